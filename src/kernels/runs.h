// Every loop along a contiguous run whose gamma and beta are constant. The scalar formula stands above each.
#pragma once

#include "activations.h"
#include "sums.h"

namespace anynorm::ANYNORM_TARGET {

// (x - high) * scale + shift. In float, high is the mean as far as a float goes, and the rest is in shift.
template <class Compute>
struct Line {
    Compute high = 0, scale = 0, shift = 0;
    Line() = default;
    INLINE Line(double mean, double a, double b)
        : high(static_cast<Compute>(mean)), scale(static_cast<Compute>(a)),
          shift(static_cast<Compute>(b + (high - mean) * a)) {}
};

template <class SomeLine>
using ComputeOf = decltype(SomeLine::high);

// What follows a run's norm: an activation, a residual before it, positions that count, and where the gradient before
// the activation goes.
template <class T>
struct Epilogue {
    Activation activation;
    const T* residual = nullptr;
    const float* mask = nullptr;
    T* gradient = nullptr;

    template <class V, class Compute, class Kind, class Some>
    INLINE V forward(Kind kind, V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        v = kind.value(v);
        if (mask) v = load_as<Compute>(mask + i, some) > 0 ? v : V{};
        return v;
    }
    // g times the derivative, kept.
    template <class V, class Compute, class Kind, class Some>
    INLINE V backward(Kind kind, V g, V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        // Opaque: what follows is contracted alike in every loop, whatever is known of the activation there.
        g = in_register(kind.gradient(g, v));
        if (mask) g = load_as<Compute>(mask + i, some) > 0 ? g : V{};
        if (gradient) store(gradient + i, g, some);
        return g;
    }
};

// to[i] = from[indices[i]]; indices ascend, so eight are neighbours where the last is the first plus seven: one copy
template <class T>
INLINE void gather(const T* from, const int64_t* indices, int64_t size, T* to) {
    int64_t i = 0;
    while (i < size) {
        if (i + 8 <= size && indices[i + 7] == indices[i] + 7) {
            std::memcpy(to + i, from + indices[i], 8 * sizeof(T));
            i += 8;
        } else {
            to[i] = from[indices[i]];
            ++i;
        }
    }
}

// first = sum(x[i] - shift), second = sum((x[i] - shift)^2)
template <class T>
Sums run_moments(const T* x, const Runs& runs, double shift, bool restart) {
    Accumulator sums;
    sums.template sweep_runs<double>(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
        const Lanes d = clear_unused(load(x + r * runs.stride + i, some) - shift, some);
        sums.add(u, d, d);
    }, [&](int64_t r, int64_t size) INLINE_LAMBDA { prefetch_padding(x + r * runs.stride, size, runs.length); });
    return sums.total();
}

// sum(x[i]^2)
template <class T>
double run_squares(const T* x, int64_t length) {
    Accumulator sums;
    sums.template sweep_runs<double>({1, 0, length}, false, [&](int64_t, int64_t i, auto some, int u) INLINE_LAMBDA {
        const Lanes v = load(x + i, some);
        sums.second[u] += v * v;
    }, [](int64_t, int64_t) {});
    return sums.total().second;
}

// y[i] = epilogue((x[i] - high) * scale + shift), for all runs; epilogue_of(run) says what follows
template <class Compute, bool Active, class T, class EpilogueOf>
void run_apply(const T* x, T* y, const Runs& runs, Line<Compute> line, EpilogueOf epilogue_of, bool bypasses_caches) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, x += runs.stride, y += runs.stride) {
        const Epilogue<T> epilogue = epilogue_of(r);
        const int64_t size = runs.size(r);
        with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
            sweep<kWidth<Compute>, Active>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                V v = (load_as<Compute>(x + i, some) - line.high) * line.scale + line.shift;
                if constexpr (Active) v = epilogue.template forward<V, Compute>(kind, v, i, some);
                store_result(y + i, v, some, bypasses_caches);
            });
        });
        clear(y, size, runs.length);
        prefetch_padding(x, size, runs.length);
    }
}

// first = sum(g[i]), second = sum(g[i] * (x[i] - mean)), g before the activation; epilogue_of(run) says what follows it. The
// activation is computed as `line` is, the sums always in double.
template <class Compute, bool Active, class T, class EpilogueOf>
Sums run_grad_sums(const T* g, const T* x, const Runs& runs, double mean, Line<Compute> line, EpilogueOf epilogue_of,
                   bool restart) {
    using V = VectorOf<Compute>;
    Accumulator sums;
    if constexpr (Active) {
        for (int64_t r = 0; r < runs.count; ++r) {
            if (T* gradient = epilogue_of(r).gradient) clear(gradient, runs.size(r), runs.length);
        }
    }
    with_activation<Active, Compute>(epilogue_of(0).activation, [&](auto kind) INLINE_LAMBDA {
        sums.template sweep_runs<Compute, Active>(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
            const T* here = x + r * runs.stride + i;
            V v = load_as<Compute>(g + r * runs.stride + i, some);
            if constexpr (Active) {
                const V z = (load_as<Compute>(here, some) - line.high) * line.scale + line.shift;
                v = epilogue_of(r).template backward<V, Compute>(kind, v, z, i, some);
            }
            for (int p = 0; p < kParts<Compute>; ++p) {
                sums.add(u + p, part_of(v, p), load(here + p * W, part_of(some, p)) - mean);
            }
        }, [&](int64_t r, int64_t size) INLINE_LAMBDA {
            prefetch_padding(g + r * runs.stride, size, runs.length);
            prefetch_padding(x + r * runs.stride, size, runs.length);
        });
    });
    return sums.total();
}

// dx[i] = g[i] * line.scale - ((x[i] - high) * slope + constant), 0 where a position does not count, for all runs; g
// before the activation, found once more rather than read rounded. Given statistics have no slopes: an infinite x would
// make NaN of a slope of 0.
template <class Compute, bool Active, class T, class EpilogueOf>
void run_dx(const T* g, const T* x, T* dx, const Runs& runs, Line<Compute> line, Line<Compute> slopes, EpilogueOf epilogue_of,
            bool bypasses_caches, bool has_given_statistics = false) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, x += runs.stride, dx += runs.stride) {
        Epilogue<T> epilogue = epilogue_of(r);
        epilogue.gradient = nullptr;
        const int64_t size = runs.size(r);
        with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
            sweep<kWidth<Compute>, Active>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                const V centred = load_as<Compute>(x + i, some) - line.high;
                V v = load_as<Compute>(g + i, some);
                if constexpr (Active) {
                    v = epilogue.template backward<V, Compute>(kind, v, centred * line.scale + line.shift, i, some);
                }
                v = v * line.scale - ((Active && has_given_statistics ? V{} : centred) * slopes.scale + slopes.shift);
                if constexpr (Active) {
                    if (epilogue.mask) v = load_as<Compute>(epilogue.mask + i, some) > 0 ? v : V{};
                }
                store_result(dx + i, v, some, bypasses_caches);
            });
        });
        clear(dx, size, runs.length);
        prefetch_padding(g, size, runs.length);
        prefetch_padding(x, size, runs.length);
    }
}

// dx[i] = g[i] * a, for all runs
template <class Compute, class T>
void run_scale(const T* g, T* dx, const Runs& runs, double a, bool bypasses_caches) {
    const Compute scale = static_cast<Compute>(a);
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, dx += runs.stride) {
        const int64_t size = runs.size(r);
        sweep<kWidth<Compute>>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            store_result(dx + i, load_as<Compute>(g + i, some) * scale, some, bypasses_caches);
        });
        clear(dx, size, runs.length);
        prefetch_padding(g, size, runs.length);
    }
}

}  // namespace anynorm::ANYNORM_TARGET
