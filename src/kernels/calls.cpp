#include "calls.h"

#include "tensors.h"

namespace anynorm {
namespace {

nb::object take(PyObject* made) {
    if (!made) throw nb::python_error();
    return nb::steal(made);
}

Address find_address(const nb::object& made) {
    View view;
    if (!read_new_tensor(made.ptr(), view)) throw std::runtime_error("kernels: torch made a tensor that is not plain memory");
    return view.begin;
}

// The tensors of one call, looked at one after the other.
class Tensors {
  public:
    explicit Tensors(const Plan& plan) : plan_(plan), parameter_(plan.call.dtype == kFloat64 ? kFloat64 : kFloat32) {}

    // What the plan walks: x, which a view of is kept, and what must be laid out as x.
    bool read_input(nb::handle tensor, Address& to) { return read_all(tensor, x_, to); }
    bool read_alike(nb::handle tensor, Address& to) const {
        View view;
        return tensor.is_none() || (read_all(tensor, view, to) && view.is_laid_out_as(x_));
    }
    bool read_parameter(nb::handle tensor, Address& to) const {
        return read_flat(tensor, parameter_, plan_.call.channels(), to);
    }
    bool read_mask(nb::handle tensor, Address& to) const {
        return read_flat(tensor, kFloat32, plan_.call.n * plan_.call.s, to);
    }
    bool read_running(nb::handle tensor, Address& to) const { return read_flat(tensor, parameter_, plan_.call.g, to); }
    bool read_given(nb::handle tensor, Address& to) const {
        const int dtype = plan_.call.statistics == kGivenAsDouble ? +kFloat64 : parameter_;
        return !tensor.is_none() && read_flat(tensor, dtype, plan_.call.g, to);
    }
    // Those that `make_statistics` made.
    bool read_statistics(nb::handle tensor, Arguments& given) const {
        Address start = 0;
        if (tensor.is_none() || !read_flat(tensor, kFloat64, count_statistics(), start)) return false;
        place_statistics(start, given);
        return true;
    }
    nb::object make_statistics(Arguments& given) const {
        nb::object made = take(make_flat(count_statistics(), true));
        place_statistics(find_address(made), given);
        return made;
    }
    nb::object make_gradient(Address& to) const {
        nb::object made = take(make_flat(plan_.call.channels(), parameter_ == kFloat64));
        to = find_address(made);
        return made;
    }
    bool has_layout(nb::tuple sizes, nb::tuple strides) const {
        if (nb::len(sizes) != size_t(x_.axes) || nb::len(strides) != size_t(x_.axes)) return false;
        for (int i = 0; i < x_.axes; ++i) {
            if (PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i)) != x_.sizes[i]) return false;
            if (PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i)) != x_.strides[i]) return false;
        }
        return true;
    }

  private:
    bool read_all(nb::handle tensor, View& view, Address& to) const {
        if (!read_tensor(tensor.ptr(), view) || view.dtype != plan_.call.dtype) return false;
        if (view.count() * plan_.element != plan_.all() || !holds(tensor.ptr(), view, plan_.all())) return false;
        to = view.begin;
        return true;
    }
    bool read_flat(nb::handle tensor, int dtype, int64_t count, Address& to) const {
        if (tensor.is_none()) return true;
        View view;
        if (!read_tensor(tensor.ptr(), view) || view.dtype != dtype || view.count() != count) return false;
        if (!view.is_contiguous() || !holds(tensor.ptr(), view, count * (dtype == kFloat64 ? 8 : 4))) return false;
        to = view.begin;
        return true;
    }
    int64_t count_statistics() const { return plan_.call.pools() * (plan_.call.centred ? 2 : 1); }
    void place_statistics(Address start, Arguments& given) const {
        given.mean = plan_.call.centred ? start : 0;
        given.m2 = plan_.call.centred ? start + static_cast<Address>(plan_.per_pool()) : start;
    }

    const Plan& plan_;
    const int parameter_;
    View x_{};
};

// Whether running averages can be moved by a kernel.
bool read_running(const Tensors& tensors, const Plan& plan, nb::handle mean, nb::handle var, nb::handle momentum,
                  Arguments& given) {
    if (mean.is_none() || var.is_none()) return true;
    if (plan.call.k != 1 || !PyFloat_CheckExact(momentum.ptr())) return false;
    given.momentum = PyFloat_AS_DOUBLE(momentum.ptr());
    return given.momentum >= 0 && tensors.read_running(mean, given.running_mean) &&
           tensors.read_running(var, given.running_var);
}

}  // namespace

nb::object describe(nb::args tensors) {
    constexpr int kMostTensors = 7, kMostAxes = 8;
    int64_t found[kMostTensors * (1 + kMostAxes) + kMostAxes];
    int size = 0;
    View first{};
    if (tensors.size() > kMostTensors) return nb::none();
    for (size_t i = 0; i < tensors.size(); ++i) {
        PyObject* tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
        if (tensor == Py_None) {
            found[size++] = -1;
            continue;
        }
        View view;
        if (!read_tensor(tensor, view) || view.axes > kMostAxes) return nb::none();
        if (i == 0) first = view;
        found[size++] = view.dtype + 4 * view.axes;
        for (int axis = 0; axis < view.axes; ++axis) found[size++] = view.sizes[axis];
    }
    for (int axis = 0; axis < first.axes; ++axis) found[size++] = first.strides[axis];
    return nb::bytes(found, static_cast<size_t>(size) * sizeof *found);
}

nb::object forward_tensors(const Plan& plan, nb::handle memory_format, nb::handle x, nb::handle weight, nb::handle bias,
                           nb::handle residual, nb::handle mask, nb::handle mean, nb::handle var, nb::handle momentum,
                           double eps, int activation, double alpha, int threads, bool keep) {
    Tensors tensors(plan);
    Arguments given;
    given.threads = threads, given.eps = eps, given.activation = {activation, alpha};
    if (!tensors.read_input(x, given.x) || !tensors.read_parameter(weight, given.gamma) ||
        !tensors.read_parameter(bias, given.beta) || !tensors.read_alike(residual, given.residual) ||
        !tensors.read_mask(mask, given.mask)) {
        return nb::none();
    }
    nb::object statistics = nb::none();
    if (plan.call.has_given_statistics()) {
        if (!tensors.read_given(mean, given.mean) || !tensors.read_given(var, given.var)) return nb::none();
        if (keep) {  // What is kept for backward must not change when the buffers do.
            nb::object kept_mean = take(copy(mean.ptr())), kept_var = take(copy(var.ptr()));
            statistics = nb::make_tuple(kept_mean, kept_var);
        }
    } else {
        if (!read_running(tensors, plan, mean, var, momentum, given)) return nb::none();
        if (keep) statistics = tensors.make_statistics(given);
    }
    nb::object y = take(make_like(x.ptr(), memory_format.ptr()));
    given.y = find_address(y);
    const Call call = make_forward(plan, given);
    {
        nb::gil_scoped_release release;
        run_forward(plan, call);
    }
    return nb::make_tuple(y, statistics);
}

nb::object backward_tensors(const Plan& plan, nb::handle memory_format, nb::tuple sizes, nb::tuple strides, nb::handle grad,
                            nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual, nb::handle mask,
                            nb::handle mean, nb::handle var, double eps, int activation, double alpha, int threads,
                            nb::sequence needs) {
    Tensors tensors(plan);
    Arguments given;
    given.threads = threads, given.eps = eps, given.activation = {activation, alpha};
    if (!tensors.read_input(x, given.x) || !tensors.has_layout(sizes, strides) || grad.is_none() ||
        !tensors.read_alike(grad, given.grad) || !tensors.read_parameter(weight, given.gamma) ||
        !tensors.read_parameter(bias, given.beta) || !tensors.read_alike(residual, given.residual) ||
        !tensors.read_mask(mask, given.mask)) {
        return nb::none();
    }
    if (plan.call.has_given_statistics()) {
        if (!tensors.read_given(mean, given.mean) || !tensors.read_given(var, given.var)) return nb::none();
    } else if (!tensors.read_statistics(mean, given)) {
        return nb::none();
    }
    nb::object made[4] = {nb::none(), nb::none(), nb::none(), nb::none()};
    if (nb::cast<bool>(needs[0])) {
        made[0] = take(make_like(x.ptr(), memory_format.ptr()));
        given.dx = find_address(made[0]);
    }
    if (nb::cast<bool>(needs[1])) made[1] = tensors.make_gradient(given.dgamma);
    if (nb::cast<bool>(needs[2])) made[2] = tensors.make_gradient(given.dbeta);
    if (nb::cast<bool>(needs[3])) {
        made[3] = take(make_like(x.ptr(), memory_format.ptr()));
        given.dresidual = find_address(made[3]);
    }
    const Call call = make_backward(plan, given);
    {
        nb::gil_scoped_release release;
        run_backward(plan, call);
    }
    return nb::make_tuple(made[0], made[1], made[2], made[3]);
}

}  // namespace anynorm
