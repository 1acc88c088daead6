#!/usr/bin/env bash
# Makes the golden test data again with Python mlx_lm, the reference. Usage: scripts/golden.sh BUILD_DIR (called by ./dev golden)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh
python=$(scripts/reference.sh "$1")
found=no
while IFS= read -r maker; do
  found=yes
  say "$maker"
  "$python" "$maker"
done < <(find tests -name 'make_golden*.py' -o -name 'make_expected*.py' | sort)
[ "$found" = yes ] || die "no makers of golden data under tests/"
