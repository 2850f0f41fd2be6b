#include "masks.h"

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace anynorm {
namespace {

constexpr int kMostAxes = 8;

// The axes of x, with size 1 for channels, and those of its positions alone.
struct Positions {
    int64_t opened[kMostAxes], sizes[kMostAxes];
    int opened_axes = 0, axes = 0;

    bool read(nb::handle x, int first, int channels) {
        View view;
        if (!read_tensor(x.ptr(), view) || view.axes > kMostAxes) return false;
        if (first < 0) first += view.axes;
        if (channels < 1 || first < 0 || first + channels > view.axes) return false;
        for (int axis = 0; axis < view.axes; ++axis) {
            const bool is_channel = axis >= first && axis < first + channels;
            opened[opened_axes++] = is_channel ? 1 : view.sizes[axis];
            if (!is_channel) sizes[axes++] = view.sizes[axis];
        }
        return true;
    }
    bool fits(const View& mask) const { return mask.axes == axes && std::equal(sizes, sizes + axes, mask.sizes); }
    nb::object make(float*& to) const {
        nb::object made = nb::steal(make_sized(opened, opened_axes));
        View view;
        if (!made.is_valid() || !read_new_tensor(made.ptr(), view)) throw nb::python_error();
        to = reinterpret_cast<float*>(view.begin);
        return made;
    }
};

bool read_counted(nb::handle tensor, View& view) {
    return read_mask_tensor(tensor.ptr(), view) && view.is_contiguous() && holds(tensor.ptr(), view, view.bytes());
}

// How many values are 1; -1 where one is neither 1 nor 0.
int64_t count_ones(const float* mask, int64_t size) {
    int64_t ones = 0, others = 0;
    for (int64_t i = 0; i < size; ++i) ones += mask[i] == 1.0f, others += !(mask[i] == 1.0f) & !(mask[i] == 0.0f);
    return others ? -1 : ones;
}

template <class T>
bool any(const View& view) {
    const T* begin = reinterpret_cast<const T*>(view.begin);
    return std::any_of(begin, begin + view.count(), [](T value) { return value != 0; });
}

// Whole numbers, or nothing where one is something else.
std::vector<int64_t> read_numbers(nb::handle numbers) {
    std::vector<int64_t> found;
    View view;
    if (PyList_CheckExact(numbers.ptr()) || PyTuple_CheckExact(numbers.ptr())) {
        for (nb::handle number : nb::borrow<nb::sequence>(numbers)) {
            int overflow = 0;
            if (!PyLong_CheckExact(number.ptr())) return {};
            found.push_back(PyLong_AsLongLongAndOverflow(number.ptr(), &overflow));
            if (overflow) return {};
        }
    } else if (read_counted(numbers, view) && view.dtype == kInt64 && view.axes == 1) {
        const int64_t* begin = reinterpret_cast<const int64_t*>(view.begin);
        found.assign(begin, begin + view.count());
    }
    return found;
}

}  // namespace

nb::object open_mask(nb::handle x, nb::handle mask, int first, int channels) {
    Positions positions;
    View view;
    if (!positions.read(x, first, channels) || !read_counted(mask, view) || !positions.fits(view)) return nb::none();
    const int64_t size = view.count();
    if (view.dtype == kFloat32) {
        const int64_t ones = count_ones(reinterpret_cast<const float*>(view.begin), size);
        if (ones < 0) return nb::none();
        nb::object opened = nb::steal(view_as(mask.ptr(), positions.opened, positions.opened_axes));
        if (!opened.is_valid()) throw nb::python_error();
        return nb::make_tuple(opened, ones);
    }
    if (view.dtype != kBool) return nb::none();
    const auto* from = reinterpret_cast<const uint8_t*>(view.begin);
    float* to;
    nb::object made = positions.make(to);
    int64_t ones = 0;
    for (int64_t i = 0; i < size; ++i) to[i] = from[i] != 0, ones += from[i] != 0;
    return nb::make_tuple(made, ones);
}

nb::object open_lengths(nb::handle x, nb::handle lengths, int first, int channels) {
    Positions positions;
    if (!positions.read(x, first, channels) || positions.axes != 2) return nb::none();
    const auto [samples, size] = std::pair(positions.sizes[0], positions.sizes[1]);
    const std::vector<int64_t> found = read_numbers(lengths);
    if (static_cast<int64_t>(found.size()) != samples) return nb::none();
    for (int64_t length : found) {
        if (length < 0 || length > size) return nb::none();
    }
    float* to;
    nb::object made = positions.make(to);
    int64_t real = 0;
    for (int64_t n = 0; n < samples; ++n, to += size) {
        std::fill(std::fill_n(to, found[n], 1.0f), to + size, 0.0f);
        real += found[n];
    }
    return nb::make_tuple(made, real);
}

nb::object has_real(nb::handle counted) {
    View view;
    if (!read_counted(counted, view)) {
        const std::vector<int64_t> found = read_numbers(counted);
        if (found.empty()) return nb::none();
        return nb::bool_(std::any_of(found.begin(), found.end(), [](int64_t length) { return length != 0; }));
    }
    if (view.dtype == kBool) return nb::bool_(any<uint8_t>(view));
    if (view.dtype == kInt64) return nb::bool_(any<int64_t>(view));
    return view.dtype == kFloat32 ? nb::object(nb::bool_(any<float>(view))) : nb::none();
}

}  // namespace anynorm
