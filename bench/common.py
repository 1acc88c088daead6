"""What the measurements share: running contenders in turn, a line of JSON a round, medians and tables."""
import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

# Beside "decode": weights read a second, against what this machine reads from memory, and as many bytes over and over (caches hold a part).
SHARE, REREAD_SHARE = "% of read bandwidth", "% of reread bandwidth"
LIMIT_S = 900  # for one process; a machine that takes longer measures nothing


def output_of(command, env=None):
    """What the command prints on stdout."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"error: {' '.join(map(str, command))}: not done after {LIMIT_S} s")
    except OSError as error:
        sys.exit(f"error: {command[0]}: {error.strerror}")
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def cpu_name():
    try:
        return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def files_of(model):
    path = pathlib.Path(model)
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def read_once(models):
    """Into the file cache, so that no contender waits for the disk."""
    for path in (file for model in models for file in files_of(model)):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="no round is begun that would end later; at least one is run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/NAME-DATE.jsonl")


def add_llama_cpp(parser):
    parser.add_argument("--llama-cpp", required=True, type=pathlib.Path, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="what llama.cpp reads, perhaps several; default: the model")


def peers_of(args):
    """File of each contender of llama.cpp's."""
    return dict(peer.split("=", 1) for peer in args.peer) or {"llama.cpp": args.model}


def run_llama(args, tool, model, *flags):
    """The lines that llama-bench or llama-batched-bench prints."""
    env = dict(os.environ, LD_LIBRARY_PATH=str(args.llama_cpp))
    return json_lines(output_of([args.llama_cpp / tool, "-m", model, "-t", str(args.threads), *map(str, flags)], env))


def alternate(name, args, contenders, works, about):
    """Runs each work on each contender in turn, round after round. A work is a function of the contender's name that returns its rates. Each round
    of a contender is a line of JSON, the last line the medians, which are printed as a table too."""
    stamp = datetime.datetime.now(datetime.UTC)
    output = args.output or pathlib.Path(__file__).parent / "results" / f"{name}-{stamp:%Y%m%d-%H%M}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {**about, "threads": args.threads, "cpu": cpu_name(), "date": f"{stamp:%Y-%m-%d}"}
    rounds, longest, begin = {contender: [] for contender in contenders}, 0, time.monotonic()
    partial = output.with_name(output.name + ".partial")  # a run that is cut short leaves the last results alone
    with partial.open("w") as file:
        while (number := len(rounds[contenders[0]]) + 1) <= args.rounds:
            start = time.monotonic()
            if number > 1 and start - begin + longest > args.minutes * 60:
                break
            rates = {contender: {} for contender in contenders}
            for work in works:
                for contender in contenders:
                    rates[contender].update(work(contender))
            for contender in contenders:
                rounds[contender].append(rates[contender])
                file.write(json.dumps({"round": number, "contender": contender, "rates": rates[contender], **about}) + "\n")
            file.flush()
            longest = max(longest, time.monotonic() - start)
            print(f"round {number} of {args.rounds}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        medians = {contender: {kind: statistics.median(r[kind] for r in done) for kind in done[0]} for contender, done in rounds.items()}
        best = {contender: {kind: max(r[kind] for r in done) for kind in done[0]} for contender, done in rounds.items()}
        result = {"medians": medians, "best": best, "rounds": len(rounds[contenders[0]]), **about}
        file.write(json.dumps(result) + "\n")
    partial.rename(output)
    print(f"{about['cpu']}, {args.threads} threads; {title_of(result)}\n\n{table_of(result)}\n\nAll rounds: {output}")


def title_of(result):
    cache = f", {result['kv_bits']}-bit cache" if result.get("kv_bits") else ""
    trials = f", each the best of {result['trials']} trials" if result.get("trials", 1) > 1 else ""
    return f"{result['model']}{cache}; medians of {result['rounds']} alternated rounds{trials}, tokens/s"


def number_of(value):
    return "" if value is None else f"{value:.{0 if value >= 100 else 1}f}"


def row_of(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def table_of(result):
    """Of the medians, the ratios of the first contender to each other below, and those of the best rounds: what each does when nobody else has the
    machine."""
    medians = result["medians"]
    (ours, us), *others = medians.items()
    lines = [row_of(["", *us]), "|---" * (len(us) + 1) + "|", row_of([ours, *map(number_of, us.values())])]
    lines += [row_of([name, *(number_of(rates.get(kind)) for kind in us)]) for name, rates in others]
    for title, values in (("ratio to", medians), ("best rounds: to", result.get("best", {}))):
        mine, *rest = values.items() or [(ours, {})]
        for name, rates in rest:
            ratios = ["" if kind.startswith("%") or kind not in rates else f"{mine[1][kind] / rates[kind]:.2f}" for kind in us]
            lines.append(row_of([f"{title} {name}", *ratios]))
    return "\n".join(lines)
