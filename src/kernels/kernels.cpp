// The walks for one instruction set: this file is compiled once for each, with ANYNORM_TARGET as its namespace.
#include <type_traits>

#include "call.h"
#include "columns.h"
#include "elements.h"
#include "rows.h"

namespace anynorm::ANYNORM_TARGET {
namespace {

// Shorter runs would leave vectors half empty.
constexpr int64_t kShortRow = 16;

// Calls body with the walk that suits the sizes. Positions that do not count are told apart along rows only.
template <class T, class Body>
void with_walk(const Call& call, Body body) {
    const bool is_short = call.s < kShortRow && !(call.weight && call.s > 1);
    if (call.last || (is_short && call.pool_n)) {
        Columns<T> walk{call};
        return body(walk);
    }
    if (is_short && !call.pool_n && call.k > 1) {
        Elements<T> walk{call};
        return body(walk);
    }
    Rows<T> walk{call};
    body(walk);
}

template <class Body>
void with_type_and_walk(const Call& call, Body body) {
    switch (call.dtype) {
        case kFloat32: return with_walk<float>(call, body);
        case kFloat64: return with_walk<double>(call, body);
        case kBFloat16: return with_walk<bfloat16>(call, body);
        default: return with_walk<float16>(call, body);
    }
}

void forward(const Call& call) {
    with_type_and_walk(call, [](auto& walk) { walk.forward(); });
}

void backward(const Call& call) {
    with_type_and_walk(call, [](auto& walk) { walk.backward(); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{forward, backward};

}  // namespace anynorm::ANYNORM_TARGET
