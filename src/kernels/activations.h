// What follows a norm: the activations of `activations.py`, and their derivatives, on a vector of floats or doubles.
#pragma once

#include <type_traits>

#include "call.h"
#include "exponential.h"

namespace anynorm::ANYNORM_TARGET {

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
// s = sigmoid(v) and s * (1 - s), which loses no digits where s is near 1
template <class V>
struct Sigmoid {
    V s, spread;
    INLINE explicit Sigmoid(V v) {
        const V e = exponential(v < 0 ? v : -v);
        s = (v < 0 ? e : V{} + 1) / (1 + e);
        spread = e / ((1 + e) * (1 + e));
    }
};

// What takes many instructions is written once, not in every loop.
template <class V>
__attribute__((noinline)) V silu(V v) {
    return v / (1 + exponential(-v));
}
template <class V>
__attribute__((noinline)) V gelu(V v) {
    return v * Normal<V>(v).distribution;
}
template <class V>
__attribute__((noinline)) V silu_derivative(V v) {
    const Sigmoid<V> gate(v);
    return gate.s + v * gate.spread;
}
template <class V>
__attribute__((noinline)) V gelu_derivative(V v) {
    using S = typename Math<V>::Scalar;
    const Normal<V> normal(v);
    return normal.distribution + v * normal.bell * static_cast<S>(0.39894228040143267794);
}

// relu6(v + 3) / 6
template <class V>
INLINE V hard_sigmoid(V v) {
    using S = typename Math<V>::Scalar;
    const V shifted = v + 3;
    return (shifted < 0 ? V{} : (shifted > 6 ? V{} + 6 : shifted)) * static_cast<S>(1.0 / 6);
}
template <class V>
__attribute__((noinline)) V elu(V v, V alpha) {
    return v > 0 ? v : alpha * exponential_minus_one(v > 0 ? V{} : v);
}
template <class V>
__attribute__((noinline)) V elu_derivative(V v, V alpha) {
    return v > 0 ? V{} + 1 : alpha * exponential(v);
}
// tanh |v| = -e / (e + 2), e = exp(-2 |v|) - 1
template <class V>
__attribute__((noinline)) V hyperbolic_tangent(V v) {
    const V e = exponential_minus_one((v < 0 ? v : -v) * 2);
    const V size = -e / (e + 2);
    return v < 0 ? -size : size;
}
// 1 - tanh(v)^2 = 4 e / (1 + e)^2, e = exp(-2 |v|): no digits are lost far out
template <class V>
__attribute__((noinline)) V hyperbolic_tangent_derivative(V v) {
    const V e = exponential((v < 0 ? v : -v) * 2);
    return 4 * e / ((1 + e) * (1 + e));
}
template <class V>
__attribute__((noinline)) V logistic(V v) {
    return sigmoid(v);
}
template <class V>
__attribute__((noinline)) V logistic_derivative(V v) {
    return Sigmoid<V>(v).spread;
}
// mish(v) = v * tanh(log(1 + e)) = v * n / (n + 2), n = e * (e + 2), e = exp(v); beyond kFar the fraction is 1.
template <class V>
struct Mish {
    static constexpr double kFar = 40;  // exp(40)^2 fits a float; 2 / exp(80) is less than half a unit of a double
    V e, n;
    INLINE explicit Mish(V v) {
        using S = typename Math<V>::Scalar;
        e = exponential(v > static_cast<S>(kFar) ? V{} + kFar : v);
        n = e * (e + 2);
    }
};
template <class V>
__attribute__((noinline)) V mish(V v) {
    const Mish<V> m(v);
    return v * (m.n / (m.n + 2));
}
// w + v * sigmoid(v) * (1 - w^2), w = n / (n + 2), 1 - w^2 = 4 (n + 1) / (n + 2)^2
template <class V>
__attribute__((noinline)) V mish_derivative(V v) {
    using S = typename Math<V>::Scalar;
    const Mish<V> m(v);
    // Beyond, the second term is 0, which n does not know; v - v is NaN for an infinite v, as torch's is.
    const V near = v > static_cast<S>(Mish<V>::kFar) ? v - v : v;
    const V rest = 4 / (m.n + 2) * ((m.n + 1) / (m.n + 2));
    return m.n / (m.n + 2) + near * (m.e / (1 + m.e)) * rest;
}
// gelu by tanh: v * sigmoid(t), t = 2 sqrt(2 / pi) * (v + 0.044715 v^3). From kEdge on sigmoid(t) is 0 or 1, in double too.
constexpr double kEdge = 24, kTanhScale = 1.59576912160573071176;
template <class V>
INLINE V clamp(V v) {
    using S = typename Math<V>::Scalar;
    return v < -static_cast<S>(kEdge) ? V{} - kEdge : (v > static_cast<S>(kEdge) ? V{} + kEdge : v);
}
template <class V>
INLINE V find_argument(V v) {
    using S = typename Math<V>::Scalar;
    return v * static_cast<S>(kTanhScale) * (1 + static_cast<S>(0.044715) * v * v);
}
template <class V>
__attribute__((noinline)) V gelu_tanh(V v) {
    return v * sigmoid(find_argument(clamp(v)));
}
template <class V>
__attribute__((noinline)) V gelu_tanh_derivative(V v) {
    using S = typename Math<V>::Scalar;
    const V edge = clamp(v);
    const Sigmoid<V> gate(find_argument(edge));
    const V slope = static_cast<S>(kTanhScale) * (1 + static_cast<S>(0.134145) * edge * edge);
    return gate.s + edge * gate.spread * slope + (v - v);  // NaN for an infinite v, as torch's is
}

// What an activation makes of a value, and g times its derivative there. A NaN stays one. Where a derivative is 0 before or
// behind a kink 0 is chosen, not multiplied: as in torch, also for an infinite g.
struct Relu {
    template <class V>
    INLINE V value(V v) const { return v < 0 ? V{} : v; }
    template <class V>
    INLINE V gradient(V g, V v) const { return v <= 0 ? V{} : g; }
};
struct Relu6 {
    template <class V>
    INLINE V value(V v) const { return v < 0 ? V{} : (v > 6 ? V{} + 6 : v); }
    template <class V>
    INLINE V gradient(V g, V v) const { return v > 0 ? (v < 6 ? g : V{}) : V{}; }
};
struct LeakyRelu {
    double alpha;
    template <class V>
    INLINE V value(V v) const { return v < 0 ? v * static_cast<typename Math<V>::Scalar>(alpha) : v; }
    template <class V>
    INLINE V gradient(V g, V v) const { return v > 0 ? g : g * static_cast<typename Math<V>::Scalar>(alpha); }
};
struct Hardswish {
    template <class V>
    INLINE V value(V v) const { return v * hard_sigmoid(v); }
    template <class V>
    INLINE V gradient(V g, V v) const {
        using S = typename Math<V>::Scalar;
        return v <= -3 ? V{} : (v >= 3 ? g : g * (v * static_cast<S>(1.0 / 3) + static_cast<S>(0.5)));
    }
};
// Any of them, chosen for each vector.
struct AnyActivation {
    Activation activation;
    template <class V>
    INLINE V value(V v) const {
        switch (activation.code) {
            case kRelu: return Relu{}.value(v);
            case kLeakyRelu: return LeakyRelu{activation.alpha}.value(v);
            case kSilu: return silu(v);
            case kGelu: return gelu(v);
            case kRelu6: return Relu6{}.value(v);
            case kHardswish: return Hardswish{}.value(v);
            case kElu: return elu(v, V{} + static_cast<typename Math<V>::Scalar>(activation.alpha));
            case kTanh: return hyperbolic_tangent(v);
            case kSigmoid: return logistic(v);
            case kMish: return mish(v);
            case kGeluTanh: return gelu_tanh(v);
            default: return v;
        }
    }
    template <class V>
    INLINE V gradient(V g, V v) const {
        switch (activation.code) {
            case kRelu: return Relu{}.gradient(g, v);
            case kLeakyRelu: return LeakyRelu{activation.alpha}.gradient(g, v);
            case kSilu: return g * silu_derivative(v);
            case kGelu: return g * gelu_derivative(v);
            case kRelu6: return Relu6{}.gradient(g, v);
            case kHardswish: return Hardswish{}.gradient(g, v);
            case kElu: return g * elu_derivative(v, V{} + static_cast<typename Math<V>::Scalar>(activation.alpha));
            case kTanh: return g * hyperbolic_tangent_derivative(v);
            case kSigmoid: return g * logistic_derivative(v);
            case kMish: return g * mish_derivative(v);
            case kGeluTanh: return g * gelu_tanh_derivative(v);
            default: return g;
        }
    }
};

// body(the activation): those of a few instructions have loops of their own in float, in which nothing is chosen.
#if defined(ANYNORM_SMALL)
constexpr bool kHasLoopsOfTheirOwn = false;
#else
constexpr bool kHasLoopsOfTheirOwn = true;
#endif
template <bool Active, class Compute, class Body>
INLINE void with_activation(const Activation& activation, Body body) {
    if constexpr (Active && kHasLoopsOfTheirOwn && std::is_same_v<Compute, float>) {
        switch (activation.code) {
            case kRelu: return body(Relu{});
            case kRelu6: return body(Relu6{});
            case kLeakyRelu: return body(LeakyRelu{activation.alpha});
            case kHardswish: return body(Hardswish{});
            default: break;
        }
    }
    body(AnyActivation{activation});
}

}  // namespace anynorm::ANYNORM_TARGET
