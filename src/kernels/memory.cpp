#include "memory.h"

#include <atomic>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anynorm {

namespace {

// From the system's files, since glibc's sysconf adds up the caches of cores that share none.
int64_t find_last_cache() {
    long long kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        if (std::fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
        std::fclose(file);
    }
    return (kilobytes > 0 ? kilobytes : 32 * 1024) * 1024;
}
std::atomic<int64_t> last_cache_bytes{find_last_cache()};

}  // namespace

int64_t last_cache() { return last_cache_bytes.load(std::memory_order_relaxed); }
void set_last_cache(int64_t bytes) { last_cache_bytes = bytes; }

void ask_for_huge_pages(void* memory, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    if (size <= int64_t{32} << 20) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t from = (begin + page - 1) & ~(page - 1), to = (begin + static_cast<uintptr_t>(size)) & ~(page - 1);
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: failure changes nothing
#else
    (void)memory, (void)size;
#endif
}

}  // namespace anynorm
