// The walks for one instruction set and one element type: this file is compiled once for each, with ANYNORM_TARGET as its
// namespace and ANYNORM_ELEMENT as its type.
#include <type_traits>

#include "call.h"
#include "columns.h"
#include "elements.h"
#include "rows.h"

namespace anynorm::ANYNORM_TARGET {
namespace {

using Element = ANYNORM_ELEMENT;

// Shorter runs would leave vectors half empty.
constexpr int64_t kShortRow = 16;

// Calls body with the walk that suits the sizes. With a mask positions that follow one another are walked along, even one:
// padded, it would be walked so.
template <class Body>
void with_walk(const Call& call, Body body) {
    const bool is_short = call.s < kShortRow && !(call.mask && call.sample_rows == 0);
    if (call.channels_last || (is_short && call.pool_n)) {
        Columns<Element> walk{call};
        return body(walk);
    }
    if (is_short && !call.pool_n && call.k > 1) {
        Elements<Element> walk{call};
        return body(walk);
    }
    Rows<Element> walk{call};
    body(walk);
}

void forward(const Call& call) {
    with_walk(call, [](auto& walk) { walk.forward(); });
}

void backward(const Call& call) {
    with_walk(call, [](auto& walk) { walk.backward(); });
}

}  // namespace

template <>
Kernels kernels_of<Element>() {
    return {forward, backward};
}

}  // namespace anynorm::ANYNORM_TARGET
