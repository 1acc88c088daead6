#!/usr/bin/env bash
# Builds and runs bench_engine on the default model: JSON lines on stdout. Arguments: throughput, admission, prefix; all when none is given.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${MLXLM_BUILD_DIR:-build}
ninja -C "$build" bench_engine >&2
exec "$build/bench_engine" "${MODEL:-models/SmolLM2-135M-Instruct.gguf}" "$@"
