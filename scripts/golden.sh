#!/usr/bin/env bash
# Makes the golden test data again with Python mlx_lm, the reference. Usage: scripts/golden.sh BUILD_DIR (called by ./dev golden)
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
found=no
while IFS= read -r maker; do
  found=yes
  say "$maker"
  "$venv/bin/python" "$maker"
done < <(find tests -name 'make_golden*.py' -o -name 'make_expected*.py' | sort)
[ "$found" = yes ] || die "no makers of golden data under tests/"
