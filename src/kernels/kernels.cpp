// The walks for one instruction set: this file is compiled once for each, with ANYNORM_TARGET as its namespace.
#include "call.h"
#include "columns.h"
#include "elements.h"
#include "rows.h"

namespace anynorm::ANYNORM_TARGET {
namespace {

// Shorter runs would leave vectors half empty. Of batch norm's, runs of a few vectors go down the columns too, where
// there are samples enough to pay for a table of all columns: on 7x7 maps from 64 samples on, measured.
constexpr int64_t kShortRow = 16, kFewVectors = 128, kManySamples = 64;

bool suits_columns(const Call& call) {
    return call.pool_n && (call.s < kShortRow || (call.s < kFewVectors && call.n >= kManySamples));
}

// Calls body with the walk that suits the sizes.
template <class T, class Body>
void with_walk(const Call& call, Body body) {
    if (call.last || suits_columns(call)) return body(Columns<T>{call});
    if (!call.pool_n && call.k > 1 && call.s < kShortRow) return body(Elements<T>{call});
    return body(Rows<T>{call});
}

template <class Body>
void with_type(const Call& call, Body body) {
    switch (call.dtype) {
        case kFloat32: return body(float{});
        case kFloat64: return body(double{});
        case kBFloat16: return body(bfloat16{});
        default: return body(float16{});
    }
}

template <class Body>
void with_type_and_walk(const Call& call, Body body) {
    with_type(call, [&](auto element) { with_walk<decltype(element)>(call, body); });
}

void forward(const Call& call) {
    with_type_and_walk(call, [](const auto& walk) { walk.forward(); });
}

void backward(const Call& call) {
    with_type_and_walk(call, [](const auto& walk) { walk.backward(); });
}

// Given statistics are one per channel for all samples, so every walk is that of batch norm.
void forward_given(const Call& call) {
    with_type(call, [&](auto element) {
        using T = decltype(element);
        if (suits_columns(call)) return Columns<T>{call}.forward_given();
        Rows<T>{call}.forward_given();
    });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{forward, forward_given, backward};

}  // namespace anynorm::ANYNORM_TARGET
