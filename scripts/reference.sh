#!/usr/bin/env bash
# Installs Python's mlx_lm, the reference, into BUILD_DIR/venv-golden and prints the path of its Python. Usage: scripts/reference.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh
venv=$1/venv-golden
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import mlx_lm' 2>/dev/null; then
  say "Installing mlx-lm 0.32.2 with mlx-cpu 0.32.4 into $venv"
  python3 -m venv "$venv"
  quiet "$1/venv-golden.log" "$venv/bin/python" -m pip install mlx-lm==0.32.2 'mlx[cpu]==0.32.4' gguf==0.19.0
fi
echo "$venv/bin/python"
