#include "dispatch.h"

namespace anynorm {
namespace {

struct Target {
    const char* name;
    bool is_here;
    Kernels kernels[4];  // as Dtype counts
};

#define ANYNORM_KERNELS(target) \
    {target::kernels_of<float>(), target::kernels_of<double>(), target::kernels_of<bfloat16>(), target::kernels_of<float16>()}

// The widest first.
const Target kTargets[] = {
#if defined(ANYNORM_HAS_avx512)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq"),
     ANYNORM_KERNELS(avx512)},
#endif
#if defined(ANYNORM_HAS_avx2)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), ANYNORM_KERNELS(avx2)},
#endif
#if defined(ANYNORM_HAS_baseline)
    {"baseline", true, ANYNORM_KERNELS(baseline)},
#endif
};

const Target* chosen = nullptr;

}  // namespace

bool choose_instruction_set(const std::string& name) {
    for (const Target& target : kTargets) {
        if (target.is_here && (name.empty() || name == target.name)) {
            chosen = &target;
            return true;
        }
    }
    return false;
}

const Kernels& kernels(int dtype) { return chosen->kernels[dtype]; }
const char* instruction_set() { return chosen->name; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Target& target : kTargets) {
        if (target.is_here) names.emplace_back(target.name);
    }
    return names;
}

}  // namespace anynorm
