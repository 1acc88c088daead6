#!/usr/bin/env bash
# Measures what docs/performance.md reports, a section of it or several, and leaves a file of JSON lines for each table in bench/results.
# Usage: bench/measure_all.sh [--rounds N] [SECTION...]; bench/report.py prints the tables. Everything must be built: ./dev build, ./dev bench,
# ninja bench_engine, bench_precision (-DMLXLM_BENCH=ON). Models that are missing are made.
# Environment: MLXLM_BUILD_DIR (build), LLAMA_CPP_DIR (BUILD/llama.cpp), SYNTHETIC_DIR (BUILD/synthetic), PYTHON (BUILD/venv-bench/bin/python, with
# numpy and gguf), RESULTS_DIR (bench/results).
set -euo pipefail
cd "$(dirname "$0")/.."
build=${MLXLM_BUILD_DIR:-build}
peer=${LLAMA_CPP_DIR:-$build/llama.cpp}/build/bin
made=${SYNTHETIC_DIR:-$build/synthetic}
python=${PYTHON:-$build/venv-bench/bin/python}
results=${RESULTS_DIR:-bench/results}
program=$build/mlx-lm
model=models/SmolLM2-135M-Instruct.gguf
model_q4_0=models/SmolLM2-135M-Instruct.Q4_0.gguf
all=(smollm2 fast long 1b 3b dense moe ssm mla conv delta engine admission prefix speculative sampling startup precision)
rounds=5
if [ "${1:-}" = --rounds ]; then
  rounds=$2
  shift 2
fi
mkdir -p "$made" "$results"

# make NAME ARGUMENTS...: a synthetic model, unless it is there.
make() {
  local out=$made/$1
  shift
  if [ ! -e "$out" ]; then
    "$python" bench/synthetic.py "$1" "${out}.partial" "${@:2}"
    mv "${out}.partial" "$out"
  fi
}

# against RESULT MINUTES NAME MODEL ARGUMENTS...
against() {
  "$python" bench/side_by_side.py --program "$program" --llama-cpp "$peer" --rounds "$rounds" --output "$results/$1.jsonl" --minutes "$2" \
    --name "$3" --model "$4" "${@:5}"
}

# shape SECTION SHAPE NAME: a folder of 4 bits here, Q4_0 there.
shape() {
  make "$2" "$2"
  make "$2.Q4_0.gguf" "$2" --gguf q4_0
  against "$1" 1 "$3" "$made/$2" --peer "llama.cpp Q4_0=$made/$2.Q4_0.gguf" --prefill 512
}

# llama SIZE MINUTES ARGUMENTS...: Llama's shapes; group 32 is Q4_1, the same bytes on both sides; group 64 is a folder.
llama() {
  local name=llama-$1 title="Llama ${1^^} shape"
  make "$name.Q4_1.gguf" "$name" --gguf q4_1
  make "$name.Q4_0.gguf" "$name" --gguf q4_0
  make "$name.group64" "$name" --group-size 64
  against "$1" "$2" "$title, 4 bit, groups of 32" "$made/$name.Q4_1.gguf" --peer "llama.cpp=$made/$name.Q4_1.gguf" \
    --peer "llama.cpp Q4_0=$made/$name.Q4_0.gguf" --decode 32 --bandwidth --trials 1 "${@:3}"
  against "$1-group64" 1.5 "$title, 4 bit, groups of 64" "$made/$name.group64" --peer "llama.cpp Q4_0=$made/$name.Q4_0.gguf" \
    --decode 32 --bandwidth --trials 1 --prefill
}

section() {
  local same=(--peer "llama.cpp=$model") fast=(--peer "llama.cpp Q4_0=$model_q4_0")
  case $1 in
    smollm2) against smollm2 7 "SmolLM2-135M, 4 bit" "$model" "${same[@]}" "${fast[@]}" --bandwidth ;;
    fast) against fast 6 "SmolLM2-135M, 4 bit, --cpu-precision fast" "$model" "${fast[@]}" --cpu-precision fast --sequences 8 32 ;;
    long)
      for bits in "" 8; do
        local cache=(${bits:+--kv-bits "$bits"}) name=long${bits:+-kv$bits}
        against "$name" 1 "SmolLM2-135M, 4 bit" "$model" "${fast[@]}" "${cache[@]}" --prefill --context-only --trials 1 --context 4096
        against "$name-16k" 3 "SmolLM2-135M, 4 bit" "$model" "${fast[@]}" "${cache[@]}" --prefill --context-only --trials 1 --context 16384
      done
      ;;
    1b)
      llama 1b 3 --prefill 32 512
      against 1b-2048 1 "Llama 1B shape, 4 bit, groups of 32" "$made/llama-1b.Q4_1.gguf" --context-only --trials 1 --prefill 2048 \
        --peer "llama.cpp Q4_0=$made/llama-1b.Q4_0.gguf"
      ;;
    3b) llama 3b 1.5 --prefill ;;
    dense)
      for kind in f16 bf16; do
        make "smollm2.${kind^^}.gguf" smollm2 --gguf $kind
        make "smollm2.$kind" smollm2 --dense $kind
        against "dense-$kind" 1 "SmolLM2's shape, $kind" "$made/smollm2.$kind" --peer "llama.cpp=$made/smollm2.${kind^^}.gguf" --prefill 512 --bandwidth
      done
      ;;
    moe) shape moe qwen3_moe "qwen3_moe, 703M, 4 of 32 experts" ;;
    ssm) shape ssm nemotron_h "nemotron_h (Mamba-2 hybrid), 190M" ;;
    mla) shape mla deepseek_v3 "deepseek_v3 (latent attention), 730M" ;;
    conv) shape conv lfm2 "lfm2 (gated short convolutions), 354M" ;;
    delta) shape delta qwen3_next "qwen3_next (gated delta nets), 777M, 4 of 32 experts" ;;
    engine)
      "$python" bench/engine.py --bench-engine "$build/bench_engine" --llama-cpp "$peer" --model "$model" "${same[@]}" "${fast[@]}" \
        --rounds "$rounds" --minutes 2.5 --output "$results/engine.jsonl"
      ;;
    admission) repeat 240 "$build/bench_engine" "$model" learned stored | save admission ;;
    prefix) repeat 300 "$build/bench_engine" "$model" prefix | save prefix ;;
    speculative)
      "$python" bench/speculative.py --program "$program" --model "$model" --rounds "$rounds" --minutes 2 --output "$results/speculative.jsonl"
      ;;
    sampling)
      "$python" bench/sampling.py --program "$program" --model "$model" --rounds "$rounds" --minutes 1 --output "$results/sampling.jsonl"
      ;;
    startup)
      make llama-1b.Q4_1.gguf llama-1b --gguf q4_1
      timeout 120 "$python" bench/startup.py --program "$program" --runs "$rounds" "$model" "$made/llama-1b.Q4_1.gguf" | save startup
      ;;
    precision)
      local text
      text=$(mktemp)
      cat docs/*.md | head -c 30000 >"$text" || true
      timeout 300 "$build/bench/bench_precision" "$model" "$text" | save precision
      rm "$text"
      ;;
    *)
      echo "error: no section $1; there are: ${all[*]}" >&2
      exit 1
      ;;
  esac
}

# repeat SECONDS COMMAND...: as many times as there are rounds, each within so many seconds.
repeat() {
  local seconds=$1 round
  shift
  for ((round = 1; round <= rounds; round++)); do timeout "$seconds" "$@" || return; done
}

# What a program prints as a file of results, only if it ends well.
save() {
  tee "$results/$1.jsonl.partial"
  mv "$results/$1.jsonl.partial" "$results/$1.jsonl"
}

[ $# -gt 0 ] || set -- "${all[@]}"
failed=()
for name in "$@"; do
  if [ $# -gt 1 ]; then # a process each: one that fails does not keep the others from running
    bench/measure_all.sh --rounds "$rounds" "$name" || failed+=("$name")
    continue
  fi
  start=$SECONDS
  printf '\n== %s\n' "$name"
  section "$name"
  printf '== %s: %d s\n' "$name" $((SECONDS - start))
done
[ ${#failed[@]} -eq 0 ] || { echo "error: failed: ${failed[*]}" >&2 && exit 1; }
