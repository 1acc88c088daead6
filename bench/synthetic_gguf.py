#!/usr/bin/env python3
"""Writes a GGUF file of Llama's shape with random weights, to measure sizes for which no weights can be installed. Both programs read it.

The tokenizer is that of the model given, padded to the shape's vocabulary. Needs the Python package gguf.
Usage: synthetic_gguf.py --shape 1b --type Q4_0 --tokenizer models/SmolLM2-135M-Instruct.gguf OUT.gguf
"""
import argparse

import gguf
import numpy as np

SHAPES = {  # layers, width, hidden, heads, kv heads, head dims, vocabulary
    "135m": (30, 576, 1536, 9, 3, 64, 49152),
    "1b": (16, 2048, 8192, 32, 8, 64, 128256),
    "3b": (28, 3072, 8192, 24, 8, 128, 128256),
}
TYPES = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q4_1", "Q8_0", "F16", "BF16")}


def half(values):
    return values.astype(np.float16).view(np.uint8)


def random_weights(random, kind, rows, columns):
    """Weights of standard deviation about 1 / sqrt(columns): logits stay small and nothing overflows."""
    spread = columns ** -0.5
    if kind in (TYPES["F16"], TYPES["BF16"]):
        values = (random.standard_normal((rows, columns), dtype=np.float32) * spread)
        if kind == TYPES["F16"]:
            return values.astype(np.float16)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, columns * 2)
    blocks = rows * columns // 32
    scale = half((spread * random.uniform(0.8, 1.2, blocks) / (40 if kind == TYPES["Q8_0"] else 4.6)).astype(np.float32)).reshape(blocks, 2)
    if kind == TYPES["Q8_0"]:
        codes = random.integers(-127, 128, (blocks, 32), dtype=np.int8).view(np.uint8)
        parts = [scale, codes]
    else:
        codes = random.integers(0, 256, (blocks, 16), dtype=np.uint8)
        parts = [scale, codes]
        if kind == TYPES["Q4_1"]:
            parts.insert(1, half(scale.view(np.float16)[:, 0].astype(np.float32) * -7.5).reshape(blocks, 2))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def copy_tokenizer(writer, path, vocabulary):
    fields = gguf.GGUFReader(path).fields
    tokens = [bytes(fields["tokenizer.ggml.tokens"].parts[i]) for i in fields["tokenizer.ggml.tokens"].data]
    types = [int(fields["tokenizer.ggml.token_type"].parts[i][0]) for i in fields["tokenizer.ggml.token_type"].data]
    merges = [bytes(fields["tokenizer.ggml.merges"].parts[i]).decode() for i in fields["tokenizer.ggml.merges"].data]
    extra = vocabulary - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + [f"<extra_{i}>".encode() for i in range(extra)])
    writer.add_token_types(types + [1] * extra)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    parser.add_argument("--tokenizer", required=True, metavar="FILE.gguf")
    args = parser.parse_args()
    layers, width, hidden, heads, kv_heads, head_dims, vocabulary = SHAPES[args.shape]
    kind, random = TYPES[args.type], np.random.default_rng(0)
    embedding_kind = TYPES["Q8_0"] if args.type.startswith("Q4") else kind

    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name(f"synthetic {args.shape} {args.type}")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dims)
    writer.add_value_length(head_dims)
    writer.add_rope_dimension_count(head_dims)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    copy_tokenizer(writer, args.tokenizer, vocabulary)

    def matrix(name, rows, columns, of=kind):
        writer.add_tensor(name, random_weights(random, of, rows, columns), raw_dtype=of)

    def norm(name):
        writer.add_tensor(name, np.ones(width, np.float32))

    matrix("token_embd.weight", vocabulary, width, embedding_kind)
    norm("output_norm.weight")
    for layer in range(layers):
        at = f"blk.{layer}."
        norm(at + "attn_norm.weight")
        norm(at + "ffn_norm.weight")
        matrix(at + "attn_q.weight", heads * head_dims, width)
        matrix(at + "attn_k.weight", kv_heads * head_dims, width)
        matrix(at + "attn_v.weight", kv_heads * head_dims, width)
        matrix(at + "attn_output.weight", width, heads * head_dims)
        matrix(at + "ffn_gate.weight", hidden, width)
        matrix(at + "ffn_up.weight", hidden, width)
        matrix(at + "ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
