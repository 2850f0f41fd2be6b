// Whole calls, from tensors to tensors. Each looks at every tensor where it touches it, and returns None where it is not sure
// of one, with nothing written: engine/kernels.py then does the same in Python, or says what is wrong.
#pragma once

#include <nanobind/nanobind.h>

#include "plan.h"

namespace anynorm {

namespace nb = nanobind;

// Dtypes and sizes of up to seven tensors, and the first one's strides, as bytes; None if one may not be plain memory.
nb::object describe(nb::args tensors);

// (y, statistics) as `kernels.forward` says; mean and var are given ones, or running averages to move, or None.
nb::object forward_tensors(const Plan& plan, nb::handle memory_format, nb::handle x, nb::handle weight, nb::handle bias,
                           nb::handle residual, nb::handle mask, nb::handle mean, nb::handle var, nb::handle momentum,
                           double eps, int activation, double alpha, int threads, bool keep);

// The four gradients as `kernels.backward` says; `mean` is all statistics where they come from x, and var None.
nb::object backward_tensors(const Plan& plan, nb::handle memory_format, nb::tuple sizes, nb::tuple strides, nb::handle grad,
                            nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual, nb::handle mask,
                            nb::handle mean, nb::handle var, double eps, int activation, double alpha, int threads,
                            nb::sequence needs);

}  // namespace anynorm
