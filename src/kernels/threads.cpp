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
using Number = int (*)();

struct Runtime {
    Parallel parallel = nullptr;
    Number number = nullptr;  // of the thread that asks, in its team
    char path[4096] = "";
};

constexpr int kMostThreads = 64;  // memory is busy long before

// A child of fork() has none of the runtime's threads; to ask for them would wait for ever.
std::atomic<bool> is_forked{false};

Runtime find_runtime() {
    Runtime found;
#if defined(__unix__) || defined(__APPLE__)
    // torch makes its runtime's symbols global when it is imported, so whatever it uses is what is found here.
    found.parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
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

// Each thread has a range of tasks of its own, neighbours in memory, and helps with another's when it is done. A thread's
// range goes by its number, as that of torch's loops does: what the layer before left in its core's cache is there.
struct Work {
    void (*body)(void*, int64_t);
    void* context;
    int64_t tasks, team;
    bool backwards;
    std::atomic<int64_t> joined{0};
    struct alignas(64) Next {
        std::atomic<int64_t> task{0};
    } next[kMostThreads];
    int64_t begin(int64_t member) const { return tasks * member / team; }
};

void take_tasks(void* argument) {
    auto* work = static_cast<Work*>(argument);
    const int64_t own = runtime().number ? runtime().number() % work->team : work->joined++;
    for (int64_t helped = 0; helped < work->team; ++helped) {
        const int64_t member = (own + helped) % work->team, begin = work->begin(member), end = work->begin(member + 1);
        auto& next = work->next[member].task;
        for (int64_t i = next++; i < end - begin; i = next++) {
            work->body(work->context, work->backwards ? end - 1 - i : begin + i);
        }
    }
}

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context, bool backwards) {
    int64_t team = threads < tasks ? threads : tasks;
    if (team > kMostThreads) team = kMostThreads;
    if (team < 2 || is_forked.load() || !runtime().parallel) {
        for (int64_t i = 0; i < tasks; ++i) body(context, backwards ? tasks - 1 - i : i);
        return;
    }
    Work work;
    work.body = body;
    work.context = context;
    work.tasks = tasks;
    work.team = team;
    work.backwards = backwards;
    runtime().parallel(take_tasks, &work, static_cast<unsigned>(team), 0);
}

const char* thread_runtime() { return runtime().path; }

}  // namespace anynorm
