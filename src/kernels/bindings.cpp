// The compiled module: names for Python, and its lock released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "calls.h"
#include "dispatch.h"
#include "keys.h"
#include "masks.h"
#include "memory.h"
#include "plan.h"
#include "tensors.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using anynorm::Address;
using anynorm::Arguments;
using anynorm::Call;
using anynorm::Plan;

namespace {

void forward(const Plan& plan, int threads, double eps, int activation, double alpha, Address x, Address residual,
             Address y, Address gamma, Address beta, Address mean, Address m2, Address var, Address mask, Address running_mean,
             Address running_var, double momentum) {
    Arguments given;
    given.threads = threads, given.eps = eps, given.activation = {activation, alpha};
    given.x = x, given.residual = residual, given.y = y, given.gamma = gamma, given.beta = beta, given.mask = mask;
    given.mean = mean, given.m2 = m2, given.var = var;
    given.running_mean = running_mean, given.running_var = running_var, given.momentum = momentum;
    const Call call = make_forward(plan, given);
    nb::gil_scoped_release release;
    run_forward(plan, call);
}

void statistics(const Plan& plan, int threads, Address x, Address mask, Address mean, Address m2) {
    Arguments given;
    given.threads = threads, given.x = x, given.mask = mask, given.mean = mean, given.m2 = m2;
    const Call call = make_statistics(plan, given);
    nb::gil_scoped_release release;
    run_forward(plan, call);
}

void backward(const Plan& plan, int threads, double eps, int activation, double alpha, Address grad, Address x,
              Address residual, Address dx, Address dresidual, Address gamma, Address beta, Address mean, Address m2,
              Address var, Address mask, Address dgamma, Address dbeta) {
    Arguments given;
    given.threads = threads, given.eps = eps, given.activation = {activation, alpha};
    given.grad = grad, given.x = x, given.residual = residual, given.gamma = gamma, given.beta = beta, given.mask = mask;
    given.mean = mean, given.m2 = m2, given.var = var;
    given.dx = dx, given.dresidual = dresidual, given.dgamma = dgamma, given.dbeta = dbeta;
    const Call call = make_backward(plan, given);
    nb::gil_scoped_release release;
    run_backward(plan, call);
}

}  // namespace

NB_MODULE(_kernels, module) {
    nb::set_leak_warnings(false);  // plans are kept for the life of the process
    nb::class_<Plan>(module, "Plan")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, bool, bool, bool, int, int, int64_t>(), nb::kw_only(), "n"_a, "g"_a,
             "k"_a, "s"_a, "channels_last"_a, "pool_n"_a, "centred"_a, "dtype"_a, "statistics"_a, "sample_rows"_a);
    // Addresses are of the first element, 0 where there is no such tensor.
    module.def("forward", &forward, "plan"_a, nb::kw_only(), "threads"_a, "eps"_a, "activation"_a = 0, "alpha"_a = 0.0,
               "x"_a, "residual"_a = 0, "y"_a, "gamma"_a = 0, "beta"_a = 0, "mean"_a = 0, "m2"_a = 0, "var"_a = 0, "mask"_a = 0,
               "running_mean"_a = 0, "running_var"_a = 0, "momentum"_a = 0.0);
    module.def("statistics", &statistics, "plan"_a, nb::kw_only(), "threads"_a, "x"_a, "mask"_a = 0, "mean"_a, "m2"_a);
    module.def("backward", &backward, "plan"_a, nb::kw_only(), "threads"_a, "eps"_a, "activation"_a = 0, "alpha"_a = 0.0,
               "grad"_a, "x"_a, "residual"_a = 0, "dx"_a = 0, "dresidual"_a = 0, "gamma"_a = 0, "beta"_a = 0, "mean"_a = 0, "m2"_a = 0,
               "var"_a = 0, "mask"_a = 0, "dgamma"_a = 0, "dbeta"_a = 0);
    // The same from tensors to tensors, where this torch lends their memory: None where Python must look.
    module.def("find_torch", &anynorm::find_torch);
    module.def("describe", &anynorm::describe);
    module.def("set_activations", &anynorm::set_activations);
    module.def("normalize_known", &anynorm::normalize_known, "plans"_a, "function"_a, "apply"_a, "x"_a.none(), "weight"_a.none(),
               "bias"_a.none(), "residual"_a.none(), "request"_a);
    module.def("forward_tensors", &anynorm::forward_tensors, "plan"_a, "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
               "residual"_a.none(), "request"_a, "keep"_a);
    module.def("forward_saving", &anynorm::forward_saving, "context"_a, "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
               "residual"_a.none(), "request"_a, "plan"_a);
    module.def("backward_tensors", &anynorm::backward_tensors, "grad"_a.none(), "saved"_a, "how"_a, "needs"_a);
    module.def("open_mask", &anynorm::open_mask, "x"_a, "mask"_a, "first"_a, "channels"_a);
    module.def("open_lengths", &anynorm::open_lengths, "x"_a, "lengths"_a, "first"_a, "channels"_a);
    module.def("has_real", &anynorm::has_real, "counted"_a);
    module.def("last_cache", &anynorm::last_cache);
    module.def("set_last_cache", &anynorm::set_last_cache);
    module.def("choose_instruction_set", &anynorm::choose_instruction_set);
    module.def("instruction_set", &anynorm::instruction_set);
    module.def("instruction_sets", &anynorm::instruction_sets);
    module.def("thread_runtime", &anynorm::thread_runtime);
    anynorm::choose_instruction_set("");
}
