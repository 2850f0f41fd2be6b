// The walk along contiguous runs in which gamma and beta vary from element to element: layer and RMS norm over trailing
// axes, and group norm where a channel has so few positions that its own run would waste the vectors.
#pragma once

#include "tables.h"
#include "statistics.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Elements {
    using P = Parameter<T>;
    static constexpr int kPoolsAtOnce = 4;

    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* residual = static_cast<const T*>(call.residual);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    T* gradient = static_cast<T*>(call.dresidual);
    int64_t length = call.k * call.s;           // of a pool
    int64_t period = call.channels() * call.s;  // of gamma and beta
    Scratch<P> own_gamma{table_size(call.gamma, true)}, own_beta{table_size(call.beta, false)};
    const P* gamma = table(call.gamma, own_gamma.get(), 1, true);
    const P* beta = table(call.beta, own_beta.get(), 0, false);
    Statistics<T> statistics{call};
    double largest_gamma = 0;
    Scratch<int64_t> chosen{call.mask ? call.n : 0};  // samples that count, in their order
    int64_t count = call.mask ? find_counted_indices(call.mask, call.n, chosen.get()) : call.n;

    int64_t sample(int64_t i) { return call.mask ? chosen[i] : i; }
    int64_t table_size(const void* parameter, bool is_needed) const {
        return (parameter && call.s > 1) || (!parameter && is_needed) ? period : 0;
    }
    // A value per element of the period: the parameter itself where a channel has one position.
    const P* table(const void* parameter, P* own, P otherwise, bool is_needed) const {
        const auto* values = static_cast<const P*>(parameter);
        if (!table_size(parameter, is_needed)) return values;
        for (int64_t i = 0; i < period; ++i) own[i] = values ? values[i / call.s] : otherwise;
        return own;
    }
    int64_t offset(int64_t pool) const { return (pool % call.g) * length; }
    bool is_skipped(int64_t pool) const { return call.mask && !(call.mask[pool / call.g] > 0); }
    Epilogue<T> epilogue(int64_t pool) const {
        const int64_t at = pool * length;
        return {call.activation, residual ? residual + at : nullptr, nullptr, gradient ? gradient + at : nullptr};
    }

    // Mean, m2 and rstd of the pools [begin, end), from no sums where a pool does not count.
    void moments(int64_t begin, int64_t end) {
        statistics.find(begin, end, [&](int64_t p) { return guess_shift(p); }, [&](int64_t p, double shift) {
            if (is_skipped(p)) return Sums();
            const T* run = x + p * length;
            return call.centred ? run_moments(run, {1, 0, length}, shift, false) : Sums{0, run_squares(run, length)};
        });
    }
    // The mean of the first values.
    double guess_shift(int64_t pool) const {
        if (!call.centred || is_skipped(pool)) return 0;
        const int64_t size = least(W, length);
        return add_lanes(load(x + pool * length, Part{size})) / static_cast<double>(size);
    }

    void apply(int64_t pool) {
        const T* run = x + pool * length;
        T* y = out + pool * length;
        if (is_skipped(pool)) return clear(y, 0, length);
        const double mean = statistics.mean[pool], rstd = statistics.rstd[pool];
        with_compute<T>(fits_float<T>(mean, rstd), [&](auto zero) {
            using Compute = decltype(zero);
            const Line<Compute> line(mean, rstd, 0);
            const P *scale = gamma + offset(pool), *shift = beta ? beta + offset(pool) : nullptr;
            if constexpr (kHasPlain<Compute, T>) {
                if (!call.is_active() && beta) {
                    return run_apply_table<Compute, false, true>(run, y, length, line, scale, shift, epilogue(pool),
                                                                 call.bypasses_caches);
                }
                if (!call.is_active()) {
                    return run_apply_table<Compute, false, false>(run, y, length, line, scale, shift, epilogue(pool),
                                                                  call.bypasses_caches);
                }
            }
            if (beta) {
                return run_apply_table<Compute, true, true>(run, y, length, line, scale, shift, epilogue(pool),
                                                            call.bypasses_caches);
            }
            run_apply_table<Compute, true, false>(run, y, length, line, scale, shift, epilogue(pool), call.bypasses_caches);
        });
    }

    void forward() {
        parallel_for(call, call.pools(), length, [&](int64_t begin, int64_t end) {
            const int64_t size = least(32, most(1, kSlabBytes / 4 / (length * static_cast<int64_t>(sizeof(T)))));
            for (int64_t from = begin; from < end; from += size) {
                const int64_t to = least(end, from + size);
                moments(from, to);
                for (int64_t p = from; out && p < to; ++p) apply(p);
            }
        });
        statistics.move_running();
    }

    // The largest size of a gamma, compared as whole numbers, which vectors can.
    double find_largest_gamma() const {
        uint32_t most_bits = 0;
        if constexpr (kIsNarrow<T>) {
            const auto* values = static_cast<const P*>(call.gamma);
            if (!values) return 1;
            for (int64_t c = 0; c < call.channels(); ++c) {
                const uint32_t bits = bits_of<uint32_t>(values[c]) & 0x7fffffff;
                most_bits = bits > most_bits ? bits : most_bits;
            }
        }
        return bits_of<float>(most_bits);
    }

    // Each chunk of samples adds up its own gradients; how many there are depends on the sizes alone. Of samples that do not
    // count there is no chunk: so no bit depends on where they are.
    void backward() {
        statistics.read();
        largest_gamma = find_largest_gamma();
        const bool parameters = call.dgamma || call.dbeta;
        const int64_t samples = most(8 * kPoolsAtOnce, divide_up(count, 16)), chunks = divide_up(count, samples);
        Scratch<double> partial(parameters ? chunks * 2 * period : 0);
        parallel_for(call, chunks, samples * period, [&](int64_t begin, int64_t end) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                double* sums = parameters ? partial.get() + chunk * 2 * period : nullptr;
                if (sums) clear(sums, 0, 2 * period);  // by whom it is summed: it stays in that core's cache
                const int64_t first = chunk * samples, last = least(count, first + samples);
                for (int64_t g = 0; g < call.g; ++g) one_group(g, first, last, sums ? sums + g * length : nullptr);
            }
        });
        for (int64_t p = 0; call.mask && p < call.pools(); ++p) {
            if (is_skipped(p)) skip(p);
        }
        if (parameters) write_parameter_gradients(partial, chunks);
    }

    // Gradients of the pools of group g in the samples [first, last) of those that count.
    void one_group(int64_t g, int64_t first, int64_t last, double* sums) {
        for (int64_t i = first; i < last;) {
            const bool four = i + kPoolsAtOnce <= last;
            if (four) {
                some_pools<kPoolsAtOnce>(i, g, sums);
            } else {
                some_pools<1>(i, g, sums);
            }
            i += four ? kPoolsAtOnce : 1;
        }
    }
    void skip(int64_t pool) {
        if (out) clear(out + pool * length, 0, length);
        if (gradient) clear(gradient + pool * length, 0, length);
    }

    // Gradients of R pools, those of group g in R samples: the sums for gamma and beta are loaded and stored once for all R.
    template <int R>
    void some_pools(int64_t first, int64_t g, double* dgamma) {
        const P *scale = gamma + g * length, *shift = beta ? beta + g * length : nullptr;
        int64_t at[R];
        Line<double> lines[R];
        Epilogue<T> epilogues[R];
        Sums scaled[R];
        bool fits = true;
        for (int r = 0; r < R; ++r) {
            const int64_t p = sample(first + r) * call.g + g;
            at[r] = p * length;
            lines[r] = Line<double>(statistics.mean[p], statistics.rstd[p], 0);
            epilogues[r] = epilogue(p);
            fits = fits && fits_float<T>(statistics.mean[p], statistics.rstd[p]);
        }
        const auto sum = [&](auto zero, auto active, auto parameters) {
            run_grad_sums_table<decltype(zero), R, active, parameters>(grad, x, length, at, lines, scale, shift, epilogues,
                                                                       dgamma, dgamma + period, scaled);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (!call.is_active()) {
            dgamma ? sum(0.0, No{}, Yes{}) : sum(0.0, No{}, No{});
        } else {
            with_compute<T>(fits, [&](auto zero) { dgamma ? sum(zero, Yes{}, Yes{}) : sum(zero, Yes{}, No{}); });
        }
        for (int r = 0; out && r < R; ++r) write_dx(at[r] / length, scaled[r]);
    }

    // scaled: sums of gamma * g and gamma * g * xhat.
    void write_dx(int64_t pool, Sums scaled) {
        const int64_t at = pool * length;
        const double mean = statistics.mean[pool], rstd = statistics.rstd[pool];
        scaled.second = rstd > 0 ? scaled.second / rstd : 0;  // an eps of infinity makes 0 of all
        const Slopes slopes(call.centred, scaled, rstd, statistics.count(pool));
        with_compute<T>(fits_float<T>(mean, rstd, largest_gamma * rstd, slopes.c1, slopes.c2, slopes.reach), [&](auto zero) {
            using Compute = decltype(zero);
            const Line<Compute> line(mean, rstd, 0), slope(mean, slopes.c2, slopes.c1);
            const P *scale = gamma + offset(pool), *shift = beta ? beta + offset(pool) : nullptr;
            if constexpr (kHasPlain<Compute, T>) {
                if (!call.is_active()) {
                    return run_dx_table<Compute, false>(grad + at, x + at, out + at, length, line, slope, scale, shift,
                                                        epilogue(pool), call.bypasses_caches);
                }
            }
            run_dx_table<Compute, true>(grad + at, x + at, out + at, length, line, slope, scale, shift, epilogue(pool),
                                        call.bypasses_caches);
        });
    }

    void write_parameter_gradients(Scratch<double>& partial, int64_t chunks) const {
        parallel_for(call, call.channels(), chunks * call.s, [&](int64_t begin, int64_t end) {
            if (call.s == 1) return write_added(partial.get(), chunks, begin, end);
            for (int64_t c = begin; c < end; ++c) {
                double dgamma = 0, dbeta = 0;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                    for (int64_t i = c * call.s; i < (c + 1) * call.s; ++i) {
                        dgamma += partial[chunk * 2 * period + i];
                        dbeta += partial[(chunk * 2 + 1) * period + i];
                    }
                }
                write_gradients<T>(call, c, dgamma, dbeta);
            }
        });
    }
    // Of channels with one position each: chunk by chunk, as they lie in memory, onto the first.
    void write_added(double* partial, int64_t chunks, int64_t begin, int64_t end) const {
        for (int64_t which = 0; which < 2; ++which) {
            auto* to = static_cast<P*>(which == 0 ? call.dgamma : call.dbeta);
            double* sums = partial + which * period;
            for (int64_t chunk = 1; to && chunk < chunks; ++chunk) {
                const double* more = sums + chunk * 2 * period;
                for (int64_t c = begin; c < end; ++c) sums[c] += more[c];
            }
            for (int64_t c = begin; to && c < end; ++c) to[c] = static_cast<P>(sums[c]);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
