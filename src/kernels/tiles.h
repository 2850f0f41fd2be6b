// Every loop down a tile of columns: `rows` rows of `width` elements, `stride` apart. The scalar formula stands above each.
//
// Coefficients are tables, one value a column. Several rows are taken for one load of them, and sums, which are double, stay
// in registers for kSumRows rows.
#pragma once

#include "channels.h"

namespace anynorm::ANYNORM_TARGET {

struct Tile {
    int64_t rows, width, stride;
    bool is_near;          // in a cache from which rows are read side by side at full speed
    bool bypasses_caches;  // where results go
    const int64_t* chosen = nullptr;  // which rows are summed, where some do not count
    INLINE int64_t find_row(int64_t row) const { return chosen ? chosen[row] : row; }
};

// Rows are read side by side where they are short or near; else memory delivers less well than in order.
constexpr int kSumRows = 32, kFarSumRows = 4, kApplyRows = 4;
constexpr int64_t kWide = 128;  // elements

// body(column, Full or Part, how many vectors as a constant) over [0, width).
template <int Width, bool Long = false, class Body>
INLINE void sweep_columns(int64_t width, Body body) {
    int64_t i = 0;
    for (; !Long && i + 4 * Width <= width; i += 4 * Width) body(i, Full{}, std::integral_constant<int, 4>{});
    if constexpr (!Long) {
        if (i + 2 * Width <= width) {
            body(i, Full{}, std::integral_constant<int, 2>{});
            i += 2 * Width;
        }
    }
    for (; i + Width <= width; i += Width) body(i, Full{}, std::integral_constant<int, 1>{});
    if (i < width) body(i, Part{width - i}, std::integral_constant<int, 1>{});
}

INLINE bool is_long_and_far(const Tile& tile) { return tile.width > kWide && !tile.is_near; }
// What is summed next of a row, asked for ahead, since no processor foresees where: the rows behind the next few where rows
// are long and far, else the next columns.
template <class T>
INLINE void prefetch_next(const T* from, const Tile& tile, int64_t columns) {
    if (is_long_and_far(tile)) return __builtin_prefetch(from + kFarSumRows * tile.stride);
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = columns; i < 2 * columns; i += line) __builtin_prefetch(from + i);
}

// Two sums a column over a tile: prepare(column, Full or Part, vectors as a constant) loads what columns have in common,
// add(that, row, column, Full or Part, vectors, sums, more sums) adds one row's. Sums stay in registers for kSumRows rows, or
// where rows are long and far, so that memory is read nearly in order, for a few; rows are added one by one either way.
template <class Compute, bool Long, class Prepare, class Add>
INLINE void sum_columns(const Tile& tile, double* first, double* second, Prepare prepare, Add add) {
    constexpr int parts = kParts<Compute>;
    const int64_t step = is_long_and_far(tile) ? kFarSumRows : kSumRows;
    for (int64_t row = 0; row < tile.rows; row += step) {
        const int64_t end = row + step < tile.rows ? row + step : tile.rows;
        sweep_columns<kWidth<Compute>, Long>(tile.width, [&](int64_t i, auto some, auto vectors) INLINE_LAMBDA {
            Lanes one[vectors * parts], two[vectors * parts];
            for (int u = 0; u < vectors * parts; ++u) {
                one[u] = load(first + i + u * W, part_of(some, u));
                two[u] = load(second + i + u * W, part_of(some, u));
            }
            const auto known = prepare(i, some, vectors);
            for (int64_t r = row; r < end; ++r) add(known, r, i, some, vectors, one, two);
            for (int u = 0; u < vectors * parts; ++u) {
                store(first + i + u * W, one[u], part_of(some, u));
                store(second + i + u * W, two[u], part_of(some, u));
            }
        });
    }
}

// `Vectors` vectors of a table, which a loop over rows keeps in registers.
template <class Compute, int Vectors>
struct Loaded {
    VectorOf<Compute> v[Vectors];
};
template <class Compute>
INLINE auto loader(const Compute* table) {
    return [table](int64_t i, auto some, auto vectors) INLINE_LAMBDA {
        Loaded<Compute, vectors> loaded;
        for (int u = 0; u < vectors; ++u) loaded.v[u] = load_as<Compute>(table + i + u * kWidth<Compute>, some);
        return loaded;
    };
}

// first[i] += sum over rows of x[r][i] - shift[i], second[i] += sum over rows of (x[r][i] - shift[i])^2
template <class T>
void column_moments(const T* x, const Tile& tile, const double* shift, double* first, double* second) {
    const auto add = [&](const auto& about, int64_t r, int64_t i, auto some, auto vectors, auto* sum, auto* squares) INLINE_LAMBDA {
        const T* from = x + tile.find_row(r) * tile.stride + i;
        prefetch_next(from, tile, vectors * W);
        for (int u = 0; u < vectors; ++u) {
            const Lanes d = load(from + u * W, some) - about.v[u];
            sum[u] += d;
            squares[u] += d * d;
        }
    };
    sum_columns<double, false>(tile, first, second, loader(shift), add);
}

// What follows a tile's norm; `at` is an element's place in the tile.
template <class T>
struct TileEpilogue {
    Activation activation;
    const T* residual = nullptr;
    const float* mask = nullptr;  // one for each row
    T* gradient = nullptr;

    template <class V, class Compute, class Kind, class Some>
    INLINE V forward(Kind kind, V v, int64_t row, int64_t at, Some some) const {
        if (mask && !(mask[row] > 0)) return V{};
        if (residual) v += load_as<Compute>(residual + at, some);
        return kind.value(v);
    }
    template <class V, class Compute, class Kind, class Some>
    INLINE V backward(Kind kind, V g, V v, int64_t row, int64_t at, Some some) const {
        if (residual) v += load_as<Compute>(residual + at, some);
        // Opaque: what follows is contracted alike in every loop, whatever is known of the activation there.
        g = in_register(kind.gradient(g, v));
        if (mask && !(mask[row] > 0)) g = V{};
        if (gradient) store(gradient + at, g, some);
        return g;
    }
};

// body(row, column, Full or Part, how many rows as a constant)
template <class Compute, bool Long = false, class Body>
INLINE void sweep_tile(const Tile& tile, Body body) {
    int64_t r = 0;
    for (; !Long && (tile.width <= kWide || tile.is_near) && r + kApplyRows <= tile.rows; r += kApplyRows) {
        sweep_results<kWidth<Compute>>(tile.width, tile.width, [&](int64_t i, auto some) INLINE_LAMBDA { body(r, i, some, kApplyRows); });
    }
    for (; r < tile.rows; ++r) {
        sweep_results<kWidth<Compute>, Long>(tile.width, tile.width, [&](int64_t i, auto some) INLINE_LAMBDA { body(r, i, some, 1); });
    }
}

// y[r][i] = epilogue((x[r][i] - high[i]) * scale[i] + shift[i])
template <class Compute, bool Active, class T>
void column_apply(const T* x, T* y, const Tile& tile, const Lines<Compute>& lines, const TileEpilogue<T>& epilogue) {
    using V = VectorOf<Compute>;
    with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
        sweep_tile<Compute, Active>(tile, [&](int64_t r, int64_t i, auto some, int rows) INLINE_LAMBDA {
            const V high = load_as<Compute>(lines.high + i, some), scale = load_as<Compute>(lines.scale + i, some);
            const V shift = load_as<Compute>(lines.shift + i, some);
            for (int u = 0; u < rows; ++u) {
                const int64_t at = (r + u) * tile.stride + i;
                V v = (load_as<Compute>(x + at, some) - high) * scale + shift;
                if constexpr (Active) v = epilogue.template forward<V, Compute>(kind, v, r + u, at, some);
                store_result(y + at, v, some, tile.bypasses_caches);
            }
        });
    });
}

// first[i] += sum over rows of g[r][i], second[i] += sum over rows of g[r][i] * (x[r][i] - mean[i]), g before the activation,
// which is computed as `lines` are, and the sums always in double
template <class Compute, bool Active, class T>
void column_grad_sums(const T* g, const T* x, const Tile& tile, const double* mean, const Lines<Compute>& lines,
                      const TileEpilogue<T>& epilogue, double* first, double* second) {
    using V = VectorOf<Compute>;
    constexpr int width = kWidth<Compute>, parts = kParts<Compute>;
    const auto add = [&](const auto& about, int64_t r, int64_t i, auto some, auto vectors, auto* sum, auto* products) INLINE_LAMBDA {
        const int64_t row = tile.find_row(r);
        prefetch_next(x + row * tile.stride + i, tile, vectors * width);
        prefetch_next(g + row * tile.stride + i, tile, vectors * width);
        for (int u = 0; u < vectors; ++u) {
            const int64_t column = i + u * width, at = row * tile.stride + column;
            V v = load_as<Compute>(g + at, some);
            if constexpr (Active) {
                const V high = load_as<Compute>(lines.high + column, some);
                const V scale = load_as<Compute>(lines.scale + column, some), shift = load_as<Compute>(lines.shift + column, some);
                const V z = (load_as<Compute>(x + at, some) - high) * scale + shift;
                v = epilogue.template backward<V, Compute>(AnyActivation{epilogue.activation}, v, z, row, at, some);
            }
            for (int p = 0; p < parts; ++p) {
                const Lanes d = load(x + at + p * W, part_of(some, p)) - about.v[u * parts + p];
                sum[u * parts + p] += part_of(v, p);
                products[u * parts + p] += part_of(v, p) * d;
            }
        }
    };
    const auto prepare = [mean](int64_t i, auto some, auto vectors) INLINE_LAMBDA {
        Loaded<double, vectors * parts> loaded;
        for (int u = 0; u < vectors * parts; ++u) loaded.v[u] = load(mean + i + u * W, part_of(some, u));
        return loaded;
    };
    sum_columns<Compute, Active>(tile, first, second, prepare, add);
}

// dx[r][i] = g[r][i] * scale[i] - ((x[r][i] - high[i]) * slope[i] + constant[i]), 0 in rows that do not count; g before the
// activation, found once more rather than read rounded. Given statistics have no slopes: an infinite x would make NaN of a
// slope of 0.
template <class Compute, bool Active, class T>
void column_dx(const T* g, const T* x, T* dx, const Tile& tile, const Lines<Compute>& lines, const Compute* slope,
               const Compute* constant, TileEpilogue<T> epilogue, bool has_given_statistics = false) {
    using V = VectorOf<Compute>;
    epilogue.gradient = nullptr;
    with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
        sweep_tile<Compute, Active>(tile, [&](int64_t r, int64_t i, auto some, int rows) INLINE_LAMBDA {
            const V high = load_as<Compute>(lines.high + i, some), scale = load_as<Compute>(lines.scale + i, some);
            const V by = load_as<Compute>(slope + i, some), less = load_as<Compute>(constant + i, some);
            for (int u = 0; u < rows; ++u) {
                const int64_t at = (r + u) * tile.stride + i;
                const V centred = load_as<Compute>(x + at, some) - high;
                V before = load_as<Compute>(g + at, some);
                if constexpr (Active) {
                    const V shift = load_as<Compute>(lines.shift + i, some);
                    before = epilogue.template backward<V, Compute>(kind, before, centred * scale + shift, r + u, at, some);
                }
                V v = before * scale - ((Active && has_given_statistics ? V{} : centred) * by + less);
                if constexpr (Active) {
                    if (epilogue.mask && !(epilogue.mask[r + u] > 0)) v = V{};
                }
                store_result(dx + at, v, some, tile.bypasses_caches);
            }
        });
    });
}

// dx[r][i] = g[r][i] * a[i]
template <class Compute, class T>
void column_scale(const T* g, T* dx, const Tile& tile, const Compute* a) {
    sweep_tile<Compute>(tile, [&](int64_t r, int64_t i, auto some, int rows) INLINE_LAMBDA {
        const auto factor = load_as<Compute>(a + i, some);
        for (int u = 0; u < rows; ++u) {
            const int64_t at = (r + u) * tile.stride + i;
            store_result(dx + at, load_as<Compute>(g + at, some) * factor, some, tile.bypasses_caches);
        }
    });
}

}  // namespace anynorm::ANYNORM_TARGET
