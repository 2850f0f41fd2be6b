// The walk along contiguous runs in which gamma and beta vary from element to element: layer and RMS norm over trailing
// axes, and group norm where a channel has so few positions that its own run would waste the vectors.
#pragma once

#include "walk.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Elements {
    using P = Parameter<T>;
    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    int64_t length = call.k * call.s;         // of a pool
    int64_t period = call.channels() * call.s;  // of gamma and beta
    bool expands = call.s > 1;
    Room<P> own_gamma{table_size(call.gamma)}, own_beta{table_size(call.beta)};
    const P* gamma = table(call.gamma, own_gamma.get(), 1);
    const P* beta = table(call.beta, own_beta.get(), 0);

    explicit Elements(const Call& call) : call(call) {}

    int64_t table_size(const void* parameter) const { return parameter && !expands ? 0 : period; }

    // A value per element of the period: the parameter itself where a channel has one position.
    const P* table(const void* parameter, P* own, P otherwise) const {
        const auto* values = static_cast<const P*>(parameter);
        if (values && !expands) return values;
        for (int64_t i = 0; i < period; ++i) own[i] = values ? values[i / call.s] : otherwise;
        return own;
    }
    int64_t offset(int64_t pool) const { return (pool % call.g) * length; }

    void moments(Statistics<T>& found, int64_t pool) const {
        const T* run = x + pool * length;
        if (!call.centred) return (void)found.finish(pool, {0, run_squares(run, length)}, 0);
        if (found.finish(pool, run_powers(run, length), 0)) return;
        const double mean = found.mean[pool];
        found.finish(pool, run_sums(run, length, mean), mean);
    }

    void apply(double mean, double rstd, int64_t pool) const {
        if constexpr (sizeof(T) < 8) {
            if (fits_float<T>(mean, rstd)) return apply_in<float>(mean, rstd, pool);
        }
        apply_in<double>(mean, rstd, pool);
    }
    template <class Compute>
    void apply_in(double mean, double rstd, int64_t pool) const {
        const T* run = x + pool * length;
        T* y = out + pool * length;
        const P *scale = gamma + offset(pool), *shift = beta + offset(pool);
        if (call.centred) return run_apply_table<Compute, true, true>(run, y, length, mean, rstd, scale, shift);
        if (call.beta) return run_apply_table<Compute, false, true>(run, y, length, mean, rstd, scale, shift);
        run_apply_table<Compute, false, false>(run, y, length, mean, rstd, scale, shift);
    }

    void forward() const {
        Statistics<T> found(call);
        share(call, call.pools(), length, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                moments(found, p);
                apply(found.mean[p], found.rstd[p], p);
            }
        });
    }

    void backward() const {
        Statistics<T> found(call);
        found.read();
        const bool parameters = call.dgamma || call.dbeta;
        // Each chunk of samples adds up its own gradients; how many there are depends on the sizes alone.
        const int64_t samples = most(16, divide_up(call.n, 64)), chunks = divide_up(call.n, samples);
        Room<double> partial(parameters ? chunks * 2 * period : 0, true);
        share(call, chunks, samples * period, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                double* dgamma = partial.get() + (parameters ? chunk * 2 * period : 0);
                const int64_t last = least(call.n, (chunk + 1) * samples) * call.g;
                for (int64_t p = chunk * samples * call.g; p < last; ++p) {
                    one_pool(p, found.mean[p], found.rstd[p], parameters ? dgamma + offset(p) : nullptr);
                }
            }
        });
        if (parameters) put_parameters(partial, chunks);
    }

    void one_pool(int64_t pool, double mean, double rstd, double* dgamma) const {
        const int64_t at = pool * length;
        const P* scale = gamma + offset(pool);
        const Sums scaled =
            dgamma ? run_grad_sums_table<true>(grad + at, x + at, length, mean, rstd, scale, dgamma, dgamma + period)
                   : run_grad_sums_table<false>(grad + at, x + at, length, mean, rstd, scale, dgamma, dgamma);
        if (!out) return;
        const Slopes slopes(call, scaled, rstd);
        if constexpr (sizeof(T) < 8) {
            if (fits_float<T>(mean, rstd, slopes.c1, slopes.c2)) {
                run_dx_table<float>(grad + at, x + at, out + at, length, mean, rstd, scale, slopes.c1, slopes.c2);
                return;
            }
        }
        run_dx_table<double>(grad + at, x + at, out + at, length, mean, rstd, scale, slopes.c1, slopes.c2);
    }

    void put_parameters(Room<double>& partial, int64_t chunks) const {
        share(call, call.channels(), chunks * call.s, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                double dgamma = 0, dbeta = 0;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                    for (int64_t i = c * call.s; i < (c + 1) * call.s; ++i) {
                        dgamma += partial[chunk * 2 * period + i];
                        dbeta += partial[(chunk * 2 + 1) * period + i];
                    }
                }
                put_gradients<T>(call, c, dgamma, dbeta);
            }
        });
    }
};

}  // namespace anynorm::ANYNORM_TARGET
