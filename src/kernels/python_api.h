// What Python's full API does in place, by the names that its limited API has: a module built for the stable ABI serves every
// Python from 3.12 on, and pays a call for each.
#pragma once

#include <Python.h>

namespace anynorm {

inline Py_ssize_t tuple_size(PyObject* tuple) {
#if defined(Py_LIMITED_API)
    return PyTuple_Size(tuple);
#else
    return PyTuple_GET_SIZE(tuple);
#endif
}

// A borrowed reference; the tuple has so many.
inline PyObject* tuple_item(PyObject* tuple, Py_ssize_t i) {
#if defined(Py_LIMITED_API)
    return PyTuple_GetItem(tuple, i);
#else
    return PyTuple_GET_ITEM(tuple, i);
#endif
}

// Takes the item over; the tuple is new.
inline void set_tuple_item(PyObject* tuple, Py_ssize_t i, PyObject* item) {
#if defined(Py_LIMITED_API)
    PyTuple_SetItem(tuple, i, item);
#else
    PyTuple_SET_ITEM(tuple, i, item);
#endif
}

inline PyObject* call_one(PyObject* function, PyObject* argument) {
    PyObject* arguments[] = {nullptr, argument};  // the first place is the callee's to use
    return PyObject_Vectorcall(function, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
}

}  // namespace anynorm
