#!/usr/bin/env python3
"""Writes a model of a real shape with random weights, to measure with where no weights can be installed: a folder that mlx-lm reads
(safetensors: quantized, or dense with --dense), or the same shape as a GGUF file (--gguf). The tokenizer has a token a byte.

    python3 bench/synthetic.py SHAPE OUT [--bits 4 --group-size 32] [--set num_hidden_layers=4]
    python3 bench/synthetic.py SHAPE OUT --dense bf16
    python3 bench/synthetic.py SHAPE OUT.gguf --gguf q4_0

Every matrix has the format that is named, the embedding too. The weights repeat themselves after some million values: what is measured does not
depend on them. One tensor at a time is in memory. Needs numpy, and the gguf package for --gguf.
"""
import argparse
import json
import math
import pathlib
import struct

import numpy as np

ROPE = {"rope_theta": 10000.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
LLAMA_3 = {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
SHAPES = {
    "llama-1b": {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, **LLAMA_3},
    "llama-3b": {"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192, "num_attention_heads": 24,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True, **LLAMA_3},
    "smollm2": {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
                "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, **ROPE},
    "qwen3_moe": {"model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 2048, "moe_intermediate_size": 512,
                  "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                  "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32768, "tie_word_embeddings": False, **ROPE},
    "nemotron_h": {"model_type": "nemotron_h", "hidden_size": 1024, "num_hidden_layers": 16, "hybrid_override_pattern": "M-M-M*-M-M-M*-M-",
                   "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "attention_bias": False,
                   "mamba_num_heads": 32, "mamba_head_dim": 64, "mamba_proj_bias": False, "ssm_state_size": 128, "conv_kernel": 4, "n_groups": 8,
                   "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True, "vocab_size": 32768,
                   "tie_word_embeddings": False, **ROPE},
    "deepseek_v3": {"model_type": "deepseek_v3", "hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 3072,
                    "moe_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 32,
                    "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1, "moe_layer_freq": 1,
                    "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                    "attention_bias": False, "vocab_size": 32768, "tie_word_embeddings": False, "num_nextn_predict_layers": 0, **ROPE},
    "lfm2": {"model_type": "lfm2", "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
             "full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_L_cache": 3, "conv_bias": False, "block_dim": 1024, "block_ff_dim": 4608,
             "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "norm_eps": 1e-5, "vocab_size": 65536,
             "tie_word_embeddings": True, **ROPE},
    "qwen3_next": {"model_type": "qwen3_next", "hidden_size": 1024, "num_hidden_layers": 12, "full_attention_interval": 4, "intermediate_size": 2048,
                   "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.25, "linear_num_value_heads": 16,
                   "linear_num_key_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
                   "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
                   "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 32768, "tie_word_embeddings": False,
                   **ROPE},
}


def matrices(c):
    """(mlx name, GGUF name, kind, shape) of each tensor, a name empty where it is not there; kinds: matrix, vector (f32 in GGUF), router,
    plain (never quantized)."""
    w, family = c["hidden_size"], c["model_type"]
    root = "backbone" if family == "nemotron_h" else "model"
    yield f"{root}.{'embeddings' if family == 'nemotron_h' else 'embed_tokens'}", "token_embd", "matrix", (c["vocab_size"], w)
    for i in range(c["num_hidden_layers"]):
        yield from LAYERS[family](c, i, f"{root}.layers.{i}.", f"blk.{i}.")
    norm, norm_to = {"nemotron_h": ("norm_f", "output_norm"), "lfm2": ("embedding_norm", "token_embd_norm")}.get(family, ("norm", "output_norm"))
    yield f"{root}.{norm}", norm_to, "vector", (w,)
    if not c["tie_word_embeddings"]:
        yield "lm_head", "output", "matrix", (c["vocab_size"], w)


def attention(c, at, to, prefix="self_attn."):
    w, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield at + prefix + "q_proj", to + "attn_q", "matrix", (q, w)
    yield at + prefix + "k_proj", to + "attn_k", "matrix", (kv, w)
    yield at + prefix + "v_proj", to + "attn_v", "matrix", (kv, w)
    yield at + prefix + "o_proj", to + "attn_output", "matrix", (w, q)
    if c["model_type"] == "qwen3_moe":
        yield at + prefix + "q_norm", to + "attn_q_norm", "vector", (d,)
        yield at + prefix + "k_norm", to + "attn_k_norm", "vector", (d,)


def norms(c, at, to):
    yield at + "input_layernorm", to + "attn_norm", "vector", (c["hidden_size"],)
    yield at + "post_attention_layernorm", to + "ffn_norm", "vector", (c["hidden_size"],)


def glu(at, to, w, hidden, suffix=""):
    yield at + "gate_proj", to + "ffn_gate" + suffix, "matrix", (hidden, w)
    yield at + "up_proj", to + "ffn_up" + suffix, "matrix", (hidden, w)
    yield at + "down_proj", to + "ffn_down" + suffix, "matrix", (w, hidden)


def experts(c, at, to, count):
    w, hidden = c["hidden_size"], c["moe_intermediate_size"]
    for mlx, gguf, shape in (("gate_proj", "gate", (hidden, w)), ("up_proj", "up", (hidden, w)), ("down_proj", "down", (w, hidden))):
        yield f"{at}mlp.switch_mlp.{mlx}", f"{to}ffn_{gguf}_exps", "matrix", (count, *shape)


def llama_layer(c, i, at, to):
    yield from norms(c, at, to)
    yield from attention(c, at, to)
    yield from glu(at + "mlp.", to, c["hidden_size"], c["intermediate_size"])


def qwen3_moe_layer(c, i, at, to):
    yield from norms(c, at, to)
    yield from attention(c, at, to)
    yield at + "mlp.gate", to + "ffn_gate_inp", "router", (c["num_experts"], c["hidden_size"])
    yield from experts(c, at, to, c["num_experts"])


def nemotron_h_layer(c, i, at, to):
    w, kind = c["hidden_size"], c["hybrid_override_pattern"][i]
    yield at + "norm", to + "attn_norm", "vector", (w,)
    if kind == "*":
        yield from attention(c, at, to, "mixer.")
    elif kind == "-":
        yield at + "mixer.up_proj", to + "ffn_up", "matrix", (c["intermediate_size"], w)
        yield at + "mixer.down_proj", to + "ffn_down", "matrix", (w, c["intermediate_size"])
    else:
        inner, heads = c["mamba_num_heads"] * c["mamba_head_dim"], c["mamba_num_heads"]
        channels = inner + 2 * c["n_groups"] * c["ssm_state_size"]
        yield at + "mixer.in_proj", to + "ssm_in", "matrix", (inner + channels + heads, w)
        yield at + "mixer.conv1d", to + "ssm_conv1d", "plain", (channels, c["conv_kernel"], 1)
        yield at + "mixer.conv1d.bias", to + "ssm_conv1d.bias", "vector", (channels,)
        yield at + "mixer.dt_bias", to + "ssm_dt.bias", "vector", (heads,)
        yield at + "mixer.A_log", to + "ssm_a", "vector", (heads,)
        yield at + "mixer.D", to + "ssm_d", "vector", (heads,)
        yield at + "mixer.norm", to + "ssm_norm", "vector", (inner,)
        yield at + "mixer.out_proj", to + "ssm_out", "matrix", (w, inner)


def deepseek_v3_layer(c, i, at, to):
    w, heads, prefix = c["hidden_size"], c["num_attention_heads"], at + "self_attn."
    nope, rope, latent, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"], c["v_head_dim"]
    yield from norms(c, at, to)
    yield prefix + "q_a_proj", to + "attn_q_a", "matrix", (c["q_lora_rank"], w)
    yield prefix + "q_a_layernorm", to + "attn_q_a_norm", "vector", (c["q_lora_rank"],)
    yield prefix + "q_b_proj", to + "attn_q_b", "matrix", (heads * (nope + rope), c["q_lora_rank"])
    yield prefix + "kv_a_proj_with_mqa", to + "attn_kv_a_mqa", "matrix", (latent + rope, w)
    yield prefix + "kv_a_layernorm", to + "attn_kv_a_norm", "vector", (latent,)
    yield prefix + "embed_q", to + "attn_k_b", "matrix", (heads, latent, nope)
    yield prefix + "unembed_out", to + "attn_v_b", "matrix", (heads, value, latent)
    yield prefix + "o_proj", to + "attn_output", "matrix", (w, heads * value)
    if i < c["first_k_dense_replace"]:
        yield from glu(at + "mlp.", to, w, c["intermediate_size"])
        return
    yield at + "mlp.gate", to + "ffn_gate_inp", "plain", (c["n_routed_experts"], w)
    yield at + "mlp.gate.e_score_correction_bias", to + "exp_probs_b.bias", "vector", (c["n_routed_experts"],)
    yield from experts(c, at, to, c["n_routed_experts"])
    yield from glu(at + "mlp.shared_experts.", to, w, c["moe_intermediate_size"] * c["n_shared_experts"], "_shexp")


def lfm2_layer(c, i, at, to):
    w, d, hidden = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"], c["block_ff_dim"]
    yield at + "operator_norm", to + "attn_norm", "vector", (w,)
    yield at + "ffn_norm", to + "ffn_norm", "vector", (w,)
    if i in c["full_attn_idxs"]:
        for mlx, gguf, rows in (("q_proj", "attn_q", w), ("k_proj", "attn_k", c["num_key_value_heads"] * d),
                                ("v_proj", "attn_v", c["num_key_value_heads"] * d), ("out_proj", "attn_output", w)):
            yield f"{at}self_attn.{mlx}", to + gguf, "matrix", (rows, w)
        yield at + "self_attn.q_layernorm", to + "attn_q_norm", "vector", (d,)
        yield at + "self_attn.k_layernorm", to + "attn_k_norm", "vector", (d,)
    else:
        yield at + "conv.in_proj", to + "shortconv.in_proj", "matrix", (3 * w, w)
        yield at + "conv.conv", to + "shortconv.conv", "plain", (w, c["conv_L_cache"], 1)
        yield at + "conv.out_proj", to + "shortconv.out_proj", "matrix", (w, w)
    for mlx, gguf, shape in (("w1", "ffn_gate", (hidden, w)), ("w3", "ffn_up", (hidden, w)), ("w2", "ffn_down", (w, hidden))):
        yield f"{at}feed_forward.{mlx}", to + gguf, "matrix", shape


def qwen3_next_layer(c, i, at, to):
    w, d, shared = c["hidden_size"], c["head_dim"], c["shared_expert_intermediate_size"]
    yield at + "input_layernorm", to + "attn_norm", "vector", (w,)
    yield at + "post_attention_layernorm", to + "post_attention_norm", "vector", (w,)
    if (i + 1) % c["full_attention_interval"] == 0:
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        for mlx, gguf, shape in (("q_proj", "attn_q", (2 * q, w)), ("k_proj", "attn_k", (kv, w)), ("v_proj", "attn_v", (kv, w)),
                                 ("o_proj", "attn_output", (w, q))):
            yield f"{at}self_attn.{mlx}", to + gguf, "matrix", shape
        yield at + "self_attn.q_norm", to + "attn_q_norm", "vector", (d,)
        yield at + "self_attn.k_norm", to + "attn_k_norm", "vector", (d,)
    else:
        keys, values = c["linear_num_key_heads"] * c["linear_key_head_dim"], c["linear_num_value_heads"] * c["linear_value_head_dim"]
        heads, channels = c["linear_num_value_heads"], 2 * keys + values
        at_delta = at + "linear_attn."
        yield at_delta + "in_proj_qkvz", "", "matrix", (channels + values, w)
        yield "", to + "attn_qkv", "matrix", (channels, w)
        yield "", to + "attn_gate", "matrix", (values, w)
        yield at_delta + "in_proj_ba", to + "ssm_ba", "matrix", (2 * heads, w)
        yield at_delta + "conv1d", to + "ssm_conv1d", "plain", (channels, c["linear_conv_kernel_dim"], 1)
        yield at_delta + "dt_bias", to + "ssm_dt.bias", "vector", (heads,)
        yield at_delta + "A_log", to + "ssm_a", "vector", (heads,)
        yield at_delta + "norm", to + "ssm_norm", "vector", (c["linear_value_head_dim"],)
        yield at_delta + "out_proj", to + "ssm_out", "matrix", (w, values)
    yield at + "mlp.gate", to + "ffn_gate_inp", "router", (c["num_experts"], w)
    yield from experts(c, at, to, c["num_experts"])
    yield at + "mlp.shared_expert_gate", to + "ffn_gate_inp_shexp", "router", (1, w)
    yield from glu(at + "mlp.shared_expert.", to, w, shared, "_shexp")


LAYERS = {"llama": llama_layer, "qwen3_moe": qwen3_moe_layer, "nemotron_h": nemotron_h_layer, "deepseek_v3": deepseek_v3_layer,
          "lfm2": lfm2_layer, "qwen3_next": qwen3_next_layer}
BARE = ("dt_bias", "A_log", "mixer.D", "conv1d.bias", "e_score_correction_bias")  # parameters, not modules with a weight


def small(name, kind, shape, random):
    """What is neither quantized nor large."""
    if kind != "vector":
        return random.normal(0, 1 / math.sqrt(shape[1]), shape)
    if name.endswith("A_log"):
        return np.log(random.uniform(1, 16, shape))
    if name.endswith("dt_bias"):
        return random.uniform(-6, -2, shape)
    if name.endswith((".bias", "e_score_correction_bias")):
        return random.normal(0, 0.01, shape)
    return 1 + random.normal(0, 0.02, shape)


class Safetensors:
    """Tensors one after the other, each made only when it is written."""

    def __init__(self):
        self.header, self.makers, self.at = {}, [], 0

    def add(self, name, kind, shape, make):
        size = math.prod(shape) * {"U32": 4, "BF16": 2, "F16": 2}[kind]
        self.header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [self.at, self.at + size]}
        self.at += size
        self.makers.append((size, make))

    def write(self, path):
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for size, make in self.makers:
                values = make()
                assert values.nbytes == size, (values.nbytes, size)
                values.tofile(out)


def bf16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


HALF = {"f16": lambda x: np.asarray(x, np.float16), "bf16": bf16}


class Weights:
    """Random values, made once a format and repeated from another place on for every tensor."""

    COUNT = 262139  # blocks; a prime, so that no two rows of a matrix begin alike

    def __init__(self):
        self.random, self.pools = np.random.default_rng(0), {}

    def take(self, key, make, count):
        if key not in self.pools:
            self.pools[key] = make()
        pool = self.pools[key]
        start = int(self.random.integers(len(pool)))
        return np.take(pool, np.arange(start, start + count), axis=0, mode="wrap")

    def blocks(self, kind, shape):
        """Bytes of a matrix in a format of GGUF, of standard deviation about 1 / sqrt(columns): nothing overflows."""
        columns = shape[-1]
        blocks = self.take((kind, columns), lambda: self.make_blocks(kind, columns ** -0.5), math.prod(shape) // 32)
        return blocks.reshape(*shape[:-1], -1)

    def make_blocks(self, kind, spread):
        if kind in HALF:
            return HALF[kind](self.random.standard_normal((self.COUNT, 32), np.float32) * np.float32(spread)).view(np.uint8)
        codes = self.random.integers(0, 256, (self.COUNT, 32 if kind == "q8_0" else 16), np.uint8)
        scales = (spread * self.random.uniform(0.8, 1.2, (self.COUNT, 1)) / (74 if kind == "q8_0" else 4.6)).astype(np.float16)
        parts = [scales, (scales * np.float16(-7.5)), codes] if kind == "q4_1" else [scales, codes]
        return np.concatenate([part.view(np.uint8) for part in parts], axis=1)

    def words(self, shape):
        count = math.prod(shape)
        words = self.take("words", lambda: self.random.integers(0, 1 << 32, (self.COUNT, 16), np.uint32), -(-count // 16))
        return words.reshape(-1)[:count]

    def scales(self, shape, step):
        return self.take(("scales", step), lambda: bf16(self.random.uniform(0.8, 1.2, self.COUNT) * step), math.prod(shape))


def tokenizer():
    """One token a byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        letters[chr(byte) if byte in visible else chr(256 + extra)] = byte
        extra += byte not in visible
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "truncation": None, "padding": None,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": letters, "merges": []}}


def write_folder(c, folder, args):
    out, weights, quantization = Safetensors(), Weights(), {"group_size": args.group_size, "bits": args.bits, "mode": "affine"}
    half = HALF[args.dense or "bf16"]
    stored = (args.dense or "bf16").upper()
    for name, _, kind, shape in matrices(c):
        if not name:
            continue
        leaf = "" if name.endswith(BARE) else ".weight"
        if kind in ("vector", "plain"):
            out.add(name + leaf, stored, shape, lambda n=name, k=kind, s=shape: half(small(n, k, s, weights.random)))
            continue
        if args.dense:
            out.add(name + leaf, stored, shape, lambda s=shape: weights.blocks(args.dense, s))
            continue
        bits, group = (8, 64) if kind == "router" else (args.bits, args.group_size)
        if kind == "router":
            quantization[name] = {"group_size": group, "bits": bits}
        # Uniform codes with the spread of 1 / sqrt(columns).
        columns, step = shape[-1], 4 / ((1 << bits) * math.sqrt(shape[-1]))
        words, groups = (*shape[:-1], columns * bits // 32), (*shape[:-1], columns // group)
        least = -step * ((1 << bits) - 1) / 2
        out.add(name + ".weight", "U32", words, lambda s=words: weights.words(s))
        out.add(name + ".scales", "BF16", groups, lambda s=groups, d=step: weights.scales(s, d))
        out.add(name + ".biases", "BF16", groups, lambda s=groups, d=least: bf16(np.full(s, d)))
    folder.mkdir(parents=True, exist_ok=True)
    out.write(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c if args.dense else {**c, "quantization": quantization}, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None}))


def gguf_keys(c, writer):
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_layer_norm_rms_eps(c.get("layer_norm_epsilon", c["rms_norm_eps"]))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(c["rope_theta"])
    letters = [*tokenizer()["model"]["vocab"], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters + [f"<unused_{i}>" for i in range(c["vocab_size"] - len(letters))])
    writer.add_token_types([1] * c["vocab_size"])
    writer.add_token_merges(["a b"])  # llama.cpp wants one
    family, d = c["model_type"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    if family == "nemotron_h":
        kinds = c["hybrid_override_pattern"]
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv([c["num_key_value_heads"] if k == "*" else 0 for k in kinds])
        writer.add_feed_forward_length([c["intermediate_size"] if k == "-" else 0 for k in kinds])
        writer.add_ssm_conv_kernel(c["conv_kernel"])
        writer.add_ssm_inner_size(c["mamba_num_heads"] * c["mamba_head_dim"])
        writer.add_ssm_state_size(c["ssm_state_size"])
        writer.add_ssm_time_step_rank(c["mamba_num_heads"])
        writer.add_ssm_group_count(c["n_groups"])
    elif family == "lfm2":
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv([c["num_key_value_heads"] if i in c["full_attn_idxs"] else 0 for i in range(c["num_hidden_layers"])])
        writer.add_feed_forward_length(c["block_ff_dim"])
        writer.add_shortconv_l_cache(c["conv_L_cache"])
    else:
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv(1 if family == "deepseek_v3" else c["num_key_value_heads"])
        writer.add_feed_forward_length(c["intermediate_size"])
    if family == "deepseek_v3":
        writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
        writer.add_value_length(c["kv_lora_rank"])
        writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        writer.add_value_length_mla(c["v_head_dim"])
        writer.add_q_lora_rank(c["q_lora_rank"])
        writer.add_kv_lora_rank(c["kv_lora_rank"])
        writer.add_rope_dimension_count(c["qk_rope_head_dim"])
        writer.add_leading_dense_block_count(c["first_k_dense_replace"])
        writer.add_expert_shared_count(c["n_shared_experts"])
        writer.add_expert_weights_scale(c["routed_scaling_factor"])
        writer.add_expert_weights_norm(c["norm_topk_prob"])
        writer.add_expert_group_count(c["n_group"])
        writer.add_expert_group_used_count(c["topk_group"])
        writer.add_uint32(f"{writer.arch}.expert_gating_func", 2)  # sigmoid
    else:
        writer.add_key_length(d)
        writer.add_value_length(d)
        writer.add_rope_dimension_count(int(d * c.get("partial_rotary_factor", 1)))
    if family == "qwen3_next":
        writer.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
        writer.add_ssm_inner_size(c["linear_num_value_heads"] * c["linear_value_head_dim"])
        writer.add_ssm_state_size(c["linear_key_head_dim"])
        writer.add_ssm_time_step_rank(c["linear_num_value_heads"])
        writer.add_ssm_group_count(c["linear_num_key_heads"])
        writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
        writer.add_uint32(f"{writer.arch}.full_attention_interval", c["full_attention_interval"])
    if "moe_intermediate_size" in c:
        writer.add_expert_count(c.get("num_experts", c.get("n_routed_experts")))
        writer.add_expert_used_count(c["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(c["moe_intermediate_size"])


def gguf_vector(c, to, values):
    """As llama.cpp's converter leaves it."""
    if to.endswith("ssm_a"):
        values = -np.exp(values)
    if c["model_type"] == "nemotron_h" and to.endswith(("ssm_a", "ssm_d")):
        values = values.reshape(-1, 1)
    if c["model_type"] == "nemotron_h" and to.endswith("ssm_norm.weight"):
        values = values.reshape(c["n_groups"], -1)
    if to.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        values = values[:, :, 0]
    if to.endswith("ffn_gate_inp_shexp.weight"):
        values = values[0]
    return np.ascontiguousarray(values, np.float32)


def write_gguf(c, path, kind_of_matrices):
    import gguf
    family = {"qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2", "qwen3_next": "qwen3next"}.get(c["model_type"], c["model_type"])
    writer, weights, makers = gguf.GGUFWriter(str(path), family), Weights(), []
    gguf_keys(c, writer)
    raw = gguf.GGMLQuantizationType[kind_of_matrices.upper()]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[raw]
    for name, to, kind, shape in matrices(c):
        if not to:
            continue
        to += "" if to.endswith((".bias", "ssm_a", "ssm_d")) else ".weight"
        if kind == "matrix":
            size = math.prod(shape) // block_values * block_bytes
            writer.add_tensor_info(to, shape, np.dtype(np.float32), size, raw)
            makers.append(lambda s=shape: weights.blocks(kind_of_matrices, s))
        else:
            values = gguf_vector(c, to, small(name, kind, shape, weights.random))
            writer.add_tensor_info(to, values.shape, values.dtype, values.nbytes)
            makers.append(lambda v=values: v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in makers:
        writer.write_tensor_data(make())
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--group-size", type=int, default=64, choices=[32, 64, 128])
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--dense", choices=HALF, help="a folder that is not quantized")
    other.add_argument("--gguf", choices=["q4_0", "q4_1", "q8_0", "f16", "bf16"], help="a GGUF file of this format")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="changes the configuration")
    args = parser.parse_args()
    config = {**SHAPES[args.shape], **{k: json.loads(v) for k, v in (s.split("=", 1) for s in args.set)}}
    if args.gguf:
        write_gguf(config, args.out, args.gguf)
    else:
        write_folder(config, args.out, args)


if __name__ == "__main__":
    main()
