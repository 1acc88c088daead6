#!/usr/bin/env python3
"""Alternates this program and llama.cpp on the same model, and prints medians and ratios. Called by side_by_side.sh (./dev bench).

A round runs each of: this program on the Q4_1 file, llama.cpp on the same file, llama.cpp on a Q4_0 copy (its fastest 4-bit format). Both report
tokens/s themselves: prefill of --prefill tokens, decode of --decode tokens after a short prompt, the same after --context tokens, and --sequences
sequences decoding together (total). Each round is one line of JSON in --output, the last line the medians.
"""
import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys


def output_of(command, env=None):
    """What the command prints on stdout."""
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def ours(args, prompt, tokens, sequences=1):
    text = output_of([args.program, "benchmark", "--model", args.model, "-p", str(prompt), "-g", str(tokens), "-b", str(sequences), "-n", "1",
                      "--threads", str(args.threads), "--cpu-precision", args.cpu_precision, "--json"])
    result = json.loads(text)
    return {kind: result[kind + "_tps"][0] for kind in ("prompt", "generation")}


def measure_ours(args):
    rates = {"prefill": ours(args, args.prefill, 1)["prompt"], "decode": ours(args, 4, args.decode)["generation"]}
    if args.context:
        rates["decode in context"] = ours(args, args.context, args.decode)["generation"]
    for count in args.sequences:
        rates[f"{count} sequences"] = ours(args, 16, args.decode, count)["generation"]
    return rates


def bench_llama(args, model, *flags):
    """Rate of the last test of the call."""
    text = output_of([args.llama_cpp / "llama-bench", "-m", model, "-t", str(args.threads), "-r", "1", "-o", "jsonl", *flags], llama_env(args))
    return [json.loads(line)["avg_ts"] for line in text.splitlines() if line.startswith("{")][-1]


def llama_env(args):
    return dict(os.environ, LD_LIBRARY_PATH=str(args.llama_cpp))


def measure_llama(args, model):
    rates = {"prefill": bench_llama(args, model, "-p", str(args.prefill), "-n", "0"), "decode": bench_llama(args, model, "-p", "0", "-n", str(args.decode))}
    if args.context:
        rates["decode in context"] = bench_llama(args, model, "-p", "0", "-n", str(args.decode), "-d", str(args.context))
    for count in args.sequences:
        text = output_of([args.llama_cpp / "llama-batched-bench", "-m", model, "-c", str(count * (args.decode + 32)), "-npp", "16", "-ntg", str(args.decode),
                          "-npl", str(count), "-t", str(args.threads), "--output-format", "jsonl"], llama_env(args))
        rates[f"{count} sequences"] = [json.loads(line)["speed_tg"] for line in text.splitlines() if line.startswith("{")][-1]
    return rates


def cpu_name():
    try:
        return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--llama-cpp", required=True, type=pathlib.Path, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-q4-0", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="0 = leave it out")
    parser.add_argument("--sequences", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--cpu-precision", default="default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/side_by_side-DATE.jsonl")
    args = parser.parse_args()
    stamp = datetime.datetime.now(datetime.timezone.utc)
    output = args.output or pathlib.Path(__file__).parent / "results" / f"side_by_side-{stamp:%Y%m%d-%H%M}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)

    machine = {"date": f"{stamp:%Y-%m-%d}", "cpu": cpu_name(), "threads": args.threads, "prefill_tokens": args.prefill, "decode_tokens": args.decode,
               "context_tokens": args.context, "cpu_precision": args.cpu_precision}
    contenders = {
        "mlx-lm.cpp Q4_1": lambda: measure_ours(args),
        "llama.cpp Q4_1": lambda: measure_llama(args, args.model),
        "llama.cpp Q4_0": lambda: measure_llama(args, args.model_q4_0),
    }
    rounds = {name: [] for name in contenders}
    with output.open("w") as file:
        for number in range(args.rounds + 1):
            for name, measure in contenders.items():
                rates = measure()
                if number:  # the first round warms up the file cache
                    rounds[name].append(rates)
                    file.write(json.dumps({"round": number, "contender": name, **rates, **machine}) + "\n")
            print(f"round {number} of {args.rounds}" if number else "warm-up", file=sys.stderr)
        kinds = list(next(iter(rounds.values()))[0])
        medians = {name: {kind: statistics.median(r[kind] for r in rates) for kind in kinds} for name, rates in rounds.items()}
        file.write(json.dumps({"medians": medians, **machine}) + "\n")

    print(f"{machine['cpu']}, {args.threads} threads; SmolLM2-135M, 4 bit; medians of {args.rounds} alternated rounds, tokens/s")
    titles = {"prefill": f"prefill, {args.prefill} tokens", "decode": f"decode, {args.decode} tokens", "decode in context": f"decode after {args.context} tokens"}
    print("\n| | " + " | ".join(titles.get(kind, kind) for kind in kinds) + " |\n|---" + "|---" * len(kinds) + "|")
    for name, rates in medians.items():
        print(f"| {name} | " + " | ".join(f"{rates[kind]:.0f}" for kind in kinds) + " |")
    us = medians["mlx-lm.cpp Q4_1"]
    for name, rates in list(medians.items())[1:]:
        print(f"| ratio to {name} | " + " | ".join(f"{us[kind] / rates[kind]:.2f}" for kind in kinds) + " |")
    print(f"\nAll rounds: {output}")


if __name__ == "__main__":
    main()
