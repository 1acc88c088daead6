#!/usr/bin/env python3
"""Alternates this program and llama.cpp on the same model, and prints medians and ratios. Called by side_by_side.sh (./dev bench).

Contenders are this program on --model, and llama.cpp on each --peer: the same file, or one in another format. Both report tokens/s themselves:
prefill of --prefill tokens, decode of --decode tokens after a short prompt, the same after --context tokens, and --sequences sequences decoding
together (total). Every work is run by each contender before the next one. A round's figure is the best of --trials: other guests of the machine
only take from it. Each round is a line of JSON in --output, the last line the medians.
"""
import argparse

from common import (
    REREAD_SHARE,
    SHARE,
    add_arguments,
    add_llama_cpp,
    alternate,
    files_of,
    json_lines,
    output_of,
    peers_of,
    read_once,
    run_llama,
)

OURS = "mlx-lm.cpp"


class Contenders:
    def __init__(self, args):
        self.args, self.peers, self.bandwidths = args, peers_of(args), {}

    def ours(self, prompt, tokens, *flags, sequences=1):
        args = self.args
        cache = ["--kv-bits", str(args.kv_bits)] if args.kv_bits else []
        return json_lines(output_of([args.program, "benchmark", "--model", args.model, "-p", str(prompt), "-g", str(tokens), "-b", str(sequences), "-n",
                                     str(args.trials), "--threads", str(args.threads), "--cpu-precision", args.cpu_precision, "--json", *cache, *flags]))[-1]

    def llama(self, name, *flags):
        cache = ["-fa", "1", "-ctk", "q8_0", "-ctv", "q8_0"] if self.args.kv_bits else []
        return max(run_llama(self.args, "llama-bench", self.peers[name], "-r", self.args.trials, "-o", "jsonl", *cache, *flags)[-1]["samples_ts"])

    def prefill(self, name, count):
        if name == OURS:
            return {f"prefill {count}": max(self.ours(count, 1)["prompt_tps"])}
        warm_up = ["--no-warmup"] if count >= 1024 else []  # it would take as long again
        return {f"prefill {count}": self.llama(name, "-p", count, "-n", 0, *warm_up)}

    def decode(self, name):
        if name == OURS:
            result = self.ours(4, self.args.decode, *(["--bandwidth"] if self.args.bandwidth else []))
            rate, weights = max(result["generation_tps"]), result["weight_bytes"]
            if self.args.bandwidth:
                self.bandwidths = {SHARE: result["read_bandwidth_gb_s"], REREAD_SHARE: result["reread_bandwidth_gb_s"]}
        else:
            rate = self.llama(name, "-p", 0, "-n", self.args.decode)
            weights = sum(file.stat().st_size for file in files_of(self.peers[name]))
        return {"decode": rate, **{share: 100 * rate * weights / 1e9 / read for share, read in self.bandwidths.items()}}

    def decode_after(self, name, count):
        kind = f"decode after {count}"
        if name == OURS:
            return {kind: max(self.ours(count, self.args.decode)["generation_tps"])}
        return {kind: self.llama(name, "-p", 0, "-n", self.args.decode, "-d", count)}

    def sequences(self, name, count):
        kind, args = f"{count} sequences", self.args
        if name == OURS:
            return {kind: max(self.ours(16, args.decode, sequences=count)["generation_tps"])}
        cache = ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"] if args.kv_bits else []
        return {kind: max(run_llama(args, "llama-batched-bench", self.peers[name], "-c", count * (args.decode + 32), "-npp", 16, "-ntg", args.decode,
                                    "-npl", count, "--output-format", "jsonl", *cache)[-1]["speed_tg"] for _ in range(args.trials))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/mlx-lm")
    parser.add_argument("--model", required=True, help="a folder or a GGUF file")
    add_llama_cpp(parser)
    parser.add_argument("--name", default="SmolLM2-135M, 4 bit", help="of the model, for the title")
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 512, 2048], metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--bandwidth", action="store_true", help="also the share of the read bandwidth that decoding reaches, where all weights are read")
    parser.add_argument("--context", type=int, nargs="*", default=[], metavar="TOKENS", help="decode after so many")
    parser.add_argument("--context-only", action="store_true", help="no decode after a short prompt")
    parser.add_argument("--kv-bits", type=int, choices=[8], help="quantized caches on both sides (llama.cpp: q8_0, with flash attention)")
    parser.add_argument("--sequences", type=int, nargs="*", default=[])
    parser.add_argument("--cpu-precision", default="default")
    parser.add_argument("--trials", type=int, default=3, help="in a round, of which the best counts")
    add_arguments(parser)
    args = parser.parse_args()
    contenders = Contenders(args)
    works = [lambda name, count=count: contenders.prefill(name, count) for count in args.prefill]
    if not args.context_only:
        works.append(contenders.decode)
    works += [lambda name, count=count: contenders.decode_after(name, count) for count in args.context]
    works += [lambda name, count=count: contenders.sequences(name, count) for count in args.sequences]
    read_once([args.model, *contenders.peers.values()])
    about = {"model": args.name, "decode_tokens": args.decode, "kv_bits": args.kv_bits, "cpu_precision": args.cpu_precision, "trials": args.trials}
    alternate("side_by_side", args, [OURS, *contenders.peers], works, about)


if __name__ == "__main__":
    main()
