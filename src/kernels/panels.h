// How columns are cut for the walk down them: panels of columns, slabs that stay in a cache, tiles of rows that are shared.
#pragma once

#include "tiles.h"
#include "statistics.h"

namespace anynorm::ANYNORM_TARGET {

constexpr int64_t kTileBytes = 1 << 17;  // of x in a tile, where it is read once
constexpr int64_t kTiles = 64;           // the most that have sums of their own
constexpr int64_t kNearBytes = 1 << 22;  // of x, up to which its rows are read side by side at full speed

template <class T>
struct Panels {
    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    T* gradient = static_cast<T*>(call.dresidual);
    bool by_sample = call.channels_last;  // whether samples have statistics of their own
    int64_t samples = by_sample ? call.n : 1;
    int64_t rows = call.channels_last ? call.s : call.n;
    int64_t width = call.channels() * (call.channels_last ? 1 : call.s);
    int64_t columns = call.channels_last ? call.k : call.k * call.s;  // in a pool
    int64_t tensors = call.grad ? 2 : 1;                              // that are read twice
    bool is_near = samples * rows * width * static_cast<int64_t>(sizeof(T)) <= kNearBytes;
    int64_t slab = find_slab();
    bool fused = rows * slab * tensors * static_cast<int64_t>(sizeof(T)) <= 2 * kSlabBytes;
    int64_t slabs = fused ? divide_up(width, slab) : 1;
    // Tiles of results begin anew with each sample that has an extent.
    int64_t stretch = call.mask && call.sample_rows > 1 ? call.sample_rows : rows;
    // Each tile has sums of its own, so there are not more of them than threads may want; with padding they must not depend
    // on its size.
    int64_t few = call.mask ? 0 : divide_up(rows, kTiles);
    int64_t sum_rows = most(most(2 * kSumRows, few), kTileBytes / (width * static_cast<int64_t>(sizeof(T))));
    int64_t tile_rows = least(stretch, sum_rows);
    int64_t per_stretch = divide_up(stretch, tile_rows), tiles = rows / stretch * per_stretch;
    Statistics<T> statistics{call};
    const int64_t* extents = by_sample || call.sample_rows > 1 ? statistics.extents : nullptr;
    bool needs_mask = call.mask && !(extents && statistics.is_dense);
    // With a mask sums are over the rows that count, one after the other, wherever they are: so no padding changes a bit.
    bool has_indices = call.mask && (by_sample ? !statistics.is_dense : true);
    Scratch<int64_t> indices{has_indices ? samples * rows : 0}, counted{samples};

    explicit Panels(const Call& call) : call(call) {
        for (int64_t n = 0; n < samples; ++n) {
            if (has_indices) {
                counted[n] = find_counted_indices(call.mask + n * rows, rows, &indices[n * rows]);
            } else {
                counted[n] = call.mask ? extents[n] : rows;
            }
        }
    }
    bool is_active() const { return call.is_active(); }  // rows that do not count are cleared behind the loops

    // Columns that are finished together: whole pools, and 512 bytes at least, which memory delivers well. With a mask all
    // of them, for what is found of one may change how the others are taken.
    int64_t find_slab() const {
        if (call.mask) return width;
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
    Panel make_panel(int64_t sample, int64_t begin, int64_t size, double* scratch) const {
        return {sample, begin, size, scratch, scratch + size, scratch + 2 * size, scratch + 3 * size,
                reinterpret_cast<bool*>(scratch + 8 * size)};
    }
    static int64_t scratch_size(int64_t width) { return 8 * width + 1; }

    int64_t at(const Panel& p, int64_t row) const { return (p.sample * rows + row) * width + p.begin; }
    int64_t first_pool(const Panel& p) const { return (by_sample ? p.sample * call.g : 0) + p.begin / columns; }
    Tile tile(const Panel& p, int64_t row_count) const { return {row_count, p.width, width, is_near, call.bypasses_caches}; }
    // Rows `rank` and on of those that count, as a tile, and where its rows are counted from.
    Tile summed(const Panel& p, int64_t rank, int64_t row_count) const {
        Tile part = tile(p, row_count);
        if (has_indices) part.chosen = const_cast<Panels*>(this)->indices.get() + p.sample * rows + rank;
        return part;
    }
    int64_t summed_from(const Panel& p, int64_t rank) const { return at(p, has_indices ? 0 : rank); }
    int64_t count_rows(const Panel& p) const { return const_cast<Panels*>(this)->counted[p.sample]; }
    int64_t find_row(const Panel& p, int64_t rank) const {
        return has_indices ? const_cast<Panels*>(this)->indices[p.sample * rows + rank] : rank;
    }
    // Null where the extents say all.
    const float* mask_of(const Panel& p, int64_t row) const {
        return needs_mask ? call.mask + p.sample * rows + row : nullptr;
    }
    TileEpilogue<T> epilogue(const Panel& p, int64_t row) const {
        const int64_t from = at(p, row);
        const auto* residual = static_cast<const T*>(call.residual);
        return {call.activation, residual ? residual + from : nullptr, mask_of(p, row), gradient ? gradient + from : nullptr};
    }
    // What follows the norm of rows that are summed: all of these count, so no mask is read.
    TileEpilogue<T> epilogue_of_chosen(const Panel& p, int64_t rank) const {
        TileEpilogue<T> chosen = epilogue(p, has_indices ? 0 : rank);
        chosen.mask = nullptr;
        return chosen;
    }
    int64_t tile_begin(int64_t t) const { return t / per_stretch * stretch + t % per_stretch * tile_rows; }
    int64_t tile_size(int64_t t) const { return least(tile_rows, stretch - t % per_stretch * tile_rows); }
    // How many rows of tile t lie before the extent of its sample: what is behind it is not read.
    int64_t counted_size(const Panel& p, int64_t t) const {
        if (!extents) return tile_size(t);
        const int64_t extent = extents[by_sample ? p.sample : t / per_stretch];
        return most(0, least(tile_size(t), extent - t % per_stretch * tile_rows));
    }
    static void add(double* to, const double* from, int64_t size) {
        for (int64_t i = 0; i < size; ++i) to[i] += from[i];
    }

    // start(panel), then sum(panel, rank, rows, first, second, attempt) over all rows that count and finish(panel, attempt),
    // which names the attempt to make next or -1, then write(panel, row, rows) over all rows.
    template <class Start, class Sum, class Finish, class Write>
    void walk(Start start, Sum sum, Finish finish, Write write) {
        if (!fused) return walk_tiles(start, sum, finish, write);
        parallel_for(call, samples * slabs, rows * slab, [&](int64_t begin, int64_t end) {
            Scratch<double> scratch(scratch_size(slab)), partial(2 * slab);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t from = (i % slabs) * slab;
                const Panel p = make_panel(i / slabs, from, least(slab, width - from), scratch.get());
                start(p);
                for (int attempt = kGuess; attempt >= 0;) {
                    clear(p.first, 0, 2 * p.width);  // `second` follows `first`
                    for (int64_t rank = 0; rank < count_rows(p); rank += sum_rows) {
                        clear(partial.get(), 0, 2 * p.width);
                        sum(p, rank, least(sum_rows, count_rows(p) - rank), partial.get(), partial.get() + p.width, attempt);
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
        const int64_t sums = divide_up(rows, sum_rows);  // of a panel
        Scratch<double> scratch(samples * scratch_size(width)), partial(samples * sums * 2 * width);
        Scratch<int> attempts(samples);
        auto panel = [&](int64_t sample) { return make_panel(sample, 0, width, scratch.get() + sample * scratch_size(width)); };
        for (int64_t n = 0; n < samples; ++n) {
            start(panel(n));
            attempts[n] = kGuess;
        }
        for (bool is_done = false; !is_done;) {
            parallel_for(call, samples * sums, least(rows, sum_rows) * width, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const int64_t n = i / sums, rank = i % sums * sum_rows, left = count_rows(panel(n)) - rank;
                    if (attempts[n] < 0 || left <= 0) continue;
                    double* to = partial.get() + i * 2 * width;
                    clear(to, 0, 2 * width);
                    sum(panel(n), rank, least(sum_rows, left), to, to + width, attempts[n]);
                }
            });
            is_done = true;
            for (int64_t n = 0; n < samples; ++n) {
                if (attempts[n] < 0) continue;
                const Panel p = panel(n);
                clear(p.first, 0, 2 * width);
                for (int64_t t = 0; t * sum_rows < count_rows(p); ++t) {
                    add(p.first, partial.get() + (n * sums + t) * 2 * width, 2 * width);
                }
                attempts[n] = finish(p, attempts[n]);
                is_done = is_done && attempts[n] < 0;
            }
        }
        if (!out && !gradient) return;
        // Backwards: what was read last is still in cache, and with the thread that read it.
        each_tile([&](int64_t n, int64_t t) { write_tile(panel(n), t, write); }, true);
    }
    // What lies behind the extent is padding, and there may be holes before it.
    template <class Write>
    void write_tile(const Panel& p, int64_t t, Write write) const {
        const int64_t begin = tile_begin(t), size = counted_size(p, t);
        if (out) write(p, begin, size);
        const float* counts = mask_of(p, begin);
        for (int64_t i = 0; i < tile_size(t); ++i) {
            const bool is_hole = i < size && counts && !(counts[i] > 0);
            if (out && (i >= size || is_hole)) clear(out + at(p, begin + i), 0, p.width);
            if (gradient && (i >= size || is_hole)) clear(gradient + at(p, begin + i), 0, p.width);
        }
    }
    template <class Body>
    void each_tile(Body body, bool backwards = false) const {
        parallel_for(call, samples * tiles, tile_rows * width, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i / tiles, i % tiles);
        }, backwards);
    }
};

}  // namespace anynorm::ANYNORM_TARGET
