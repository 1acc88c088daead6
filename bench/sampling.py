#!/usr/bin/env python3
"""Alternates ways to choose a token, and prints the median tokens/s of each. Each round is a line of JSON in --output.

An end-of-text token may end an answer early: the rate is that of the tokens there are.
"""
import argparse

from common import add_arguments, alternate, json_lines, output_of

WAYS = {"greedy": [], "--temp 0.8": ["--temp", "0.8"], "--top-p 0.95": ["--temp", "0.8", "--top-p", "0.95"],
        "--top-k 40": ["--temp", "0.8", "--top-k", "40"], "--min-p 0.05": ["--temp", "0.8", "--min-p", "0.05"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/mlx-lm")
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="SmolLM2-135M, 4 bit", help="of the model, for the title")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--prompt", default="Write a long story about a lighthouse keeper and a storm.")
    add_arguments(parser)
    args = parser.parse_args()

    def measure(way):
        command = [args.program, "generate", "--model", args.model, "--prompt", args.prompt, "--max-tokens", str(args.max_tokens), "--seed", "1",
                   "--threads", str(args.threads), "--json"]
        return {"tokens/s": json_lines(output_of([*command, *WAYS[way]]))[-1]["generation_tps"]}

    alternate("sampling", args, list(WAYS), [measure], {"model": args.name, "max_tokens": args.max_tokens})


if __name__ == "__main__":
    main()
