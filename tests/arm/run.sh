#!/usr/bin/env bash
# `make arm`: the kernels alone against the formula, for each element type: compiled for this machine, and for aarch64 by a
# cross compiler and run by qemu's emulation of its processor. Debian: apt-get install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/../.."
cross=${CROSS:-aarch64-linux-gnu-g++}
emulator=${EMULATOR:-qemu-aarch64}
build=build/arm
mkdir -p "$build"

for tool in "$cross" "$emulator"; do
  if ! command -v "$tool" >/dev/null; then
    echo "make arm: $tool is missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
    exit 1
  fi
done

# compile COMPILER NAME ELEMENT: as CMakeLists.txt compiles the kernels where it knows no wider instruction set.
compile() {
  "$1" -std=c++17 -O3 -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -static -pthread \
    -Isrc/kernels -DANYNORM_SMALL -DANYNORM_TARGET=baseline -DANYNORM_ELEMENT="$3" \
    src/kernels/kernels.cpp tests/arm/kernels.cpp -o "$build/$2-$3"
}

for element in float double bfloat16 float16; do
  compile "${CXX:-g++}" native "$element" &
  compile "$cross" aarch64 "$element"
  wait $!
  echo "$element, this machine: $("$build/native-$element")"
  echo "$element, aarch64:      $("$emulator" "$build/aarch64-$element")"
done
