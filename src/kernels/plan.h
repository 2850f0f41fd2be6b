// How a tensor is walked, checked once, and where the tensors of a call are, checked at every call.
#pragma once

#include <cstdint>

#include "call.h"

namespace anynorm {

using Address = uintptr_t;  // 0 where a call has no such tensor

// Sizes and layout of x and of what belongs to it, which stay from call to call.
struct Plan {
    Call call{};                 // with nothing but sizes and layout
    int64_t element, parameter;  // bytes of one

    // Throws std::invalid_argument where sizes overflow or no walk serves the layout. See Call for what the sizes mean.
    Plan(int64_t n, int64_t g, int64_t k, int64_t s, bool channels_last, bool pool_n, bool centred, int dtype, int statistics,
         int64_t sample_rows);

    // Bytes.
    int64_t all() const { return call.n * call.g * call.k * call.s * element; }
    int64_t per_channel() const { return call.channels() * parameter; }
    int64_t per_pool() const { return call.pools() * 8; }
    int64_t per_given() const { return call.g * (call.statistics == kGivenAsDouble ? 8 : parameter); }
    int64_t per_running() const { return call.g * parameter; }
    int64_t per_position() const { return call.n * call.s * 4; }

    // Whether so many tensors of x's size are more than the last cache holds, and every row that a walk writes begins at a
    // cache line: results bypass the caches in whole lines only.
    bool bypasses_caches(int64_t tensors) const;
};

// What a call is given beside its plan, by the names that Python gives.
struct Arguments {
    int threads = 1;
    Activation activation;
    double eps = 0, momentum = 0;
    Address x = 0, residual = 0, y = 0, gamma = 0, beta = 0, mask = 0;
    Address mean = 0, m2 = 0, var = 0;  // mean and m2 of the pools; mean and var where statistics are given
    Address running_mean = 0, running_var = 0;
    Address grad = 0, dx = 0, dresidual = 0, dgamma = 0, dbeta = 0;
};

// A call as the kernels take it. Each throws std::invalid_argument where an address is missing that is needed, or where
// something that is written overlaps anything else; nothing was touched then. All sizes are the plan's: that so many bytes
// are there is the caller's to know.
Call make_forward(const Plan& plan, const Arguments& given);
Call make_statistics(const Plan& plan, const Arguments& given);
Call make_backward(const Plan& plan, const Arguments& given);

// Runs a call that was made for the plan; Python's lock is not needed.
void run_forward(const Plan& plan, const Call& call);
void run_backward(const Plan& plan, const Call& call);

}  // namespace anynorm
