// Every loop along a contiguous run. The scalar formula stands above each.
//
// `Compute` is float, or double where x is double or the numbers are near a float's limits. Sums of floats are short: after
// kBlock elements they are added to sums of doubles.
#pragma once

#include "activations.h"
#include "lanes.h"

namespace anynorm::ANYNORM_TARGET {

struct Sums {
    double first = 0, second = 0;
    void add(const Sums& other) {
        first += other.first;
        second += other.second;
    }
};

// Where a long run is cut, for sums that must not depend on who takes its parts.
constexpr int64_t kSegment = 1 << 15;

// Runs of `length` elements, `stride` apart, or parts of runs that begin at `from`. What lies behind a run's extent is
// padding: it enters nothing, and its results are 0.
struct Runs {
    int64_t count, stride, length;
    const int64_t* extents = nullptr;  // one for each run, or for all of them where extent_step is 0
    int64_t from = 0, extent_step = 1;
    INLINE int64_t size(int64_t run) const {
        if (!extents) return length;
        const int64_t left = extents[run * extent_step] - from;
        return left < 0 ? 0 : left < length ? left : length;
    }
};

// Brings short padding into the cache: a stream of memory that stops and begins anew takes twice as long as to go on.
template <class T>
INLINE void pass_over(const T* x, int64_t begin, int64_t end) {
    constexpr int64_t line = 64 / sizeof(T);
    if (end - begin > 16 * line) return;
    for (int64_t i = begin; i < end; i += line) __builtin_prefetch(x + i);
}

template <class T>
INLINE void clear(T* values, int64_t begin, int64_t end) {
    if (begin < end) std::memset(static_cast<void*>(values + begin), 0, static_cast<size_t>(end - begin) * sizeof(T));
}

// (x - high) * scale + shift. In float, high is the mean as far as a float goes, and the rest is in shift.
template <class Compute>
struct Line {
    Compute high = 0, scale = 0, shift = 0;
    Line() = default;
    INLINE Line(double mean, double a, double b)
        : high(static_cast<Compute>(mean)), scale(static_cast<Compute>(a)),
          shift(static_cast<Compute>(b + (high - mean) * a)) {}
};

// What follows a run's norm: an activation, a residual before it, positions that count, and where the gradient before
// the activation goes.
template <class T>
struct After {
    int activation = kIdentity;
    const T* residual = nullptr;
    const float* weight = nullptr;
    T* gradient = nullptr;

    template <class V, class Compute, class Some>
    INLINE V forward(V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        v = activate(activation, v);
        if (weight) v = load_as<Compute>(weight + i, some) > 0 ? v : V{};
        return v;
    }
    // g times the derivative, kept.
    template <class V, class Compute, class Some>
    INLINE V backward(V g, V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        if (activation != kIdentity) g *= derivative(activation, v);
        if (weight) g = load_as<Compute>(weight + i, some) > 0 ? g : V{};
        if (gradient) store(gradient + i, g, some);
        return g;
    }
};

template <class Compute>
using VectorOf = typename LanesOf<Compute>::type;
template <class Compute>
constexpr int kWidth = LanesOf<Compute>::width;
template <class Compute>
constexpr int64_t kBlock = 128 * kWidth<Compute>;

// The sum of a vector, as a double.
template <class Compute>
INLINE double add_vector(VectorOf<Compute> v) {
    if constexpr (kWidth<Compute> == W) {
        return add_lanes(v);
    } else {
        return add_lanes(low_half(v) + high_half(v));
    }
}

// Two sums at once, in four vectors each so that additions do not wait for one another.
template <class Compute>
struct Accumulator {
    VectorOf<Compute> first[4] = {}, second[4] = {};
    Lanes wide[4] = {};
    Sums done;            // of runs that were finished by themselves
    int64_t waiting = 0;  // elements in the sums of floats

    INLINE void flush() {
        waiting = 0;
        const auto a = (first[0] + first[1]) + (first[2] + first[3]);
        const auto b = (second[0] + second[1]) + (second[2] + second[3]);
        if constexpr (kWidth<Compute> == W) {
            wide[0] += a;
            wide[2] += b;
        } else {
            wide[0] += low_half(a);
            wide[1] += high_half(a);
            wide[2] += low_half(b);
            wide[3] += high_half(b);
        }
        for (int u = 0; u < 4; ++u) first[u] = second[u] = VectorOf<Compute>{};
    }
    INLINE Sums total() {
        finish();
        return done;
    }
    INLINE void finish() {
        flush();
        done.add({add_lanes(wide[0] + wide[1]), add_lanes(wide[2] + wide[3])});
        for (int u = 0; u < 4; ++u) wide[u] = Lanes{};
    }
    // body(start, Full or Part, which of four) over all runs. With `restart` each run's sums are finished by themselves, and
    // each segment's of a long one: then neither padding nor how the work is shared changes a bit.
    // leave(run, its size) comes behind each.
    template <bool Long = false, class Body, class Leave>
    INLINE void sweep_runs(const Runs& runs, bool restart, Body body, Leave leave) {
        for (int64_t r = 0; r < runs.count; ++r) {
            const int64_t length = runs.size(r);
            for (int64_t from = 0; from < length; from += kBlock<Compute>) {
                const int64_t left = length - from, size = left < kBlock<Compute> ? left : kBlock<Compute>;
                sweep<kWidth<Compute>, Long>(size, [&](int64_t i, auto some, int u) INLINE_LAMBDA {
                    body(r, from + i, some, u);
                });
                waiting += size;
                if (restart && (size == left || (from + size) % kSegment == 0)) {
                    finish();
                } else if (waiting >= kBlock<Compute>) {
                    flush();
                }
            }
            leave(r, length);
        }
    }
};

// first = sum(x[i] - shift), second = sum((x[i] - shift)^2), over positions that count
template <class Compute, bool Weighted, class T>
Sums run_moments(const T* x, const Runs& runs, double about, bool restart, const float* weight, int64_t weight_stride) {
    using V = VectorOf<Compute>;
    Accumulator<Compute> sums;
    const V shift = V{} + static_cast<Compute>(about);
    sums.sweep_runs(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
        V d = load_as<Compute>(x + r * runs.stride + i, some) - shift;
        if constexpr (Weighted) {
            d = load_as<Compute>(weight + r * weight_stride + i, some) > 0 ? d : V{};
        } else {
            d = keep(d, some);
        }
        sums.first[u] += d;
        sums.second[u] += d * d;
    }, [&](int64_t r, int64_t size) INLINE_LAMBDA { pass_over(x + r * runs.stride, size, runs.length); });
    return sums.total();
}

// sum(x[i]^2)
template <class Compute, class T>
double run_squares(const T* x, int64_t length) {
    Accumulator<Compute> sums;
    sums.sweep_runs({1, 0, length}, false, [&](int64_t, int64_t i, auto some, int u) INLINE_LAMBDA {
        const auto v = load_as<Compute>(x + i, some);
        sums.second[u] += v * v;
    }, [](int64_t, int64_t) {});
    return sums.total().second;
}

// y[i] = after((x[i] - high) * scale + shift), for all runs; after_of(run) says what follows
template <class Compute, bool Active, class T, class AfterOf>
void run_apply(const T* x, T* y, const Runs& runs, Line<Compute> line, AfterOf after_of, bool past_caches) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, x += runs.stride, y += runs.stride) {
        const After<T> after = after_of(r);
        const int64_t size = runs.size(r);
        sweep<kWidth<Compute>, Active>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            V v = (load_as<Compute>(x + i, some) - line.high) * line.scale + line.shift;
            if constexpr (Active) v = after.template forward<V, Compute>(v, i, some);
            put(y + i, v, some, past_caches);
        });
        clear(y, size, runs.length);
        pass_over(x, size, runs.length);
    }
}

// first = sum(g[i]), second = sum(g[i] * (x[i] - high)), g before the activation; after_of(run) says what follows it
template <class Compute, bool Active, class T, class AfterOf>
Sums run_grad_sums(const T* g, const T* x, const Runs& runs, Line<Compute> line, AfterOf after_of, bool restart) {
    using V = VectorOf<Compute>;
    Accumulator<Compute> sums;
    if constexpr (Active) {
        for (int64_t r = 0; r < runs.count; ++r) {
            if (T* gradient = after_of(r).gradient) clear(gradient, runs.size(r), runs.length);
        }
    }
    sums.template sweep_runs<Active>(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
        V v = load_as<Compute>(g + r * runs.stride + i, some);
        V d = load_as<Compute>(x + r * runs.stride + i, some) - line.high;
        if constexpr (Active) {
            const After<T> after = after_of(r);
            v = after.template backward<V, Compute>(v, d * line.scale + line.shift, i, some);
            if (after.weight) d = load_as<Compute>(after.weight + i, some) > 0 ? d : V{};
        }
        sums.first[u] += v;
        sums.second[u] += v * d;
    }, [&](int64_t r, int64_t size) INLINE_LAMBDA {
        pass_over(g + r * runs.stride, size, runs.length);
        pass_over(x + r * runs.stride, size, runs.length);
    });
    return sums.total();
}

// dx[i] = g[i] * line.scale - ((x[i] - high) * slope + constant), 0 where a position does not count, for all runs; g
// before the activation, found once more rather than read rounded
template <class Compute, bool Active, class T, class AfterOf>
void run_dx(const T* g, const T* x, T* dx, const Runs& runs, Line<Compute> line, Line<Compute> slopes, AfterOf after_of,
            bool past_caches) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, x += runs.stride, dx += runs.stride) {
        After<T> after = after_of(r);
        after.gradient = nullptr;
        const int64_t size = runs.size(r);
        sweep<kWidth<Compute>, Active>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const V centred = load_as<Compute>(x + i, some) - line.high;
            V before = load_as<Compute>(g + i, some);
            if constexpr (Active) before = after.template backward<V, Compute>(before, centred * line.scale + line.shift, i, some);
            V v = before * line.scale - (centred * slopes.scale + slopes.shift);
            if constexpr (Active) {
                if (after.weight) v = load_as<Compute>(after.weight + i, some) > 0 ? v : V{};
            }
            put(dx + i, v, some, past_caches);
        });
        clear(dx, size, runs.length);
        pass_over(g, size, runs.length);
        pass_over(x, size, runs.length);
    }
}

// dx[i] = g[i] * a, for all runs
template <class Compute, class T>
void run_scale(const T* g, T* dx, const Runs& runs, double a, bool past_caches) {
    const Compute scale = static_cast<Compute>(a);
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, dx += runs.stride) {
        const int64_t size = runs.size(r);
        sweep<kWidth<Compute>>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            put(dx + i, load_as<Compute>(g + i, some) * scale, some, past_caches);
        });
        clear(dx, size, runs.length);
        pass_over(g, size, runs.length);
    }
}

// ---- gamma and beta from element to element ----------------------------------------------------------------------

// y[i] = after(((x[i] - high) * scale + shift) * gamma[i] + beta[i])
template <class Compute, bool Active, bool Beta, class T, class P>
void run_apply_table(const T* x, T* y, int64_t length, Line<Compute> line, const P* gamma, const P* beta, After<T> after,
                     bool past_caches) {
    using V = VectorOf<Compute>;
    sweep<kWidth<Compute>, Active>(length, [&](int64_t i, auto some, int) INLINE_LAMBDA {
        V v = (load_as<Compute>(x + i, some) - line.high) * line.scale + line.shift;
        v *= load_as<Compute>(gamma + i, some);
        if constexpr (Beta) v += load_as<Compute>(beta + i, some);
        if constexpr (Active) v = after.template forward<V, Compute>(v, i, some);
        put(y + i, v, some, past_caches);
    });
}

// Of R pools at once, `stride` apart: first = sum(gamma[i] * g[i]), second = sum(gamma[i] * g[i] * xhat[i]); and for the
// parameters dbeta[i] += g[i], dgamma[i] += g[i] * xhat[i], in sums that the caller flushes.
template <class Compute, int R, bool Active, bool Parameters, class T, class P>
void run_grad_sums_table(const T* g, const T* x, int64_t length, int64_t stride, const Line<Compute>* lines,
                         const P* gamma, const P* beta, const After<T>* after, Compute* dgamma, Compute* dbeta,
                         Sums* found) {
    using V = VectorOf<Compute>;
    constexpr int64_t block = 32 * kWidth<Compute>;
    for (int r = 0; r < R; ++r) found[r] = {};
    for (int64_t from = 0; from < length; from += block) {
        const int64_t end = length - from < block ? length : from + block;
        V first[R] = {}, second[R] = {}, high[R], by[R], shift[R];
        for (int r = 0; r < R; ++r) {
            high[r] = V{} + lines[r].high;
            by[r] = V{} + lines[r].scale;
            shift[r] = V{} + lines[r].shift;
        }
        const auto body = [&](int64_t i, auto some) INLINE_LAMBDA {
            const V scale = load_as<Compute>(gamma + i, some);
            V by_beta{}, by_gamma{};
            for (int r = 0; r < R; ++r) {
                V v = in_register(load_as<Compute>(g + r * stride + i, some));
                const V xhat = (load_as<Compute>(x + r * stride + i, some) - high[r]) * by[r] + shift[r];
                if constexpr (Active) {
                    V z = xhat * scale;
                    if (beta) z += load_as<Compute>(beta + i, some);
                    v = after[r].template backward<V, Compute>(v, z, i, some);
                }
                by_beta += v;
                by_gamma += v * xhat;
                const V scaled = keep(v * scale, some);
                first[r] += scaled;
                second[r] += scaled * xhat;
            }
            if constexpr (Parameters) {
                store(dbeta + i, load_as<Compute>(dbeta + i, some) + by_beta, some);
                store(dgamma + i, load_as<Compute>(dgamma + i, some) + by_gamma, some);
            }
        };
        int64_t i = from;
        for (; i + kWidth<Compute> <= end; i += kWidth<Compute>) body(i, Full{});
        if (i < end) body(i, Part{end - i});
        for (int r = 0; r < R; ++r) found[r].add({add_vector<Compute>(first[r]), add_vector<Compute>(second[r])});
    }
}

// dx[i] = g[i] * gamma[i] * rstd - ((x[i] - high) * slope + constant), g before the activation
template <class Compute, bool Active, class T, class P>
void run_dx_table(const T* g, const T* x, T* dx, int64_t length, Line<Compute> line, Line<Compute> slopes, const P* gamma,
                  const P* beta, After<T> after, bool past_caches) {
    using V = VectorOf<Compute>;
    after.gradient = nullptr;
    sweep<kWidth<Compute>, Active>(length, [&](int64_t i, auto some, int) INLINE_LAMBDA {
        const V scale = load_as<Compute>(gamma + i, some);
        const V centred = load_as<Compute>(x + i, some) - line.high;
        V before = load_as<Compute>(g + i, some);
        if constexpr (Active) {
            V z = (centred * line.scale + line.shift) * scale;
            if (beta) z += load_as<Compute>(beta + i, some);
            before = after.template backward<V, Compute>(before, z, i, some);
        }
        put(dx + i, before * scale * line.scale - (centred * slopes.scale + slopes.shift), some, past_caches);
    });
}

}  // namespace anynorm::ANYNORM_TARGET
