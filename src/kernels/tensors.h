// torch's tensors, read and made from C++ without torch's headers: memory through DLPack's exchange API, which torch has since
// 2.10, the rest through torch's own functions. All of it needs Python's lock.
#pragma once

#include <Python.h>

#include <cstdint>

#include "call.h"
#include "plan.h"
#include "python_api.h"

namespace anynorm {

// What masks and lengths may be beside floats; only `read_mask_tensor` gives them.
enum MaskDtype : int { kBool = 16, kInt64 = 17 };

// A tensor's memory; sizes and strides are torch's own, for as long as nobody changes the tensor.
struct View {
    Address begin;
    int dtype, axes;  // dtype as in Dtype or MaskDtype
    const int64_t* sizes;
    const int64_t* strides;  // in elements

    int64_t count() const;
    int64_t bytes() const;  // of its elements, without holes
    bool is_contiguous() const;
    bool is_laid_out_as(const View& other) const;
};

// Whether this torch lends its tensors' memory; to be asked once, before anything below.
bool find_torch();

// Reads a tensor that lies in the CPU's memory as it reads: exactly torch's Tensor or Parameter, of a dtype that the kernels
// have, with memory, without a negative bit that is only noted. False for anything else; no error is left.
bool read_tensor(PyObject* tensor, View& view);

// The same of a tensor that was just made, whose sign cannot be only noted.
bool read_new_tensor(PyObject* tensor, View& view);

// The same of a tensor that may also be of bools or of whole numbers of 64 bits.
bool read_mask_tensor(PyObject* tensor, View& view);

// Whether the storage holds so many bytes from the tensor's first element on; false if torch does not say.
bool holds(PyObject* tensor, const View& view, int64_t bytes);

// New tensors; null where torch raised.
PyObject* make_like(PyObject* tensor, PyObject* memory_format);
PyObject* make_flat(int64_t size, bool is_double);
PyObject* make_sized(const int64_t* sizes, int axes);  // float32
PyObject* view_as(PyObject* tensor, const int64_t* sizes, int axes);
PyObject* copy(PyObject* tensor);

// Whether anything follows the operations: tracing, a transform, a mode, forward-mode derivatives. A compiler, which cannot
// see this function, is asked for in Python. Yes where torch does not say; so of all questions here.
bool is_watched();
bool is_grad_enabled();
bool is_batched(PyObject* tensor);      // by torch.autograd.grad(is_grads_batched=True)
bool requires_grad(PyObject* tensor);   // no for None
bool is_inference(PyObject* tensor);    // no for None
int count_threads();

// Lets autograd hear of two tensors that were written through their addresses; false where torch raised.
bool increment_version(PyObject* first, PyObject* second);

}  // namespace anynorm
