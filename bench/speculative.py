#!/usr/bin/env python3
"""Alternates plain and speculative decoding of the same prompts, checks that the tokens are equal, and prints medians and ratios.

Without --draft-model, drafts are n-grams of the text itself (--ngram-draft-tokens). `repeats`: an answer that repeats what it said, where
drafts pay; `prose`: one that does not, where they cost. The last line is JSON.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

PARAGRAPH = ("The quick brown fox jumps over the lazy dog near the quiet river bank, while seven small birds sing above the old stone bridge and the "
             "miller counts his sacks of flour. At noon the baker opens his shop, and the smell of fresh bread fills the narrow street until evening.")
PROMPTS = {
    # Whatever the model, it goes on as the text began.
    "repeats": ["--ignore-chat-template", "--prompt", f"{PARAGRAPH}\n{PARAGRAPH}\n{PARAGRAPH}\n"],
    "prose": ["--prompt", "Write a story about a lighthouse keeper and a storm."],
}


def generate(args, flags):
    command = [args.program, "generate", *(["--model", args.model] if args.model else []), "--max-tokens", str(args.max_tokens), "--temp", "0",
               "--json", *(["--threads", str(args.threads)] if args.threads else []), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(pathlib.Path(__file__).resolve().parent.parent / "build" / "mlx-lm"))
    parser.add_argument("--model", help="the default model when not given")
    parser.add_argument("--draft-model")
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    parser.add_argument("--ngram-draft-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    drafts = ["--ngram-draft-tokens", str(args.ngram_draft_tokens)]
    if args.draft_model:
        drafts = ["--draft-model", args.draft_model, "--num-draft-tokens", str(args.num_draft_tokens)]

    summary = {"drafts": drafts, "max_tokens": args.max_tokens, "rounds": args.rounds, "cores": os.cpu_count()}
    for name, prompt in PROMPTS.items():
        rates, ratios = {"plain": [], "speculative": []}, []
        for _ in range(args.rounds):
            plain, speculative = generate(args, prompt), generate(args, [*prompt, *drafts])
            if plain["tokens"] != speculative["tokens"]:
                sys.exit(f"error: {name}: the tokens differ")
            rates["plain"].append(plain["generation_tps"])
            rates["speculative"].append(speculative["generation_tps"])
            ratios.append(speculative["generation_tps"] / plain["generation_tps"])
        drafted, accepted = speculative["drafted_tokens"], speculative["accepted_tokens"]
        row = {"tokens": speculative["generation_tokens"], "plain_tps": statistics.median(rates["plain"]),
               "speculative_tps": statistics.median(rates["speculative"]), "ratio": statistics.median(ratios), "drafted": drafted,
               "accepted": accepted}
        summary[name] = row
        print(f"{name}: {row['tokens']} tokens, plain {row['plain_tps']:.1f} tokens/s, speculative {row['speculative_tps']:.1f} tokens/s, "
              f"ratio {row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {accepted} of {drafted} drafted tokens accepted", flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
