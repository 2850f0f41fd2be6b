// What the walks share: scratch memory, threads, which precision serves, parameters and the slopes of backward.
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
