// What programs of the kernels without Python and torch share: threads, and a case for each walk.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "call.h"
#include "threads.h"

namespace anynorm {

// Takes the place of threads.cpp: plain threads instead of torch's OpenMP runtime. For one file of each program.
void run_tasks(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context, bool) {
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t task = next++; task < tasks; task = next++) body(context, task);
    };
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(take);
    take();
    for (auto& thread : team) thread.join();
}

struct Case {
    const char* name;
    int64_t n, g, k, s;
    bool last, pool_n, centred;
};

const Case kCases[] = {
    {"rows, whole pools", 6, 40, 1, 900, false, true, true},
    {"rows, few and long", 2, 3, 1, 70000, false, true, true},
    {"rows of groups", 3, 4, 5, 700, false, false, true},
    {"elements", 90, 1, 300, 1, false, false, true},
    {"elements, not centred", 90, 1, 300, 1, false, false, false},
    {"columns, fused", 50, 700, 1, 1, false, true, true},
    {"columns in tiles", 30000, 40, 1, 1, false, true, true},
    {"columns of groups", 3, 4, 6, 3000, true, false, true},
};

}  // namespace anynorm
