#!/usr/bin/env python3
"""Prints the tables of docs/performance.md from what measure_all.sh left in bench/results. Usage: report.py [FOLDER]"""
import pathlib
import statistics
import sys

from common import json_lines, number_of, row_of, table_of, title_of

COMPARED = ["smollm2", "fast", "long", "long-16k", "long-kv8", "long-kv8-16k", "1b", "1b-2048", "1b-group64", "3b", "3b-group64", "dense-f16", "dense-bf16",
            "engine"]
SHAPES = ["moe", "ssm", "mla", "conv", "delta"]
LISTED = {"admission": ["admission", "gap_ms_median_alone", "gap_ms_median", "gap_ms_p99", "gap_ms_worst", "worst_over_median_alone",
                        "first_token_s", "rounds"],
          "prefix": ["prefix", "requests", "shared_tokens", "seconds", "first_token_s_median", "cache_mb_most", "rounds"],
          "startup": ["model", "weights_mb", "first_token_s", "fastest_s", "peak_memory_mb", "peak_to_weights"],
          "precision": ["precision", "perplexity", "against_exact_percent", "mean_kl", "same_top_token_percent", "tokens_per_s"]}


def results_of(folder, name):
    """The lines of a file of results; none when it was not measured."""
    path = folder / f"{name}.jsonl"
    return json_lines(path.read_text()) if path.exists() else []


def medians_of(folder, name):
    """None where the file has no medians of rounds."""
    lines = results_of(folder, name)
    return lines[-1] if lines and "rounds" in lines[-1] else None


def medians_by(lines, key):
    """One line for those that have the same `key`: its numbers are medians, `worst` ones the worst of all."""
    groups = {}
    for line in lines:
        groups.setdefault(line.get(key), []).append(line)
    merged = []
    for group in groups.values():
        merged.append(dict(group[0], rounds=len(group)))
        for name, value in group[0].items():
            if isinstance(value, int | float) and len(group) > 1:
                merged[-1][name] = (max if "worst" in name else statistics.median)(line[name] for line in group)
    return merged


def shapes_table(results):
    kinds = [kind for kind in next(iter(results[0]["medians"].values()))]
    lines = [row_of(["", *(cell for kind in kinds for cell in (kind, "llama.cpp", "ratio"))]), "|---" * (1 + 3 * len(kinds)) + "|"]
    for result in results:
        us, peer = list(result["medians"].values())[:2]
        lines.append(row_of([result["model"], *(cell for kind in kinds for cell in (number_of(us[kind]), number_of(peer[kind]),
                                                                                    f"{us[kind] / peer[kind]:.2f}"))]))
    return "\n".join(lines)


def list_table(lines, columns):
    rows = [row_of(column.replace("_", " ") for column in columns), "|---" * len(columns) + "|"]
    return "\n".join(rows + [row_of(line.get(column, "") for column in columns) for line in lines])


def sampling_table(result):
    rates = {way: rate["tokens/s"] for way, rate in result["medians"].items()}
    fastest = rates["greedy"]
    rows = [row_of([way, number_of(rate), f"{rate / fastest:.2f}"]) for way, rate in rates.items()]
    return "\n".join([row_of(["", "tokens/s", "of greedy"]), "|---" * 3 + "|", *rows])


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "results"

    def show(name, title, table):
        print(f"## {name}\n{title}\n\n{table}\n")

    for name in COMPARED:
        if result := medians_of(folder, name):
            show(name, title_of(result), table_of(result))
    if shapes := [result for name in SHAPES if (result := medians_of(folder, name))]:
        show("shapes", f"Medians of {min(s['rounds'] for s in shapes)} alternated rounds or more, tokens/s; llama.cpp in Q4_0", shapes_table(shapes))
    if result := medians_of(folder, "speculative"):
        accepted = ", ".join(f"{count} accepted in {name}" for name, count in result["accepted"].items())
        show("speculative", f"{title_of(result)}; {result['drafts']}: {accepted}", table_of(result))
    if result := medians_of(folder, "sampling"):
        show("sampling", title_of(result), sampling_table(result))
    for name, columns in LISTED.items():
        if lines := results_of(folder, name):
            show(name, "", list_table(medians_by(lines, columns[0]), columns))


if __name__ == "__main__":
    main()
