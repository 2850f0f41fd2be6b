// The walk along contiguous runs whose gamma and beta are constant: batch, instance and group norm, channels first.
#pragma once

#include "channels.h"
#include "positions.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Rows : Positions<T> {
    // `this->` below where g++ 12 does not find these in a generic lambda.
    using Here = Positions<T>;
    using Here::call, Here::pools, Here::runs, Here::elements, Here::segments, Here::pieces, Here::whole, Here::by_sample;
    using Here::stride, Here::start, Here::channel, Here::segment, Here::cut, Here::all_runs, Here::each_run, Here::each_segment;
    using Here::each_slab, Here::each_piece, Here::each_row_of_pools;
    using Here::statistics, Here::x, Here::residual, Here::grad, Here::out, Here::gradient;
    using Here::epilogue, Here::mean_of_first, Here::each_gathered, Here::each_dense, Here::clear_holes;
    // Where the values are by whose mean a shift is guessed: alike in every pool.
    struct Spots {
        int64_t runs, per_run, size, apart;
        double values;
    };

    int64_t channels = by_sample ? 1 : runs;  // of a pool
    Spots spots = find_spots();

    explicit Rows(const Call& call) : Positions<T>(call) {}

    // ---- moments ----------------------------------------------------------------------------------------------

    // The mean of a few values, exact where all are alike; of the first that count where some do not.
    double guess_shift(int64_t pool) const {
        if (!call.centred) return 0;
        if (call.mask) return mean_of_first(pool);
        const T* first = x + start(pool);
        Lanes sum{};
        for (int64_t j = 0; j < spots.runs; ++j) {
            const T* run = j > 0 && by_sample ? first + j * runs / spots.runs * stride() : first;
            for (int64_t u = 0; u < spots.per_run; ++u) {
                const T* here = run + spots.apart * u;
                sum += spots.size == W ? load(here, Full{}) : load(here, Part{spots.size});
            }
        }
        return add_lanes(sum) / spots.values;
    }
    Spots find_spots() const {
        const int64_t length = by_sample ? call.s : elements, wanted = most(1, least(8, elements / 512));
        const int64_t here = least(wanted, by_sample ? runs : 1), per_run = wanted / here, size = least(W, length);
        return {here, per_run, size, (length - size) / per_run, static_cast<double>(size * here * per_run)};
    }
    Sums moments(int64_t pool, int64_t run, int64_t from, const Runs& all, double shift) const {
        if (!statistics.needs_mask()) {
            return run_moments(x + start(pool) + run * stride() + from, all, shift, call.mask != nullptr);
        }
        Sums sums;
        Scratch<T> scratch(least(kSegment, call.s) + kGatherSlack);
        each_gathered(pool, run, from, all, [&](int64_t at, const uint8_t* counted, const int64_t* chosen, int64_t size) {
            gather(x + at, counted, call.s, chosen, size, scratch.get());
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

    // body(line) with a channel's line, of floats where these serve.
    template <class Body>
    INLINE void with_line(const Coefficients<T>& of, int64_t pool, int64_t run, Body body) const {
        const int64_t entry = of.entry(pool, run);
        if constexpr (kIsNarrow<T>) {
            if (!of.fits_float_at(entry)) return body(of.wide_line(pool, channel(pool, run)));
        }
        body(of.lines.at(entry));
    }
    void apply(const Coefficients<T>& of, int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t at = start(pool) + run * stride() + from;
        with_line(of, pool, run, [&](auto line) INLINE_LAMBDA { apply_line(line, pool, run, from, at, all); });
    }
    template <class Compute>
    INLINE void apply_line(Line<Compute> line, int64_t pool, int64_t run, int64_t from, int64_t at, const Runs& all) const {
        const auto line_of = [&](int64_t) INLINE_LAMBDA { return line; };
        if constexpr (kHasPlain<Compute, T>) {
            if (!call.is_active()) {
                return each_dense(pool, run, at, from, all,
                              [&](int64_t here, const Runs& runs, T* to, bool bypasses) INLINE_LAMBDA {
                    run_apply<Compute, false>(x + here, to, runs, line_of, [](int64_t) { return Epilogue<T>{}; }, bypasses);
                });
            }
        }
        run_apply<Compute, true>(x + at, out + at, all, line_of, [&](int64_t r) {
            return epilogue(pool, run + r, at + r * all.stride, from);
        }, call.bypasses_caches);
    }
    // Whether runs of neighbouring channels are taken in one loop: short ones would cost more to begin than to walk.
    bool has_neighbours(const Coefficients<T>& of) const { return !call.mask && call.s <= kSegment && of.serve_all(); }
    // The runs of `count` channels that follow one another, from a place in the tables and one in memory on.
    void apply_neighbours(const Coefficients<T>& of, int64_t entry, int64_t at, int64_t count) const {
        using Compute = typename Coefficients<T>::Compute;
        const Runs all{count, call.s, call.s};
        const auto line_of = [&](int64_t r) INLINE_LAMBDA { return of.lines.at(entry + r); };
        if constexpr (kHasPlain<Compute, T>) {
            if (!call.is_active()) {
                return run_apply<Compute, false>(x + at, out + at, all, line_of, [](int64_t) { return Epilogue<T>{}; },
                                                 call.bypasses_caches);
            }
        }
        run_apply<Compute, true>(x + at, out + at, all, line_of, [&](int64_t r) { return epilogue(0, 0, at + r * call.s, 0); },
                                 call.bypasses_caches);
    }

    void forward() {
        if (call.has_given_statistics()) return forward_given();
        if (!whole) {
            Scratch<Sums> parts(segments);
            for (int64_t p = 0; p < pools; ++p) {
                find_in_segments(p, parts.get());
                if (!out) continue;
                const Coefficients<T> of(statistics, p, p + 1, channels);
                each_segment(p, [&](int64_t j, int64_t from, const Runs& all) { apply(of, p, j, from, all); });
            }
            return statistics.move_running();
        }
        each_slab(sizeof(T), [&](int64_t begin, int64_t end) {
            find_whole(begin, end);
            if (!out) return;
            const Coefficients<T> of(statistics, begin, end, channels);
            if (!by_sample && has_neighbours(of)) return apply_neighbours(of, 0, start(begin), (end - begin) * channels);
            for (int64_t p = begin; p < end; ++p) {
                each_run(p, [&](int64_t j, int64_t from, const Runs& all) { apply(of, p, j, from, all); });
            }
        });
        statistics.move_running();
    }

    // In the order of memory, since no sums are needed first.
    void forward_given() {
        statistics.read();
        Coefficients<T> of(statistics, 0, pools, 1);
        of.fit_all_or_none();
        if (has_neighbours(of)) {
            return each_row_of_pools([&](int64_t p, int64_t at, int64_t count) { apply_neighbours(of, p, at, count); });
        }
        each_piece([&](int64_t p, int64_t j, int64_t from, const Runs& all) { apply(of, p, j, from, all); });
    }

    // ---- backward -----------------------------------------------------------------------------------------------

    // Sums of a channel's g and g * (x - mean), over all its runs or a part of one.
    Sums grad_sums(const Coefficients<T>& of, int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t at = start(pool) + run * stride() + from;
        const double mean = statistics.mean[pool];
        if (statistics.needs_mask()) return grad_sums_gathered(of, pool, run, from, all);
        const bool restart = call.mask != nullptr;
        if (!call.is_active()) {
            const auto nothing = [](int64_t) { return Epilogue<T>{}; };
            return run_grad_sums<double, false>(grad + at, x + at, all, mean, Line<double>(), nothing, restart);
        }
        const auto epilogue_of = [&](int64_t r) { return epilogue(pool, run + r, at + r * all.stride, from); };
        Sums sums;
        with_line(of, pool, run, [&](auto line) {
            sums = run_grad_sums<ComputeOf<decltype(line)>, true>(grad + at, x + at, all, mean, line, epilogue_of, restart);
        });
        return sums;
    }
    Sums grad_sums_gathered(const Coefficients<T>& of, int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t size = least(kSegment, call.s);
        const double mean = statistics.mean[pool];
        Sums sums;
        Scratch<T> scratch(4 * size + kGatherSlack);  // gathered in this order
        T *xs = scratch.get(), *gs = xs + size, *residuals = gs + size, *gradients = residuals + size;
        if (gradient && from == 0) {
            clear_holes(gradient, pool, run, start(pool) + run * stride(), 0, {all.count, all.stride, call.s});
        }
        each_gathered(pool, run, from, all, [&](int64_t at, const uint8_t* counted, const int64_t* chosen, int64_t count) {
            gather(x + at, counted, call.s, chosen, count, xs);
            gather(grad + at, counted, call.s, chosen, count, gs);
            if (residual) gather(residual + at, counted, call.s, chosen, count, residuals);
            const Epilogue<T> epilogue{call.activation, residual ? residuals : nullptr, nullptr, gradient ? gradients : nullptr};
            const auto epilogue_of = [&](int64_t) { return epilogue; };
            const Runs runs{1, 0, count};
            if (!call.is_active()) {
                return sums.add(run_grad_sums<double, false>(gs, xs, runs, mean, Line<double>(), epilogue_of, false));
            }
            with_line(of, pool, run, [&](auto line) {
                sums.add(run_grad_sums<ComputeOf<decltype(line)>, true>(gs, xs, runs, mean, line, epilogue_of, false));
            });
            for (int64_t i = 0; gradient && i < count; ++i) gradient[at + chosen[i]] = gradients[i];
        });
        return sums;
    }
    void write_dx(const Coefficients<T>& of, int64_t pool, int64_t run, int64_t from, const Runs& all) const {
        const int64_t at = start(pool) + run * stride() + from;
        with_line(of, pool, run, [&](auto line) {
            using Compute = ComputeOf<decltype(line)>;
            if (call.has_given_statistics() && !call.is_active()) {
                return each_dense(pool, run, at, from, all,
                              [&](int64_t here, const Runs& runs, T* to, bool bypasses) INLINE_LAMBDA {
                    run_scale<Compute>(grad + here, to, runs, line.scale, bypasses);
                });
            }
            const Line<Compute> slope = slope_of<Compute>(of, pool, run);
            const auto line_of = [&](int64_t) INLINE_LAMBDA { return line; };
            const auto slopes_of = [&](int64_t) INLINE_LAMBDA { return slope; };
            if constexpr (kHasPlain<Compute, T>) {
                if (!this->call.is_active()) {
                    return this->each_dense(pool, run, at, from, all,
                                  [&](int64_t here, const Runs& runs, T* to, bool bypasses) INLINE_LAMBDA {
                        const auto nothing = [](int64_t) { return Epilogue<T>{}; };
                        run_dx<Compute, false>(this->grad + here, this->x + here, to, runs, line_of, slopes_of, nothing, bypasses);
                    });
                }
            }
            run_dx<Compute, true>(grad + at, x + at, out + at, all, line_of, slopes_of, [&](int64_t r) {
                return epilogue(pool, run + r, at + r * all.stride, from);
            }, call.bypasses_caches, call.has_given_statistics());
        });
    }
    // As `apply_neighbours`, of dx.
    void write_dx_of_neighbours(const Coefficients<T>& of, int64_t at, int64_t count) const {
        using Compute = typename Coefficients<T>::Compute;
        const Runs all{count, call.s, call.s};
        const auto line_of = [&](int64_t r) INLINE_LAMBDA { return of.lines.at(r); };
        const auto slopes_of = [&](int64_t r) INLINE_LAMBDA { return of.slopes.at(r); };
        if constexpr (kHasPlain<Compute, T>) {
            if (!call.is_active()) {
                return run_dx<Compute, false>(grad + at, x + at, out + at, all, line_of, slopes_of,
                                              [](int64_t) { return Epilogue<T>{}; }, call.bypasses_caches);
            }
        }
        run_dx<Compute, true>(grad + at, x + at, out + at, all, line_of, slopes_of,
                              [&](int64_t r) { return epilogue(0, 0, at + r * call.s, 0); }, call.bypasses_caches);
    }

    template <class Compute>
    INLINE Line<Compute> slope_of(const Coefficients<T>& of, int64_t pool, int64_t run) const {
        if constexpr (std::is_same_v<Compute, typename Coefficients<T>::Compute>) return of.slopes.at(of.entry(pool, run));
        else return of.wide_slope(pool);
    }

    void backward() {
        statistics.read();
        const bool needs_sums = !call.has_given_statistics() || call.dgamma || call.dbeta || statistics.is_active();
        if (!needs_sums) {
            Coefficients<T> of(statistics, 0, pools, channels);
            of.find_slopes(nullptr, nullptr);
            return each_piece([&](int64_t p, int64_t j, int64_t from, const Runs& all) { write_dx(of, p, j, from, all); });
        }
        ChannelSums sums(pools * channels);
        whole ? backward_whole(sums) : backward_in_segments(sums);
        write_parameter_gradients<T>(call, statistics.rstd.get(), sums, by_sample ? 1 : call.n);
    }
    void backward_whole(ChannelSums& sums) {
        each_slab(2 * sizeof(T), [&](int64_t begin, int64_t end) {
            Coefficients<T> of(statistics, begin, end, channels);
            for (int64_t p = begin; p < end; ++p) {
                for (int64_t j = 0; j < channels; ++j) {
                    sums.add(p * channels + j, grad_sums(of, p, j, 0, cut(p, j, {by_sample ? runs : 1, stride(), call.s})));
                }
            }
            if (!out) return;
            of.find_slopes(sums.first + begin * channels, sums.second + begin * channels);
            if (!by_sample && has_neighbours(of)) return write_dx_of_neighbours(of, start(begin), (end - begin) * channels);
            for (int64_t p = begin; p < end; ++p) {
                each_run(p, [&](int64_t j, int64_t from, const Runs& all) { write_dx(of, p, j, from, all); });
            }
        });
    }
    void backward_in_segments(ChannelSums& sums) {
        Scratch<Sums> parts(segments);
        for (int64_t p = 0; p < pools; ++p) {
            Coefficients<T> of(statistics, p, p + 1, channels);
            each_segment(p, [&](int64_t j, int64_t from, const Runs& all) {
                parts[segment(j, from)] = grad_sums(of, p, j, from, all);
            });
            for (int64_t j = 0; j < segments; ++j) sums.add(p * channels + (by_sample ? 0 : j / pieces), parts[j]);
            if (!out) continue;
            of.find_slopes(sums.first + p * channels, sums.second + p * channels);
            each_segment(p, [&](int64_t j, int64_t from, const Runs& all) { write_dx(of, p, j, from, all); });
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
