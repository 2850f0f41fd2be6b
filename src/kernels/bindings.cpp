// The compiled module: checks what Python says about sizes and addresses, releases the GIL, calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "call.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace nb = nanobind;
using anynorm::Call;
using Address = uintptr_t;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("kernels: " + what); }

// What a call reads and writes. Nothing that is written may overlap anything else.
class Memory {
  public:
    template <class T>
    void reads(T*& to, Address address, int64_t size, const char* name) {
        add(to, address, size, name, false);
    }
    template <class T>
    void writes(T*& to, Address address, int64_t size, const char* name) {
        add(to, address, size, name, true);
    }
    void check() const {
        for (int i = 0; i < count_; ++i) {
            for (int j = 0; spans_[i].is_written && j < count_; ++j) {
                if (i != j && spans_[i].begin < spans_[j].end && spans_[j].begin < spans_[i].end) {
                    refuse(std::string(spans_[i].name) + " shares memory with " + spans_[j].name);
                }
            }
        }
    }

  private:
    struct Span {
        Address begin, end;
        const char* name;
        bool is_written;
    };
    template <class T>
    void add(T*& to, Address address, int64_t size, const char* name, bool is_written) {
        to = reinterpret_cast<T*>(address);
        if (address) spans_[count_++] = {address, address + static_cast<Address>(size), name, is_written};
    }
    Span spans_[16];
    int count_ = 0;
};

// How a tensor is walked: sizes that were checked once, made by `walks.find_plan` and kept.
struct Plan {
    Call call{};
    int64_t element, parameter;  // bytes
    bool given_as_parameters;

    // given: 0 statistics come from x; 1 they are given in the dtype of the parameters; 2 in double.
    Plan(int64_t n, int64_t g, int64_t k, int64_t s, bool last, bool pool_n, bool centred, int dtype, int given,
         int64_t sample_rows) {
        int64_t total = 16;  // bytes of the widest thing kept per element
        for (int64_t size : {n, g, k, s}) {
            if (size < 1 || __builtin_mul_overflow(total, size, &total)) refuse("sizes must be positive and fit 63 bits");
        }
        if (dtype < 0 || dtype > anynorm::kFloat16) refuse("dtype");
        if (pool_n && (k != 1 || last)) refuse("layout");
        if (given < 0 || given > 2 || (given && !centred)) refuse("given");
        if (given && !pool_n) refuse("given statistics are one per channel");
        if (sample_rows < 0 || (sample_rows > 0 && n % sample_rows)) refuse("sample_rows must divide n");
        if (sample_rows > 1 && (!pool_n || s > 1)) refuse("sample_rows are of samples that share statistics");
        call.n = n;
        call.g = g;
        call.k = k;
        call.s = s;
        call.last = last;
        call.pool_n = pool_n;
        call.centred = centred;
        call.given = given != 0;
        given_as_parameters = given == 1;
        call.dtype = dtype;
        call.sample_rows = sample_rows;
        element = dtype == anynorm::kFloat64 ? 8 : dtype == anynorm::kFloat32 ? 4 : 2;
        parameter = dtype == anynorm::kFloat64 ? 8 : 4;
    }
    // Whether every row that a walk writes begins at a cache line: results bypass the caches in whole lines only.
    bool has_whole_lines() const {
        const int64_t row = call.last ? call.g * call.k : call.s < 16 ? call.g * call.k * call.s : call.s;
        return row * element % 64 == 0;
    }
    bool goes_past_caches(int64_t tensors) const { return has_whole_lines() && tensors * all() > anynorm::last_cache(); }
    int64_t all() const { return call.n * call.g * call.k * call.s * element; }
    int64_t per_channel() const { return call.channels() * parameter; }
    int64_t per_pool() const { return call.pools() * (given_as_parameters ? parameter : 8); }
    int64_t per_position() const { return call.n * call.s * 4; }
    void reads_statistics(Memory& memory, Call& to, Address mean, Address m2) const {
        if (given_as_parameters) {
            memory.reads(to.given_mean, mean, per_pool(), "mean");
            memory.reads(to.given_var, m2, per_pool(), "var");
        } else {
            memory.reads(to.mean, mean, per_pool(), "mean");
            memory.reads(to.m2, m2, per_pool(), "m2");
        }
    }
};

Call begin(const Plan& plan, double eps, int threads, int activation) {
    if (threads < 1) refuse("threads must be positive");
    if (activation < 0 || activation > anynorm::kGelu) refuse("activation");
    Call call = plan.call;
    call.eps = eps;
    call.threads = threads;
    call.activation = activation;
    return call;
}
void need(bool held, const char* what) {
    if (!held) refuse(std::string("missing ") + what);
}

void forward(const Plan& plan, double eps, int threads, int activation, Address x, Address residual, Address y,
             Address gamma, Address beta, Address mean, Address m2, Address weight, Address running_mean,
             Address running_var, Address counter, double momentum) {
    Call call = begin(plan, eps, threads, activation);
    Memory memory;
    memory.reads(call.x, x, plan.all(), "x");
    memory.reads(call.residual, residual, plan.all(), "residual");
    memory.writes(call.out, y, plan.all(), "y");
    memory.reads(call.gamma, gamma, plan.per_channel(), "gamma");
    memory.reads(call.beta, beta, plan.per_channel(), "beta");
    if (call.given) {
        plan.reads_statistics(memory, call, mean, m2);
        need(mean && m2 && y, "given statistics or y");
        need(!running_mean && !running_var && !counter, "statistics of this batch for the running averages");
    } else {
        memory.writes(call.mean, mean, plan.per_pool(), "mean");
        memory.writes(call.m2, m2, plan.per_pool(), "m2");
    }
    memory.reads(call.weight, weight, plan.per_position(), "weight");
    memory.writes(call.running_mean, running_mean, call.g * plan.parameter, "running_mean");
    memory.writes(call.running_var, running_var, call.g * plan.parameter, "running_var");
    memory.writes(call.counter, counter, 8, "num_batches_tracked");
    call.momentum = momentum;
    need(x && (y || m2), "x, or a result");
    need((running_mean != 0) == (running_var != 0) && (running_mean || !counter), "running_mean or running_var");
    need(counter || momentum >= 0, "num_batches_tracked for a cumulative average");
    if (running_mean && (call.k != 1 || !call.centred)) refuse("running averages are one per channel");
    memory.check();
    nb::gil_scoped_release release;
    if (y) anynorm::ask_for_huge_pages(y, plan.all());
    call.past_caches = plan.goes_past_caches(2 + (residual != 0));
    anynorm::kernels(call.dtype).forward(call);
}

void backward(const Plan& plan, double eps, int threads, int activation, Address grad, Address x, Address residual,
              Address dx, Address dresidual, Address gamma, Address beta, Address mean, Address m2, Address weight,
              Address dgamma, Address dbeta) {
    Call call = begin(plan, eps, threads, activation);
    Memory memory;
    memory.reads(call.grad, grad, plan.all(), "grad");
    memory.reads(call.x, x, plan.all(), "x");
    memory.reads(call.residual, residual, plan.all(), "residual");
    memory.writes(call.out, dx, plan.all(), "dx");
    memory.writes(call.dresidual, dresidual, plan.all(), "dresidual");
    memory.reads(call.gamma, gamma, plan.per_channel(), "gamma");
    memory.reads(call.beta, beta, plan.per_channel(), "beta");
    plan.reads_statistics(memory, call, mean, m2);
    memory.reads(call.weight, weight, plan.per_position(), "weight");
    memory.writes(call.dgamma, dgamma, plan.per_channel(), "dgamma");
    memory.writes(call.dbeta, dbeta, plan.per_channel(), "dbeta");
    need(grad && x && m2 && (mean || !call.centred), "grad, x, mean or m2");
    // grad and x may be one tensor, as in y = norm(x), y.backward(x): both are only read.
    memory.check();
    nb::gil_scoped_release release;
    if (dx) anynorm::ask_for_huge_pages(dx, plan.all());
    call.past_caches = plan.goes_past_caches(3 + (residual != 0) + (dresidual != 0));
    if (dresidual) anynorm::ask_for_huge_pages(dresidual, plan.all());
    anynorm::kernels(call.dtype).backward(call);
}

}  // namespace

NB_MODULE(_kernels, module) {
    nb::set_leak_warnings(false);  // plans are kept for the life of the process
    nb::class_<Plan>(module, "Plan")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, bool, bool, bool, int, int, int64_t>());
    module.def("forward", &forward);
    module.def("backward", &backward);
    module.def("last_cache", &anynorm::last_cache);
    module.def("set_last_cache", &anynorm::set_last_cache);
    module.def("choose_instruction_set", &anynorm::choose_instruction_set);
    module.def("instruction_set", &anynorm::instruction_set);
    module.def("instruction_sets", &anynorm::instruction_sets);
    module.def("thread_runtime", &anynorm::thread_runtime);
    anynorm::choose_instruction_set("");
}
