#!/usr/bin/env python3
"""Writes tests/data/cache/expected.json: what mlx_lm's caches return and remember over sequences of updates and trims.

Tokens are numbered in the order in which they come; a list of tokens is stored as runs [first, count].
Usage: make_expected_cache.py  (needs mlx_lm 0.32.2)
"""

import json
import random
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

mx.set_default_device(mx.cpu)
BATCH, HEADS, KEY_DIMS, VALUE_DIMS = 2, 3, 4, 5


def runs(tokens):
    out = []
    for t in tokens:
        if out and out[-1][0] + out[-1][1] == t:
            out[-1][1] += 1
        else:
            out.append([t, 1])
    return out


def rows(first, count, dims, sign):
    """Every head and batch entry holds other numbers, so that none can stand in for another."""
    t = mx.arange(first, first + count).reshape(1, 1, count, 1)
    b = mx.arange(BATCH).reshape(BATCH, 1, 1, 1)
    h = mx.arange(HEADS).reshape(1, HEADS, 1, 1)
    e = mx.arange(dims).reshape(1, 1, 1, dims)
    return (sign * (t * 64 + b * 32 + h * 8 + e)).astype(mx.float32)


def seen(keys, values):
    tokens = [int(x) // 64 for x in keys[0, 0, :, 0].tolist()]
    assert [int(-x) // 64 for x in values[0, 0, :, 0].tolist()] == tokens
    return runs(tokens)


def play(kind, max_size, keep, ops):
    cache = KVCache() if kind == "full" else RotatingKVCache(max_size=max_size, keep=keep)
    steps, next_token = [], 0
    for op, count in ops:
        if op == "trim" and not cache.is_trimmable():
            continue
        if op == "update":
            k, v = cache.update_and_fetch(rows(next_token, count, KEY_DIMS, 1), rows(next_token, count, VALUE_DIMS, -1))
            mx.eval(k, v)
            next_token += count
            steps.append({"update": count, "tokens": seen(k, v)})
        else:
            steps.append({"trim": count, "trimmed": cache.trim(count)})
        steps[-1] |= {"offset": cache.offset, "trimmable": cache.is_trimmable()}
    case = {"kind": kind, "steps": steps}
    return case if kind == "full" else case | {"max_size": max_size, "keep": keep}


def main():
    random.seed(7)
    u, t = lambda *counts: [("update", n) for n in counts], lambda n: [("trim", n)]
    cases = [
        play("full", 0, 0, u(1, 1, 3, 1)),
        play("full", 0, 0, u(255, 1, 1, 1)),
        play("full", 0, 0, u(256, 1)),
        play("full", 0, 0, u(257, 300, 1)),
        play("full", 0, 0, u(200, 200, 200, 200)),
        play("full", 0, 0, u(10) + t(3) + u(1, 5) + t(1) + u(1)),
        play("full", 0, 0, u(300) + t(100) + u(1, 120, 1) + t(1000) + u(2)),
        play("full", 0, 0, t(2) + u(3) + t(0) + t(3) + u(1)),
        play("rotating", 4, 0, u(*[1] * 12)),
        play("rotating", 300, 4, u(250, *[1] * 60)),
        play("rotating", 260, 0, u(255, 1, 1, 1, 1, 1, 1, 1, 40, 1)),
        play("rotating", 8, 2, u(3) + t(2) + u(1, 1) + t(1) + u(2, 1, 1, 1, 1, 1)),
        play("rotating", 8, 0, u(20, 1, 1, 5, 1)),
    ]
    for max_size in (1, 2, 3, 5, 8):
        for keep in sorted({0, 1, 4, max_size - 1}):
            if keep >= max_size:
                continue
            for _ in range(4):
                ops = []
                for _ in range(14):
                    trim = random.random() < 0.15
                    ops.append(("trim", random.randint(1, 3)) if trim else ("update", random.choice([1, 1, 1, 1, 2, 3, 5, 9])))
                cases.append(play("rotating", max_size, keep, ops))
    for _ in range(10):
        ops = [random.choice([("update", random.choice([1, 1, 2, 7, 100])), ("trim", random.randint(0, 20))]) for _ in range(20)]
        cases.append(play("full", 0, 0, ops))
    path = Path(__file__).resolve().parent.parent / "data" / "cache" / "expected.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
