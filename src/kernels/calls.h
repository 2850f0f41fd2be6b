// Whole calls, from tensors to tensors. Each looks at every tensor where it touches it, and returns None where it is not sure
// of one, with nothing written: engine/kernels.py then does the same in Python, or says what is wrong.
#pragma once

#include <nanobind/nanobind.h>

#include "plan.h"

namespace anynorm {

namespace nb = nanobind;

// y as `Front.normalize` says, of a call whose checks have passed before: one whose key, see `watch.find_key`, is in `plans`.
// Where a gradient is wanted `apply` makes y. None where there is no such key, or something follows the operations.
nb::object normalize_known(nb::handle plans, nb::handle function, nb::handle apply, nb::handle x, nb::handle weight,
                           nb::handle bias, nb::handle residual, nb::handle request);

// (y, statistics) as `kernels.forward` says. Running averages get a new version.
nb::object forward_tensors(nb::handle plan, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                           nb::handle request, bool keep);

// y of `Normalize.forward`, with all saved that backward needs. None also for what was made in inference mode.
nb::object forward_saving(nb::handle context, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                          nb::handle request, nb::handle plan);

// What `Normalize.backward` returns, from what its forward saved; None also where gradients are to be differentiable or batched,
// or need another shape or dtype than kernels give.
nb::object backward_tensors(nb::handle grad, nb::handle saved, nb::handle how, nb::handle needs);

// Activations by name, each its code and alpha.
void set_activations(nb::dict activations);

}  // namespace anynorm
