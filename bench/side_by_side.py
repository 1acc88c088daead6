#!/usr/bin/env python3
"""Alternates this program and llama.cpp on the same model, and prints medians and ratios. Called by side_by_side.sh (./dev bench).

A round runs each of: this program on the file, llama.cpp on the same file, llama.cpp on a Q4_0 copy (its fastest 4-bit format). Both report
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
    cache = ["--kv-bits", str(args.kv_bits)] if args.kv_bits else []
    text = output_of([args.program, "benchmark", "--model", args.model, "-p", str(prompt), "-g", str(tokens), "-b", str(sequences), "-n", "1",
                      "--threads", str(args.threads), "--cpu-precision", args.cpu_precision, "--json", *cache])
    result = json.loads(text)
    return {kind: result[kind + "_tps"][0] for kind in ("prompt", "generation")}


def measure_ours(args):
    rates = {f"prefill {count}": ours(args, count, 1)["prompt"] for count in args.prefill}
    rates["decode"] = ours(args, 4, args.decode)["generation"]
    for count in args.context:
        rates[f"decode after {count}"] = ours(args, count, args.decode)["generation"]
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
    rates = {f"prefill {count}": bench_llama(args, model, "-p", str(count), "-n", "0") for count in args.prefill}
    rates["decode"] = bench_llama(args, model, "-p", "0", "-n", str(args.decode))
    cache = ["-fa", "1", "-ctk", "q8_0", "-ctv", "q8_0"] if args.kv_bits else []
    for count in args.context:
        rates[f"decode after {count}"] = bench_llama(args, model, "-p", "0", "-n", str(args.decode), "-d", str(count), *cache)
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
    parser.add_argument("--model", required=True, help="a GGUF file that both read, or see --peer-model")
    parser.add_argument("--model-q4-0", help="the same in llama.cpp's fastest format")
    parser.add_argument("--peer-model", help="what llama.cpp reads when it cannot read --model")
    parser.add_argument("--name", default="SmolLM2-135M, 4 bit", help="of the model, for the title")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 512, 2048], metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--context", type=int, nargs="*", default=[4096], metavar="TOKENS", help="decode after so many")
    parser.add_argument("--kv-bits", type=int, choices=[8], help="quantized caches on both sides (decode after --context only for llama.cpp)")
    parser.add_argument("--sequences", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--cpu-precision", default="default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/side_by_side-DATE.jsonl")
    args = parser.parse_args()
    stamp = datetime.datetime.now(datetime.timezone.utc)
    output = args.output or pathlib.Path(__file__).parent / "results" / f"side_by_side-{stamp:%Y%m%d-%H%M}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)

    machine = {"date": f"{stamp:%Y-%m-%d}", "cpu": cpu_name(), "threads": args.threads, "model": args.name, "decode_tokens": args.decode, "kv_bits": args.kv_bits,
               "cpu_precision": args.cpu_precision}
    contenders = {"mlx-lm.cpp": lambda: measure_ours(args), "llama.cpp": lambda: measure_llama(args, args.peer_model or args.model)}
    if args.model_q4_0:
        contenders["llama.cpp Q4_0"] = lambda: measure_llama(args, args.model_q4_0)
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

    print(f"{machine['cpu']}, {args.threads} threads; {args.name}; medians of {args.rounds} alternated rounds, tokens/s")
    print("\n| | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
    for name, rates in medians.items():
        print(f"| {name} | " + " | ".join(f"{rates[kind]:.{0 if rates[kind] >= 100 else 1}f}" for kind in kinds) + " |")
    us = medians["mlx-lm.cpp"]
    for name, rates in list(medians.items())[1:]:
        print(f"| ratio to {name} | " + " | ".join(f"{us[kind] / rates[kind]:.2f}" for kind in kinds) + " |")
    print(f"\nAll rounds: {output}")


if __name__ == "__main__":
    main()
