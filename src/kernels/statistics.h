// What a norm needs of x beside x: mean and rstd of each pool, from its sums or as they were given, and running averages.
#pragma once

#include "walk.h"

namespace anynorm::ANYNORM_TARGET {

// Sums of some pools about a shift of each.
struct RawSums {
    Scratch<double> scratch;
    double *first, *second, *shift;
    explicit RawSums(int64_t size) : scratch(3 * size), first(scratch.get()), second(first + size), shift(second + size) {}
    INLINE void put(int64_t i, const Sums& sums, double about) {
        first[i] = sums.first;
        second[i] = sums.second;
        shift[i] = about;
    }
};

// The positions that count, in their order. Sums are taken over these, wherever they are: so no padding changes a bit.
INLINE int64_t find_counted_indices(const float* mask, int64_t size, int64_t* indices) {
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
        indices[found] = i;
        found += mask[i] > 0;
    }
    return found;
}

// What a norm needs of x beside x, one entry per pool. Given statistics take the place of the pools'.
template <class T>
struct Statistics {
    const Call& call;
    const int64_t pools = call.has_given_statistics() ? call.g : call.pools();
    Scratch<double> own_mean, own_m2, rstd, counts;
    // Positions of a sample, which have a mask value each: its rows where samples and positions were made one axis.
    const int64_t positions = call.s > 1 ? call.s : most(1, call.sample_rows);
    const int64_t samples = call.mask ? call.n * call.s / positions : 0;
    Scratch<int64_t> own_extents{samples}, counted{samples};  // of each sample how many positions count
    const int64_t* extents = call.mask ? own_extents.get() : nullptr;  // of each sample up to where anything counts
    bool is_dense = find_extents();  // whether all positions up to there count, so that the mask need not be looked at
    double *mean, *m2;
    double all = static_cast<double>((call.pool_n ? call.n : call.k) * call.s);

    explicit Statistics(const Call& call)
        : call(call), own_mean(call.mean ? 0 : pools, true), own_m2(call.m2 ? 0 : pools), rstd(pools),
          counts(call.mask ? call.n : 0), mean(call.mean ? call.mean : own_mean.get()),
          m2(call.m2 ? call.m2 : own_m2.get()) {
        if (call.mask) count_positions();
    }

    // Elements of a pool that count.
    INLINE double count(int64_t pool) {
        if (!call.mask) return all;
        return counts[call.pool_n ? 0 : pool / call.g];
    }
    void count_positions() {
        for (int64_t n = 0; n < call.n; ++n) {
            int64_t found = 0;
            for (int64_t s = 0; s < call.s; ++s) found += call.mask[n * call.s + s] > 0;
            counts[n] = static_cast<double>(found * (call.pool_n ? 1 : call.k));
            if (call.pool_n && n > 0) counts[0] += counts[n];
        }
    }
    bool find_extents() {
        bool is_dense = true;
        for (int64_t i = 0; i < samples; ++i) {
            const float* mask = call.mask + i * positions;
            int64_t extent = positions, found = 0;
            while (extent > 0 && !(mask[extent - 1] > 0)) --extent;
            for (int64_t s = 0; s < extent; ++s) found += mask[s] > 0;
            own_extents[i] = extent;
            counted[i] = found;
            is_dense = is_dense && found == extent;
        }
        return is_dense;
    }
    bool needs_mask() const { return call.mask && !is_dense; }
    // Whether the loops for a bare norm will not do.
    bool is_active() const { return call.is_active() || needs_mask(); }

    // The same of neighbouring pools.
    template <class Some>
    INLINE Lanes counts_of(int64_t pool, Some) {
        if (!call.mask) return Lanes{} + all;
        if (call.pool_n) return Lanes{} + counts[0];
        Lanes found;
        for (int i = 0; i < W; ++i) found[i] = counts[least(pool + i, pools - 1) / call.g];
        return found;
    }

    // Mean, m2 and rstd of pools from their sums about shifts. False where a pool's sums cannot be trusted: too little was
    // left of the squares.
    bool finish(int64_t begin, int64_t end, const RawSums& raw, int attempt) {
        Indices wrong{};
        sweep<W, true>(end - begin, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const int64_t p = begin + i;
            const Lanes first = load(raw.first + i, some), second = load(raw.second + i, some), size = counts_of(p, some);
            const Lanes share = size > 0 ? 1 / size : Lanes{} + 1, step = call.centred ? first * share : Lanes{};
            const Lanes deviations = second - first * step, kept = deviations < 0 ? Lanes{} : deviations;
            if (call.centred) store(mean + p, load(raw.shift + i, some) + step, some);
            store(m2 + p, kept, some);
            store(rstd.get() + p, 1 / square_root(kept * share + call.eps), some);
            wrong |= are_wrong(deviations, second, attempt);
        });
        return !has_any(wrong);
    }
    // The shift may be ten standard deviations off: that costs two of sixteen digits.
    INLINE bool is_good(double deviations, double squares, int attempt) const {
        return attempt == kMean || !call.centred || (kIsNarrow<T> && deviations >= 0.01 * squares);
    }
    INLINE Indices are_wrong(Lanes deviations, Lanes squares, int attempt) const {
        if (attempt == kMean || !call.centred) return Indices{};
        return kIsNarrow<T> ? ~(deviations >= 0.01 * squares) : ~Indices{};
    }
    void set_m2(int64_t pool, double deviations) {
        m2[pool] = deviations;
        const double size = count(pool);
        rstd[pool] = 1 / std::sqrt(deviations / (size > 0 ? size : 1) + call.eps);
    }

    // The same of neighbouring pools.
    template <class Some>
    INLINE void set_m2(int64_t pool, Lanes deviations, Some some) {
        const Lanes size = counts_of(pool, some);
        store(m2 + pool, deviations, some);
        store(rstd.get() + pool, 1 / square_root(deviations / (size > 0 ? size : Lanes{} + 1) + call.eps), some);
    }

    // Moments of some pools by shift_of(pool) and sums_of(pool, shift): of all of them at once, then again and alone where
    // that was not good enough.
    template <class GuessOf, class SumsOf>
    void find(int64_t begin, int64_t end, GuessOf shift_of, SumsOf sums_of) {
        RawSums raw(end - begin);
        for (int64_t p = begin; p < end; ++p) {
            const double shift = kIsNarrow<T> ? shift_of(p) : 0;
            raw.put(p - begin, sums_of(p, shift), shift);
        }
        if (finish(begin, end, raw, kGuess)) return;
        for (int64_t p = begin; p < end; ++p) {
            const int64_t i = p - begin;
            if (is_good(raw.second[i] - raw.first[i] * (raw.first[i] / count_or_one(p)), raw.second[i], kGuess)) continue;
            RawSums again(1);
            again.put(0, sums_of(p, mean[p]), mean[p]);
            finish(p, p + 1, again, kMean);
        }
    }
    double count_or_one(int64_t pool) { return count(pool) > 0 ? count(pool) : 1; }

    // A given variance takes the place of m2.
    template <class Given>
    void copy_given() {
        sweep<W, true>(pools, [&](int64_t c, auto some, int) INLINE_LAMBDA {
            store(mean + c, load(static_cast<const Given*>(call.given_mean) + c, some), some);
            store(m2 + c, load(static_cast<const Given*>(call.given_var) + c, some), some);
        });
    }
    // Fills rstd, and means and variances where these are given, from what a forward kept or what is given.
    void read() {
        if (call.statistics == kGivenAsParameters) copy_given<Parameter<T>>();
        if (call.statistics == kGivenAsDouble) copy_given<double>();
        const double scale = call.has_given_statistics() ? 1 : 1 / all;
        if (call.mask && !call.has_given_statistics()) {
            for (int64_t p = 0; p < pools; ++p) set_m2(p, m2[p]);
        } else {
            sweep<W, true>(pools, [&](int64_t p, auto some, int) INLINE_LAMBDA {
                store(rstd.get() + p, 1 / square_root(load(m2 + p, some) * scale + call.eps), some);
            });
        }
    }

    // running = (1 - momentum) * running + momentum * new, rounded once; new variances are divided by their count - 1.
    // Pools of several samples are averaged. Where no position counts, nothing changes.
    void move_running() {
        if (!call.running_mean) return;
        const int64_t samples = pools / call.g;
        double counted = 0;
        for (int64_t n = 0; n < samples; ++n) counted += count(n * call.g) > 0;
        if (counted == 0) return;
        const auto move = [&](void* running, int64_t c, Lanes value, auto some) INLINE_LAMBDA {
            auto* old = static_cast<Parameter<T>*>(running) + c;
            store(old, load(old, some) * (1 - call.momentum) + value / counted * call.momentum, some);
        };
        sweep<W, true>(call.g, [&](int64_t c, auto some, int) INLINE_LAMBDA {
            Lanes means{}, variances{};
            for (int64_t n = 0; n < samples; ++n) {
                const int64_t p = n * call.g + c;
                const double size = count(n * call.g);  // of all pools of a sample
                if (!(size > 0)) continue;
                means += load(mean + p, some);
                variances += load(m2 + p, some) / (size > 1 ? size - 1 : 1);
            }
            move(call.running_mean, c, means, some);
            move(call.running_var, c, variances, some);
        });
    }
};

}  // namespace anynorm::ANYNORM_TARGET
