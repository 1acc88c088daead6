#!/usr/bin/env python3
"""Write tests/data/parity/*.safetensors: logits of mlx_lm 0.32.2 for tiny models. Run by ./dev golden; docs/testing.md explains.

    make_goldens.py [NAME...]    only the cases whose name contains one of these

Weights come from their names (tests/tiny_weights.h computes the same bits), so a file holds only answers:

    prompt, prompt_logits      int32 [L], float32 [R, V] at prompt_rows, one pass without a cache
    decode, decode_logits      int32 [N], float32 [R, V] at decode_rows: greedy, the logits that each was chosen from
    batch_logits               float32 [2, V]: last position of the prompt and of its reverse, run as one batch
    long_prompt, long_logits   int32 [M], float32 [2, V]: last position of a prompt beyond every sliding window, and one token later

and as metadata `case`, a JSON object: config, dtype, seed, crc32 (of all parameters as the model holds them, by sorted name), and where it
applies rounding (error of the reference itself, for f16 and bf16), dense (modules left out of the quantization), without_head,
checkpoint (shapes by stored name), stored_quantized (suffix of tensors that the checkpoint has quantized), adapter (type, scale, shapes).
"""
import json
import math
import pathlib
import sys
import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, quantize_model

TESTS = pathlib.Path(__file__).resolve().parents[1]
OUT = TESTS / "data" / "parity"
PROMPT_TOKENS, DECODE_TOKENS, LONG_TOKENS = 11, 12, 40
PROMPT_ROWS, DECODE_ROWS = [0, 5, 10], [1, 6, 11]
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


# Weights: tests/tiny_weights.h
def splitmix64(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise(name, count, seed):
    with np.errstate(over="ignore"):
        start = splitmix64(np.array([(seed << 32) | zlib.crc32(name.encode())], np.uint64))
        bits = splitmix64(start + np.arange(count, dtype=np.uint64))
    total = sum(((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    return (total - 131070).astype(np.float32) * np.float32(2**-15)


def centre(name, axes):
    if name.endswith("_scale_inv"):
        return 1.0
    if name.endswith("A_log"):
        return 0.5
    return 1.0 if name.endswith(".D") or (axes == 1 and name.endswith(".weight")) else 0.0


def tiny_weights(name, shape, seed):
    values = noise(name, math.prod(shape), seed).reshape(shape)
    if len(shape) >= 2 and not name.endswith("_scale_inv"):
        return values * np.float32(0.60625 / math.sqrt(shape[-1]))
    return np.float32(centre(name, len(shape))) + values * np.float32(0.09375)


def checkpoint_tensor(name, spec, dtype, keep_f32, seed):
    """A stored tensor; spec is its shape, or {"shape", "kind"} with kind fp8."""
    kind = spec["kind"] if isinstance(spec, dict) else None
    value = mx.array(tiny_weights(name, spec["shape"] if kind else spec, seed))
    if kind == "fp8":
        return mx.to_fp8(value)
    return value if keep_f32(name) else value.astype(dtype)


# Names as the models' authors publish them
def split_experts(shapes, find, to):
    out = {}
    for name, shape in shapes.items():
        hit = next((old for old in find if f".{old}." in name), None)
        if hit is None:
            out[name] = shape
            continue
        for e in range(shape[0]):
            out[name.replace(f".{hit}.", f".{to[find.index(hit)].format(e=e)}.")] = shape[1:]
    return out


def published_qwen3_moe(shapes, config):
    names = ("gate_proj", "up_proj", "down_proj")
    return split_experts(shapes, [f"switch_mlp.{n}" for n in names], [f"experts.{{e}}.{n}" for n in names])


def published_deepseek(shapes, config):
    names = ("gate_proj", "up_proj", "down_proj")
    shapes = split_experts(shapes, [f"switch_mlp.{n}" for n in names], [f"experts.{{e}}.{n}" for n in names])
    rank, rows = config["kv_lora_rank"], config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["v_head_dim"])
    out = {}
    for name, shape in shapes.items():
        if "unembed_out" not in name:
            name, shape = (name.replace("embed_q", "kv_b_proj"), [rows, rank]) if "embed_q" in name else (name, shape)
            out[name] = shape
    for i in range(config["num_hidden_layers"]):
        out[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = [config["qk_rope_head_dim"] // 2]
    extra = config["num_hidden_layers"]  # the multi-token prediction layer
    return out | {f"model.layers.{extra}.eh_proj.weight": [8, 16], f"model.layers.{extra}.enorm.weight": [8]}


def published_deepseek_fp8(shapes, config):
    out = {}
    for name, shape in published_deepseek(shapes, config).items():
        in_layer = f"model.layers.{config['num_hidden_layers']}." not in name
        if len(shape) == 2 and in_layer and ".layers." in name and not name.endswith("mlp.gate.weight"):
            out[name] = {"shape": shape, "kind": "fp8"}
            out[name + "_scale_inv"] = [-(-dim // 128) for dim in shape]
        else:
            out[name] = shape
    return out


def published_nemotron_h(shapes, config):
    shapes = split_experts(shapes, ["switch_mlp.fc1", "switch_mlp.fc2"], ["experts.{e}.up_proj", "experts.{e}.down_proj"])
    out = {n: [s[0], s[2], s[1]] if n.endswith("conv1d.weight") else s for n, s in shapes.items()}
    return out | {"mtp.layers.0.eh_proj.weight": [8, 16]}


def published_lfm2(shapes, config):
    return {n: [s[0], s[2], s[1]] if n.endswith("conv.conv.weight") else s for n, s in shapes.items()}


def ncl(shapes):
    return {n: [s[0], s[2], s[1]] if n.endswith("conv1d.weight") else s for n, s in shapes.items()}


def published_qwen3_next(shapes, config):
    return ncl(published_qwen3_moe(shapes, config)) | {"mtp.fc.weight": [8, 16]}


def published_qwen3_5(shapes, config):
    """With a vision tower; experts stacked, gate and up together."""
    out = {}
    for name, shape in ncl(shapes).items():
        name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
        if "switch_mlp.up_proj" in name:
            continue
        if "switch_mlp.gate_proj" in name:
            shape = [shape[0], 2 * shape[1], shape[2]]
        out[name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj").replace("switch_mlp.down_proj.weight", "experts.down_proj")] = shape
    return out | {"model.visual.patch_embed.proj.weight": [8, 16], "mtp.norm.weight": [8]}


def published_llama4(shapes, config):
    """With a vision tower; experts stacked, gate and up side by side, inputs before outputs."""
    out = {}
    for name, shape in shapes.items():
        if ".experts.up_proj" in name:
            continue
        if ".experts." in name:
            shape = [shape[0], shape[2], 2 * shape[1] if "gate_proj" in name else shape[1]]
            name = name.replace("gate_proj.weight", "gate_up_proj").replace("down_proj.weight", "down_proj")
        out[name] = shape
    return out | {"vision_model.class_embedding": [32], "multi_modal_projector.linear_1.weight": [8, 16]}


def published_gemma3(shapes, config):
    out = {n: s for n, s in shapes.items() if "lm_head" not in n}
    return out | {"vision_tower.vision_model.embeddings.patch_embedding.bias": [32], "multi_modal_projector.mm_input_projection_weight": [32, 64]}


# Models
def build(case):
    config = json.loads(json.dumps(case["config"]))
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))  # some write their defaults into it
    dtype = DTYPES[case["dtype"]]
    cast = getattr(model, "cast_predicate", lambda name: True)
    published = case.pop("published", None)
    shapes = {n: list(v.shape) for n, v in tree_flatten(model.parameters())}
    if published:
        shapes = case["checkpoint"] = published(shapes, config)
    if case.get("without_head"):
        shapes = {n: s for n, s in shapes.items() if not n.endswith("lm_head.weight")}
    weights = {n: checkpoint_tensor(n, s, dtype, lambda name: not cast(name), case["seed"]) for n, s in shapes.items()}
    stored = case.get("stored_quantized")
    if stored:  # modules that the checkpoint itself has quantized, in 4 bits, and that sanitize turns into others
        bits, group_size = 4, 32
        for path in [n.removesuffix(".weight") for n in list(weights) if n.endswith(stored)]:
            parts = mx.quantize(weights[path + ".weight"], group_size, bits)
            weights |= dict(zip((path + ".weight", path + ".scales", path + ".biases"), parts))
    if published:  # mlx_lm drops the extra layer of DeepSeek V3 by its number, 61, whatever the config says
        weights = {n: v for n, v in weights.items() if not n.startswith(f"model.layers.{config.get('num_hidden_layers')}.")}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if stored:
        nn.quantize(model, group_size, bits, class_predicate=lambda path, m: f"{path}.scales" in weights)
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    model.load_weights(list(weights.items()), strict=True)
    if "quantize" in case:
        model, config = quantize_model(model, config, **case.pop("quantize"))
        config.pop("quantization_config", None)
    case["config"] = config
    mx.eval(model.parameters())
    if "quantization" in config:
        case["dense"] = dense_modules(model, config)
    case["crc32"] = checksum(model)
    if "adapter" in case:
        adapt(model, case)
    model.eval()
    return model


def adapt(model, case):
    """Trains nothing: the adapter's tensors come from their names, too."""
    adapter = case["adapter"]
    parameters = {"rank": 4, "scale": adapter["scale"], "dropout": 0.0, "keys": adapter["keys"]}
    linear_to_lora_layers(model, adapter["layers"], parameters, use_dora=adapter["type"] == "dora")
    shapes = {n: list(v.shape) for n, v in tree_flatten(model.parameters()) if n.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}
    # As a norm's weight, m lies around 1.
    named = lambda name: name + ".weight" if name.endswith(".m") else name
    model.load_weights([(n, mx.array(tiny_weights(named(n), s, case["seed"]))) for n, s in shapes.items()], strict=False)
    mx.eval(model.parameters())
    adapter["shapes"] = shapes


def dense_modules(model, config):
    """Modules that could have been quantized by the global values and were not."""
    group_size = config["quantization"]["group_size"]
    modules = [(p, m) for p, m in model.named_modules() if hasattr(m, "to_quantized") and "scales" not in m]
    return sorted(p for p, m in modules if m.weight.shape[-1] % group_size == 0)


def checksum(model):
    crc = 0
    for _, value in sorted(tree_flatten(model.parameters())):
        crc = zlib.crc32(np.array(mx.contiguous(value).flatten().view(mx.uint8)).tobytes(), crc)
    return crc


def token_ids(name, count, vocab, seed):
    return [1 + int(abs(x) * 32768) % (vocab - 1) for x in noise(name, count, seed)]


def answers(model, case, greedy=None):
    """`greedy`: tokens to decode instead of the model's own."""
    config = case["config"]
    vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
    prompt = mx.array(token_ids("prompt", PROMPT_TOKENS, vocab, case["seed"]))
    f32 = lambda x: x.astype(mx.float32)
    given, greedy = greedy, []
    cache = make_prompt_cache(model)
    step = f32(model(prompt[None], cache=cache)[0, -1])
    rows = []
    for i in range(DECODE_TOKENS):
        greedy.append(given[i] if given else int(mx.argmax(step)))
        rows.append(step)
        step = f32(model(mx.array([[greedy[-1]]]), cache=cache)[0, -1])
    long = mx.array(token_ids("long", LONG_TOKENS, vocab, case["seed"]))
    cache = make_prompt_cache(model)
    at_end = f32(model(long[None], cache=cache)[0, -1])
    after = f32(model(long[None, :1], cache=cache)[0, -1])
    return {
        "prompt": prompt.astype(mx.int32),
        "prompt_rows": mx.array(PROMPT_ROWS, mx.int32),
        "prompt_logits": f32(model(prompt[None])[0])[mx.array(PROMPT_ROWS)],
        "decode": mx.array(greedy, mx.int32),
        "decode_rows": mx.array(DECODE_ROWS, mx.int32),
        "decode_logits": mx.stack(rows)[mx.array(DECODE_ROWS)],
        "batch_logits": f32(model(mx.stack([prompt, prompt[::-1]]))[:, -1]),
        "long_prompt": long.astype(mx.int32),
        "long_logits": mx.stack([at_end, after]),
    }


def rounding(model, case, golden):
    """How far its own rounding takes the reference from float32 arithmetic with the same weights, as a part of the spread of a row."""
    to_f32 = lambda value: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
    model.update(tree_map(to_f32, model.parameters()))
    exact = answers(model, case, golden["decode"].tolist())
    worst = 0.0
    for key in ("prompt_logits", "decode_logits", "batch_logits", "long_logits"):
        spread = exact[key].max(-1) - exact[key].min(-1)
        worst = max(worst, (mx.abs(golden[key] - exact[key]).max(-1) / spread).max().item())
    if worst > 0.1:
        raise ValueError(f"rounding is {worst:.2f} of the spread: such a case proves nothing, give it another seed")
    return worst


# Cases
def cases():
    configs = {p.stem: json.loads(p.read_text()) for p in sorted((TESTS / "arch").glob("*.json"))}

    def case(name, config, dtype="f32", **more):
        config = configs[config] if isinstance(config, str) else config
        return dict(name=name, config=config, dtype=dtype) | {"seed": 0} | more

    affine = lambda bits, group_size: {"bits": bits, "group_size": group_size, "mode": "affine"}
    for name in configs:
        yield case(f"{name}.f32", name)
        yield case(f"{name}.q4", name, quantize=affine(4, 32))
    for bits in (2, 3, 5, 6, 8):
        yield case(f"llama.q{bits}", "llama", quantize=affine(bits, 32))
    wide = configs["mistral"] | {"hidden_size": 128}
    for bits in (2, 3, 4, 5, 6, 8):
        yield case(f"mistral.q{bits}_g64", "mistral", quantize=affine(bits, 64))
    yield case("mistral_wide.q4_g128", wide, quantize=affine(4, 128))
    for mode, bits, group_size in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)):
        for name in ("llama", "qwen3_moe"):
            yield case(f"{name}.{mode}", name, quantize={"mode": mode, "bits": bits, "group_size": group_size})
    mixed = lambda path, module: affine(8, 32) if "embed" in path or "head" in path else "o_proj" not in path
    yield case("llama.mixed", "llama", quantize=affine(4, 32) | {"quant_predicate": mixed})
    # MLX gathers dense experts on the CPU in float32 only: here, no layer has them, or they are quantized.
    without_experts = {
        "deepseek_v3_dense": configs["deepseek_v3"] | {"first_k_dense_replace": 3},
        "nemotron_h_dense": configs["nemotron_h"] | {"hybrid_override_pattern": "M*-MM"},
        "qwen3_next_dense": configs["qwen3_next"] | {"mlp_only_layers": [0, 1, 2, 3]},
    }
    for dtype in ("f16", "bf16"):
        for name in ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "lfm2", "falcon_h1", "llama4_text"):
            yield case(f"{name}.{dtype}", name, dtype)
        for name, config in without_experts.items():
            yield case(f"{name}.{dtype}", config, dtype)
        for name in ("llama", "qwen3_moe", "nemotron_h"):
            yield case(f"{name}.{dtype}_q4", name, dtype, quantize=affine(4, 32))
        # With seed 0, bfloat16 rounding sends a token to another expert in the reference itself.
        yield case(f"deepseek_v3.{dtype}_q4", "deepseek_v3", dtype, seed=1, quantize=affine(4, 32))
        # All experts, for the same reason.
        yield case(f"qwen3_next.{dtype}_q4", configs["qwen3_next"] | {"num_experts_per_tok": 8}, dtype, seed=1, quantize=affine(4, 32))
    yield case("gemma3_text.f16_q4", "gemma3_text", "f16", quantize=affine(4, 32))

    pairs = 8  # of a head of llama.json
    ropes = {
        "none": None,
        "linear": {"type": "linear", "factor": 3.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.5},
        "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "beta_slow": 2},
        "yarn_mscale": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.3},
        "longrope": {
            "type": "longrope",
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * pairs,
            "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
        },
        "proportional": {"type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
        "mrope": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    for kind, scaling in ropes.items():
        config = configs["llama"] | {"rope_scaling": scaling, "max_position_embeddings": 32, "rope_theta": 100.0}
        yield case(f"llama_rope_{kind}.f32", config)
    yield case("llama_traditional.f32", configs["llama"] | {"rope_traditional": True})

    keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    yield case("llama_lora.f32", "llama", adapter={"type": "lora", "scale": 2.0, "layers": 2, "keys": keys})
    yield case("llama_lora.q4", "llama", quantize=affine(4, 32), adapter={"type": "lora", "scale": 2.0, "layers": 1, "keys": keys})
    yield case("qwen2_dora.f32", "qwen2", adapter={"type": "dora", "scale": 1.5, "layers": 2, "keys": keys})
    yield case("llama_dora.q4", "llama", quantize=affine(4, 32), adapter={"type": "dora", "scale": 1.5, "layers": 2, "keys": keys})

    yield case("gemma3_text_tied.f32", "gemma3_text", without_head=True)
    yield case("gemma3_text_tied.q4", "gemma3_text", without_head=True, quantize=affine(4, 32))
    yield case("qwen3_moe_published.f32", "qwen3_moe", published=published_qwen3_moe)
    yield case("deepseek_v3_published.f32", "deepseek_v3", published=published_deepseek)
    yield case("deepseek_v3_published.fp8", "deepseek_v3", published=published_deepseek_fp8)
    yield case("deepseek_v3_published.q4", "deepseek_v3", published=published_deepseek, stored_quantized="kv_b_proj.weight")
    yield case("nemotron_h_published.f32", "nemotron_h", published=published_nemotron_h)
    yield case("qwen3_next_published.f32", "qwen3_next", published=published_qwen3_next)
    yield case("qwen3_5_published.f32", "qwen3_5", published=published_qwen3_5)
    yield case("qwen3_5_moe_published.f32", "qwen3_5_moe", published=published_qwen3_5)
    yield case("lfm2_published.f32", "lfm2", published=published_lfm2)
    yield case("llama4_published.f32", "llama4", published=published_llama4)
    # Its published multipliers; the reference leaves out those of keys and values, which are 1 here.
    yield case("falcon_h1_published.f32", "falcon_h1", published=lambda shapes, config: ncl(shapes))
    yield case("falcon_h1_normed_published.f32", "falcon_h1_normed", published=lambda shapes, config: ncl(shapes))
    yield case("gemma3_published.f32", "gemma3", published=published_gemma3)


def main():
    mx.set_default_device(mx.cpu)
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:]
    made = set()
    for case in cases():
        name = case.pop("name")
        made.add(name)
        if wanted and not any(w in name for w in wanted):
            continue
        model = build(case)
        golden = answers(model, case)
        mx.eval(golden)
        if case["dtype"] != "f32":
            case["rounding"] = rounding(model, case, golden)
        mx.save_safetensors(str(OUT / f"{name}.safetensors"), golden, {"case": json.dumps(case, separators=(",", ":"))})
        print(name, golden["decode"].tolist(), case.get("rounding", ""), flush=True)
    for path in OUT.glob("*.safetensors"):
        if path.stem not in made:
            path.unlink()


if __name__ == "__main__":
    main()
