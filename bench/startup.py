#!/usr/bin/env python3
"""Seconds from process start to the end of an answer of one token, and peak memory against the size of the weights. Prints one line of JSON a model.

Usage: startup.py --program build/mlx-lm MODEL...
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def run(command):
    """Wall seconds and peak bytes of one process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)}: status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/mlx-lm")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    for model in args.models:
        path = pathlib.Path(model)
        weights = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))
        command = [args.program, "generate", "--model", model, "--prompt", "Hello", "--max-tokens", "1"]
        results = [run(command) for _ in range(args.runs + 1)][1:]  # the first warms up the file cache
        seconds, peaks = zip(*results)
        peak = statistics.median(peaks)
        print(json.dumps({"model": path.name, "weights_mb": round(weights / 1e6), "first_token_s": round(statistics.median(seconds), 3),
                          "fastest_s": round(min(seconds), 3), "peak_memory_mb": round(peak / 1e6), "peak_to_weights": round(peak / weights, 2)}))


if __name__ == "__main__":
    main()
