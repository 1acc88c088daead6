#!/usr/bin/env python3
"""Writes tests/data/nn/route.json: the experts that mlx_lm's routers choose, and their weights.

Usage: make_expected_nn.py  (needs mlx_lm 0.32.2)
"""

import json
import random
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import deepseek_v3, nemotron_h

mx.set_default_device(mx.cpu)


def softmax_route(gates, top_k, renormalize):
    """qwen3_moe.py, Qwen3MoeSparseMoeBlock.__call__ up to the experts."""
    gates = mx.softmax(gates, axis=-1, precise=True)
    indices = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
    weights = mx.take_along_axis(gates, indices, axis=-1)
    if renormalize:
        weights /= mx.sum(weights, axis=-1, keepdims=True)
    return indices, weights


def softmax_after_route(gates, top_k):
    """gpt_oss.py, MLPBlock.__call__ up to the experts."""
    indices = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
    weights = mx.softmax(mx.take_along_axis(gates, indices, axis=-1), axis=-1, precise=True)
    return indices, weights


def case(route, tokens, experts, top_k, renormalize=True, scale=1.0, groups=1, kept=1, bias=None, eps=0.0):
    # Multiples of 1/64 that differ within a row: exact in JSON, and no ties.
    logits = [[v / 64 for v in random.sample(range(-200, 200), experts)] for _ in range(tokens)]
    gates = mx.array(logits)
    correction = None
    if route == "sigmoid":
        correction = [random.randint(-64, 64) / 128 if bias is None else bias for _ in range(experts)]
        module = nemotron_h if eps else deepseek_v3
        indices, weights = module.group_expert_select(gates, mx.array(correction), top_k, groups, kept, scale, renormalize)
    elif route == "softmax":
        indices, weights = softmax_route(gates, top_k, renormalize)
    else:
        indices, weights = softmax_after_route(gates, top_k)
    chosen = [sorted(zip(i, w)) for i, w in zip(indices.tolist(), weights.tolist())]
    return {
        "route": route, "top_k": top_k, "renormalize": renormalize, "eps": eps, "scale": scale, "groups": groups, "groups_kept": kept,
        "bias": correction, "logits": logits,
        "indices": [[i for i, _ in row] for row in chosen], "weights": [[float(f"{w:.9g}") for _, w in row] for row in chosen],
    }


def main():
    random.seed(11)
    cases = []
    for tokens, experts, top_k in ((1, 4, 1), (5, 8, 2), (3, 8, 8), (4, 60, 6)):
        for renormalize in (True, False):
            cases.append(case("softmax", tokens, experts, top_k, renormalize))
        cases.append(case("softmax_after_topk", tokens, experts, top_k))
    for tokens, experts, top_k, groups, kept in ((1, 4, 1, 1, 1), (5, 8, 2, 1, 1), (6, 16, 4, 4, 2), (6, 16, 3, 8, 1), (3, 16, 4, 4, 4), (4, 64, 6, 8, 3)):
        for renormalize in (True, False):
            for eps in (0.0, 1e-20):
                cases.append(case("sigmoid", tokens, experts, top_k, renormalize, 2.5, groups, kept, eps=eps))
        # Every score below zero: the zeros of dropped groups are then the best.
        cases.append(case("sigmoid", tokens, experts, top_k, True, 1.0, groups, kept, bias=-1.5))
    path = Path(__file__).resolve().parent.parent / "data" / "nn" / "route.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
