// The kernels without Python and torch against the formula in double, written out element by element: for instruction sets
// whose machine is only emulated. Of one element type, ANYNORM_ELEMENT; every walk, with a mask and without.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>

#include "../sanitize/alone.h"

namespace anynorm {
namespace {

using Element = ANYNORM_ELEMENT;
using Wide = long double;  // of the formula, so that its own rounding does not show
constexpr bool kIsDouble = sizeof(Element) == 8;
using Parameter = std::conditional_t<kIsDouble, double, float>;
constexpr double kEps = 1e-5, kAlpha = 0.5, kMomentum = 0.1;
// In spacings of the type beside 1, of the largest value; in double the kernels' own sums of 140,000 terms show.
constexpr double kMostError = kIsDouble ? 300 : 3;

// Bits of the half types, not by the kernels' own conversions. Values are of ordinary size.
inline double read(double v) { return v; }
inline double read(float v) { return v; }
inline double read(bfloat16 v) {
    const uint32_t bits = uint32_t{v.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline double read(float16 v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return v.bits >> 15 ? -size : size;
}
inline void write(double& to, double v) { to = v; }
inline void write(float& to, double v) { to = static_cast<float>(v); }
inline void write(bfloat16& to, double v) {
    const float narrow = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    to.bits = static_cast<uint16_t>(bits >> 16);
}
inline void write(float16& to, double v) {
    int exponent;
    std::frexp(v, &exponent);
    if (exponent < -13) exponent = -13;
    const int scaled = static_cast<int>(std::ldexp(std::fabs(v), 11 - exponent));
    const int biased = scaled < 1024 ? 0 : exponent + 14;
    to.bits = static_cast<uint16_t>((v < 0) << 15 | biased << 10 | (scaled & 1023));
}
double spacing() {  // of values beside 1
    return kIsDouble ? 0x1p-52 : sizeof(Element) == 4 ? 0x1p-23 : std::is_same_v<Element, float16> ? 0x1p-10 : 0x1p-7;
}

template <class T>
std::vector<T> draw(int64_t size, int seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<T> values(size);
    for (T& value : values) write(value, normal(generator) + 1);
    return values;
}

Wide activate(int code, Wide z) {
    if (code == kRelu) return z > 0 ? z : 0;
    if (code == kSilu) return z / (1 + std::exp(-z));
    if (code == kElu) return z > 0 ? z : kAlpha * std::expm1(z);
    return z;
}
Wide slope(int code, Wide z) {
    if (code == kRelu) return z > 0;
    const Wide s = 1 / (1 + std::exp(-z));
    if (code == kSilu) return s * (1 + z * (1 - s));
    if (code == kElu) return z > 0 ? 1 : kAlpha * std::exp(z);
    return 1;
}

// How far found is from wanted, as a share of the largest that is wanted.
template <class T>
double compare(const std::vector<T>& found, const std::vector<Wide>& wanted) {
    Wide largest = 0, error = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        if (std::isnan(wanted[i])) continue;  // does not count
        largest = std::fmax(largest, std::fabs(wanted[i]));
        const Wide off = std::fabs(read(found[i]) - wanted[i]);
        if (!(off <= error)) error = off;
    }
    return static_cast<double>(error / largest);
}

struct Problem {
    const Case& c;
    const int activation;
    const bool masked;
    const int64_t total = c.n * c.g * c.k * c.s, channels = c.g * c.k, pools = c.pool_n ? c.g : c.n * c.g;
    const std::vector<Element> x = draw<Element>(total, 1), grad = draw<Element>(total, 2), residual = draw<Element>(total, 3);
    const std::vector<Parameter> gamma = draw<Parameter>(channels, 4), beta = draw<Parameter>(channels, 5);
    std::vector<float> mask = std::vector<float>(c.n * c.s);
    std::vector<Element> y{}, dx{}, dresidual{};
    std::vector<Parameter> dgamma{}, dbeta{}, running{};

    // body(i, channel, pool) for every element that counts.
    template <class Body>
    void each(Body body) const {
        for (int64_t n = 0; n < c.n; ++n)
            for (int64_t channel = 0; channel < channels; ++channel)
                for (int64_t s = 0; s < c.s; ++s) {
                    if (masked && mask[n * c.s + s] == 0) continue;
                    const int64_t i = c.last ? (n * c.s + s) * channels + channel : (n * channels + channel) * c.s + s;
                    body(i, channel, channel / c.k + (c.pool_n ? 0 : n * c.g));
                }
    }

    void run() {
        for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 % 3 != 1;
        y.resize(total), dx.resize(total), dresidual.resize(total), dgamma.resize(channels), dbeta.resize(channels);
        running.assign(2 * c.g, 1);
        std::vector<double> statistics(2 * pools);
        Call call{};
        call.n = c.n, call.g = c.g, call.k = c.k, call.s = c.s, call.channels_last = c.last, call.pool_n = c.pool_n;
        call.centred = c.centred, call.threads = 2, call.eps = kEps, call.activation = {activation, kAlpha};
        call.x = x.data(), call.out = y.data(), call.gamma = gamma.data(), call.beta = beta.data();
        call.mean = statistics.data(), call.m2 = statistics.data() + pools, call.momentum = kMomentum;
        if (c.k == 1 && c.centred) call.running_mean = running.data(), call.running_var = running.data() + c.g;
        if (masked) call.mask = mask.data(), call.residual = residual.data(), call.sample_rows = c.s == 1 && !c.last;
        const Kernels kernels = baseline::kernels_of<Element>();
        kernels.forward(call);
        call.grad = grad.data(), call.out = dx.data(), call.dgamma = dgamma.data(), call.dbeta = dbeta.data();
        if (masked) call.dresidual = dresidual.data();
        kernels.backward(call);
    }

    // The largest error of anything that was computed, in spacings of its type.
    double find_error() const {
        std::vector<Wide> count(pools), mean(pools), var(pools), first(pools), second(pools);
        each([&](int64_t i, int64_t, int64_t pool) { ++count[pool], mean[pool] += read(x[i]); });
        for (int64_t pool = 0; pool < pools; ++pool) mean[pool] = c.centred ? mean[pool] / count[pool] : 0;
        each([&](int64_t i, int64_t, int64_t pool) { var[pool] += (read(x[i]) - mean[pool]) * (read(x[i]) - mean[pool]) / count[pool]; });
        const auto xhat = [&](int64_t i, int64_t pool) { return (read(x[i]) - mean[pool]) / std::sqrt(var[pool] + Wide{kEps}); };
        std::vector<Wide> want_y(total, NAN), want_dx(total, NAN), want_dresidual(total, NAN);
        std::vector<Wide> want_dgamma(channels), want_dbeta(channels), want_running(2 * c.g, 1), g(total);
        each([&](int64_t i, int64_t channel, int64_t pool) {
            const Wide z = xhat(i, pool) * gamma[channel] + beta[channel] + (masked ? read(residual[i]) : 0);
            want_y[i] = activate(activation, z);
            want_dresidual[i] = g[i] = read(grad[i]) * slope(activation, z);
            want_dbeta[channel] += g[i], want_dgamma[channel] += g[i] * xhat(i, pool);
            first[pool] += g[i] * gamma[channel], second[pool] += g[i] * gamma[channel] * xhat(i, pool);
        });
        each([&](int64_t i, int64_t channel, int64_t pool) {
            const Wide through = (c.centred ? first[pool] : 0) + xhat(i, pool) * second[pool];
            want_dx[i] = (g[i] * gamma[channel] - through / count[pool]) / std::sqrt(var[pool] + Wide{kEps});
        });
        double parameters = std::fmax(compare(dgamma, want_dgamma), compare(dbeta, want_dbeta));
        if (c.k == 1 && c.centred && c.pool_n) {
            for (int64_t i = 0; i < c.g; ++i) {
                want_running[i] += kMomentum * (mean[i] - 1);
                want_running[c.g + i] += kMomentum * (var[i] * count[i] / (count[i] - 1) - 1);
            }
            parameters = std::fmax(parameters, compare(running, want_running));
        }
        double elements = std::fmax(compare(y, want_y), compare(dx, want_dx));
        if (masked) elements = std::fmax(elements, compare(dresidual, want_dresidual));
        return std::fmax(elements / spacing(), parameters / (kIsDouble ? 0x1p-52 : 0x1p-23));
    }
};

}  // namespace
}  // namespace anynorm

int main() {
    int passed = 0, failed = 0;
    double worst = 0;
    for (const anynorm::Case& c : anynorm::kCases) {
        for (int activation : {anynorm::kIdentity, anynorm::kRelu, anynorm::kSilu, anynorm::kElu}) {
            for (bool masked : {false, true}) {
                anynorm::Problem problem{c, activation, masked};
                problem.run();
                const double error = problem.find_error();
                const bool is_right = error < anynorm::kMostError;
                worst = std::fmax(worst, error);
                ++(is_right ? passed : failed);
                if (!is_right) std::printf("%s, activation %d%s: %g\n", c.name, activation, masked ? ", masked" : "", error);
            }
        }
    }
    std::printf("%d passed, %d failed; the largest error is %.2g spacings\n", passed, failed, worst);
    return failed != 0;
}
