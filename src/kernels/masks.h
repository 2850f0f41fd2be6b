// Masks and lengths as the engine takes them: one float for each position, 1 where it counts. As in calls.h, each function
// returns None where it is not sure of a tensor or where something does not fit; padding/masks.py then says what.
#pragma once

#include <nanobind/nanobind.h>

namespace anynorm {

namespace nb = nanobind;

// (mask, how many positions count) for an x whose channels are `channels` axes from `first` on, counted from the back where
// `first` is negative. The mask has the axes of x, with size 1 for channels.
nb::object open_mask(nb::handle x, nb::handle mask, int first, int channels);

// The same for how many positions of each sample count, from its first on: a tensor, a list or a tuple.
nb::object open_lengths(nb::handle x, nb::handle lengths, int first, int channels);

// Whether any position of a mask, or any of some lengths, is not 0.
nb::object has_real(nb::handle counted);

}  // namespace anynorm
