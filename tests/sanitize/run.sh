#!/usr/bin/env bash
# `make sanitize`: the kernel tests against a module built with the address and undefined-behaviour sanitizers, and the
# kernels alone, on std::thread, with the thread sanitizer.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
[[ $python = /* ]] || python=$PWD/$python
build=build/sanitize
mkdir -p "$build"

# A narrow instruction set where the machine has no other; -O1 keeps reports readable and the build short.
target=$("$python" -c 'from anynorm.engine import kernels; print(kernels.compiled.instruction_set())')
case $target in
  avx512) flags="-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512" ;;
  avx2) flags="-mavx2 -mfma -mf16c" ;;
  *) flags="" ;;
esac

echo "== threads: kernels alone, $target"
# shellcheck disable=SC2086
${CXX:-g++} -std=c++17 -O1 -g -fsanitize=thread -Wno-psabi $flags -Isrc/kernels -DANYNORM_TARGET="$target" -DANYNORM_ELEMENT=float \
  src/kernels/kernels.cpp tests/sanitize/kernels_alone.cpp -o "$build/kernels_alone" -pthread
"$build/kernels_alone"

echo "== addresses and undefined behaviour: tests of kernels and masks, $target"
cmake -S . -B "$build/module" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DANYNORM_TARGETS="$target" -DANYNORM_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$python" >"$build/cmake.log"
cmake --build "$build/module" --parallel 2 >>"$build/cmake.log"
module=$(ls "$build"/module/_kernels*.so)
# Python itself is not instrumented, so leaks of its own would be reported: only ours are looked for, in what is touched.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  "$python" tests/sanitize/with_module.py "$module" -q -p no:cacheprovider -k "not compile" \
    tests/engine/test_kernels.py tests/engine/test_kernel_arguments.py tests/engine/test_kernel_masks.py \
    tests/engine/test_kernel_process.py tests/engine/test_tensors.py tests/engine/test_memory.py tests/padding/test_masks.py tests/padding/test_opened_masks.py tests/padding/test_mask_invariants.py \
    tests/padding/test_mask_context.py tests/padding/test_ragged.py
