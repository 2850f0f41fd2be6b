// Work shared among the threads of the OpenMP runtime that torch has loaded; none is linked or brought along.
#pragma once

#include <cstdint>

namespace anynorm {

// Calls body(context, task) once for every task, from at most `threads` threads. Each begins with a range of neighbours,
// the same range for as many tasks and threads, from its front or its back.
void run_tasks(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context, bool backwards);

// Path of the runtime in use, or "" where work is serial.
const char* thread_runtime();

}  // namespace anynorm
