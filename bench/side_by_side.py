#!/usr/bin/env python3
"""Alternates this program and llama.cpp on the same model, and prints medians and ratios. Called by side_by_side.sh (./dev bench).

A round runs each of: this program on the Q4_1 file, llama-bench on the same file, llama-bench on a Q4_0 copy (its fastest 4-bit format).
Prefill is a prompt of about 512 tokens, decode is 64 tokens after a short prompt; both as tokens/s, as each program itself reports them.
Each round is one line of JSON in --output, the last line the medians.
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


def ours(args, prompt, tokens):
    text = output_of([args.program, "generate", "--model", args.model, "--ignore-chat-template", "--prompt", prompt, "--max-tokens", str(tokens),
                      "--temp", "0", "--threads", str(args.threads), "--json"])
    return json.loads(text)


def measure_ours(args):
    prompt = ours(args, "the" + " the" * (args.prefill - 1), 1)
    answer = ours(args, "Once upon a time", args.decode)
    if prompt["prompt_tokens"] != args.prefill or answer["generation_tokens"] != args.decode:
        sys.exit(f"error: measured {prompt['prompt_tokens']} and {answer['generation_tokens']} tokens, wanted {args.prefill} and {args.decode}")
    return {"prefill": prompt["prompt_tps"], "decode": answer["generation_tps"]}


def measure_llama(args, model):
    env = dict(os.environ, LD_LIBRARY_PATH=str(pathlib.Path(args.llama_bench).parent))
    text = output_of([args.llama_bench, "-m", model, "-p", str(args.prefill), "-n", str(args.decode), "-t", str(args.threads), "-r", "1",
                      "-o", "jsonl"], env)
    rates = {}
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            rates["decode" if row["n_gen"] else "prefill"] = row["avg_ts"]
    return rates


def cpu_name():
    try:
        return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-q4-0", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/side_by_side-DATE.jsonl")
    args = parser.parse_args()
    stamp = datetime.datetime.now(datetime.timezone.utc)
    output = args.output or pathlib.Path(__file__).parent / "results" / f"side_by_side-{stamp:%Y%m%d-%H%M}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)

    machine = {"date": f"{stamp:%Y-%m-%d}", "cpu": cpu_name(), "threads": args.threads, "prefill_tokens": args.prefill, "decode_tokens": args.decode}
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
        medians = {name: {kind: statistics.median(r[kind] for r in rates) for kind in ("prefill", "decode")} for name, rates in rounds.items()}
        file.write(json.dumps({"medians": medians, **machine}) + "\n")

    print(f"{machine['cpu']}, {args.threads} threads; SmolLM2-135M, 4 bit; medians of {args.rounds} alternated rounds, tokens/s")
    print(f"\n| | prefill, {args.prefill} tokens | decode, {args.decode} tokens |\n|---|---|---|")
    for name, rates in medians.items():
        print(f"| {name} | {rates['prefill']:.0f} | {rates['decode']:.0f} |")
    us = medians["mlx-lm.cpp Q4_1"]
    for name, rates in list(medians.items())[1:]:
        print(f"| ratio to {name} | {us['prefill'] / rates['prefill']:.2f} | {us['decode'] / rates['decode']:.2f} |")
    print(f"\nAll rounds: {output}")


if __name__ == "__main__":
    main()
