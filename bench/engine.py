#!/usr/bin/env python3
"""Alternates this program's engine (bench_engine) and llama-batched-bench: total tokens/s of 1, 8 and 32 sequences that decode together, each of 64
tokens after a prompt of 32. Prints medians and ratios; each round is a line of JSON in --output.
"""
import argparse
import os

from common import (
    add_arguments,
    add_llama_cpp,
    alternate,
    json_lines,
    output_of,
    peers_of,
    read_once,
    run_llama,
)

OURS = "mlx-lm.cpp"
SEQUENCES, PROMPT, ANSWER = (1, 8, 32), 32, 64  # those of bench_engine's throughput


def kind_of(sequences):
    return f"{sequences} sequence" + "s" * (sequences > 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-engine", default="build/bench_engine")
    parser.add_argument("--model", required=True)
    add_llama_cpp(parser)
    parser.add_argument("--name", default="SmolLM2-135M, 4 bit", help="of the model, for the title")
    add_arguments(parser)
    args = parser.parse_args()
    peers = peers_of(args)

    def measure(name):
        if name == OURS:
            env = dict(os.environ, MLXLM_BENCH_THREADS=str(args.threads))
            lines = json_lines(output_of([args.bench_engine, args.model, "throughput"], env))
            return {kind_of(line["sequences"]): line["tokens_per_s"] for line in lines}
        lines = run_llama(args, "llama-batched-bench", peers[name], "-c", max(SEQUENCES) * (PROMPT + ANSWER), "-npp", PROMPT, "-ntg", ANSWER, "-npl",
                          ",".join(map(str, SEQUENCES)), "--output-format", "jsonl")
        return {kind_of(line["pl"]): line["speed_tg"] for line in lines}

    read_once([args.model, *peers.values()])
    alternate("engine", args, [OURS, *peers], [measure], {"model": args.name, "prompt_tokens": PROMPT, "decode_tokens": ANSWER})


if __name__ == "__main__":
    main()
