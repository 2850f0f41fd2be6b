// What is asked of a kernel: one struct, filled and checked by plan.cpp, read by every walk.
#pragma once

#include <cstdint>

namespace anynorm {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
// Where statistics come from: x itself, or one mean and one variance per g, as constants.
enum StatisticsFrom : int { kFromInput = 0, kGivenAsParameters = 1, kGivenAsDouble = 2 };
enum ActivationCode : int {
    kIdentity, kRelu, kLeakyRelu, kSilu, kGelu, kRelu6, kHardswish, kElu, kTanh, kSigmoid, kMish, kGeluTanh,
};
constexpr int kActivations = kGeluTanh + 1;
struct Activation {
    int code = kIdentity;
    double alpha = 0;  // slope of leaky relu below 0, and elu's factor there
};

// Memory is [n][g][k][s], or [n][s][g][k] where `channels_last`. A pool is one (n, g); one g where `pool_n`.
// gamma and beta vary over channels c = (g, k). Parameters are float, or double where x is double.
struct Call {
    int64_t n, g, k, s;
    bool channels_last, pool_n, centred;
    StatisticsFrom statistics;
    int dtype, threads;
    Activation activation;
    bool bypasses_caches;    // more is touched than the last cache holds: nothing written will be read from there
    double eps;
    const void* x;
    const void* residual;    // added before the activation; laid out as x, or null
    const void* grad;        // backward: dL/dy, laid out as x
    void* out;               // forward: y, or null for statistics alone; backward: dx or null
    void* dresidual;         // backward: gradient of the residual, or null
    const void* gamma;       // [c] or null
    const void* beta;        // [c] or null
    double* mean;            // [pools], written forward and read backward; null where nothing is subtracted
    double* m2;              // [pools] sum of squared deviations
    const void* given_mean;  // [g], instead of `mean` and `m2`; parameters or double as `statistics` says
    const void* given_var;   // [g] population variance
    void* running_mean;      // [g], moved in a forward, or null
    void* running_var;
    double momentum;         // weight of the new value in the running averages
    const float* mask;       // [n][s], 0 for positions that do not count; null where all do
    int64_t sample_rows;     // with a mask: rows of a sample where its positions are rows; 0 where they follow one another
    void* dgamma;            // [c] or null
    void* dbeta;

    int64_t channels() const { return g * k; }
    int64_t pools() const { return pool_n ? g : n * g; }
    bool has_given_statistics() const { return statistics != kFromInput; }
    bool is_active() const { return activation.code != kIdentity || residual || dresidual; }  // whether something follows
};

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// One instruction set's kernels for one element type.
struct Kernels {
    void (*forward)(const Call&);
    void (*backward)(const Call&);
};

// Declares where each instruction set's kernels are; kernels.cpp defines them.
#define ANYNORM_DECLARE_TARGET(target) \
    namespace target {                 \
    template <class T>                 \
    Kernels kernels_of();              \
    template <>                        \
    Kernels kernels_of<float>();       \
    template <>                        \
    Kernels kernels_of<double>();      \
    template <>                        \
    Kernels kernels_of<bfloat16>();    \
    template <>                        \
    Kernels kernels_of<float16>();     \
    }
ANYNORM_DECLARE_TARGET(baseline)
ANYNORM_DECLARE_TARGET(avx2)
ANYNORM_DECLARE_TARGET(avx512)

}  // namespace anynorm
