#include "keys.h"

#include "tensors.h"

namespace anynorm {
namespace {

constexpr int kMostTensors = 7, kMostAxes = 8;

nb::object describe(PyObject* const* tensors, size_t count) {
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
    PyObject* kinds = PyTuple_New(tuple_size(given));
    for (Py_ssize_t i = 0; kinds && i < tuple_size(given); ++i) {
        set_tuple_item(kinds, i, Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(tuple_item(given, i)))));
    }
    return kinds;
}

}  // namespace

nb::object describe(nb::args tensors) {
    PyObject* given[kMostTensors];
    const size_t count = tensors.size();
    for (size_t i = 0; i < count && i < kMostTensors; ++i) given[i] = tuple_item(tensors.ptr(), static_cast<Py_ssize_t>(i));
    return describe(given, count);
}

nb::object find_key(nb::handle function, nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                    const Request& request) {
    PyObject* tensors[] = {x.ptr(), weight.ptr(), bias.ptr(), residual.ptr(), request.mask.ptr(), request.mean().ptr(),
                           request.var().ptr()};
    const nb::object found = describe(tensors, 7), kinds = nb::steal(find_kinds(request.sizes));
    if (found.is_none() || !kinds.is_valid()) return {};
    return take(PyTuple_Pack(7, function.ptr(), Py_TYPE(request.source.ptr()), request.eps.ptr(), request.activation.ptr(),
                             request.sizes.ptr(), kinds.ptr(), found.ptr()));
}

}  // namespace anynorm
