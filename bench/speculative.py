#!/usr/bin/env python3
"""Alternates speculative and plain decoding of the same prompts, checks that the tokens are equal, and prints the median tokens/s of each. Each round
is a line of JSON in --output.

Without --draft-model, drafts are n-grams of the text itself (--ngram-draft-tokens). `repeats`: an answer that repeats what it said, where
drafts pay; `prose`: one that does not, where they cost.
"""
import argparse
import sys

from common import add_arguments, alternate, json_lines, output_of

PARAGRAPH = ("The quick brown fox jumps over the lazy dog near the quiet river bank, while seven small birds sing above the old stone bridge and the "
             "miller counts his sacks of flour. At noon the baker opens his shop, and the smell of fresh bread fills the narrow street until evening.")
PROMPTS = {
    # Whatever the model, it goes on as the text began.
    "repeats": ["--ignore-chat-template", "--prompt", f"{PARAGRAPH}\n{PARAGRAPH}\n{PARAGRAPH}\n"],
    "prose": ["--prompt", "Write a story about a lighthouse keeper and a storm."],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/mlx-lm")
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="SmolLM2-135M, 4 bit", help="of the model, for the title")
    parser.add_argument("--draft-model")
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    parser.add_argument("--ngram-draft-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    add_arguments(parser)
    args = parser.parse_args()
    drafts = ["--ngram-draft-tokens", str(args.ngram_draft_tokens)]
    if args.draft_model:
        drafts = ["--draft-model", args.draft_model, "--num-draft-tokens", str(args.num_draft_tokens)]
    ways = {"drafts": drafts, "plain": []}
    answers, accepted = {}, {}  # by prompt, as they come

    def measure(name, way):
        command = [args.program, "generate", "--model", args.model, "--max-tokens", str(args.max_tokens), "--temp", "0", "--threads",
                   str(args.threads), "--json", *PROMPTS[name], *ways[way]]
        answer = json_lines(output_of(command))[-1]
        if answers.setdefault(name, answer["tokens"]) != answer["tokens"]:
            sys.exit(f"error: {name}: the tokens of {way} differ")
        if way == "drafts":
            accepted[name] = f"{answer['accepted_tokens']} of {answer['drafted_tokens']}"
        return {name: answer["generation_tps"]}

    alternate("speculative", args, list(ways), [lambda way, name=name: measure(name, way) for name in PROMPTS],
              {"model": args.name, "max_tokens": args.max_tokens, "drafts": " ".join(drafts), "accepted": accepted})


if __name__ == "__main__":
    main()
