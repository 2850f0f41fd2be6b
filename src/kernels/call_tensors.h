// The tensors of one call, looked at one after the other: does each lie in memory as its plan walks it?
#pragma once

#include "request.h"
#include "tensors.h"

namespace anynorm {

inline Address find_address(const nb::object& made) {
    View view;
    if (!read_new_tensor(made.ptr(), view)) throw std::runtime_error("kernels: torch made a tensor that is not plain memory");
    return view.begin;
}

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
            if (PyLong_AsLongLong(tuple_item(sizes.ptr(), i)) != x_.sizes[i]) return false;
            if (PyLong_AsLongLong(tuple_item(strides.ptr(), i)) != x_.strides[i]) return false;
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

}  // namespace anynorm
