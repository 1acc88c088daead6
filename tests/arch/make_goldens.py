#!/usr/bin/env python3
"""Write NAME.txt for every NAME.json of this folder: what mlx_lm 0.32.2 builds from that config. Run by ./dev golden.

Lines: `tensor NAME DIM...` sorted by name, `cache LAYER KIND`, `rope LAYER INPUT_SCALE FREQUENCY...`
(angle per position, one a pair).
"""
import json
import pathlib

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import rope_utils
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

DYNAMIC_TOKENS = 100  # context length at which the dynamic kind is evaluated


def rope_line(rope):
    if isinstance(rope, nn.RoPE):
        return 1.0, [rope.scale * rope.base ** (-2 * i / rope.dims) for i in range(rope.dims // 2)]
    if isinstance(rope, rope_utils.DynamicNTKScalingRoPE):
        length = max(DYNAMIC_TOKENS, rope.max_position_embeddings)
        stretch = rope.factor * length / rope.max_position_embeddings - (rope.factor - 1)
        base = rope.base * stretch ** (rope.dims / (rope.dims - 2))
        return 1.0, [base ** (-2 * i / rope.dims) for i in range(rope.dims // 2)]
    scale = getattr(rope, "mscale", getattr(rope, "_scale", 1.0))
    return scale, [1 / f for f in rope._freqs.tolist()]


def cache_kind(cache):
    if isinstance(cache, RotatingKVCache):
        return f"rotating {cache.max_size}"
    if isinstance(cache, ChunkedKVCache):
        return f"chunked {cache.chunk_size}"
    if isinstance(cache, KVCache):
        return "full"
    if isinstance(cache, ArraysCache):
        return "recurrent"
    raise TypeError(type(cache))


def cache_kinds(model):
    """(layer, kind), one for each cache of a list."""
    caches = iter(make_prompt_cache(model))
    stateless = {"-", "E"}
    for i, layer in enumerate(model.layers):
        if getattr(layer, "block_type", None) in stateless:
            yield i, "none"
            continue
        cache = next(caches)
        for part in cache.caches if isinstance(cache, CacheList) else [cache]:
            yield i, cache_kind(part)


def golden(config):
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    lines = [f"tensor {name} {' '.join(map(str, value.shape))}" for name, value in sorted(tree_flatten(model.parameters()))]
    lines += [f"cache {i} {kind}" for i, kind in cache_kinds(model)]
    for i, layer in enumerate(model.layers):
        attention = getattr(layer, "self_attn", None)
        rope = getattr(attention, "rope", None)
        if rope is not None and type(rope).__name__ != "NoPE":
            scale, frequencies = rope_line(rope)
            lines.append(f"rope {i} {scale:.9g} " + " ".join(f"{f:.9g}" for f in frequencies))
    return "\n".join(lines) + "\n"


def main():
    folder = pathlib.Path(__file__).resolve().parent
    mx.set_default_device(mx.cpu)
    for path in sorted(folder.glob("*.json")):
        path.with_suffix(".txt").write_text(golden(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
