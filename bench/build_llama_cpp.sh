#!/usr/bin/env bash
# Builds llama.cpp's llama-bench from the source archive of the Python package llama-cpp-python, to measure against.
# Usage: bench/build_llama_cpp.sh OUT_DIR   -> OUT_DIR/build/bin/llama-bench
set -euo pipefail
mkdir -p "$1"
cd "$1"
version=0.3.36
if [ ! -x build/bin/llama-bench ]; then
  python3 -m venv venv
  venv/bin/pip -q install scikit-build-core pyproject-metadata pathspec
  venv/bin/pip -q download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==$version -d .
  tar xf llama_cpp_python-$version.tar.gz
  # Every instruction set of this CPU but AMX: on some virtual machines it ends in an illegal instruction although the CPU reports it.
  flags=()
  if [ -r /proc/cpuinfo ] && grep -qw avx2 /proc/cpuinfo; then
    has() { grep -qw "$1" /proc/cpuinfo && echo ON || echo OFF; }
    flags=(-DGGML_NATIVE=OFF "-DGGML_AVX=$(has avx)" "-DGGML_AVX2=$(has avx2)" "-DGGML_FMA=$(has fma)" "-DGGML_F16C=$(has f16c)"
      "-DGGML_BMI2=$(has bmi2)" "-DGGML_AVX512=$(has avx512f)" "-DGGML_AVX512_VBMI=$(has avx512vbmi)"
      "-DGGML_AVX512_VNNI=$(has avx512_vnni)" "-DGGML_AVX512_BF16=$(has avx512_bf16)")
  fi
  cmake -G Ninja -S llama_cpp_python-$version/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release "${flags[@]}" -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_UI=OFF
  ninja -C build llama-bench llama-batched-bench
fi
