#include "tensors.h"

#include <initializer_list>

namespace anynorm {
namespace {

// As DLPack 1.x lays them out; see dlpack.h, "DLPackExchangeAPI".
struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t axes;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* sizes;
    int64_t* strides;
    uint64_t byte_offset;
};
struct DlExchange {
    uint32_t major, minor;
    void* previous;
    void* allocate;
    void* export_managed;
    void* import_managed;
    int (*read)(void* tensor, DlTensor* view);
    void* current_stream;
};
constexpr int kDlCpu = 1, kDlInt = 0, kDlFloat = 2, kDlBfloat = 4, kDlBool = 6;

// What is used of torch, kept for the life of the process.
struct Torch {
    int (*read)(void*, DlTensor*) = nullptr;
    PyTypeObject *tensor, *parameter;
    PyObject *is_neg, *untyped_storage, *storage_offset, *clone, *view, *empty, *empty_like;
    PyObject *float32, *float64, *cpu, *with_format, *with_dtype;
    PyObject *is_inference, *increment_version, *is_grad_enabled, *get_num_threads;
    // Each says whether, or how often, something follows the operations.
    PyObject *is_tracing, *transforms, *dispatch_modes, *function_modes, *forward_ad;
    PyObject *function_mode_stack, *default_device;  // the modes themselves, and the one that only says where to make tensors
    PyObject* is_batched;
    PyObject *requires_grad, *current_level;  // names
    bool lacks = false;                       // whether one of them is missing: a torch that is not known
} torch;

// attribute(module, "nn", "Parameter") is module.nn.Parameter; null, and noted, where one is missing. Noted here, because
// what is called between may clear Python's error.
template <class... Names>
PyObject* attribute(PyObject* of, Names... names) {
    Py_XINCREF(of);
    for (const char* name : {names...}) {
        PyObject* found = of ? PyObject_GetAttrString(of, name) : nullptr;
        Py_XDECREF(of);
        of = found;
    }
    if (!of) torch.lacks = true;
    return of;
}

bool read_torch(PyObject* module) {
    PyObject* capsule = attribute(module, "Tensor", "__dlpack_c_exchange_api__");
    const char* name = "dlpack_exchange_api";
    if (!capsule || !PyCapsule_IsValid(capsule, name)) return false;
    const auto* exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, name));
    if (exchange->major != 1 || !exchange->read) return false;
    torch.tensor = reinterpret_cast<PyTypeObject*>(attribute(module, "Tensor"));
    torch.parameter = reinterpret_cast<PyTypeObject*>(attribute(module, "nn", "Parameter"));
    torch.is_neg = attribute(module, "Tensor", "is_neg");
    torch.untyped_storage = attribute(module, "Tensor", "untyped_storage");
    torch.storage_offset = attribute(module, "Tensor", "storage_offset");
    torch.clone = attribute(module, "Tensor", "clone");
    torch.view = attribute(module, "Tensor", "view");
    torch.empty = attribute(module, "empty");
    torch.empty_like = attribute(module, "empty_like");
    torch.float32 = attribute(module, "float32");
    torch.float64 = attribute(module, "float64");
    torch.cpu = PyObject_CallMethod(module, "device", "s", "cpu");
    torch.with_format = Py_BuildValue("(s)", "memory_format");
    torch.with_dtype = Py_BuildValue("(ss)", "dtype", "device");
    torch.is_inference = attribute(module, "Tensor", "is_inference");
    torch.increment_version = attribute(module, "_C", "_increment_version");
    torch.is_grad_enabled = attribute(module, "is_grad_enabled");
    torch.get_num_threads = attribute(module, "get_num_threads");
    torch.is_tracing = attribute(module, "_C", "_is_tracing");
    torch.transforms = attribute(module, "_C", "_functorch", "get_dynamic_layer_stack_depth");
    torch.is_batched = attribute(module, "_C", "_functorch", "is_legacy_batchedtensor");
    torch.dispatch_modes = attribute(module, "_C", "_len_torch_dispatch_stack");
    torch.function_modes = attribute(module, "_C", "_len_torch_function_stack");
    torch.forward_ad = attribute(module, "autograd", "forward_ad");
    torch.function_mode_stack = attribute(module, "overrides", "_get_current_function_mode_stack");
    PyObject* of_devices = PyImport_ImportModule("torch.utils._device");
    torch.default_device = attribute(of_devices, "DeviceContext");
    Py_XDECREF(of_devices);
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.current_level = PyUnicode_InternFromString("_current_level");
    if (torch.lacks || !torch.cpu || PyErr_Occurred()) return false;
    torch.read = exchange->read;
    return true;
}

// A whole number or bool, which is let go; -1 where torch raised.
int64_t read_answer(PyObject* found) {
    const int64_t answer = found ? PyLong_AsLongLong(found) : -1;
    Py_XDECREF(found);
    if (answer == -1) PyErr_Clear();
    return answer;
}
// What a method of torch's without arguments, or a function, answers.
int64_t ask(PyObject* method, PyObject* tensor) { return read_answer(call_one(method, tensor)); }
int64_t ask(PyObject* function) { return read_answer(PyObject_CallNoArgs(function)); }

// As `watch.only_default_device`.
bool has_only_default_device() {
    PyObject* modes = PyObject_CallNoArgs(torch.function_mode_stack);
    bool is_so = modes && PyList_Check(modes);
    for (Py_ssize_t i = 0; is_so && i < PyList_Size(modes); ++i) {
        is_so = reinterpret_cast<PyObject*>(Py_TYPE(PyList_GetItem(modes, i))) == torch.default_device;
    }
    Py_XDECREF(modes);
    PyErr_Clear();
    return is_so;
}

int find_dtype(const DlTensor& t) {
    if (t.lanes != 1) return -1;
    if (t.code == kDlBfloat) return t.bits == 16 ? kBFloat16 : -1;
    if (t.code == kDlBool) return t.bits == 8 ? kBool : -1;
    if (t.code == kDlInt) return t.bits == 64 ? kInt64 : -1;
    if (t.code != kDlFloat) return -1;
    return t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : -1;
}

int64_t element_size(int dtype) {
    return dtype == kBool ? 1 : dtype == kFloat64 || dtype == kInt64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

bool read_any(PyObject* tensor, View& view) {
    const PyTypeObject* type = Py_TYPE(tensor);
    if (!torch.read || (type != torch.tensor && type != torch.parameter)) return false;
    DlTensor found;
    if (torch.read(tensor, &found)) {
        PyErr_Clear();
        return false;
    }
    const int dtype = find_dtype(found);
    if (found.device_type != kDlCpu || dtype < 0 || !found.data) return false;
    view = {reinterpret_cast<Address>(found.data) + found.byte_offset, dtype, found.axes, found.sizes, found.strides};
    return true;
}

PyObject* write_sizes(const int64_t* sizes, int axes) {
    PyObject* written = PyTuple_New(axes);
    for (int i = 0; written && i < axes; ++i) {
        PyObject* size = PyLong_FromLongLong(sizes[i]);
        if (size) set_tuple_item(written, i, size);
        else Py_CLEAR(written);
    }
    return written;
}

}  // namespace

int64_t View::count() const {
    int64_t count = 1;
    for (int i = 0; i < axes; ++i) count *= sizes[i];
    return count;
}

int64_t View::bytes() const { return count() * element_size(dtype); }

bool View::is_contiguous() const {
    int64_t step = 1;
    for (int i = axes - 1; i >= 0; --i) {
        if (sizes[i] != 1 && strides[i] != step) return false;
        step *= sizes[i];
    }
    return true;
}

bool View::is_laid_out_as(const View& other) const {
    if (dtype != other.dtype || axes != other.axes) return false;
    for (int i = 0; i < axes; ++i) {
        if (sizes[i] != other.sizes[i] || strides[i] != other.strides[i]) return false;
    }
    return true;
}

bool find_torch() {
    if (torch.read) return true;
    PyObject* module = PyImport_ImportModule("torch");
    const bool found = module && read_torch(module);
    Py_XDECREF(module);
    PyErr_Clear();
    return found;
}

bool read_new_tensor(PyObject* tensor, View& view) { return read_any(tensor, view) && view.dtype < kBool; }

bool read_tensor(PyObject* tensor, View& view) {
    return read_new_tensor(tensor, view) && ask(torch.is_neg, tensor) == 0;
}

bool read_mask_tensor(PyObject* tensor, View& view) {
    return read_any(tensor, view) && (view.dtype >= kBool || ask(torch.is_neg, tensor) == 0);
}

bool holds(PyObject* tensor, const View& view, int64_t bytes) {
    PyObject* storage = call_one(torch.untyped_storage, tensor);
    if (!storage) {
        PyErr_Clear();
        return false;
    }
    const int64_t held = PyObject_Size(storage);  // in bytes
    if (held < 0) PyErr_Clear();
    Py_DECREF(storage);
    const int64_t offset = ask(torch.storage_offset, tensor);
    return offset >= 0 && held - offset * element_size(view.dtype) >= bytes;
}

PyObject* make_like(PyObject* tensor, PyObject* memory_format) {
    PyObject* arguments[] = {tensor, memory_format};
    return PyObject_Vectorcall(torch.empty_like, arguments, 1, torch.with_format);
}

PyObject* make_flat(int64_t size, bool is_double) {
    PyObject* number = PyLong_FromLongLong(size);
    PyObject* arguments[] = {number, is_double ? torch.float64 : torch.float32, torch.cpu};
    PyObject* made = number ? PyObject_Vectorcall(torch.empty, arguments, 1, torch.with_dtype) : nullptr;
    Py_XDECREF(number);
    return made;
}

PyObject* make_sized(const int64_t* sizes, int axes) {
    PyObject* written = write_sizes(sizes, axes);
    PyObject* arguments[] = {written, torch.float32, torch.cpu};
    PyObject* made = written ? PyObject_Vectorcall(torch.empty, arguments, 1, torch.with_dtype) : nullptr;
    Py_XDECREF(written);
    return made;
}

PyObject* view_as(PyObject* tensor, const int64_t* sizes, int axes) {
    PyObject* written = write_sizes(sizes, axes);
    PyObject* arguments[] = {tensor, written};
    PyObject* made = written ? PyObject_Vectorcall(torch.view, arguments, 2, nullptr) : nullptr;
    Py_XDECREF(written);
    return made;
}

bool is_watched() {
    return ask(torch.is_tracing) != 0 || ask(torch.transforms) != 0 || ask(torch.dispatch_modes) != 0 ||
           (ask(torch.function_modes) != 0 && !has_only_default_device()) || read_answer(PyObject_GetAttr(torch.forward_ad, torch.current_level)) != -1;
}
bool is_grad_enabled() { return ask(torch.is_grad_enabled) != 0; }
bool is_batched(PyObject* tensor) { return ask(torch.is_batched, tensor) != 0; }
bool requires_grad(PyObject* tensor) {
    return tensor != Py_None && read_answer(PyObject_GetAttr(tensor, torch.requires_grad)) != 0;
}
bool is_inference(PyObject* tensor) { return tensor != Py_None && ask(torch.is_inference, tensor) != 0; }
int count_threads() { return static_cast<int>(ask(torch.get_num_threads)); }

bool increment_version(PyObject* first, PyObject* second) {
    if (is_inference(first)) return true;  // such a tensor has none
    PyObject* both = PyTuple_Pack(2, first, second);
    PyObject* done = both ? call_one(torch.increment_version, both) : nullptr;
    Py_XDECREF(both);
    Py_XDECREF(done);
    return done;
}

PyObject* copy(PyObject* tensor) { return call_one(torch.clone, tensor); }

}  // namespace anynorm
