#!/usr/bin/env bash
# Measures this program against llama.cpp on this machine: fetches and builds what is missing, then runs side_by_side.py.
# Usage: bench/side_by_side.sh BUILD_DIR [arguments of side_by_side.py]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh
build=$1
shift
peer=${LLAMA_CPP_DIR:-$build/llama.cpp}
model=models/SmolLM2-135M-Instruct.gguf
model_q4_0=models/SmolLM2-135M-Instruct.Q4_0.gguf

if [ ! -x "$peer/build/bin/llama-batched-bench" ]; then
  say "Building llama.cpp in $peer (some minutes, once)"
  mkdir -p "$peer"
  quiet "$build/llama.cpp.log" bench/build_llama_cpp.sh "$peer"
fi
if [ ! -f "$model_q4_0" ]; then
  say "Making $model_q4_0"
  [ -x "$build/venv-bench/bin/python" ] || python3 -m venv "$build/venv-bench"
  quiet "$build/venv-bench.log" "$build/venv-bench/bin/python" -m pip install gguf==0.19.0
  "$build/venv-bench/bin/python" bench/q4_1_to_q4_0.py "$model" "$model_q4_0.partial"
  mv "$model_q4_0.partial" "$model_q4_0"
fi
exec python3 bench/side_by_side.py --program "$build/mlx-lm" --llama-cpp "$peer/build/bin" --model "$model" \
  --peer "llama.cpp=$model" --peer "llama.cpp Q4_0=$model_q4_0" --bandwidth --sequences 8 32 "$@"
