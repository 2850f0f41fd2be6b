// What the machine's memory is like: how much its caches hold, and pages of 2 MB for large results.
#pragma once

#include <cstdint>

namespace anynorm {

// Bytes that the last cache holds; results larger than that bypass the caches. Tests set it.
int64_t last_cache();
void set_last_cache(int64_t bytes);

// Asks the system to back `size` bytes of memory with huge pages where it lends them on request, for results of more than
// 32 MB: these the C allocator maps anew at every call, and 8,192 page faults take longer than the kernel, 16 do not. Smaller
// ones come from memory that is there already. Only whole pages within are named, and every byte of them is about to be
// written: no more memory is used than without.
void ask_for_huge_pages(void* memory, int64_t size);

}  // namespace anynorm
