#!/usr/bin/env python3
"""Write tests/data/parity/smollm2_greedy.json: what mlx_lm 0.32.2 answers with the default model's weights.

    make_real_goldens.py models/SmolLM2-135M-Instruct.gguf

Not part of ./dev golden: on a CPU, mlx_lm takes about 20 minutes for it. The GGUF (Q4_1, embeddings Q8_0) becomes an mlx_lm model without loss:
affine quantization, 4 and 8 bits, groups of 32.
"""
import json
import pathlib
import sys

import jinja2
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFReader
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

OUT = pathlib.Path(__file__).resolve().parents[1] / "data" / "parity" / "smollm2_greedy.json"
MESSAGES = ["What is the capital of France?", "Write a haiku about the sea.", "def fibonacci(n):"]
TOKENS = 20
GROUP = 32
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def path_of(name):
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]


def halves(rows, heads):
    """llama.cpp stores q and k with the pairs of the rotation side by side."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def quantized(tensor, heads):
    """Packed weights, scales and biases."""
    out_dims, in_dims = int(tensor.shape[1]), int(tensor.shape[0])
    head, codes = {"Q4_1": (4, 16), "Q8_0": (2, 32)}[tensor.tensor_type.name]
    blocks = np.array(tensor.data).view(np.uint8).reshape(out_dims, in_dims // GROUP, head + codes)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if head == 4:
        biases = blocks[..., 2:4].copy().view(np.float16)[..., 0]
        values = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).reshape(out_dims, in_dims)
    else:
        biases = (-128 * scales.astype(np.float32)).astype(np.float16)
        values = (blocks[..., 2:] ^ 128).reshape(out_dims, in_dims)  # int8 -> 0..255
    if heads:
        values, scales, biases = (halves(a, heads) for a in (values, scales, biases))
    packed = values[:, 0::2] | (values[:, 1::2] << 4) if head == 4 else values
    return [mx.array(np.ascontiguousarray(a)) for a in (np.ascontiguousarray(packed).view(np.uint32), scales, biases)]


def load_model(reader):
    value = lambda key: reader.fields[f"llama.{key}"].contents()
    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        path = path_of(tensor.name)
        if tensor.tensor_type.name == "F32":
            weights[path + ".weight"] = mx.array(np.array(tensor.data)).astype(mx.float16)
            continue
        parts = quantized(tensor, {"q_proj": heads, "k_proj": kv_heads}.get(path.split(".")[-1]))
        weights |= dict(zip((path + ".weight", path + ".scales", path + ".biases"), parts))
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=value("embedding_length"),
        num_hidden_layers=value("block_count"),
        intermediate_size=value("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        vocab_size=value("vocab_size"),
        rope_theta=value("rope.freq_base"),
    )
    model = llama.Model(args)
    bits = lambda path, module: hasattr(module, "to_quantized") and {"bits": 8 if "embed" in path else 4, "group_size": GROUP}
    nn.quantize(model, GROUP, 4, class_predicate=bits)
    model.load_weights(list(weights.items()), strict=True)
    return model


def load_tokenizer(reader):
    value = lambda key: reader.fields[f"tokenizer.{key}"].contents()
    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(m.split(" ")) for m in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3])
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(value("chat_template"))
    return tokenizer, template, value("ggml.eos_token_id")


def greedy(model, prompt, end):
    cache = make_prompt_cache(model)
    logits = model(mx.array([prompt]), cache=cache)[0, -1]
    tokens, leads = [], []
    while len(tokens) < TOKENS and end not in tokens:
        best = mx.sort(logits.astype(mx.float32))[-2:].tolist()
        tokens.append(int(mx.argmax(logits)))
        leads.append(round(best[1] - best[0], 3))
        logits = model(mx.array([[tokens[-1]]]), cache=cache)[0, -1]
    return tokens, leads


def main():
    mx.set_default_device(mx.cpu)
    reader = GGUFReader(sys.argv[1])
    model = load_model(reader)
    tokenizer, template, end = load_tokenizer(reader)
    answers = []
    for message in MESSAGES:
        text = template.render(messages=[{"role": "user", "content": message}], add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        tokens, leads = greedy(model, prompt, end)
        answers.append(dict(message=message, prompt=prompt, tokens=tokens, leads=leads, text=tokenizer.decode(tokens)))
        print(answers[-1], flush=True)
    lines = ",\n".join(" " + json.dumps(a, ensure_ascii=False) for a in answers)
    OUT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
