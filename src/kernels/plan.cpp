#include "plan.h"

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "memory.h"

namespace anynorm {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("kernels: " + what); }

void need(bool is_there, const char* what) {
    if (!is_there) refuse(std::string("missing ") + what);
}

// What a call reads and writes. Nothing that is written may overlap anything else; what is only read may, as grad and x do
// in y = norm(x), y.backward(x).
class Spans {
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

// What every call has.
Call begin(const Plan& plan, const Arguments& given, Spans& spans) {
    if (given.threads < 1) refuse("threads must be positive");
    if (given.activation.code < 0 || given.activation.code >= kActivations) refuse("activation");
    Call call = plan.call;
    call.eps = given.eps;
    call.threads = given.threads;
    call.activation = given.activation;
    spans.reads(call.x, given.x, plan.all(), "x");
    spans.reads(call.residual, given.residual, plan.all(), "residual");
    spans.reads(call.gamma, given.gamma, plan.per_channel(), "gamma");
    spans.reads(call.beta, given.beta, plan.per_channel(), "beta");
    spans.reads(call.mask, given.mask, plan.per_position(), "mask");
    return call;
}

void read_given_statistics(const Plan& plan, const Arguments& given, Call& call, Spans& spans) {
    spans.reads(call.given_mean, given.mean, plan.per_given(), "mean");
    spans.reads(call.given_var, given.var, plan.per_given(), "var");
    need(given.mean && given.var && !given.m2, "given statistics: mean and var");
}

void write_running(const Plan& plan, const Arguments& given, Call& call, Spans& spans) {
    spans.writes(call.running_mean, given.running_mean, plan.per_running(), "running_mean");
    spans.writes(call.running_var, given.running_var, plan.per_running(), "running_var");
    call.momentum = given.momentum;
    need((given.running_mean != 0) == (given.running_var != 0), "running_mean or running_var");
    if (!given.running_mean) return;
    need(!call.has_given_statistics(), "statistics of this batch for the running averages");
    if (given.momentum < 0) refuse("momentum must not be negative");
    if (call.k != 1 || !call.centred) refuse("running averages are one per channel");
}

}  // namespace

Plan::Plan(int64_t n, int64_t g, int64_t k, int64_t s, bool channels_last, bool pool_n, bool centred, int dtype, int statistics,
           int64_t sample_rows) {
    int64_t total = 16;  // bytes of the widest thing kept per element
    for (int64_t size : {n, g, k, s}) {
        if (size < 1 || __builtin_mul_overflow(total, size, &total)) refuse("sizes must be positive and fit 63 bits");
    }
    if (dtype < 0 || dtype > kFloat16) refuse("dtype");
    if (pool_n && (k != 1 || channels_last)) refuse("layout");
    if (statistics < 0 || statistics > kGivenAsDouble) refuse("statistics are of x or given in one of two dtypes");
    if (statistics && !centred) refuse("given statistics have a mean");
    if (statistics && !pool_n) refuse("given statistics are one per channel");
    if (sample_rows < 0 || (sample_rows > 0 && n % sample_rows)) refuse("sample_rows must divide n");
    if (sample_rows > 1 && (!pool_n || s > 1)) refuse("sample_rows are of samples that share statistics");
    call.n = n;
    call.g = g;
    call.k = k;
    call.s = s;
    call.channels_last = channels_last;
    call.pool_n = pool_n;
    call.centred = centred;
    call.statistics = static_cast<StatisticsFrom>(statistics);
    call.dtype = dtype;
    call.sample_rows = sample_rows;
    element = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
    parameter = dtype == kFloat64 ? 8 : 4;
}

bool Plan::bypasses_caches(int64_t tensors) const {
    const int64_t row = call.channels_last ? call.g * call.k : call.s < 16 ? call.g * call.k * call.s : call.s;
    return row * element % 64 == 0 && tensors * all() > last_cache();
}

Call make_forward(const Plan& plan, const Arguments& given) {
    Spans spans;
    Call call = begin(plan, given, spans);
    need(given.x && given.y, "x or y");
    spans.writes(call.out, given.y, plan.all(), "y");
    if (call.has_given_statistics()) {
        read_given_statistics(plan, given, call, spans);
    } else {
        spans.writes(call.mean, given.mean, plan.per_pool(), "mean");
        spans.writes(call.m2, given.m2, plan.per_pool(), "m2");
    }
    write_running(plan, given, call, spans);
    spans.check();
    call.bypasses_caches = plan.bypasses_caches(2 + (given.residual != 0));
    return call;
}

Call make_statistics(const Plan& plan, const Arguments& given) {
    Spans spans;
    Call call = begin(plan, given, spans);
    need(given.x && given.m2 && (given.mean || !call.centred), "x, mean or m2");
    if (call.has_given_statistics()) refuse("statistics are given already");
    spans.writes(call.mean, given.mean, plan.per_pool(), "mean");
    spans.writes(call.m2, given.m2, plan.per_pool(), "m2");
    spans.check();
    return call;
}

Call make_backward(const Plan& plan, const Arguments& given) {
    Spans spans;
    Call call = begin(plan, given, spans);
    need(given.grad && given.x, "grad or x");
    spans.reads(call.grad, given.grad, plan.all(), "grad");
    if (call.has_given_statistics()) {
        read_given_statistics(plan, given, call, spans);
    } else {
        need(given.m2 && (given.mean || !call.centred), "mean or m2");
        spans.reads(call.mean, given.mean, plan.per_pool(), "mean");
        spans.reads(call.m2, given.m2, plan.per_pool(), "m2");
    }
    spans.writes(call.out, given.dx, plan.all(), "dx");
    spans.writes(call.dresidual, given.dresidual, plan.all(), "dresidual");
    spans.writes(call.dgamma, given.dgamma, plan.per_channel(), "dgamma");
    spans.writes(call.dbeta, given.dbeta, plan.per_channel(), "dbeta");
    spans.check();
    call.bypasses_caches = plan.bypasses_caches(3 + (given.residual != 0) + (given.dresidual != 0));
    return call;
}

void run_forward(const Plan& plan, const Call& call) {
    if (call.out) ask_for_huge_pages(call.out, plan.all());
    kernels(call.dtype).forward(call);
}

void run_backward(const Plan& plan, const Call& call) {
    if (call.out) ask_for_huge_pages(call.out, plan.all());
    if (call.dresidual) ask_for_huge_pages(call.dresidual, plan.all());
    kernels(call.dtype).backward(call);
}

}  // namespace anynorm
