// What the walks share: scratch memory, threads, and how sums become moments, coefficients and gradients.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "call.h"
#include "runs.h"
#include "threads.h"

namespace anynorm::ANYNORM_TARGET {

// Parameters are as wide as x where x is double, else float.
template <class T>
using Parameter = std::conditional_t<sizeof(T) == 8, double, float>;
template <class T>
constexpr bool kIsNarrow = sizeof(T) < 8;

// Elements that are worth a task.
constexpr int64_t kTask = 1 << 14;
// The most that one thread takes alone: to wake another costs 8 us and more, and milliseconds where no core is free.
constexpr int64_t kAlone = 3 * kTask;
// The most that is read twice while it is in a core's own cache.
constexpr int64_t kSlabBytes = 1 << 18;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory for `size` values, zero where asked, freed with its owner. Up to 512 bytes lie in the object itself: small
// norms would spend longer in malloc than in their sums.
template <class V>
class Scratch {
  public:
    explicit Scratch(int64_t size, bool zero = false) {
        const size_t bytes = static_cast<size_t>(most(size, 1)) * sizeof(V);
        if (bytes <= sizeof(own_)) {
            data_ = reinterpret_cast<V*>(own_);
            if (zero) std::memset(own_, 0, bytes);
            return;
        }
        data_ = static_cast<V*>(zero ? std::calloc(bytes, 1) : std::malloc(bytes));
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() {
        if (data_ != reinterpret_cast<V*>(own_)) std::free(data_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    V* get() { return data_; }
    V& operator[](int64_t i) { return data_[i]; }

  private:
    alignas(64) char own_[512];
    V* data_;
};

// body(begin, end) over [0, total), shared among threads in steps that depend on the sizes alone: so the number of threads
// changes no bit.
template <class Body>
void parallel_for(const Call& call, int64_t total, int64_t elements_each, Body body, bool backwards = false) {
    const int64_t step = most(1, kTask / most(1, elements_each));
    if (total <= step) return body(int64_t{0}, total);
    struct Context {
        Body& body;
        int64_t total, step;
        bool bypasses_caches;
    } context{body, total, step, call.bypasses_caches};
    auto run = [](void* argument, int64_t task) {
        auto& c = *static_cast<Context*>(argument);
        c.body(task * c.step, least(c.total, (task + 1) * c.step));
        if (c.bypasses_caches) fence_results();
    };
    const int threads = total <= kAlone / most(1, elements_each) ? 1 : call.threads;
    run_tasks(threads, divide_up(total, step), run, &context, backwards);
}

// What sums are taken about: first a guess, then, where too little was left of the squares, the mean that came out. Doubles
// have no wider type and are always summed twice.
enum Attempt : int { kGuess = 0, kMean = 1 };

// Results are computed in float where x is narrow and every coefficient is far from a float's limits: twice as many at once.
INLINE bool is_within_float(double coefficient) {
    const double size = std::fabs(coefficient);
    return size == 0 || (size > 1e-30 && size < 1e30);
}
template <class T, class... Coefficients>
INLINE bool fits_float(double mean, Coefficients... coefficients) {
    return kIsNarrow<T> && std::fabs(mean) < 1e30 && (is_within_float(coefficients) && ...);
}
// The same of vectors: lanes are -1 where it is so.
INLINE Indices are_within_float(Lanes coefficients) {
    const Lanes size = coefficients < 0 ? -coefficients : coefficients;
    return (size == 0) | ((size > 1e-30) & (size < 1e30));
}
template <class T, class... Coefficients>
INLINE Indices fit_float(Lanes mean, Coefficients... coefficients) {
    return (kIsNarrow<T> ? ~Indices{} : Indices{}) & (mean < 1e30) & (mean > -1e30) & (are_within_float(coefficients) & ...);
}
// Whether there are loops of their own for calls in which nothing follows the norm. Else those with an activation serve,
// one that is the identity: a module half as large, and slower only where numbers near a float's limits are rare.
#if defined(ANYNORM_SMALL)
template <class Compute, class T>
constexpr bool kHasPlain = false;
#else
template <class Compute, class T>
constexpr bool kHasPlain = !kIsNarrow<T> || std::is_same_v<Compute, float>;
#endif

// body(float or double), as the coefficients need.
template <class T, class Body>
INLINE void with_compute(bool fits, Body body) {
    if constexpr (kIsNarrow<T>) {
        if (fits) return body(float{});
    }
    body(double{});
}

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

template <class T>
INLINE double gamma_of(const Call& call, int64_t channel) {
    return call.gamma ? static_cast<const Parameter<T>*>(call.gamma)[channel] : 1.0;
}
template <class T>
INLINE double beta_of(const Call& call, int64_t channel) {
    return call.beta ? static_cast<const Parameter<T>*>(call.beta)[channel] : 0.0;
}
template <class T>
INLINE void write_gradients(const Call& call, int64_t channel, double dgamma, double dbeta) {
    if (call.dgamma) static_cast<Parameter<T>*>(call.dgamma)[channel] = static_cast<Parameter<T>>(dgamma);
    if (call.dbeta) static_cast<Parameter<T>*>(call.dbeta)[channel] = static_cast<Parameter<T>>(dbeta);
}

// dx = a * g - c1 - (x - mean) * c2, from the pool's sums of gamma * g and gamma * g * (x - mean)
struct Slopes {
    double c1 = 0, c2 = 0;
    double reach = 0;  // c2 / rstd: (x - mean) * c2 leaves no float's range where it is far from a float's limits
    Slopes() = default;
    INLINE Slopes(bool centred, const Sums& scaled, double rstd, double count) {
        if (!(count > 0)) return;
        c1 = centred ? rstd * (scaled.first / count) : 0;
        reach = rstd * (rstd * (scaled.second / count));
        c2 = rstd * reach;
    }
};
// The same of neighbouring pools.
struct ManySlopes {
    Lanes c1{}, c2{}, reach{};
    ManySlopes() = default;
    INLINE ManySlopes(bool centred, Lanes first, Lanes second, Lanes rstd, Lanes count) {
        const Lanes by_one = first / count, by_x = second / count;
        c1 = centred ? (count > 0 ? rstd * by_one : Lanes{}) : Lanes{};
        reach = count > 0 ? rstd * (rstd * by_x) : Lanes{};
        c2 = count > 0 ? rstd * reach : Lanes{};
    }
};

}  // namespace anynorm::ANYNORM_TARGET
