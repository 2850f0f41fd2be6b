#include "dispatch.h"

namespace anynorm {

#if !defined(ANYNORM_ONLY_AVX512)
namespace baseline {
extern const Kernels kernels;
}
#endif
#if defined(ANYNORM_X86)
#if !defined(ANYNORM_ONLY_AVX512)
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Target {
    const char* name;
    const Kernels* kernels;
    bool (*is_here)();
};

// The widest first.
const Target kTargets[] = {
#if defined(ANYNORM_X86)
    {"avx512", &avx512::kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     }},
#if !defined(ANYNORM_ONLY_AVX512)
    {"avx2", &avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#endif
#if !defined(ANYNORM_ONLY_AVX512)
    {"baseline", &baseline::kernels, [] { return true; }},
#endif
};

const Target* chosen = nullptr;

}  // namespace

bool choose_instruction_set(const std::string& name) {
    for (const Target& target : kTargets) {
        if (target.is_here() && (name.empty() || name == target.name)) {
            chosen = &target;
            return true;
        }
    }
    return false;
}

const Kernels& kernels() { return *chosen->kernels; }
const char* instruction_set() { return chosen->name; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Target& target : kTargets) {
        if (target.is_here()) names.emplace_back(target.name);
    }
    return names;
}

}  // namespace anynorm
