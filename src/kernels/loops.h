// Every loop over elements: along a contiguous run, and down a tile of columns. The scalar formula stands above each.
#pragma once

#include "lanes.h"

namespace anynorm::ANYNORM_TARGET {

struct Sums {
    double first = 0, second = 0;
    void add(const Sums& other) {
        first += other.first;
        second += other.second;
    }
};

struct LaneSums {
    Lanes first[4] = {}, second[4] = {};
    INLINE Sums total() const {
        return {add_lanes((first[0] + first[1]) + (first[2] + first[3])),
                add_lanes((second[0] + second[1]) + (second[2] + second[3]))};
    }
};

// ---- along a run -----------------------------------------------------------------------------------------------

// first = sum(x[i]), second = sum(x[i]^2)
template <class T>
Sums run_powers(const T* x, int64_t length) {
    LaneSums sums;
    const Lanes one = hidden_one();
    sweep(length, [&](int64_t i, auto part, int u) INLINE_LAMBDA {
        const Lanes v = load(x + i, part);
        sums.first[u] = add_by_multiplier(sums.first[u], v, one);
        sums.second[u] += v * v;
    });
    return sums.total();
}

// first = sum(x[i] - shift), second = sum((x[i] - shift)^2)
template <class T>
Sums run_sums(const T* x, int64_t length, double shift) {
    if (shift == 0) return run_powers(x, length);
    LaneSums sums;
    sweep(length, [&](int64_t i, auto part, int u) INLINE_LAMBDA {
        const Lanes d = keep(load(x + i, part) - shift, part);
        sums.first[u] += d;
        sums.second[u] += d * d;
    });
    return sums.total();
}

// sum(x[i]^2)
template <class T>
double run_squares(const T* x, int64_t length) {
    LaneSums sums;
    sweep(length, [&](int64_t i, auto part, int u) INLINE_LAMBDA {
        const Lanes v = load(x + i, part);
        sums.second[u] += v * v;
    });
    return sums.total().second;
}

// y[i] = (x[i] - mean) * a + b; in float the mean is a pair of floats, and what the first leaves over goes to b
template <class Compute, class T>
void run_apply(const T* x, T* y, int64_t length, double mean, double a, double b) {
    const Compute high = static_cast<Compute>(mean), scale = static_cast<Compute>(a);
    const Compute shift = static_cast<Compute>(b - (mean - high) * a);
    sweep<LanesOf<Compute>::width>(length, [&](int64_t i, auto part, int) INLINE_LAMBDA {
        store(y + i, (load_as<Compute>(x + i, part) - high) * scale + shift, part);
    });
}

// y[i] = (x[i] - mean) * rstd * gamma[i] + beta[i]
template <class Compute, bool Centred, bool Beta, class T, class P>
void run_apply_table(const T* x, T* y, int64_t length, double mean, double rstd, const P* gamma, const P* beta) {
    const Compute high = static_cast<Compute>(mean), scale = static_cast<Compute>(rstd);
    const Compute rest = static_cast<Compute>((high - mean) * rstd);
    sweep<LanesOf<Compute>::width>(length, [&](int64_t i, auto part, int) INLINE_LAMBDA {
        auto v = load_as<Compute>(x + i, part);
        v = Centred ? (v - high) * scale + rest : v * scale;
        v *= load_as<Compute>(gamma + i, part);
        if (Beta) v += load_as<Compute>(beta + i, part);
        store(y + i, v, part);
    });
}

// first = sum(g[i]), second = sum(g[i] * (x[i] - mean)). Of a narrow x the products about 0 are summed: a double has
// the digits to subtract the mean's share afterwards.
template <class T>
Sums run_grad_sums(const T* g, const T* x, int64_t length, double mean) {
    constexpr bool narrow = sizeof(T) < 8;
    LaneSums sums;
    const Lanes one = hidden_one();
    sweep(length, [&](int64_t i, auto part, int u) INLINE_LAMBDA {
        const Lanes v = load(g + i, part), d = load(x + i, part);
        sums.first[u] = add_by_multiplier(sums.first[u], v, one);
        sums.second[u] += v * (narrow ? d : d - mean);
    });
    Sums total = sums.total();
    if (narrow) total.second -= mean * total.first;
    return total;
}

// first = sum(gamma[i] * g[i]), second = sum(gamma[i] * g[i] * (x[i] - mean)); and for the parameters
// dbeta[i] += g[i], dgamma[i] += g[i] * (x[i] - mean) * rstd
template <bool Parameters, class T, class P>
Sums run_grad_sums_table(const T* g, const T* x, int64_t length, double mean, double rstd, const P* gamma,
                         double* dgamma, double* dbeta) {
    LaneSums sums;
    const Lanes one = hidden_one();
    sweep(length, [&](int64_t i, auto part, int u) INLINE_LAMBDA {
        const Lanes v = load(g + i, part), xhat = load(x + i, part) * rstd - mean * rstd;
        if (Parameters) {
            store(dbeta + i, add_by_multiplier(load(dbeta + i, part), v, one), part);
            store(dgamma + i, load(dgamma + i, part) + v * xhat, part);
        }
        const Lanes scaled = v * load(gamma + i, part);
        sums.first[u] = add_by_multiplier(sums.first[u], scaled, one);
        sums.second[u] += scaled * xhat;
    });
    Sums total = sums.total();
    total.second /= rstd;
    return total;
}

// dx[i] = g[i] * a - c1 - (x[i] - mean) * c2
template <class Compute, class T>
void run_dx(const T* g, const T* x, T* dx, int64_t length, double mean, double a, double c1, double c2) {
    const Compute high = static_cast<Compute>(mean), scale = static_cast<Compute>(a);
    const Compute slope = static_cast<Compute>(c2), constant = static_cast<Compute>(c1 - (mean - high) * c2);
    sweep<LanesOf<Compute>::width>(length, [&](int64_t i, auto part, int) INLINE_LAMBDA {
        const auto centred = load_as<Compute>(x + i, part) - high;
        store(dx + i, load_as<Compute>(g + i, part) * scale - (centred * slope + constant), part);
    });
}

// dx[i] = g[i] * gamma[i] * rstd - c1 - (x[i] - mean) * c2
template <class Compute, class T, class P>
void run_dx_table(const T* g, const T* x, T* dx, int64_t length, double mean, double rstd, const P* gamma, double c1,
                  double c2) {
    const Compute high = static_cast<Compute>(mean), scale = static_cast<Compute>(rstd);
    const Compute slope = static_cast<Compute>(c2), constant = static_cast<Compute>(c1 - (mean - high) * c2);
    sweep<LanesOf<Compute>::width>(length, [&](int64_t i, auto part, int) INLINE_LAMBDA {
        const auto scaled = load_as<Compute>(g + i, part) * load_as<Compute>(gamma + i, part);
        const auto centred = load_as<Compute>(x + i, part) - high;
        store(dx + i, scaled * scale - (centred * slope + constant), part);
    });
}

// dx[i] = g[i] * a
template <class Compute, class T>
void run_scale(const T* g, T* dx, int64_t length, double a) {
    const Compute scale = static_cast<Compute>(a);
    sweep<LanesOf<Compute>::width>(length, [&](int64_t i, auto part, int) INLINE_LAMBDA {
        store(dx + i, load_as<Compute>(g + i, part) * scale, part);
    });
}

// ---- down columns ----------------------------------------------------------------------------------------------
// A tile is `rows` rows of `width` elements, `stride` apart. Eight rows are taken at once, so that a column's sums and
// coefficients are fetched once for eight elements while memory is still read in order.

constexpr int kRowsAtOnce = 8;

struct Tile {
    int64_t rows, width, stride;
};

// body(row, column, Full or Part, how many rows as a constant)
template <class Compute, class Body>
INLINE void sweep_tile(const Tile& tile, Body body) {
    constexpr int width = LanesOf<Compute>::width;
    int64_t r = 0;
    for (; r + kRowsAtOnce <= tile.rows; r += kRowsAtOnce) {
        sweep<width>(tile.width, [&](int64_t i, auto part, int) INLINE_LAMBDA { body(r, i, part, kRowsAtOnce); });
    }
    for (; r < tile.rows; ++r) {
        sweep<width>(tile.width, [&](int64_t i, auto part, int) INLINE_LAMBDA { body(r, i, part, 1); });
    }
}

// first[i] += sum over rows of x[r][i] - shift[i], second[i] += sum over rows of (x[r][i] - shift[i])^2
template <bool Shifted, class T>
void column_sums(const T* x, const Tile& tile, const double* shift, double* first, double* second) {
    const Lanes one = hidden_one();
    sweep_tile<double>(tile, [&](int64_t r, int64_t i, auto part, int rows) INLINE_LAMBDA {
        const Lanes about = Shifted ? load(shift + i, part) : Lanes{};
        Lanes sum = load(first + i, part), squares = load(second + i, part);
        for (int u = 0; u < rows; ++u) {
            Lanes d = load(x + (r + u) * tile.stride + i, part);
            if (Shifted) d -= about;
            sum = add_by_multiplier(sum, d, one);
            squares += d * d;
        }
        store(first + i, sum, part);
        store(second + i, squares, part);
    });
}

// y[r][i] = (x[r][i] - mean[i]) * a[i] + b[i]
template <class T, class Compute>
void column_apply(const T* x, T* y, const Tile& tile, const Compute* mean, const Compute* a, const Compute* b) {
    sweep_tile<Compute>(tile, [&](int64_t r, int64_t i, auto part, int rows) INLINE_LAMBDA {
        const auto m = load_as<Compute>(mean + i, part), scale = load_as<Compute>(a + i, part);
        const auto shift = load_as<Compute>(b + i, part);
        for (int u = 0; u < rows; ++u) {
            const int64_t at = (r + u) * tile.stride + i;
            store(y + at, (load_as<Compute>(x + at, part) - m) * scale + shift, part);
        }
    });
}

// first[i] += sum over rows of g[r][i], second[i] += sum over rows of g[r][i] * (x[r][i] - mean[i]); of a narrow x
// the products about 0, see run_grad_sums
template <class T>
void column_grad_sums(const T* g, const T* x, const Tile& tile, const double* mean, double* first, double* second) {
    constexpr bool narrow = sizeof(T) < 8;
    const Lanes one = hidden_one();
    sweep_tile<double>(tile, [&](int64_t r, int64_t i, auto part, int rows) INLINE_LAMBDA {
        const Lanes m = narrow ? Lanes{} : load(mean + i, part);
        Lanes sum = load(first + i, part), products = load(second + i, part);
        for (int u = 0; u < rows; ++u) {
            const int64_t at = (r + u) * tile.stride + i;
            const Lanes v = load(g + at, part), d = load(x + at, part);
            sum = add_by_multiplier(sum, v, one);
            products += v * (narrow ? d : d - m);
        }
        store(first + i, sum, part);
        store(second + i, products, part);
    });
}

// dx[r][i] = g[r][i] * a[i] - c1[i] - (x[r][i] - mean[i]) * c2[i]
template <class T, class Compute>
void column_dx(const T* g, const T* x, T* dx, const Tile& tile, const Compute* mean, const Compute* a,
               const Compute* c1, const Compute* c2) {
    sweep_tile<Compute>(tile, [&](int64_t r, int64_t i, auto part, int rows) INLINE_LAMBDA {
        const auto m = load_as<Compute>(mean + i, part), scale = load_as<Compute>(a + i, part);
        const auto constant = load_as<Compute>(c1 + i, part), slope = load_as<Compute>(c2 + i, part);
        for (int u = 0; u < rows; ++u) {
            const int64_t at = (r + u) * tile.stride + i;
            const auto centred = load_as<Compute>(x + at, part) - m;
            store(dx + at, load_as<Compute>(g + at, part) * scale - (centred * slope + constant), part);
        }
    });
}

// dx[r][i] = g[r][i] * a[i]
template <class T, class Compute>
void column_scale(const T* g, T* dx, const Tile& tile, const Compute* a) {
    sweep_tile<Compute>(tile, [&](int64_t r, int64_t i, auto part, int rows) INLINE_LAMBDA {
        const auto scale = load_as<Compute>(a + i, part);
        for (int u = 0; u < rows; ++u) {
            const int64_t at = (r + u) * tile.stride + i;
            store(dx + at, load_as<Compute>(g + at, part) * scale, part);
        }
    });
}

}  // namespace anynorm::ANYNORM_TARGET
