#!/usr/bin/env python3
"""Seconds from process start to the text of the first token and to the end of an answer of one token, and peak memory against the size of the
weights. Prints one line of JSON a model.

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


HEADER = b"==========\n"


def run(command):
    """Seconds to the answer's first byte, seconds to the end, and peak bytes of one process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output, first = b"", None
    while part := os.read(child.stdout.fileno(), 1 << 16):
        output += part
        if first is None and len(output) > len(HEADER):
            first = time.perf_counter() - start
    _, status, usage = os.wait4(child.pid, 0)
    if status or not output.startswith(HEADER):
        sys.exit(f"error: {' '.join(command)}: status {status}, {output[:100]}")
    return first, time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
        first, end, peaks = zip(*results)
        peak = statistics.median(peaks)
        print(json.dumps({"model": path.name, "weights_mb": round(weights / 1e6), "first_token_s": round(statistics.median(first), 3),
                          "fastest_s": round(min(first), 3), "end_s": round(statistics.median(end), 3), "peak_memory_mb": round(peak / 1e6), "peak_to_weights": round(peak / weights, 2)}))


if __name__ == "__main__":
    main()
