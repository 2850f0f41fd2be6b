// The kernels without Python and torch, on std::thread: what a thread sanitizer can follow. Every walk forward and backward, with
// a mask and without, must give the same bits with 1, 2 and 4 threads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "alone.h"

namespace {

using anynorm::Call;
using anynorm::Case;

std::vector<float> draw(int64_t size, int seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(size);
    for (float& value : values) value = normal(generator) + 3;
    return values;
}

// With `masked` positions that do not count lie between those that do, and a residual has a gradient of its own.
std::vector<float> run(const Case& c, int activation, bool masked, int threads) {
    const int64_t total = c.n * c.g * c.k * c.s, channels = c.g * c.k;
    Call call{};
    call.n = c.n, call.g = c.g, call.k = c.k, call.s = c.s;
    call.channels_last = c.last, call.pool_n = c.pool_n, call.centred = c.centred;
    call.dtype = anynorm::kFloat32, call.activation = {activation, 0.5}, call.threads = threads, call.eps = 1e-5;
    const auto x = draw(total, 1), grad = draw(total, 2), gamma = draw(channels, 3), beta = draw(channels, 4);
    std::vector<float> y(total), dx(total), dgamma(channels), dbeta(channels), running(2 * c.g, 1.0f);
    std::vector<double> statistics(2 * call.pools());
    call.x = x.data(), call.out = y.data(), call.gamma = gamma.data(), call.beta = beta.data();
    call.mean = statistics.data(), call.m2 = statistics.data() + call.pools();
    if (c.k == 1 && c.centred) call.running_mean = running.data(), call.running_var = running.data() + c.g;
    call.momentum = 0.1;
    const auto residual = draw(total, 5);
    std::vector<float> mask(c.n * c.s), dresidual(total);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 % 3 != 1;
    if (masked) {
        call.mask = mask.data(), call.residual = residual.data();
        call.sample_rows = c.s == 1 && !c.last;
    }
    const auto kernels = anynorm::ANYNORM_TARGET::kernels_of<float>();
    kernels.forward(call);
    call.grad = grad.data(), call.out = dx.data(), call.dgamma = dgamma.data(), call.dbeta = dbeta.data();
    if (masked) call.dresidual = dresidual.data();
    kernels.backward(call);
    for (const auto* more : {&dx, &dgamma, &dbeta, &running, &dresidual}) y.insert(y.end(), more->begin(), more->end());
    return y;
}

}  // namespace

int main() {
    int wrong = 0;
    for (const Case& c : anynorm::kCases) {
        for (int activation : {anynorm::kIdentity, anynorm::kRelu, anynorm::kSilu, anynorm::kElu}) {
            for (bool masked : {false, true}) {
                const auto one = run(c, activation, masked, 1);
                for (int threads : {2, 4}) {
                    const auto many = run(c, activation, masked, threads);
                    if (std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) != 0) {
                        std::printf("%s%s: %d threads give other bits than 1\n", c.name, masked ? ", masked" : "", threads);
                        ++wrong;
                    }
                }
            }
        }
    }
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
