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
    bool has_layout(nb::handle sizes, nb::handle strides) const {
        if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(strides.ptr())) return false;
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

// Names of attributes, made once.
struct Names {
    PyObject* compiled = PyUnicode_InternFromString("compiled");
    PyObject* memory_format = PyUnicode_InternFromString("memory_format");
    PyObject* pooling = PyUnicode_InternFromString("pooling");
    PyObject* ghosts = PyUnicode_InternFromString("ghosts");
    PyObject* sizes = PyUnicode_InternFromString("sizes");
    PyObject* strides = PyUnicode_InternFromString("strides");
    PyObject* like = PyUnicode_InternFromString("like");
    PyObject* how = PyUnicode_InternFromString("how");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* save_for_backward = PyUnicode_InternFromString("save_for_backward");
};
const Names& names() {
    static const Names made;
    return made;
}
nb::object get(nb::handle of, PyObject* name) { return take(PyObject_GetAttr(of.ptr(), name)); }

// The fields of a request (engine/request.py) that kernels look at.
struct Request {
    nb::handle source, eps, activation, mask, sizes;
    explicit Request(nb::handle request) {
        if (!PyTuple_Check(request.ptr()) || PyTuple_GET_SIZE(request.ptr()) != 6) throw nb::type_error("kernels: no request");
        source = item(request, 0), eps = item(request, 1), activation = item(request, 2), mask = item(request, 3);
        sizes = item(request, 5);
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) < 2) throw nb::type_error("kernels: no source");
    }
    static nb::handle item(nb::handle tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }
    nb::handle mean() const { return item(source, 0); }
    nb::handle var() const { return item(source, 1); }
    nb::handle momentum() const { return PyTuple_GET_SIZE(source.ptr()) > 2 ? item(source, 2) : nb::handle(Py_None); }
};

PyObject* activations = nullptr;

// Eps, threads, and the activation by its name.
void set_options(Arguments& to, nb::handle eps, nb::handle activation) {
    to.threads = count_threads();
    to.eps = PyFloat_AsDouble(eps.ptr());
    if (PyErr_Occurred()) throw nb::python_error();
    if (activation.is_none()) return;
    const nb::object found = take(PyObject_GetItem(activations, activation.ptr()));
    to.activation = {nb::cast<int>(found[0]), nb::cast<double>(found[1])};
}

// Whether running averages can be moved by a kernel.
bool read_running(const Tensors& tensors, const Plan& plan, nb::handle mean, nb::handle var, nb::handle momentum,
                  Arguments& given) {
    if (mean.is_none() || var.is_none()) return true;
    if (plan.call.k != 1 || !PyFloat_CheckExact(momentum.ptr())) return false;
    given.momentum = PyFloat_AS_DOUBLE(momentum.ptr());
    return given.momentum >= 0 && tensors.read_running(mean, given.running_mean) &&
           tensors.read_running(var, given.running_var);
}

nb::object describe(PyObject* const* tensors, size_t count) {
    constexpr int kMostTensors = 7, kMostAxes = 8;
    int64_t found[kMostTensors * (1 + kMostAxes) + kMostAxes];
    int size = 0;
    View first{};
    if (count > kMostTensors) return nb::none();
    for (size_t i = 0; i < count; ++i) {
        PyObject* tensor = tensors[i];
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

// The types of sizes, which 7.0 and True equal; null where `watch.find_key` must look.
PyObject* find_kinds(nb::handle sizes) {
    PyObject* given = sizes.ptr();
    if (given == Py_None) return Py_NewRef(Py_None);
    if (PyLong_CheckExact(given)) return Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(given)));
    if (!PyTuple_CheckExact(given)) return nullptr;
    PyObject* kinds = PyTuple_New(PyTuple_GET_SIZE(given));
    for (Py_ssize_t i = 0; kinds && i < PyTuple_GET_SIZE(given); ++i) {
        PyTuple_SET_ITEM(kinds, i, Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(given, i)))));
    }
    return kinds;
}

// What `watch.find_key` makes, or an invalid object.
nb::object find_key(nb::handle function, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                    const Request& request) {
    PyObject* tensors[] = {x.ptr(), weight.ptr(), bias.ptr(), residual.ptr(), request.mask.ptr(), request.mean().ptr(),
                           request.var().ptr()};
    const nb::object found = describe(tensors, 7), kinds = nb::steal(find_kinds(request.sizes));
    if (found.is_none() || !kinds.is_valid()) return {};
    return take(PyTuple_Pack(7, function.ptr(), Py_TYPE(request.source.ptr()), request.eps.ptr(), request.activation.ptr(),
                             request.sizes.ptr(), kinds.ptr(), found.ptr()));
}

// Shape and dtype of a parameter, `like` where it is flat and its dtype, which was looked at, the kernels' own.
nb::object find_like(nb::handle parameter, const nb::object& like) {
    View view;
    if (parameter.is_none()) return nb::none();
    if (read_new_tensor(parameter.ptr(), view) && view.axes == 1) return like;
    return nb::make_tuple(get(parameter, names().shape), get(parameter, names().dtype));
}

// What backward reads, as `Normalize.forward` saved it.
bool read_saved(const Tensors& tensors, const Plan& plan, nb::handle saved, Arguments& given) {
    const auto item = [&](Py_ssize_t i) { return nb::handle(PyTuple_GET_ITEM(saved.ptr(), i)); };
    if (!tensors.read_parameter(item(1), given.gamma) || !tensors.read_parameter(item(2), given.beta) ||
        !tensors.read_alike(item(3), given.residual) || !tensors.read_mask(item(4), given.mask)) {
        return false;
    }
    if (!plan.call.has_given_statistics()) return tensors.read_statistics(item(5), given);
    return PyTuple_GET_SIZE(saved.ptr()) == 7 && tensors.read_given(item(5), given.mean) &&
           tensors.read_given(item(6), given.var);
}

}  // namespace

nb::object describe(nb::args tensors) {
    return describe(reinterpret_cast<PyTupleObject*>(tensors.ptr())->ob_item, tensors.size());
}

void set_activations(nb::dict known) { activations = known.release().ptr(); }

nb::object normalize_known(nb::handle plans, nb::handle function, nb::handle apply, nb::handle x, nb::handle weight,
                           nb::handle bias, nb::handle residual, nb::handle asked) {
    if (is_watched()) return nb::none();
    const Request request(asked);
    const nb::object key = find_key(function, x, weight, bias, residual, request);
    PyObject* plan = key.is_valid() ? PyDict_GetItemWithError(plans.ptr(), key.ptr()) : nullptr;
    if (!plan) {
        PyErr_Clear();  // What cannot be a key is refused by the checks.
        return nb::none();
    }
    const nb::object kept = nb::borrow(plan);  // whatever becomes of the plans meanwhile
    if (is_grad_enabled() && (requires_grad(x.ptr()) || requires_grad(weight.ptr()) || requires_grad(bias.ptr()) ||
                              requires_grad(residual.ptr()))) {
        PyObject* arguments[] = {x.ptr(), weight.ptr(), bias.ptr(), residual.ptr(), asked.ptr(), plan};
        return take(PyObject_Vectorcall(apply.ptr(), arguments, 6, nullptr));
    }
    const nb::object found = forward_tensors(kept, x, weight, bias, residual, asked, false);
    return found.is_none() ? found : nb::object(found[0]);
}

nb::object forward_tensors(nb::handle of, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                           nb::handle asked, bool keep) {
    const nb::object compiled = get(of, names().compiled), memory_format = get(of, names().memory_format);
    if (nb::cast<bool>(nb::bool_(get(get(of, names().pooling), names().ghosts)))) return nb::none();
    const auto& plan = nb::cast<const Plan&>(compiled);
    const Request request(asked);
    const nb::handle mean = request.mean(), var = request.var();
    Tensors tensors(plan);
    Arguments given;
    set_options(given, request.eps, request.activation);
    if (!tensors.read_input(x, given.x) || !tensors.read_parameter(weight, given.gamma) ||
        !tensors.read_parameter(bias, given.beta) || !tensors.read_alike(residual, given.residual) ||
        !tensors.read_mask(request.mask, given.mask)) {
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
        if (!read_running(tensors, plan, mean, var, request.momentum(), given)) return nb::none();
        if (keep) statistics = tensors.make_statistics(given);
    }
    nb::object y = take(make_like(x.ptr(), memory_format.ptr()));
    given.y = find_address(y);
    const Call call = make_forward(plan, given);
    {
        nb::gil_scoped_release release;
        run_forward(plan, call);
    }
    if (given.running_mean && !increment_version(mean.ptr(), var.ptr())) throw nb::python_error();
    return nb::make_tuple(y, statistics);
}

nb::object forward_saving(nb::handle context, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                          nb::handle asked, nb::handle plan) {
    const Request request(asked);
    if (is_inference(x.ptr()) || is_inference(residual.ptr()) || is_inference(request.mask.ptr())) return nb::none();
    const nb::object found = forward_tensors(plan, x, weight, bias, residual, asked, true);
    if (found.is_none()) return found;
    // Beta may change before backward, as in torch, and without an activation the residual need not be kept.
    const bool is_behind = !request.activation.is_none();
    const nb::object statistics = found[1];
    const bool is_given = PyTuple_CheckExact(statistics.ptr());
    const nb::object first = is_given ? nb::object(statistics[0]) : statistics;
    const nb::object second = is_given ? nb::object(statistics[1]) : nb::none();
    PyObject* saved[] = {context.ptr(), x.ptr(), weight.ptr(), is_behind ? bias.ptr() : Py_None,
                         is_behind ? residual.ptr() : Py_None, request.mask.ptr(), first.ptr(), second.ptr()};
    take(PyObject_VectorcallMethod(names().save_for_backward, saved, is_given ? 8 : 7, nullptr));
    const nb::object like = get(plan, names().like);
    const nb::object of_weight = find_like(weight, like), of_bias = find_like(bias, like);
    const nb::object how = take(PyTuple_Pack(6, plan.ptr(), request.eps.ptr(), request.activation.ptr(),
                                             is_given ? Py_True : Py_False, of_weight.ptr(), of_bias.ptr()));
    if (PyObject_SetAttr(context.ptr(), names().how, how.ptr())) throw nb::python_error();
    return found[0];
}

nb::object backward_tensors(nb::handle grad, nb::handle saved, nb::handle how, nb::handle needs) {
    if (!PyTuple_Check(saved.ptr()) || PyTuple_GET_SIZE(saved.ptr()) < 6 || !PyTuple_Check(how.ptr()) ||
        PyTuple_GET_SIZE(how.ptr()) != 6 || !PyTuple_Check(needs.ptr()) || PyTuple_GET_SIZE(needs.ptr()) < 4) {
        throw nb::type_error("kernels: not what forward saved");
    }
    const auto item = [](nb::handle tuple, Py_ssize_t i) { return nb::handle(PyTuple_GET_ITEM(tuple.ptr(), i)); };
    const nb::handle of = item(how, 0), x = item(saved, 0), mask = item(saved, 4);
    const nb::object like = get(of, names().like), compiled = get(of, names().compiled);
    if ((!item(how, 4).is_none() && !item(how, 4).is(like)) || (!item(how, 5).is_none() && !item(how, 5).is(like))) {
        return nb::none();
    }
    if (grad.is_none() || is_watched() || is_grad_enabled() || is_batched(grad.ptr())) return nb::none();
    const auto& plan = nb::cast<const Plan&>(compiled);
    Tensors tensors(plan);
    Arguments given;
    set_options(given, item(how, 1), item(how, 2));
    if (!tensors.read_input(x, given.x) || !tensors.has_layout(get(of, names().sizes), get(of, names().strides)) ||
        !tensors.read_alike(grad, given.grad) || !read_saved(tensors, plan, saved, given)) {
        return nb::none();
    }
    const auto is_needed = [&](Py_ssize_t i) { return item(needs, i).ptr() == Py_True; };
    const nb::object memory_format = get(of, names().memory_format);
    nb::object dx = nb::none(), dgamma = nb::none(), dbeta = nb::none(), dresidual = nb::none();
    if (is_needed(0)) {
        dx = take(make_like(x.ptr(), memory_format.ptr()));
        given.dx = find_address(dx);
    }
    if (is_needed(1)) dgamma = tensors.make_gradient(given.dgamma);
    if (is_needed(2)) dbeta = tensors.make_gradient(given.dbeta);
    if (is_needed(3) && item(how, 2).is_none() && mask.is_none()) {
        dresidual = nb::borrow(grad);
    } else if (is_needed(3)) {
        dresidual = take(make_like(x.ptr(), memory_format.ptr()));
        given.dresidual = find_address(dresidual);
    }
    const Call call = make_backward(plan, given);
    {
        nb::gil_scoped_release release;
        run_backward(plan, call);
    }
    return nb::make_tuple(dx, dgamma, dbeta, dresidual, nb::none(), nb::none());
}

}  // namespace anynorm
