// What follows a norm: relu, leaky relu, silu, gelu (by erf), and their derivatives, on a vector of floats or doubles.
#pragma once

#include <limits>

#include "call.h"
#include "lanes.h"

namespace anynorm::ANYNORM_TARGET {

constexpr double kLeak = 0.01;  // slope of leaky relu below 0, torch's default

template <class V>
struct Math;
template <>
struct Math<Singles> {
    using Int = SingleIndices;
    using Scalar = float;
    static constexpr float kLeast = -87, kMost = 88, kMagic = 12582912;  // 1.5 * 2^23: adding it rounds to whole numbers
    static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
    static constexpr int kMantissa = 23, kBias = 127, kTerms = 7, kErfcTerms = 13;
};
template <>
struct Math<Lanes> {
    using Int = Indices;
    using Scalar = double;
    static constexpr double kLeast = -708, kMost = 709, kMagic = 6755399441055744;  // 1.5 * 2^52
    static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
    static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13, kErfcTerms = 25;
};

// exp(v) = 2^n * exp(r), n whole and |r| <= ln(2) / 2, by the Taylor series of exp(r). Beyond kLeast and kMost it is 0 and
// infinity exactly, so that no factor of 1e38 behind it makes a value of what is none.
template <class V>
INLINE V exponential(V v) {
    using M = Math<V>;
    using S = typename M::Scalar;
    const V clamped = v < M::kLeast ? V{} + M::kLeast : (v > M::kMost ? V{} + M::kMost : v);
    const V shifted = clamped * static_cast<S>(1.44269504088896340736) + M::kMagic;
    const V n = shifted - M::kMagic;
    const V r = (clamped - n * M::kLn2High) - n * M::kLn2Low;
    V sum = V{} + 1;
    for (int k = M::kTerms; k > 0; --k) sum = sum * r * static_cast<S>(1.0 / k) + 1;
    const auto power = __builtin_convertvector(n, typename M::Int) + M::kBias;
    const V found = sum * bits_of<V>(power << M::kMantissa);
    return v < M::kLeast ? V{} : (v > M::kMost ? V{} + std::numeric_limits<S>::infinity() : found);
}

// (1 + 2x) * exp(x^2) * erfc(x) for x >= 0, a polynomial in q = (x - 3.75) / (x + 3.75), after Shepherd and Laframboise
// 1981; fitted at 64 Chebyshev nodes: off by 5e-9 with 13 terms and 5e-18 with 25.
constexpr double kErfc13[] = {
    1.23751263003269936,    -0.140240658321386411,  0.0035854953140630898,  0.0822784199834704666,
    -0.108805227549499531,  0.0922907695913037827,  -0.0586854404936311076, 0.0284092523641272583,
    -0.0097700871833682331, 0.00167591221798113093, 0.000330167456272280127, -0.000224116746744160107,
    0.000022046718905694217};
constexpr double kErfc25[] = {
    1.23751263083782758,     -0.140240598585546962,   0.00358541548546442938,  0.0822767384901452077,
    -0.108803930141748858,   0.0923043211603774786,   -0.0586933985896367681,  0.0283622774189563937,
    -0.00974657955802933517, 0.00175562585289536824,  0.00029371366559169653,  -0.000290154080541145234,
    0.0000516490988913733095, 0.0000223842391558895755, -0.0000114441462345060929, -9.73559898137086031e-7,
    1.75163764366886868e-6,  -5.72182290277556467e-8, -2.58668501632970423e-7, 2.32635076014995141e-8,
    3.86753305131500025e-8,  -3.74420963955702367e-9, -5.17398877380547562e-9, 3.11143261995318748e-10,
    4.2514690190327067e-10};

// The normal distribution at v, and its density times sqrt(2 pi).
template <class V>
struct Normal {
    V distribution, bell;
    INLINE explicit Normal(V v) {
        using M = Math<V>;
        using S = typename M::Scalar;
        constexpr auto& terms = []() -> auto& {
            if constexpr (M::kErfcTerms == 13) return kErfc13;
            else return kErfc25;
        }();
        const V size = (v < 0 ? -v : v) * static_cast<S>(0.70710678118654752440);
        const V x = size > 40 ? V{} + 40 : size;  // exp(-1600) is 0 in double as well
        const V q = (x - static_cast<S>(3.75)) / (x + static_cast<S>(3.75));
        V sum = V{} + static_cast<S>(terms[M::kErfcTerms - 1]);
        for (int k = M::kErfcTerms - 2; k >= 0; --k) sum = sum * q + static_cast<S>(terms[k]);
        bell = exponential(-x * x);
        const V tail = bell * sum / (x * 4 + 2);
        distribution = v < 0 ? tail : 1 - tail;
    }
};

template <class V>
INLINE V sigmoid(V v) {
    return 1 / (1 + exponential(-v));
}

// What takes many instructions is written once, not in every loop.
template <class V>
__attribute__((noinline)) V silu(V v) {
    return v * sigmoid(v);
}
template <class V>
__attribute__((noinline)) V gelu(V v) {
    return v * Normal<V>(v).distribution;
}
template <class V>
__attribute__((noinline)) V silu_derivative(V v) {
    const V s = sigmoid(v);
    return s * (1 + v * (1 - s));
}
template <class V>
__attribute__((noinline)) V gelu_derivative(V v) {
    using S = typename Math<V>::Scalar;
    const Normal<V> normal(v);
    return normal.distribution + v * normal.bell * static_cast<S>(0.39894228040143267794);
}

// A NaN stays one.
template <class V>
INLINE V activate(int activation, V v) {
    using S = typename Math<V>::Scalar;
    switch (activation) {
        case kRelu: return v < 0 ? V{} : v;
        case kLeakyRelu: return v < 0 ? v * static_cast<S>(kLeak) : v;
        case kSilu: return silu(v);
        case kGelu: return gelu(v);
        default: return v;
    }
}

// g times the derivative. Relu's is chosen, not multiplied: as in torch, 0 times an infinite g is 0.
template <class V>
INLINE V activate_backward(int activation, V g, V v) {
    using S = typename Math<V>::Scalar;
    switch (activation) {
        case kRelu: return v <= 0 ? V{} : g;
        case kLeakyRelu: return v > 0 ? g : g * static_cast<S>(kLeak);
        case kSilu: return g * silu_derivative(v);
        case kGelu: return g * gelu_derivative(v);
        default: return g;
    }
}

}  // namespace anynorm::ANYNORM_TARGET
