// What a call asks for beside its tensors, read from Python: engine/request.py says what each field means.
#pragma once

#include <nanobind/nanobind.h>

#include "python_api.h"

namespace anynorm {

namespace nb = nanobind;

// A new reference, or Python's error.
inline nb::object take(PyObject* made) {
    if (!made) throw nb::python_error();
    return nb::steal(made);
}

// The fields of a request (engine/request.py) that kernels look at.
struct Request {
    nb::handle source, eps, activation, mask, sizes;
    explicit Request(nb::handle request) {
        if (!PyTuple_Check(request.ptr()) || tuple_size(request.ptr()) != 6) throw nb::type_error("kernels: no request");
        source = item(request, 0), eps = item(request, 1), activation = item(request, 2), mask = item(request, 3);
        sizes = item(request, 5);
        if (!PyTuple_Check(source.ptr()) || tuple_size(source.ptr()) < 2) throw nb::type_error("kernels: no source");
    }
    static nb::handle item(nb::handle tuple, Py_ssize_t i) { return tuple_item(tuple.ptr(), i); }
    nb::handle mean() const { return item(source, 0); }
    nb::handle var() const { return item(source, 1); }
    nb::handle momentum() const { return tuple_size(source.ptr()) > 2 ? item(source, 2) : nb::handle(Py_None); }
};

}  // namespace anynorm
