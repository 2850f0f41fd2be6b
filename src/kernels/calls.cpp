#include "calls.h"

#include "call_tensors.h"
#include "keys.h"

namespace anynorm {
namespace {

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
    given.momentum = PyFloat_AsDouble(momentum.ptr());
    return given.momentum >= 0 && tensors.read_running(mean, given.running_mean) &&
           tensors.read_running(var, given.running_var);
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
    const auto item = [&](Py_ssize_t i) { return nb::handle(tuple_item(saved.ptr(), i)); };
    if (!tensors.read_parameter(item(1), given.gamma) || !tensors.read_parameter(item(2), given.beta) ||
        !tensors.read_alike(item(3), given.residual) || !tensors.read_mask(item(4), given.mask)) {
        return false;
    }
    if (!plan.call.has_given_statistics()) return tensors.read_statistics(item(5), given);
    return tuple_size(saved.ptr()) == 7 && tensors.read_given(item(5), given.mean) &&
           tensors.read_given(item(6), given.var);
}

}  // namespace

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
    // By constants, and without a gradient of gamma or beta, y is linear in x: backward does not ask for x.
    const bool is_linear = is_given && !is_behind && !requires_grad(weight.ptr()) && !requires_grad(bias.ptr());
    PyObject* saved[] = {context.ptr(), is_linear ? Py_None : x.ptr(), weight.ptr(), is_behind ? bias.ptr() : Py_None,
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
    if (!PyTuple_Check(saved.ptr()) || tuple_size(saved.ptr()) < 6 || !PyTuple_Check(how.ptr()) ||
        tuple_size(how.ptr()) != 6 || !PyTuple_Check(needs.ptr()) || tuple_size(needs.ptr()) < 4) {
        throw nb::type_error("kernels: not what forward saved");
    }
    const auto item = [](nb::handle tuple, Py_ssize_t i) { return nb::handle(tuple_item(tuple.ptr(), i)); };
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
