#!/usr/bin/env python3
"""Write tests/data/caches: prompt-cache files of mlx_lm 0.32.2, and logits that follow from them and from quantized caches. Run by ./dev golden.

    NAME.safetensors      what save_prompt_cache writes for a tiny model's caches (buffers cut to the tokens they hold, so that it stays small)
    NAME_older.safetensors  the same in the layout before 0.32; made only where MLXLM_OLDER_PACKAGE names a folder with mlx_lm 0.31.1
    answers.safetensors   NAME.steps int32 [N]: tokens run after the prompt, one by one but the last three together;
                          NAME.logits float32 [N - 2, V]: of the last position of each call. Metadata `cases`: config, seed, prompt, kv by name.
"""
import importlib.util
import json
import os
import pathlib

import mlx.core as mx
from make_goldens import TESTS, build, token_ids
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache, save_prompt_cache

OUT = TESTS / "data" / "caches"
STEPS = 5


def configs():
    return {p.stem: json.loads(p.read_text()) for p in sorted((TESTS / "arch").glob("*.json"))}


def cases():
    """name -> config, prompt length, kv (bits, group size) or None, max_kv_size or None, whether a file is kept."""
    known = configs()
    mistral = known["mistral"]
    for bits in (2, 3, 4, 6, 8):
        yield f"mistral_kv{bits}", mistral, 12, (bits, 32), None, bits == 3
    yield "mistral_kv8_g64", mistral | {"head_dim": 64}, 12, (8, 64), None, False
    yield "mistral_kv4_g128", mistral | {"head_dim": 128}, 12, (4, 128), None, False
    yield "nemotron_h_kv4", known["nemotron_h"], 12, (4, 32), None, True
    yield "qwen3_kv8_long", known["qwen3"], 300, (8, 32), None, False
    yield "llama", known["llama"], 5, None, None, True
    yield "llama_long", known["llama"], 13, None, None, True
    yield "qwen3_bounded", known["qwen3"], 21, None, 16, True
    yield "gemma3_text", known["gemma3_text"], 11, None, None, True
    yield "nemotron_h", known["nemotron_h"], 6, None, None, True
    yield "lfm2", known["lfm2"], 6, None, None, True
    yield "qwen3_next", known["qwen3_next"], 6, None, None, True
    yield "qwen3_next_kv8", known["qwen3_next"], 12, (8, 32), None, True
    yield "deepseek_v3", known["deepseek_v3"], 4, None, None, True
    yield "falcon_h1", known["falcon_h1"], 6, None, None, True
    yield "llama4", known["llama4"], 13, None, None, True
    yield "llama4_next_chunk", known["llama4"], 29, None, None, True
    yield "llama4_end_of_chunk", known["llama4"], 32, None, None, True
    yield "llama4_trimmed", known["llama4"], 37, None, None, True


def cut(cache):
    """Without the unused end of growing buffers."""
    for c in cache:
        if isinstance(c, CacheList):
            cut(c.caches)
        elif isinstance(c, ChunkedKVCache):
            held = c.offset - c.start_position
            c.keys, c.values = c.keys[..., :held, :], c.values[..., :held, :]
        elif isinstance(c, QuantizedKVCache):
            c.keys, c.values = ([x[..., : c.offset, :] for x in part] for part in (c.keys, c.values))
        elif isinstance(c, KVCache):
            c.keys, c.values = c.keys[..., : c.offset, :], c.values[..., : c.offset, :]


def older_module():
    folder = os.environ.get("MLXLM_OLDER_PACKAGE")
    if not folder:
        return None
    path = pathlib.Path(folder) / "mlx_lm" / "models" / "cache.py"
    spec = importlib.util.spec_from_file_location("mlx_lm.models.older_cache", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_older(older, cache):
    names = {KVCache: "keys values offset", QuantizedKVCache: "keys values offset group_size bits", ArraysCache: "cache left_padding lengths",
             RotatingKVCache: "keys values offset keep max_size _idx", ChunkedKVCache: "keys values offset chunk_size start_position"}
    made = []
    for c in cache:
        if isinstance(c, CacheList):
            made.append(older.CacheList(*as_older(older, c.caches)))
            continue
        other = getattr(older, type(c).__name__)
        other = other.__new__(other)
        for name in names[type(c)].split():
            setattr(other, name, getattr(c, name))
        made.append(other)
    return made


def main():
    mx.set_default_device(mx.cpu)
    OUT.mkdir(parents=True, exist_ok=True)
    answers, described, older = {}, {}, older_module()
    for name, config, length, kv, max_kv_size, keep in cases():
        model = build({"config": config, "dtype": "f32", "seed": 0})
        vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
        prompt, steps = token_ids("prompt", length, vocab, 0), token_ids("steps", STEPS, vocab, 0)
        cache = make_prompt_cache(model, max_kv_size)
        trimmed = name == "llama4_trimmed"  # a second call forgets what lies before the latest chunk_size tokens
        for call in (prompt[:24], prompt[24:]) if trimmed else (prompt,):
            model(mx.array([call]), cache=cache)
        if kv:
            maybe_quantize_kv_cache(cache, 0, kv[1], kv[0])
        mx.eval([c.state for c in cache])
        cut(cache)
        if keep:
            metadata = {"model": "org/" + name, "tokenizer_config": json.dumps({"trust_remote_code": False})}
            save_prompt_cache(str(OUT / f"{name}.safetensors"), cache, metadata)
            if older and not trimmed:  # which that version cannot restore
                older.save_prompt_cache(str(OUT / f"{name}_older.safetensors"), as_older(older, cache), metadata)
        calls = [[t] for t in steps[:-3]] + [steps[-3:]]
        answers[f"{name}.steps"] = mx.array(steps, mx.int32)
        answers[f"{name}.logits"] = mx.stack([model(mx.array([call]), cache=cache)[0, -1] for call in calls])
        described[name] = {"config": config, "dtype": "f32", "seed": 0, "prompt": prompt, "kv": kv, "max_kv_size": max_kv_size, "file": keep, "older": keep and not trimmed}
    mx.save_safetensors(str(OUT / "answers.safetensors"), answers, {"cases": json.dumps(described, separators=(",", ":"))})


if __name__ == "__main__":
    main()
