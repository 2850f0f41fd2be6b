// The walk along contiguous runs whose gamma and beta are constant: batch, instance and group norm, channels first.
#pragma once

#include "pools.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Rows : Pools {
    Statistics<T> statistics;
    const T* x = static_cast<const T*>(call.x);
    const T* residual = static_cast<const T*>(call.residual);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    T* gradient = static_cast<T*>(call.dresidual);
    // Of the positions that count, where there are holes between them.
    Scratch<int64_t> indices{statistics.needs_mask() ? call.n * call.s : 0};

    explicit Rows(const Call& call) : Pools{call, nullptr}, statistics(call) {
        extents = statistics.extents;
        for (int64_t n = 0; statistics.needs_mask() && n < call.n; ++n) {
            find_counted_indices(call.mask + n * call.s, call.s, &indices[n * call.s]);
        }
    }

    // Null where the extents say all.
    const float* mask_of(int64_t pool, int64_t run) const {
        return statistics.needs_mask() ? call.mask + sample(pool, run) * call.s : nullptr;
    }
    Epilogue<T> epilogue(int64_t pool, int64_t run, int64_t at, int64_t from) const {
        const float* counted = mask_of(pool, run);
        return {call.activation, residual ? residual + at : nullptr, counted ? counted + from : nullptr,
                gradient ? gradient + at : nullptr};
    }

    // ---- moments ----------------------------------------------------------------------------------------------

    // The mean of a few values, exact where all are alike; of the first that count where some do not.
    double guess_shift(int64_t pool) const {
        if (!call.centred) return 0;
        if (call.mask) return mean_of_first(pool);
        const int64_t length = by_sample ? call.s : elements, spots = most(1, least(8, elements / 512));
        const int64_t here = least(spots, by_sample ? runs : 1), per_run = spots / here;
        const int64_t size = least(W, length);
        Lanes sum{};
        for (int64_t j = 0; j < here; ++j) {
            const T* run = x + start(pool) + (j * runs / here) * (by_sample ? stride() : 0);
            for (int64_t u = 0; u < per_run; ++u) sum += load(run + (length - size) / per_run * u, Part{size});
        }
        return add_lanes(sum) / static_cast<double>(size * here * per_run);
    }
    double mean_of_first(int64_t pool) const {
        double sum = 0;
        int found_here = 0;
        for (int64_t j = 0; j < runs && !found_here; ++j) {
            const float* counted = call.mask + sample(pool, j) * call.s;
            const T* run = x + start(pool) + j * stride();
            for (int64_t i = 0; i < call.s && found_here < W; ++i) {
                if (counted[i] > 0) sum += scalar(run + i), ++found_here;
            }
        }
        return found_here ? sum / found_here : 0;
    }

    // body(at, indices, how many) over runs of a pool that have holes, in segments of positions that count:
    // those are brought together before they are summed, so that no sum depends on where the holes are.
    template <class Body>
    void each_gathered(int64_t pool, int64_t run, int64_t from, const Runs& all, Body body) const {
        auto& self = const_cast<Rows&>(*this);
        for (int64_t r = run; r < run + all.count; ++r) {
            const int64_t n = sample(pool, r), end = least(self.statistics.counted[n], from + all.length);
            for (int64_t f = from; f < end; f += kSegment) {
                body(start(pool) + r * stride(), &self.indices[n * call.s + f], least(kSegment, end - f));
            }
        }
    }

    Sums moments(int64_t pool, int64_t run, int64_t from, const Runs& all, double shift) const {
        if (!statistics.needs_mask()) {
            return run_moments(x + start(pool) + run * stride() + from, all, shift, call.mask != nullptr);
        }
        Sums sums;
        Scratch<T> scratch(least(kSegment, call.s));
        each_gathered(pool, run, from, all, [&](int64_t at, const int64_t* chosen, int64_t size) {
            gather(x + at, chosen, size, scratch.get());
            sums.add(run_moments(scratch.get(), {1, 0, size}, shift, false));
        });
        return sums;
    }

    void find_whole(int64_t begin, int64_t end) {
        statistics.find(begin, end, [&](int64_t p) { return guess_shift(p); }, [&](int64_t p, double shift) {
            return moments(p, 0, 0, all_runs(p), shift);
        });
    }
    void find_in_segments(int64_t pool, Sums* parts) {
        statistics.find(pool, pool + 1, [&](int64_t p) { return guess_shift(p); }, [&](int64_t p, double shift) {
            each_segment(p, [&](int64_t run, int64_t from, const Runs& all) {
                parts[segment(run, from)] = moments(p, run, from, all, shift);
            });
            return total(parts);
        });
    }
    Sums total(const Sums* parts) const {
        Sums sum;
        for (int64_t j = 0; j < segments; ++j) sum.add(parts[j]);
        return sum;
    }

    // ---- forward ------------------------------------------------------------------------------------------------

    void apply(int64_t pool, int64_t run, int64_t from, const Runs& all) {
        const int64_t c = channel(pool, run), at = start(pool) + run * stride() + from;
        const double mean = statistics.mean[pool], a = statistics.rstd[pool] * gamma_of<T>(call, c), b = beta_of<T>(call, c);
        with_compute<T>(fits_float<T>(mean, a, b), [&](auto zero) {
            apply_line(Line<decltype(zero)>(mean, a, b), pool, run, from, at, all);
        });
    }
    template <class Compute>
    INLINE void apply_line(Line<Compute> line, int64_t pool, int64_t run, int64_t from, int64_t at, const Runs& all) const {
        if constexpr (kHasPlain<Compute, T>) {
            if (!call.is_active()) {
                run_apply<Compute, false>(x + at, out + at, all, line, [](int64_t) { return Epilogue<T>{}; }, call.bypasses_caches);
                return clear_holes(out, pool, run, at, from, all);
            }
        }
        run_apply<Compute, true>(x + at, out + at, all, line, [&](int64_t r) {
            return epilogue(pool, run + r, at + r * all.stride, from);
        }, call.bypasses_caches);
    }

    void forward() {
        if (call.has_given_statistics()) return forward_given();
        if (!whole) {
            Scratch<Sums> parts(segments);
            for (int64_t p = 0; p < pools; ++p) {
                find_in_segments(p, parts.get());
                if (out) each_segment(p, [&](int64_t j, int64_t from, const Runs& all) { apply(p, j, from, all); });
            }
            return statistics.move_running();
        }
        each_slab(sizeof(T), [&](int64_t begin, int64_t end) {
            find_whole(begin, end);
            for (int64_t p = begin; out && p < end; ++p) {
                each_run(p, [&](int64_t j, int64_t from, const Runs& all) { apply(p, j, from, all); });
            }
        });
        statistics.move_running();
    }

    // In the order of memory, since no sums are needed first.
    void forward_given() {
        statistics.read();
        bool fits = true;
        for (int64_t c = 0; c < pools; ++c) {
            fits = fits && fits_float<T>(statistics.mean[c], statistics.rstd[c] * gamma_of<T>(call, c), beta_of<T>(call, c));
        }
        with_compute<T>(fits, [&](auto zero) {
            using Compute = decltype(zero);
            Scratch<Line<Compute>> lines(pools);
            for (int64_t c = 0; c < pools; ++c) {
                lines[c] = Line<Compute>(statistics.mean[c], statistics.rstd[c] * gamma_of<T>(call, c), beta_of<T>(call, c));
            }
            each_piece([&](int64_t p, int64_t j, int64_t from, const Runs& all) {
                apply_line(lines[p], p, j, from, (j * pools + p) * call.s + from, all);
            });
        });
    }

    // ---- backward -----------------------------------------------------------------------------------------------

    // Sums of a channel's g and g * (x - mean), over all its runs or a part of one.
    Sums grad_sums(int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t c = channel(pool, run), at = start(pool) + run * stride() + from;
        const double mean = statistics.mean[pool], a = rstd(pool) * gamma_of<T>(call, c), b = beta_of<T>(call, c);
        if (statistics.needs_mask()) return grad_sums_gathered(pool, run, from, all);
        const bool restart = call.mask != nullptr;
        if (!call.is_active()) {
            const auto nothing = [](int64_t) { return Epilogue<T>{}; };
            return run_grad_sums<double, false>(grad + at, x + at, all, mean, Line<double>(), nothing, restart);
        }
        const auto epilogue_of = [&](int64_t r) { return epilogue(pool, run + r, at + r * all.stride, from); };
        Sums sums;
        with_compute<T>(fits_float<T>(mean, a, b), [&](auto zero) {
            using Compute = decltype(zero);
            sums = run_grad_sums<Compute, true>(grad + at, x + at, all, mean, Line<Compute>(mean, a, b), epilogue_of, restart);
        });
        return sums;
    }
    Sums grad_sums_gathered(int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t c = channel(pool, run), size = least(kSegment, call.s);
        const double mean = statistics.mean[pool], a = rstd(pool) * gamma_of<T>(call, c), b = beta_of<T>(call, c);
        Sums sums;
        Scratch<T> scratch(4 * size);
        T *xs = scratch.get(), *gs = xs + size, *residuals = gs + size, *gradients = residuals + size;
        if (gradient && from == 0) {
            clear_holes(gradient, pool, run, start(pool) + run * stride(), 0, {all.count, all.stride, call.s});
        }
        each_gathered(pool, run, from, all, [&](int64_t at, const int64_t* chosen, int64_t count) {
            gather(x + at, chosen, count, xs);
            gather(grad + at, chosen, count, gs);
            if (residual) gather(residual + at, chosen, count, residuals);
            const Epilogue<T> epilogue{call.activation, residual ? residuals : nullptr, nullptr, gradient ? gradients : nullptr};
            const auto epilogue_of = [&](int64_t) { return epilogue; };
            const Runs runs{1, 0, count};
            if (!call.is_active()) {
                return sums.add(run_grad_sums<double, false>(gs, xs, runs, mean, Line<double>(), epilogue_of, false));
            }
            with_compute<T>(fits_float<T>(mean, a, b), [&](auto zero) {
                using Compute = decltype(zero);
                sums.add(run_grad_sums<Compute, true>(gs, xs, runs, mean, Line<Compute>(mean, a, b), epilogue_of, false));
            });
            for (int64_t i = 0; gradient && i < count; ++i) gradient[at + chosen[i]] = gradients[i];
        });
        return sums;
    }
    // Behind a loop that knows no holes: one of its own would round otherwise than that for dense runs.
    void clear_holes(T* to, int64_t pool, int64_t run, int64_t at, int64_t from, const Runs& all) const {
        if (!statistics.needs_mask()) return;
        for (int64_t r = 0; r < all.count; ++r, at += all.stride) {
            const float* counts = mask_of(pool, run + r) + from;
            for (int64_t i = 0; i < all.length; ++i) {
                if (!(counts[i] > 0)) clear(to + at, i, i + 1);
            }
        }
    }
    double rstd(int64_t pool) const { return const_cast<Statistics<T>&>(statistics).rstd[pool]; }

    void write_dx(int64_t pool, int64_t run, int64_t from, const Runs& all, const Slopes& slopes) const {
        const int64_t c = channel(pool, run), at = start(pool) + run * stride() + from;
        const double mean = statistics.mean[pool], a = rstd(pool) * gamma_of<T>(call, c), b = beta_of<T>(call, c);
        with_compute<T>(fits_float<T>(mean, a, b, slopes.c1, slopes.c2, slopes.reach), [&](auto zero) {
            using Compute = decltype(zero);
            const Line<Compute> line(mean, a, b), slope(mean, slopes.c2, slopes.c1);
            if (call.has_given_statistics() && !call.is_active()) {
                run_scale<Compute>(grad + at, out + at, all, a, call.bypasses_caches);
                return clear_holes(out, pool, run, at, from, all);
            }
            if constexpr (kHasPlain<Compute, T>) {
                if (!call.is_active()) {
                    run_dx<Compute, false>(grad + at, x + at, out + at, all, line, slope, [](int64_t) { return Epilogue<T>{}; },
                                           call.bypasses_caches);
                    return clear_holes(out, pool, run, at, from, all);
                }
            }
            run_dx<Compute, true>(grad + at, x + at, out + at, all, line, slope, [&](int64_t r) {
                return epilogue(pool, run + r, at + r * all.stride, from);
            }, call.bypasses_caches, call.has_given_statistics());
        });
    }

    void backward() {
        statistics.read();
        const bool needs_sums = !call.has_given_statistics() || call.dgamma || call.dbeta || statistics.is_active();
        if (!needs_sums) {
            return each_piece([&](int64_t p, int64_t j, int64_t from, const Runs& all) { write_dx(p, j, from, all, {}); });
        }
        // One entry for each channel of a pool.
        const int64_t channels = by_sample ? 1 : runs;
        Scratch<Sums> sums(pools * channels, true);
        if (whole) {
            each_slab(2 * sizeof(T), [&](int64_t begin, int64_t end) {
                for (int64_t p = begin; p < end; ++p) {
                    for (int64_t j = 0; j < channels; ++j) {
                        sums[p * channels + j] = grad_sums(p, j, 0, cut(p, j, {by_sample ? runs : 1, stride(), call.s}));
                    }
                }
                for (int64_t p = begin; out && p < end; ++p) {
                    const Slopes slopes = slopes_of(p, &sums[p * channels], channels);
                    each_run(p, [&](int64_t j, int64_t from, const Runs& all) { write_dx(p, j, from, all, slopes); });
                }
            });
        } else {
            Scratch<Sums> parts(segments);
            for (int64_t p = 0; p < pools; ++p) {
                each_segment(p, [&](int64_t j, int64_t from, const Runs& all) {
                    parts[segment(j, from)] = grad_sums(p, j, from, all);
                });
                for (int64_t j = 0; j < segments; ++j) sums[p * channels + (by_sample ? 0 : j / pieces)].add(parts[j]);
                if (!out) continue;
                const Slopes slopes = slopes_of(p, &sums[p * channels], channels);
                each_segment(p, [&](int64_t j, int64_t from, const Runs& all) { write_dx(p, j, from, all, slopes); });
            }
        }
        write_parameter_gradients(sums, channels);
    }

    Slopes slopes_of(int64_t pool, const Sums* sums, int64_t channels) {
        if (call.has_given_statistics()) return {};
        Sums scaled;
        for (int64_t j = 0; j < channels; ++j) {
            const double gamma = gamma_of<T>(call, channel(pool, j));
            scaled.add({sums[j].first * gamma, sums[j].second * gamma});
        }
        return {call.centred, scaled, rstd(pool), statistics.count(pool)};
    }

    // A channel's sums over samples, in their order.
    void write_parameter_gradients(Scratch<Sums>& sums, int64_t channels) {
        if (!call.dgamma && !call.dbeta) return;
        const int64_t samples = by_sample ? 1 : call.n;
        for (int64_t c = 0; c < call.channels(); ++c) {
            double dgamma = 0, dbeta = 0;
            for (int64_t n = 0; n < samples; ++n) {
                const int64_t p = by_sample ? c : n * call.g + c / call.k;
                const Sums& of = sums[p * channels + (by_sample ? 0 : c % call.k)];
                dbeta += of.first;
                dgamma += of.second * rstd(p);
            }
            write_gradients<T>(call, c, dgamma, dbeta);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
