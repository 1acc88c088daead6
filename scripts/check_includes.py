#!/usr/bin/env python3
"""Checks that every #include under src/ follows the arrows of docs/architecture.md: no MLX where it is not wanted, no upward dependency."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_MLX = {"base", "text", "hub", "arch", "plan", "engine"}
# What each room may include, itself apart: the same arrows as the link lines of CMakeLists.txt, closed over.
MAY_INCLUDE = {
    "base": set(),
    "text": {"base"},
    "hub": {"base"},
    "arch": {"base"},
    "plan": {"base", "arch"},
    "weights": {"base", "arch", "plan"},
    "kernels": {"base"},
    "nn": {"base", "arch", "plan", "kernels"},
    "cache": {"base", "arch", "plan", "weights", "kernels", "nn"},
    "model": {"base", "arch", "plan", "weights", "kernels", "nn", "cache"},
    "sample": {"base", "kernels"},
    "engine": {"base"},
    "gen": {"base", "arch", "plan", "weights", "kernels", "nn", "cache", "model", "sample", "text", "engine"},
    "api": {"base", "arch", "plan", "weights", "kernels", "nn", "cache", "model", "sample", "text", "engine", "gen", "hub"},
    "cli": {"base", "arch", "plan", "weights", "kernels", "nn", "cache", "model", "sample", "text", "engine", "gen", "hub", "api"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def complaints():
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix not in {".cpp", ".h"}:
            continue
        room = path.relative_to(ROOT / "src").parts[0]
        if room not in MAY_INCLUDE:
            yield f"{path.relative_to(ROOT)}: room '{room}' is not listed in {pathlib.Path(__file__).name}"
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = INCLUDE.match(line)
            if not found:
                continue
            where, target = f"{path.relative_to(ROOT)}:{number}", found[2]
            first = target.split("/")[0]
            if first == "mlx" and room in NO_MLX:
                yield f"{where}: includes {target}, and room '{room}' has no MLX"
            elif found[1] == '"' and "/" in target and first in MAY_INCLUDE and first != room and first not in MAY_INCLUDE[room]:
                yield f"{where}: includes {target}, and room '{room}' may only use {sorted(MAY_INCLUDE[room])}"


def main():
    found = list(complaints())
    print("\n".join(found) if found else "includes: clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
