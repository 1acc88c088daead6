#!/usr/bin/env python3
"""Where the time of prefill and decode goes: the functions that take most of it, on the graph executor (MLX operations between our matrix
products) and on the fused one. Prints a table in Markdown for each model and kind of work. Needs Linux perf.

Usage: slowest.py --program build/mlx-lm MODEL...
"""
import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile

WORK = {"prefill of 512": ["-p", "512", "-g", "1"], "decode after 32": ["-p", "32", "-g", "96"]}


WAITING = ("ThreadPool::run_region", "_State_impl", "__sched_yield", "do_sched_yield")


def short(symbol):
    """The function's own name, without its arguments and most of its templates."""
    if any(name in symbol for name in WAITING):
        return "waiting for a thread"
    symbol = re.sub(r"\{lambda.*", "lambda", symbol.replace("(anonymous namespace)::", ""))
    for _ in range(6):
        symbol = re.sub(r"<[^<>]*>", "", symbol)
    symbol = re.sub(r"[(<].*", "", symbol).strip()
    return "::".join(symbol.split(" ")[-1].split("::")[-2:]) or "?"


def profile(command, count):
    """(percent, function), the largest first, and tokens/s."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(pathlib.Path(folder) / "perf.data")
        run = subprocess.run(["perf", "record", "-q", "-F", "2000", "-o", data, *command], capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"error: {' '.join(command)}: {run.stderr.strip()[-300:]}")
        report = subprocess.run(["perf", "report", "-i", data, "--no-children", "--sort", "symbol", "--percent-limit", "0.1",
                                 "--stdio"], capture_output=True, text=True, check=False).stdout
    shares = collections.Counter()
    for line in report.splitlines():
        found = re.match(r"\s*([\d.]+)%\s+\[(.)\]\s+(.*)", line)
        if found:
            symbol = re.sub(r"\s\s.*", "", found[3])  # columns that stay empty
            waits = short(symbol) == "waiting for a thread"
            shares[short(symbol) if waits or found[2] != "k" else f"kernel: {symbol}"] += float(found[1])
    return shares.most_common(count), json.loads(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/mlx-lm")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    for model in args.models:
        for name, options in WORK.items():
            sides, speeds = [], []
            for executor in ("graph", "best"):
                rows, result = profile([args.program, "benchmark", "--model", model, "-n", "3", "--json", "--executor", executor, *options], args.count)
                sides.append(rows)
                speeds.append(sum(result["prompt_tps" if "prefill" in name else "generation_tps"]) / 3)
            print(f"\n{pathlib.Path(model).name}, {name}: graph {speeds[0]:.0f} tokens/s, fused {speeds[1]:.0f}\n")
            print("| graph | % | fused | % |\n|---|---|---|---|")
            for i in range(args.count):
                cells = [f"{side[i][0]} | {side[i][1]:.1f}" if i < len(side) else " | " for side in sides]
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
