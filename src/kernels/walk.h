// What the walks share: room, threads, and how sums become moments and coefficients.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "call.h"
#include "loops.h"
#include "threads.h"

namespace anynorm::ANYNORM_TARGET {

// Parameters are as wide as x where x is double, else float.
template <class T>
struct ParameterOf {
    using type = float;
};
template <>
struct ParameterOf<double> {
    using type = double;
};
template <class T>
using Parameter = typename ParameterOf<T>::type;

// Elements that are worth a task, and below which threads cost more than they bring.
constexpr int64_t kTask = 1 << 14;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for `size` values; freed with its owner.
template <class V>
class Room {
  public:
    explicit Room(int64_t size, bool zero = false) {
        const size_t bytes = static_cast<size_t>(most(size, 1)) * sizeof(V);
        data_ = static_cast<V*>(zero ? std::calloc(bytes, 1) : std::malloc(bytes));
        if (!data_) throw std::bad_alloc();
    }
    ~Room() { std::free(data_); }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    V* get() { return data_; }
    V& operator[](int64_t i) { return data_[i]; }

  private:
    V* data_;
};

// body(begin, end) over [0, total) in steps that depend on nothing but the sizes, from any number of threads.
template <class Body>
void share(const Call& call, int64_t total, int64_t elements_each, Body body) {
    const int64_t step = most(1, kTask / most(1, elements_each));
    struct Context {
        Body& body;
        int64_t total, step;
    } context{body, total, step};
    auto run = [](void* argument, int64_t task) {
        auto& c = *static_cast<Context*>(argument);
        c.body(task * c.step, least(c.total, (task + 1) * c.step));
    };
    run_tasks(call.threads, divide_up(total, step), run, &context);
}

// Whether the squares about 0 (or another shift) cost the deviations too many digits: a mean of a thousand standard
// deviations takes 6 of the 15 that a double has. Sums of doubles round as they go, and are always taken twice.
template <class T>
INLINE bool cancels(const Call& call, double m2, double squares) {
    return call.centred && (sizeof(T) == 8 || m2 < 1e-6 * squares);
}

// What is written is computed in float where x is narrow and every coefficient is far from a float's limits.
INLINE bool is_tame(double coefficient) {
    const double size = std::fabs(coefficient);
    return size == 0 || (size > 1e-30 && size < 1e30);
}
template <class T, class... Coefficients>
INLINE bool fits_float(double mean, Coefficients... coefficients) {
    return sizeof(T) < 8 && std::fabs(mean) < 1e30 && (is_tame(coefficients) && ...);
}

// What a norm needs of x beside x, one entry per pool. Given statistics take the place of the pools'.
template <class T>
struct Statistics {
    const Call& call;
    Room<double> own_mean, rstd;
    double* mean;

    explicit Statistics(const Call& call)
        : call(call), own_mean(call.mean ? 0 : call.pools(), true), rstd(call.pools()), mean(call.mean) {
        if (!mean) mean = own_mean.get();
    }

    // From the sums about a shift. False where too little was left of the squares: sum again, about the mean.
    bool finish(int64_t pool, const Sums& sums, double shift) {
        const double count = static_cast<double>(call.count());
        double m2 = sums.second;
        if (call.centred) {
            mean[pool] = shift + sums.first / count;
            m2 -= sums.first * (sums.first / count);
        }
        put(pool, m2 < 0 ? 0 : m2);
        return !cancels<T>(call, m2, sums.second);
    }
    void put(int64_t pool, double m2) {
        call.m2[pool] = m2;
        rstd[pool] = 1 / std::sqrt(m2 / static_cast<double>(call.count()) + call.eps);
    }

    // From what a forward kept.
    void read() {
        for (int64_t p = 0; p < call.pools(); ++p) put(p, call.m2[p]);
    }
    void read_given() {
        const auto* given_mean = static_cast<const Parameter<T>*>(call.given_mean);
        const auto* given_var = static_cast<const Parameter<T>*>(call.given_var);
        for (int64_t c = 0; c < call.g; ++c) {
            mean[c] = given_mean[c];
            rstd[c] = 1 / std::sqrt(static_cast<double>(given_var[c]) + call.eps);
        }
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
INLINE void put_gradients(const Call& call, int64_t channel, double dgamma, double dbeta) {
    if (call.dgamma) static_cast<Parameter<T>*>(call.dgamma)[channel] = static_cast<Parameter<T>>(dgamma);
    if (call.dbeta) static_cast<Parameter<T>*>(call.dbeta)[channel] = static_cast<Parameter<T>>(dbeta);
}

// dx = a * g - c1 - (x - mean) * c2, from the pool's sums of gamma * g and gamma * g * (x - mean)
struct Slopes {
    double c1 = 0, c2 = 0;
    Slopes() = default;
    INLINE Slopes(const Call& call, const Sums& scaled, double rstd) {
        const double count = static_cast<double>(call.count());
        c1 = call.centred ? rstd * (scaled.first / count) : 0;
        c2 = rstd * rstd * (rstd * (scaled.second / count));
    }
};

}  // namespace anynorm::ANYNORM_TARGET
