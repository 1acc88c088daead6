"""Run by test_prompt_cache.py with a Python that has mlx_lm: continues from a prompt-cache file of ours, and writes one of its own.

    prompt_cache_exchange.py JSON    model, ours, theirs (files), prefix, suffix (token ids), bits, bounded (sizes or null), tokens (how many)
"""

import json
import pathlib
import sys

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.utils import load_model


def main():
    mx.set_default_device(mx.cpu)
    a = json.loads(sys.argv[1])
    model, _ = load_model(pathlib.Path(a["model"]))
    quantized = {"kv_bits": a["bits"], "kv_group_size": 32, "quantized_kv_start": 0}

    cache, metadata = load_prompt_cache(a["ours"], return_metadata=True)
    kinds = [type(c).__name__ for c in cache]
    answer = [t for t, _ in generate_step(mx.array(a["suffix"]), model, max_tokens=a["tokens"], prompt_cache=cache)]

    own = [RotatingKVCache(a["bounded"], keep=4) for _ in cache] if a["bounded"] else make_prompt_cache(model)
    for _ in generate_step(mx.array(a["prefix"]), model, max_tokens=0, prompt_cache=own, **quantized):
        pass
    save_prompt_cache(a["theirs"], own, {"model": a["model"], "tokenizer_config": "{}"})
    print(json.dumps({"tokens": answer, "kinds": kinds, "metadata": metadata}))


if __name__ == "__main__":
    main()
