// The walk down columns: channels last in every norm, (N, C), and batch norm of maps so small that their runs would
// waste the vectors: there each position of a channel is a column of its own, and the channel a pool of columns.
#pragma once

#include "tiles.h"
#include "walk.h"

namespace anynorm::ANYNORM_TARGET {

constexpr int64_t kTileBytes = 1 << 17;  // of x, for what is read once
constexpr int64_t kTiles = 64;
constexpr int64_t kNearBytes = 1 << 22;  // of x

template <class T>
struct Columns {
    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    T* gradient = static_cast<T*>(call.dresidual);
    bool by_sample = call.last;  // whether samples have statistics of their own
    int64_t samples = by_sample ? call.n : 1;
    int64_t rows = call.last ? call.s : call.n;
    int64_t width = call.channels() * (call.last ? 1 : call.s);
    int64_t columns = call.last ? call.k : call.k * call.s;  // in a pool
    int64_t tensors = call.grad ? 2 : 1;                     // that are read twice
    bool is_near = samples * rows * width * static_cast<int64_t>(sizeof(T)) <= kNearBytes;
    int64_t slab = find_slab();
    bool fused = rows * slab * tensors * static_cast<int64_t>(sizeof(T)) <= 2 * kSlabBytes;
    int64_t slabs = fused ? divide_up(width, slab) : 1;
    int64_t stretch = call.weight && call.sample_rows > 0 ? call.sample_rows : rows;  // tiles begin anew with each
    // Each tile has sums of its own, so there are not more of them than threads may want; with padding they must not depend
    // on its size.
    int64_t few = call.weight ? 0 : divide_up(rows, kTiles);
    int64_t tile_rows = least(stretch, most(most(2 * kSumRows, few), kTileBytes / (width * static_cast<int64_t>(sizeof(T)))));
    int64_t per_stretch = divide_up(stretch, tile_rows), tiles = rows / stretch * per_stretch;
    Statistics<T> found{call};

    // Columns that are finished together: whole pools, and 512 bytes at least, which memory delivers well.
    int64_t find_slab() const {
        const int64_t wanted = most(kWide, kSlabBytes / (static_cast<int64_t>(sizeof(T)) * rows * tensors));
        const int64_t pools = most(1, wanted / columns);
        return least(width, columns == 1 ? pools / kWide * kWide : pools * columns);
    }

    // Some columns of a sample, with what is known of each. Tables are floats where `is_float`.
    struct Panel {
        int64_t sample, begin, width;
        double *mean, *first, *second, *tables;
        bool* is_float;
        template <class Compute>
        Compute* table(int i) const { return reinterpret_cast<Compute*>(tables) + i * width; }
        template <class Compute>
        Lines<Compute> lines() const { return {table<Compute>(0), table<Compute>(1), table<Compute>(2)}; }
    };
    Panel make_panel(int64_t sample, int64_t begin, int64_t size, double* room) const {
        return {sample, begin, size, room, room + size, room + 2 * size, room + 3 * size, reinterpret_cast<bool*>(room + 8 * size)};
    }
    static int64_t room_size(int64_t width) { return 8 * width + 1; }

    int64_t at(const Panel& p, int64_t row) const { return (p.sample * rows + row) * width + p.begin; }
    int64_t first_pool(const Panel& p) const { return (by_sample ? p.sample * call.g : 0) + p.begin / columns; }
    Tile tile(const Panel& p, int64_t row_count) const { return {row_count, p.width, width, is_near, call.past_caches}; }
    // Null where the extents say all.
    const float* weight(const Panel& p, int64_t row) const {
        return found.needs_weight() ? call.weight + p.sample * rows + row : nullptr;
    }
    TileAfter<T> after(const Panel& p, int64_t row) const {
        const int64_t from = at(p, row);
        const auto* residual = static_cast<const T*>(call.residual);
        return {call.activation, residual ? residual + from : nullptr, weight(p, row), gradient ? gradient + from : nullptr};
    }
    int64_t tile_begin(int64_t t) const { return t / per_stretch * stretch + t % per_stretch * tile_rows; }
    int64_t tile_size(int64_t t) const { return least(tile_rows, stretch - t % per_stretch * tile_rows); }
    // Its rows up to the extent of its sample.
    int64_t counted_size(const Panel& p, int64_t t) const {
        if (!found.extents) return tile_size(t);
        const int64_t extent = found.extents[by_sample ? p.sample : t / per_stretch];
        return most(0, least(tile_size(t), extent - t % per_stretch * tile_rows));
    }
    static void add(double* to, const double* from, int64_t size) {
        for (int64_t i = 0; i < size; ++i) to[i] += from[i];
    }

    // start(panel), then sum(panel, row, rows, first, second, attempt) over all rows and finish(panel, attempt), which
    // names the attempt to make next or -1, then write(panel, row, rows) over all rows.
    template <class Start, class Sum, class Finish, class Write>
    void walk(Start start, Sum sum, Finish finish, Write write) {
        if (!fused) return walk_tiles(start, sum, finish, write);
        share(call, samples * slabs, rows * slab, [&](int64_t begin, int64_t end) {
            Room<double> room(room_size(slab)), partial(2 * slab);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t from = (i % slabs) * slab;
                const Panel p = make_panel(i / slabs, from, least(slab, width - from), room.get());
                start(p);
                for (int attempt = kIsNarrow<T> ? kFloatGuess : kDoubleZero; attempt >= 0;) {
                    clear(p.first, 0, 2 * p.width);  // `second` follows `first`
                    for (int64_t t = 0; t < tiles; ++t) {
                        clear(partial.get(), 0, 2 * p.width);
                        sum(p, tile_begin(t), counted_size(p, t), partial.get(), partial.get() + p.width, attempt);
                        add(p.first, partial.get(), 2 * p.width);
                    }
                    attempt = finish(p, attempt);
                }
                for (int64_t t = 0; t < tiles; ++t) write_tile(p, t, write);
            }
        });
    }

    // The same over tiles of rows: the sums of all of them come first, in their order.
    template <class Start, class Sum, class Finish, class Write>
    void walk_tiles(Start start, Sum sum, Finish finish, Write write) {
        Room<double> room(samples * room_size(width)), partial(samples * tiles * 2 * width);
        Room<int> attempts(samples);
        auto panel = [&](int64_t sample) { return make_panel(sample, 0, width, room.get() + sample * room_size(width)); };
        for (int64_t n = 0; n < samples; ++n) {
            start(panel(n));
            attempts[n] = kIsNarrow<T> ? kFloatGuess : kDoubleZero;
        }
        for (bool is_done = false; !is_done;) {
            each_tile([&](int64_t n, int64_t t) {
                if (attempts[n] < 0) return;
                double* sums = partial.get() + (n * tiles + t) * 2 * width;
                clear(sums, 0, 2 * width);
                sum(panel(n), tile_begin(t), counted_size(panel(n), t), sums, sums + width, attempts[n]);
            });
            is_done = true;
            for (int64_t n = 0; n < samples; ++n) {
                if (attempts[n] < 0) continue;
                const Panel p = panel(n);
                clear(p.first, 0, 2 * width);
                for (int64_t t = 0; t < tiles; ++t) add(p.first, partial.get() + (n * tiles + t) * 2 * width, 2 * width);
                attempts[n] = finish(p, attempts[n]);
                is_done = is_done && attempts[n] < 0;
            }
        }
        if (!out && !gradient) return;
        // Backwards: what was read last is still in cache, and with the thread that read it.
        each_tile([&](int64_t n, int64_t t) { write_tile(panel(n), t, write); }, true);
    }
    // What lies behind the extent is padding.
    template <class Write>
    void write_tile(const Panel& p, int64_t t, Write write) const {
        const int64_t counted = counted_size(p, t);
        if (out) write(p, tile_begin(t), counted);
        for (int64_t row = tile_begin(t) + counted; row < tile_begin(t) + tile_size(t); ++row) {
            if (out) clear(out + at(p, row), 0, p.width);
            if (gradient) clear(gradient + at(p, row), 0, p.width);
        }
    }
    template <class Body>
    void each_tile(Body body, bool backwards = false) const {
        share(call, samples * tiles, tile_rows * width, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i / tiles, i % tiles);
        }, backwards);
    }

    // ---- forward ------------------------------------------------------------------------------------------------

    void forward() {
        if (call.given) return forward_given();
        auto start = [&](const Panel& p) { guess(p); };
        auto sum = [&](const Panel& p, int64_t row, int64_t row_count, double* first, double* second, int attempt) {
            with_compute<T>(attempt <= kFloatMean, [&](auto zero) {
                column_moments(x + at(p, row), tile(p, row_count), p.template table<decltype(zero)>(0), weight(p, row), first, second);
            });
        };
        auto finish = [&](const Panel& p, int attempt) {
            const int next = judge(p, attempt);
            if (next >= 0) return next;
            for (int64_t i = 0; i < p.width; i += columns) merge(p, i);
            coefficients(p);
            return -1;
        };
        walk(start, sum, finish, [&](const Panel& p, int64_t row, int64_t n) { apply(p, row, n); });
        found.move_running();
    }
    void forward_given() {
        found.read();
        Room<double> room(room_size(width));
        const Panel p = make_panel(0, 0, width, room.get());
        coefficients(p);
        each_tile([&](int64_t, int64_t t) {
            write_tile(p, t, [&](const Panel& q, int64_t row, int64_t n) { apply(q, row, n); });
        });
    }

    // Each column's shift: the mean of a few of its values.
    void guess(const Panel& p) const {
        clear(p.mean, 0, p.width);
        if (call.centred && kIsNarrow<T>) {
            int64_t found_rows = 0;
            for (int64_t j = 0; j < least(8, rows); ++j) {
                const int64_t row = call.weight ? find_counted(p, j) : j * rows / least(8, rows);
                if (row < 0) continue;
                ++found_rows;
                const T* from = x + at(p, row);
                sweep<W>(p.width, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                    store(p.mean + i, load(p.mean + i, some) + load(from + i, some), some);
                });
            }
            for (int64_t i = 0; i < p.width; ++i) p.mean[i] /= static_cast<double>(most(1, found_rows));
        }
        put_shifts(p, kIsNarrow<T>);
    }
    // The j-th of eight rows that count, spread over samples or over the one, or -1: where they are does not depend on
    // padding.
    int64_t find_counted(const Panel& p, int64_t j) const {
        const int64_t positions = found.positions, all = rows / positions;
        const int64_t sample = by_sample ? p.sample : j * all / least(8, rows);
        const int64_t extent = found.extents ? found.extents[sample] : positions;
        const float* counted = call.weight + sample * positions;
        for (int64_t i = j * extent / 8; i < extent; ++i) {
            if (counted[i] > 0) return by_sample ? i : sample * positions + i;
        }
        return -1;
    }
    static void put_shifts(const Panel& p, bool is_float) {
        with_compute<T>(is_float, [&](auto zero) {
            using Compute = decltype(zero);
            Compute* shift = p.template table<Compute>(0);
            for (int64_t i = 0; i < p.width; ++i) p.mean[i] = shift[i] = static_cast<Compute>(p.mean[i]);
        });
    }

    // Which attempt comes next, about the means that were found, or -1. Means that a float cannot hold go to doubles.
    int judge(const Panel& p, int attempt) {
        bool is_good = true, is_small = true;
        for (int64_t i = 0; i < p.width; ++i) {
            const double size = column_count(p), step = call.centred ? p.first[i] / size : 0;
            is_good &= found.is_good(p.second[i] - p.first[i] * step, p.second[i], size, attempt);
            is_small &= std::fabs(p.mean[i] + step) < 1e18;
        }
        if (is_good) return -1;
        int next = attempt + 1;
        if (attempt == kFloatGuess && !(is_small && call.centred)) next = kDoubleZero;
        for (int64_t i = 0; i < p.width; ++i) {
            p.mean[i] = next == kDoubleZero || !call.centred ? 0 : p.mean[i] + p.first[i] / column_count(p);
        }
        put_shifts(p, next == kFloatMean);
        return next;
    }
    // Rows that count.
    double column_count(const Panel& p) {
        return call.weight ? most(1, static_cast<int64_t>(found.count(by_sample ? p.sample * call.g : 0)) / columns) : static_cast<double>(rows);
    }

    // A pool's moments from those of its columns, which have a shift each.
    void merge(const Panel& p, int64_t from) {
        const int64_t pool = first_pool(p) + from / columns;
        const double count = column_count(p);
        double m2 = 0, sum = 0, about = 0;
        for (int64_t i = from; i < from + columns; ++i) {
            m2 += p.second[i];
            if (!call.centred) continue;
            const double step = p.first[i] / count;
            m2 -= p.first[i] * step;
            p.mean[i] += step;
            if (i == from) about = p.mean[i];
            sum += p.mean[i] - about;
        }
        if (call.centred) {
            const double mean = about + sum / static_cast<double>(columns);
            for (int64_t i = from; i < from + columns; ++i) m2 += count * (p.mean[i] - mean) * (p.mean[i] - mean);
            found.mean[pool] = mean;
        }
        found.put(pool, m2 < 0 ? 0 : m2);
    }

    // body(column, pool, channel) for every column of a panel, without a division for each.
    template <class Body>
    INLINE void each_column(const Panel& p, Body body) const {
        int64_t pool = first_pool(p), block = p.begin / columns;
        for (int64_t from = 0; from < p.width; from += columns, ++pool, ++block) {
            for (int64_t i = from; i < from + columns; ++i) body(i, pool, call.last ? p.begin + i : block);
        }
    }

    // y = (x - mean) * a + b
    void coefficients(const Panel& p) {
        bool fits = true;
        each_column(p, [&](int64_t, int64_t pool, int64_t c) {
            fits = fits && fits_float<T>(found.mean[pool], found.rstd[pool] * gamma_of<T>(call, c), beta_of<T>(call, c));
        });
        put_lines(p, fits);
    }
    void put_lines(const Panel& p, bool fits) {
        *p.is_float = fits;
        with_compute<T>(fits, [&](auto zero) {
            auto lines = p.template lines<decltype(zero)>();
            each_column(p, [&](int64_t i, int64_t pool, int64_t c) INLINE_LAMBDA {
                lines.put(i, found.mean[pool], found.rstd[pool] * gamma_of<T>(call, c), beta_of<T>(call, c));
            });
        });
    }
    void apply(const Panel& p, int64_t row, int64_t row_count) const {
        const int64_t from = at(p, row);
        with_compute<T>(*p.is_float, [&](auto zero) {
            const auto lines = p.template lines<decltype(zero)>();
            const Tile part = tile(p, row_count);
            using Compute = decltype(zero);
            if constexpr (kHasPlain<Compute, T>) {
                if (!found.is_active()) return column_apply<Compute, false>(x + from, out + from, part, lines, TileAfter<T>{});
            }
            column_apply<Compute, true>(x + from, out + from, part, lines, after(p, row));
        });
    }

    // ---- backward -----------------------------------------------------------------------------------------------

    void backward() {
        found.read();
        Room<Sums> channel_sums(samples * call.channels(), true);
        const bool needs_sums = !call.given || call.dgamma || call.dbeta || found.is_active();
        auto start = [&](const Panel& p) { coefficients(p); };
        auto sum = [&](const Panel& p, int64_t row, int64_t row_count, double* first, double* second, int) {
            if (!needs_sums) return;
            const int64_t from = at(p, row);
            const Tile part = tile(p, row_count);
            with_compute<T>(*p.is_float, [&](auto zero) {
                const auto lines = p.template lines<decltype(zero)>();
                using Compute = decltype(zero);
                if constexpr (kHasPlain<Compute, T>) {
                    if (!found.is_active()) {
                        return column_grad_sums<Compute, false>(grad + from, x + from, part, lines, TileAfter<T>{}, first, second);
                    }
                }
                column_grad_sums<Compute, true>(grad + from, x + from, part, lines, after(p, row), first, second);
            });
        };
        auto finish = [&](const Panel& p, int) {
            about_means(p);
            each_column(p, [&](int64_t i, int64_t, int64_t c) {
                channel_sums[p.sample * call.channels() + c].add({p.first[i], p.second[i]});
            });
            slopes(p);
            return -1;
        };
        walk(start, sum, finish, [&](const Panel& p, int64_t row, int64_t n) { write_dx(p, row, n); });
        put_parameters(channel_sums);
    }
    // Sums of g * (x - high) become those of g * (x - mean).
    void about_means(const Panel& p) const {
        with_compute<T>(*p.is_float, [&](auto zero) {
            const auto* high = p.template table<decltype(zero)>(0);
            each_column(p, [&](int64_t i, int64_t pool, int64_t) INLINE_LAMBDA {
                p.second[i] += (static_cast<double>(high[i]) - found.mean[pool]) * p.first[i];
            });
        });
    }

    // dx = g * a - c1 - (x - mean) * c2, for each column of a pool. Leaves c1 and c2 in the place of the sums.
    void slopes(const Panel& p) {
        bool fits = true;
        for (int64_t from = 0; from < p.width; from += columns) {
            const int64_t pool = first_pool(p) + from / columns;
            Sums scaled;
            for (int64_t i = from; i < from + columns; ++i) {
                const double gamma = gamma_of<T>(call, call.last ? p.begin + i : (p.begin + from) / columns);
                scaled.add({p.first[i] * gamma, p.second[i] * gamma});
            }
            const Slopes slope = call.given ? Slopes() : Slopes(call.centred, scaled, found.rstd[pool], found.count(pool));
            for (int64_t i = from; i < from + columns; ++i) {
                p.first[i] = slope.c1;
                p.second[i] = slope.c2;
            }
            fits = fits && fits_float<T>(found.mean[pool], slope.c1, slope.c2);
        }
        if (!fits && *p.is_float) put_lines(p, false);
        with_compute<T>(*p.is_float, [&](auto zero) {
            using Compute = decltype(zero);
            Compute *slope = p.template table<Compute>(3), *constant = p.template table<Compute>(4);
            each_column(p, [&](int64_t i, int64_t pool, int64_t) INLINE_LAMBDA {
                const Line<Compute> line(found.mean[pool], p.second[i], p.first[i]);
                slope[i] = line.scale;
                constant[i] = line.shift;
            });
        });
    }

    void write_dx(const Panel& p, int64_t row, int64_t row_count) const {
        const int64_t from = at(p, row);
        const Tile part = tile(p, row_count);
        with_compute<T>(*p.is_float, [&](auto zero) {
            using Compute = decltype(zero);
            const auto lines = p.template lines<Compute>();
            const Compute *slope = p.template table<Compute>(3), *constant = p.template table<Compute>(4);
            if (call.given && !found.is_active()) return column_scale(grad + from, out + from, part, lines.scale);
            if constexpr (kHasPlain<Compute, T>) {
                if (!found.is_active()) {
                    return column_dx<Compute, false>(grad + from, x + from, out + from, part, lines, slope, constant, TileAfter<T>{});
                }
            }
            column_dx<Compute, true>(grad + from, x + from, out + from, part, lines, slope, constant, after(p, row));
        });
    }

    void put_parameters(Room<Sums>& channel_sums) {
        if (!call.dgamma && !call.dbeta) return;
        for (int64_t c = 0; c < call.channels(); ++c) {
            double dgamma = 0, dbeta = 0;
            for (int64_t n = 0; n < samples; ++n) {
                const Sums& sums = channel_sums[n * call.channels() + c];
                dbeta += sums.first;
                dgamma += sums.second * found.rstd[(by_sample ? n * call.g : 0) + c / call.k];
            }
            put_gradients<T>(call, c, dgamma, dbeta);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
