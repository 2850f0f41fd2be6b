// Every loop along a contiguous run whose gamma and beta vary from element to element. The scalar formula stands above each.
#pragma once

#include "runs.h"

namespace anynorm::ANYNORM_TARGET {

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

// Of R pools at once, which begin at `at`: first = sum(gamma[i] * g[i]), second = sum(gamma[i] * g[i] * xhat[i]); and for
// the parameters dbeta[i] += g[i], dgamma[i] += g[i] * xhat[i], in sums that the caller flushes.
template <class Compute, int R, bool Active, bool Parameters, class T, class P>
void run_grad_sums_table(const T* g, const T* x, int64_t length, const int64_t* at, const Line<Compute>* lines,
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
                V v = in_register(load_as<Compute>(g + at[r] + i, some));
                const V xhat = (load_as<Compute>(x + at[r] + i, some) - high[r]) * by[r] + shift[r];
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
