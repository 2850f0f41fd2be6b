// Every loop along a contiguous run whose gamma and beta vary from element to element. The scalar formula stands above each.
#pragma once

#include "runs.h"

namespace anynorm::ANYNORM_TARGET {

// y[i] = epilogue(((x[i] - high) * scale + shift) * gamma[i] + beta[i])
template <class Compute, bool Active, bool Beta, class T, class P>
void run_apply_table(const T* x, T* y, int64_t length, Line<Compute> line, const P* gamma, const P* beta, Epilogue<T> epilogue,
                     bool bypasses_caches) {
    using V = VectorOf<Compute>;
    with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
        sweep_results<kWidth<Compute>, Active>(length, length, [&](int64_t i, auto some) INLINE_LAMBDA {
            V v = (load_as<Compute>(x + i, some) - line.high) * line.scale + line.shift;
            v *= load_as<Compute>(gamma + i, some);
            if constexpr (Beta) v += load_as<Compute>(beta + i, some);
            if constexpr (Active) v = epilogue.template forward<V, Compute>(kind, v, i, some);
            store_result(y + i, v, some, bypasses_caches);
        });
    });
}

// Of R pools at once, which begin at `at`: first = sum(gamma[i] * g[i]), second = sum(gamma[i] * g[i] * xhat[i]); and for
// the parameters dbeta[i] += g[i], dgamma[i] += g[i] * xhat[i]. xhat = (x - high) * scale of a pool's line. The activation
// is computed in Compute, the sums always in double.
template <class Compute, int R, bool Active, bool Parameters, class T, class P>
void run_grad_sums_table(const T* g, const T* x, int64_t length, const int64_t* at, const Line<double>* lines, const P* gamma,
                         const P* beta, const Epilogue<T>* epilogue, double* dgamma, double* dbeta, Sums* found) {
    using V = VectorOf<Compute>;
    constexpr int parts = kParts<Compute>;
    Lanes first[R] = {}, second[R] = {};
    const auto body = [&](int64_t i, auto some) INLINE_LAMBDA {
        Lanes by_beta[parts] = {}, by_gamma[parts] = {};
        for (int r = 0; r < R; ++r) {
            const T* here = x + at[r] + i;
            V v = in_register(load_as<Compute>(g + at[r] + i, some));
            if constexpr (Active) {
                const Line<Compute> line(lines[r].high, lines[r].scale, 0);
                V z = ((load_as<Compute>(here, some) - line.high) * line.scale + line.shift) * load_as<Compute>(gamma + i, some);
                if (beta) z += load_as<Compute>(beta + i, some);
                v = epilogue[r].template backward<V, Compute>(AnyActivation{epilogue[r].activation}, v, z, i, some);
            }
            for (int p = 0; p < parts; ++p) {
                const auto in = part_of(some, p);
                const Lanes wide = part_of(v, p), xhat = (load(here + p * W, in) - lines[r].high) * lines[r].scale;
                by_beta[p] += wide;
                by_gamma[p] += wide * xhat;
                const Lanes scaled = clear_unused(wide * load(gamma + i + p * W, in), in);
                first[r] += scaled;
                second[r] += scaled * xhat;
            }
        }
        for (int p = 0; Parameters && p < parts; ++p) {
            const auto in = part_of(some, p);
            store(dbeta + i + p * W, load(dbeta + i + p * W, in) + by_beta[p], in);
            store(dgamma + i + p * W, load(dgamma + i + p * W, in) + by_gamma[p], in);
        }
    };
    int64_t i = 0;
    for (; i + kWidth<Compute> <= length; i += kWidth<Compute>) body(i, Full{});
    if (i < length) body(i, Part{length - i});
    for (int r = 0; r < R; ++r) found[r] = {add_lanes(first[r]), add_lanes(second[r])};
}

// dx[i] = g[i] * gamma[i] * rstd - ((x[i] - high) * slope + constant), g before the activation
template <class Compute, bool Active, class T, class P>
void run_dx_table(const T* g, const T* x, T* dx, int64_t length, Line<Compute> line, Line<Compute> slopes, const P* gamma,
                  const P* beta, Epilogue<T> epilogue, bool bypasses_caches) {
    using V = VectorOf<Compute>;
    epilogue.gradient = nullptr;
    sweep_results<kWidth<Compute>, Active>(length, length, [&](int64_t i, auto some) INLINE_LAMBDA {
        const V scale = load_as<Compute>(gamma + i, some);
        const V centred = load_as<Compute>(x + i, some) - line.high;
        V before = load_as<Compute>(g + i, some);
        if constexpr (Active) {
            V z = (centred * line.scale + line.shift) * scale;
            if (beta) z += load_as<Compute>(beta + i, some);
            before = epilogue.template backward<V, Compute>(AnyActivation{epilogue.activation}, before, z, i, some);
        }
        store_result(dx + i, before * (scale * line.scale) - (centred * slopes.scale + slopes.shift), some, bypasses_caches);
    });
}

}  // namespace anynorm::ANYNORM_TARGET
