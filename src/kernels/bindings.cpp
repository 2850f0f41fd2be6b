// The compiled module: checks what Python says about sizes and pointers, releases the GIL, calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "call.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using anynorm::Call;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Sizes are positive and everything that is computed from them fits; dtype and threads are in range.
void check_sizes(const Call& call) {
    int64_t total = 16;  // bytes of the widest thing kept per element
    for (int64_t size : {call.n, call.g, call.k, call.s}) {
        if (size < 1 || __builtin_mul_overflow(total, size, &total)) throw std::invalid_argument("kernels: sizes");
    }
    if (call.dtype < 0 || call.dtype > anynorm::kFloat16) throw std::invalid_argument("kernels: dtype");
    if (call.threads < 1) throw std::invalid_argument("kernels: threads");
    if (call.pool_n && (call.k != 1 || call.last)) throw std::invalid_argument("kernels: layout");
    if (call.given && !call.pool_n) throw std::invalid_argument("kernels: given statistics are one per channel");
}

void need(bool held, const char* what) {
    if (!held) throw std::invalid_argument(std::string("kernels: missing ") + what);
}

// Sizes as Python packs them: (n, g, k, s, last, pool_n, centred, dtype).
Call make_call(const nb::tuple& plan, double eps, int threads) {
    if (plan.size() != 8) throw std::invalid_argument("kernels: plan");
    auto integer = [&](int i) { return nb::cast<int64_t>(plan[i]); };
    Call call{};
    call.n = integer(0);
    call.g = integer(1);
    call.k = integer(2);
    call.s = integer(3);
    call.last = integer(4) != 0;
    call.pool_n = integer(5) != 0;
    call.centred = integer(6) != 0;
    call.dtype = static_cast<int>(integer(7));
    call.eps = eps;
    call.threads = threads;
    return call;
}

void forward(const nb::tuple& plan, double eps, int threads, uintptr_t x, uintptr_t y, uintptr_t gamma, uintptr_t beta,
             uintptr_t mean, uintptr_t m2) {
    Call call = make_call(plan, eps, threads);
    call.x = pointer(x);
    call.out = pointer(y);
    call.gamma = pointer(gamma);
    call.beta = pointer(beta);
    call.mean = pointer<double>(mean);
    call.m2 = pointer<double>(m2);
    check_sizes(call);
    need(x && y && m2 && (mean || !call.centred), "tensor");
    nb::gil_scoped_release release;
    anynorm::kernels().forward(call);
}

void forward_given(const nb::tuple& plan, double eps, int threads, uintptr_t x, uintptr_t y, uintptr_t gamma,
                   uintptr_t beta, uintptr_t mean, uintptr_t var) {
    Call call = make_call(plan, eps, threads);
    call.given = true;
    call.x = pointer(x);
    call.out = pointer(y);
    call.gamma = pointer(gamma);
    call.beta = pointer(beta);
    call.given_mean = pointer(mean);
    call.given_var = pointer(var);
    check_sizes(call);
    need(x && y && mean && var, "tensor");
    nb::gil_scoped_release release;
    anynorm::kernels().forward_given(call);
}

void backward(const nb::tuple& plan, double eps, int threads, bool given, uintptr_t grad, uintptr_t x, uintptr_t dx,
              uintptr_t gamma, uintptr_t mean, uintptr_t m2, uintptr_t dgamma, uintptr_t dbeta) {
    Call call = make_call(plan, eps, threads);
    call.given = given;
    call.grad = pointer(grad);
    call.x = pointer(x);
    call.out = pointer(dx);
    call.gamma = pointer(gamma);
    if (given) {
        call.given_mean = pointer(mean);
        call.given_var = pointer(m2);
    } else {
        call.mean = pointer<double>(mean);
        call.m2 = pointer<double>(m2);
    }
    call.dgamma = pointer(dgamma);
    call.dbeta = pointer(dbeta);
    check_sizes(call);
    need(grad && x && m2 && (mean || !call.centred), "tensor");
    nb::gil_scoped_release release;
    anynorm::kernels().backward(call);
}

}  // namespace

NB_MODULE(_kernels, module) {
    module.def("forward", &forward);
    module.def("forward_given", &forward_given);
    module.def("backward", &backward);
    module.def("choose_instruction_set", &anynorm::choose_instruction_set);
    module.def("instruction_set", &anynorm::instruction_set);
    module.def("instruction_sets", &anynorm::instruction_sets);
    module.def("thread_runtime", &anynorm::thread_runtime);
    anynorm::choose_instruction_set("");
}
