#!/usr/bin/env python3
"""Alternates two builds of this program, or one under two environments, on the same work, and prints the median and the range of their ratios: for
a change that noise would hide.

Usage: ab.py --before PROGRAM --after PROGRAM [--before-env NAME=VALUE] [--after-env NAME=VALUE] [--rounds N] -- ARGUMENTS of mlx-lm benchmark
"""
import argparse
import json
import os
import statistics

from common import json_lines, output_of


def rates(program, setting, arguments):
    """Best decode and prefill of the trials of one process: what the machine gave when nobody else had it."""
    env = dict(os.environ, **dict([setting.split("=", 1)] if setting else []))
    result = json_lines(output_of([program, "benchmark", *arguments, "--json"], env))[-1]
    return {"decode": max(result["generation_tps"]), "prefill": max(result["prompt_tps"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="build/mlx-lm")
    parser.add_argument("--after", default="build/mlx-lm")
    parser.add_argument("--before-env", default="", metavar="NAME=VALUE")
    parser.add_argument("--after-env", default="", metavar="NAME=VALUE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("arguments", nargs="*", help="of mlx-lm benchmark, after --")
    args = parser.parse_args()
    pairs = [(rates(args.before, args.before_env, args.arguments), rates(args.after, args.after_env, args.arguments)) for _ in range(args.rounds)]
    for kind in ("decode", "prefill"):
        ratios = sorted(after[kind] / before[kind] for before, after in pairs)
        print(json.dumps({"kind": kind, "ratio": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3),
                          "rounds": args.rounds}))


if __name__ == "__main__":
    main()
