// Was a call like this one checked before? All that the checks look at, as one key, for the plans that Python remembers.
#pragma once

#include "request.h"

namespace anynorm {

// Dtypes and sizes of up to seven tensors, and the first one's strides, as bytes; None if one may not be plain memory.
nb::object describe(nb::args tensors);

// What `watch.find_key` makes, or an invalid object where that must look.
nb::object find_key(nb::handle function, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                    const Request& request);

}  // namespace anynorm
