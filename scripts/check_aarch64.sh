#!/bin/sh
# Cross-compiles the C++ core for aarch64 (NEON) and runs its self-check under an emulator.
# Needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
set -eu
cd "$(dirname "$0")/.."
cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
cmake --build build/aarch64 -j "${MAX_JOBS:-2}"
cd build/aarch64
ctest --output-on-failure
