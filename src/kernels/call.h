// What is asked of a kernel: one struct, filled by bindings.cpp, read by every walk.
#pragma once

#include <cstdint>

namespace anynorm {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Memory is [n][g][k][s], or [n][s][g][k] where `last`. A pool is one (n, g); one g where `pool_n`.
// gamma and beta vary over channels c = (g, k). Parameters are float, or double where x is double.
struct Call {
    int64_t n, g, k, s;
    bool last, pool_n, centred, given;
    int dtype, threads;
    double eps;
    const void* x;
    const void* grad;   // backward: dL/dy, laid out as x
    void* out;          // forward: y; backward: dx or null
    const void* gamma;  // [c] or null
    const void* beta;   // [c] or null
    double* mean;       // [pools] or null where nothing is subtracted
    double* m2;         // [pools] sum of squared deviations
    const void* given_mean;  // [g], where statistics are given
    const void* given_var;
    void* dgamma;  // [c] or null
    void* dbeta;

    int64_t channels() const { return g * k; }
    int64_t total() const { return n * g * k * s; }
    int64_t pools() const { return pool_n ? g : n * g; }
    int64_t count() const { return pool_n ? n * k * s : k * s; }
};

// One instruction set's kernels.
struct Kernels {
    void (*forward)(const Call&);
    void (*forward_given)(const Call&);
    void (*backward)(const Call&);
};

}  // namespace anynorm
