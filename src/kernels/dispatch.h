// Which instruction set's kernels are in use.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace anynorm {

// The kernels for an element type, as Dtype counts them.
const Kernels& kernels(int dtype);
const char* instruction_set();
std::vector<std::string> instruction_sets();  // that were built and that this machine has

// Called once, before any kernel; "" takes the widest. False where `name` is not to be had here.
bool choose_instruction_set(const std::string& name);

}  // namespace anynorm
