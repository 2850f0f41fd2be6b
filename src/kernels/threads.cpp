#include "threads.h"

#include <atomic>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace anynorm {
namespace {

// libgomp's entry point, which libomp and libiomp offer too.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
    Parallel parallel = nullptr;
    char path[4096] = "";
};

// A child of fork() has none of the runtime's threads; to ask for them would wait for ever.
std::atomic<bool> is_forked{false};

Runtime find_runtime() {
    Runtime found;
#if defined(__unix__) || defined(__APPLE__)
    // torch makes its runtime's symbols global when it is imported, so whatever it uses is what is found here.
    found.parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Dl_info info;
    if (found.parallel && dladdr(reinterpret_cast<void*>(found.parallel), &info) && info.dli_fname) {
        std::strncpy(found.path, info.dli_fname, sizeof(found.path) - 1);
    }
    pthread_atfork(nullptr, nullptr, [] { is_forked.store(true); });
#endif
    return found;
}

const Runtime& runtime() {
    static const Runtime found = find_runtime();
    return found;
}

struct Work {
    void (*body)(void*, int64_t);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next;
};

void take_tasks(void* argument) {
    auto* work = static_cast<Work*>(argument);
    for (int64_t task = work->next++; task < work->tasks; task = work->next++) work->body(work->context, task);
}

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Work work{body, context, tasks, {0}};
    const int64_t team = threads < tasks ? threads : tasks;
    if (team < 2 || is_forked.load() || !runtime().parallel) return take_tasks(&work);
    runtime().parallel(take_tasks, &work, static_cast<unsigned>(team), 0);
}

const char* thread_runtime() { return runtime().path; }

}  // namespace anynorm
