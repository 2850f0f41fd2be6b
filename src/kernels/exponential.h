// exp(v) and exp(v) - 1 of a vector of floats or doubles, and the constants of either.
#pragma once

#include "lanes.h"

namespace anynorm::ANYNORM_TARGET {

template <class V>
struct Math;
template <>
struct Math<Singles> {
    using Int = SingleIndices;
    using Scalar = float;
    static constexpr float kLeast = -88, kMost = 89, kMagic = 12582912;  // 1.5 * 2^23: adding it rounds to whole numbers
    static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
    static constexpr int kMantissa = 23, kBias = 127, kTerms = 7, kErfcTerms = 13;
};
template <>
struct Math<Lanes> {
    using Int = Indices;
    using Scalar = double;
    static constexpr double kLeast = -709, kMost = 710, kMagic = 6755399441055744;  // 1.5 * 2^52
    static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
    static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13, kErfcTerms = 25;
};

// 1 / k!
constexpr auto kInverseFactorials = [] {
    struct {
        double of[14];
    } found{{1}};
    for (int k = 1; k < 14; ++k) found.of[k] = found.of[k - 1] / k;
    return found;
}();

// 2^n of kMagic + n, whose last bits are those of n.
template <class V>
INLINE V power_of_two(V shifted) {
    using M = Math<V>;
    return bits_of<V>((bits_of<typename M::Int>(shifted) + M::kBias) << M::kMantissa);
}

// exp(v) = 2^n * exp(r), n whole and |r| <= ln(2) / 2, by the Taylor series of exp(r). At kLeast and kMost the bits of 2^n are
// those of 0 and infinity: exactly, so that no factor of 1e38 behind it makes a value of what is none.
template <class V>
INLINE V exponential(V v) {
    using M = Math<V>;
    using S = typename M::Scalar;
    const V clamped = v < M::kLeast ? V{} + M::kLeast : (v > M::kMost ? V{} + M::kMost : v);
    const V shifted = clamped * static_cast<S>(1.44269504088896340736) + M::kMagic;
    const V n = shifted - M::kMagic;
    const V r = (clamped - n * M::kLn2High) - n * M::kLn2Low;
    V sum = V{} + static_cast<S>(kInverseFactorials.of[M::kTerms]);
    for (int k = M::kTerms - 1; k >= 0; --k) sum = sum * r + static_cast<S>(kInverseFactorials.of[k]);
    return sum * power_of_two(shifted);
}

// exp(v) - 1 for v <= 0 = 2^n * (exp(r) - 1) + (2^n - 1), which keeps the digits of a small v.
template <class V>
INLINE V exponential_minus_one(V v) {
    using M = Math<V>;
    using S = typename M::Scalar;
    const V clamped = v < M::kLeast ? V{} + M::kLeast : v;
    const V shifted = clamped * static_cast<S>(1.44269504088896340736) + M::kMagic;
    const V n = shifted - M::kMagic;
    const V r = (clamped - n * M::kLn2High) - n * M::kLn2Low;
    V sum = V{} + static_cast<S>(kInverseFactorials.of[M::kTerms]);
    for (int k = M::kTerms - 1; k > 0; --k) sum = sum * r + static_cast<S>(kInverseFactorials.of[k]);
    const V scale = power_of_two(shifted);
    return scale * (r * sum) + (scale - 1);
}

}  // namespace anynorm::ANYNORM_TARGET
