// The walk down columns: channels last in every norm, (N, C), and batch norm of maps so small that their runs would
// waste the vectors: there each position of a channel is a column of its own, and the channel a pool of columns.
#pragma once

#include "walk.h"

namespace anynorm::ANYNORM_TARGET {

constexpr int64_t kTileBytes = 1 << 18;   // of x, for what is read once; leaves room in cache for y or g and dx
constexpr int64_t kSlabBytes = 1 << 18;   // the most that is read twice while it is in cache

template <class T>
struct Columns {
    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    int64_t samples = call.last ? call.n : 1;  // that have statistics of their own
    int64_t rows = call.last ? call.s : call.n;
    int64_t width = call.channels() * (call.last ? 1 : call.s);
    int64_t columns = call.last ? call.k : call.k * call.s;  // in a pool
    int64_t slab = find_slab();
    bool fused = rows * slab * static_cast<int64_t>(sizeof(T)) <= kSlabBytes;
    int64_t slabs = fused ? divide_up(width, slab) : 1;
    int64_t tile_rows = least(rows, most(kRowsAtOnce, kTileBytes / (width * static_cast<int64_t>(sizeof(T)))));
    int64_t tiles = divide_up(rows, tile_rows);

    // Columns that are finished together: whole pools, and 512 bytes at least, which memory delivers well.
    int64_t find_slab() const {
        const int64_t wanted = most(128, kTileBytes / (static_cast<int64_t>(sizeof(T)) * rows));
        return least(width, divide_up(least(wanted, width), columns) * columns);
    }

    // Some columns of a sample, with what is known of each: coefficients and sums.
    struct Panel {
        int64_t sample, begin, width;
        double *mean, *a, *b, *c, *first, *second;
        double* is_narrow;  // not 0 where mean, a, b and c have become floats
        Panel(int64_t sample, int64_t begin, int64_t width, double* room)
            : sample(sample), begin(begin), width(width), mean(room), a(room + width), b(room + 2 * width),
              c(room + 3 * width), first(room + 4 * width), second(room + 5 * width), is_narrow(room + 6 * width) {}
    };
    static int64_t room_size(int64_t width) { return 6 * width + 1; }

    int64_t at(const Panel& p, int64_t row) const { return (p.sample * rows + row) * width + p.begin; }
    int64_t first_pool(const Panel& p) const { return (call.given ? 0 : p.sample * call.g) + p.begin / columns; }
    Tile tile(const Panel& p, int64_t row_count) const { return {row_count, p.width, width}; }
    int64_t tile_begin(int64_t t) const { return t * tile_rows; }
    int64_t tile_size(int64_t t) const { return least(tile_rows, rows - t * tile_rows); }

    // start(panel), then `add(panel, row, rows, first, second)` over all rows, then finish(panel) (false: sum again,
    // about the means found), then `write(panel, row, rows)` over all rows.
    template <class Start, class Add, class Finish, class Write>
    void walk(Start start, Add add, Finish finish, Write write) const {
        if (!fused) return walk_tiles(start, add, finish, write);
        share(call, samples * slabs, rows * slab, [&](int64_t begin, int64_t end) {
            Room<double> room(room_size(slab));
            for (int64_t i = begin; i < end; ++i) {
                const int64_t from = (i % slabs) * slab;
                const Panel p(i / slabs, from, least(slab, width - from), room.get());
                start(p);
                for (int round = 0; round < 2; ++round) {
                    clear(p.first, 2 * p.width);  // `second` follows `first`
                    add(p, 0, rows, p.first, p.second, round);
                    if (finish(p)) break;
                }
                write(p, 0, rows);
            }
        });
    }

    // The same over tiles of rows: the sums of all of them come first, in their order.
    template <class Start, class Add, class Finish, class Write>
    void walk_tiles(Start start, Add add, Finish finish, Write write) const {
        Room<double> room(samples * room_size(width)), partial(samples * tiles * 2 * width);
        auto panel = [&](int64_t sample) { return Panel(sample, 0, width, room.get() + sample * room_size(width)); };
        for (int64_t n = 0; n < samples; ++n) start(panel(n));
        bool is_done = false;
        for (int round = 0; round < 2 && !is_done; ++round) {
            each_tile([&](int64_t n, int64_t t) {
                double* sums = partial.get() + (n * tiles + t) * 2 * width;
                clear(sums, 2 * width);
                add(panel(n), tile_begin(t), tile_size(t), sums, sums + width, round);
            });
            is_done = true;
            for (int64_t n = 0; n < samples; ++n) {
                const Panel p = panel(n);
                clear(p.first, 2 * width);
                for (int64_t t = 0; t < tiles; ++t) {
                    const double* sums = partial.get() + (n * tiles + t) * 2 * width;
                    for (int64_t i = 0; i < 2 * width; ++i) p.first[i] += sums[i];
                }
                is_done &= finish(p);
            }
        }
        // Backwards: what was read last is still in cache.
        each_tile([&](int64_t n, int64_t t) {
            write(panel(samples - 1 - n), tile_begin(tiles - 1 - t), tile_size(tiles - 1 - t));
        });
    }
    static void clear(double* values, int64_t size) {
        for (int64_t i = 0; i < size; ++i) values[i] = 0;
    }
    template <class Body>
    void each_tile(Body body) const {
        share(call, samples * tiles, tile_rows * width, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i / tiles, i % tiles);
        });
    }

    void forward() const {
        Statistics<T> found(call);
        auto start = [&](const Panel& p) { clear(p.mean, p.width); };
        auto add = [&](const Panel& p, int64_t row, int64_t row_count, double* first, double* second, int round) {
            const T* from = x + at(p, row);
            if (!round) return column_sums<false>(from, tile(p, row_count), p.mean, first, second);
            column_sums<true>(from, tile(p, row_count), p.mean, first, second);
        };
        Room<char> seen(samples * slabs, true);
        auto finish = [&](const Panel& p) {
            char& is_second = seen[p.sample * slabs + p.begin / slab];
            if (is_second > 1) return true;  // finished when another sample was not
            if (cancels_anywhere(p) && !is_second) {
                for (int64_t i = 0; i < p.width; ++i) p.mean[i] += p.a[i];
                is_second = 1;
                return false;
            }
            is_second = 2;
            for (int64_t i = 0; i < p.width; i += columns) merge(p, i, found);
            coefficients(p, found);
            narrow(p);
            return true;
        };
        walk(start, add, finish, [&](const Panel& p, int64_t row, int64_t n) { apply(p, row, n); });
    }
    // Leaves each column's distance from the shift to its mean in `a`, for `merge`.
    bool cancels_anywhere(const Panel& p) const {
        const double count = static_cast<double>(rows);
        int found = 0;
        for (int64_t i = 0; i < p.width; ++i) {
            p.a[i] = p.first[i] / count;
            found |= cancels<T>(call, p.second[i] - p.first[i] * p.a[i], p.second[i]);
        }
        return found != 0;
    }
    void apply(const Panel& p, int64_t row, int64_t row_count) const {
        const int64_t from = at(p, row);
        if constexpr (sizeof(T) < 8) {
            if (*p.is_narrow) {
                column_apply(x + from, out + from, tile(p, row_count), floats(p.mean), floats(p.a), floats(p.b));
                return;
            }
        }
        column_apply(x + from, out + from, tile(p, row_count), p.mean, p.a, p.b);
    }

    // A pool's moments from those of its columns, which have a shift each.
    void merge(const Panel& p, int64_t from, Statistics<T>& found) const {
        const int64_t pool = first_pool(p) + from / columns;
        const double count = static_cast<double>(rows);
        double m2 = 0, sum = 0, about = p.mean[from] + p.a[from];
        for (int64_t i = from; i < from + columns; ++i) {
            m2 += p.second[i];
            if (!call.centred) continue;
            m2 -= p.first[i] * p.a[i];
            p.mean[i] += p.a[i];
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

    // y = (x - mean) * a + b, for each column.
    void coefficients(const Panel& p, Statistics<T>& found) const {
        each_column(p, [&](int64_t i, int64_t pool, int64_t c) {
            p.mean[i] = found.mean[pool];
            p.a[i] = found.rstd[pool] * gamma_of<T>(call, c);
            p.b[i] = beta_of<T>(call, c);
            p.c[i] = p.a[i];  // what `narrow` subtracts from b for the rest of the mean
        });
    }

    // Turns coefficients into floats, in place, where floats can hold them: mean is a pair of floats, and what the
    // first leaves over goes to b, as rest * c, where c is a in forward.
    void narrow(const Panel& p) const {
        *p.is_narrow = 0;
        bool fits = true;
        for (int64_t i = 0; i < p.width; ++i) fits &= fits_float<T>(p.mean[i], p.a[i], p.b[i], p.c[i]);
        if (!fits) return;
        *p.is_narrow = 1;
        for (int64_t i = 0; i < p.width; ++i) {
            const float high = static_cast<float>(p.mean[i]);
            const double rest = p.mean[i] - high;
            put_float(p.b, i, p.b[i] - rest * p.c[i]);
            put_float(p.mean, i, high);
            put_float(p.a, i, p.a[i]);
            put_float(p.c, i, p.c[i]);
        }
    }
    // Float i stands in the first half of double i / 2, which has been read.
    static INLINE void put_float(double* table, int64_t i, double value) {
        const float narrowed = static_cast<float>(value);
        std::memcpy(reinterpret_cast<char*>(table) + i * sizeof(float), &narrowed, sizeof(narrowed));
    }
    static const float* floats(const double* table) { return reinterpret_cast<const float*>(table); }

    void forward_given() const {
        Statistics<T> found(call);
        found.read_given();
        Room<double> room(room_size(width));
        const Panel p(0, 0, width, room.get());
        coefficients(p, found);
        narrow(p);
        each_tile([&](int64_t, int64_t t) { apply(p, tile_begin(t), tile_size(t)); });
    }

    void backward() const {
        Statistics<T> found(call);
        call.given ? found.read_given() : found.read();
        Room<Sums> channel_sums(samples * call.channels(), true);
        auto start = [&](const Panel& p) { coefficients(p, found); };
        auto add = [&](const Panel& p, int64_t row, int64_t row_count, double* first, double* second, int) {
            if (call.given && !call.dgamma && !call.dbeta) return;
            column_grad_sums(grad + at(p, row), x + at(p, row), tile(p, row_count), p.mean, first, second);
        };
        auto finish = [&](const Panel& p) {
            each_column(p, [&](int64_t i, int64_t, int64_t c) {
                if (sizeof(T) < 8) p.second[i] -= p.mean[i] * p.first[i];
                channel_sums[p.sample * call.channels() + c].add({p.first[i], p.second[i]});
            });
            for (int64_t i = 0; i < p.width; i += columns) slopes(p, i, found);
            narrow(p);
            return true;
        };
        walk(start, add, finish, [&](const Panel& p, int64_t row, int64_t n) { write_dx(p, row, n); });
        put_parameters(found, channel_sums);
    }

    void write_dx(const Panel& p, int64_t row, int64_t row_count) const {
        if (!out) return;
        const int64_t from = at(p, row);
        const Tile part = tile(p, row_count);
        if constexpr (sizeof(T) < 8) {
            if (*p.is_narrow) {
                const float* a = floats(p.a);
                if (call.given) return column_scale(grad + from, out + from, part, a);
                column_dx(grad + from, x + from, out + from, part, floats(p.mean), a, floats(p.b), floats(p.c));
                return;
            }
        }
        if (call.given) return column_scale(grad + from, out + from, part, p.a);
        column_dx(grad + from, x + from, out + from, part, p.mean, p.a, p.b, p.c);
    }

    // dx = g * a - b - (x - mean) * c, for each column of a pool.
    void slopes(const Panel& p, int64_t from, Statistics<T>& found) const {
        Sums scaled;
        for (int64_t i = from; i < from + columns; ++i) {
            const double gamma = gamma_of<T>(call, call.last ? p.begin + i : (p.begin + from) / columns);
            scaled.add({p.first[i] * gamma, p.second[i] * gamma});
        }
        const Slopes slope(call, scaled, found.rstd[first_pool(p) + from / columns]);
        for (int64_t i = from; i < from + columns; ++i) {
            p.b[i] = slope.c1;
            p.c[i] = slope.c2;
        }
    }

    void put_parameters(Statistics<T>& found, Room<Sums>& channel_sums) const {
        if (!call.dgamma && !call.dbeta) return;
        for (int64_t c = 0; c < call.channels(); ++c) {
            double dgamma = 0, dbeta = 0;
            for (int64_t n = 0; n < samples; ++n) {
                const Sums& sums = channel_sums[n * call.channels() + c];
                dbeta += sums.first;
                dgamma += sums.second * found.rstd[(call.given ? 0 : n * call.g) + c / call.k];
            }
            put_gradients<T>(call, c, dgamma, dbeta);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
