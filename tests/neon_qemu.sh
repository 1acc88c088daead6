#!/usr/bin/env bash
# Builds the CPU kernels for 64-bit Arm and runs their tests in an emulator: every instruction set, and a processor without the newer ones.
# Needs g++-aarch64-linux-gnu and qemu-user (Debian, Ubuntu); without them it says so and exits with status 77.
set -euo pipefail
cd "$(dirname "$0")/.."
cross=${MLXLM_CROSS_CXX:-aarch64-linux-gnu-g++}
for tool in "$cross" qemu-aarch64; do
  if ! command -v "$tool" >/dev/null; then
    echo "skipped: no $tool (apt-get install g++-aarch64-linux-gnu qemu-user)"
    exit 77
  fi
done
out=${1:-build/neon}
mkdir -p "$out"
# As in CMakeLists.txt.
flags="-std=c++20 -Isrc -Wall -Wextra -O3 -ffp-contract=fast -fno-math-errno -Wno-psabi -Wno-maybe-uninitialized"
kernels=src/kernels/cpu
compile() { # NAME SOURCE FLAGS...
  local object=$out/$1.o source=$2
  shift 2
  # shellcheck disable=SC2086  # a list of flags
  "$cross" $flags "$@" -c "$source" -o "$object"
}
compile generic "$kernels/isa_generic.cpp"
compile neon "$kernels/isa_neon.cpp" -march=armv8-a -DMLXLM_NEON
compile dotprod "$kernels/isa_dotprod.cpp" -march=armv8.2-a+dotprod -DMLXLM_NEON
compile i8mm "$kernels/isa_i8mm.cpp" -march=armv8.2-a+dotprod+i8mm -DMLXLM_NEON
compile list "$kernels/isa_list.cpp"
compile panels "$kernels/panels.cpp"
compile test tests/isa/isa_test.cpp -O1
"$cross" -static "$out"/{generic,neon,dotprod,i8mm,list,panels,test}.o -o "$out/test_isa"
qemu-aarch64 -cpu max "$out/test_isa" i8mm dotprod neon generic
qemu-aarch64 -cpu cortex-a57 "$out/test_isa" neon generic
