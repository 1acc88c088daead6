"""Builds tiny model folders (random llama, byte-level tokenizer) with the standard library only, and runs the program on them."""

import functools
import json
import os
import random
import struct
import subprocess
from array import array
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("MLX_LM", str(ROOT / "build" / "mlx-lm"))
IM_START, IM_END = 256, 257
VOCAB = 260
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": IM_END,
}
DTYPES = {"f": "F32", "i": "I32"}


def byte_alphabet():
    """GPT-2's mapping of bytes to printable characters."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = {b: chr(b) for b in kept}, 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


def tokenizer_json():
    def added(i, text):
        return {"id": i, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [added(IM_START, "<|im_start|>"), added(IM_END, "<|im_end|>")],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {c: i for i, c in enumerate(byte_alphabet())},
            "merges": [],
        },
    }


class Tensor:
    """Numbers (array of 'f' or 'i') and their shape."""

    def __init__(self, shape, data):
        self.shape, self.data = tuple(shape), data
        assert len(data) == prod(shape)

    def rows(self, count=None):
        """As a list of rows; with a count, the tensor of the first rows."""
        width = prod(self.shape[1:])
        if count is not None:
            return Tensor((count, *self.shape[1:]), self.data[: count * width])
        return [self.data[i : i + width] for i in range(0, len(self.data), width)]

    def integers(self):
        return Tensor(self.shape, array("i", map(int, self.data)))


@functools.cache
def _weights(d, f, v, kv, layers):
    rng = random.Random(0)

    def normal(*shape, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        return Tensor(shape, array("f", (rng.gauss(0, scale) for _ in range(prod(shape)))))

    ones = Tensor((d,), array("f", [1.0] * d))
    weights = {"model.embed_tokens.weight": normal(v, d, scale=1.0), "model.norm.weight": ones, "lm_head.weight": normal(v, d)}
    for i in range(layers):
        at = f"model.layers.{i}."
        weights |= {
            at + "self_attn.q_proj.weight": normal(d, d),
            at + "self_attn.k_proj.weight": normal(kv, d),
            at + "self_attn.v_proj.weight": normal(kv, d),
            at + "self_attn.o_proj.weight": normal(d, d),
            at + "mlp.gate_proj.weight": normal(f, d),
            at + "mlp.up_proj.weight": normal(f, d),
            at + "mlp.down_proj.weight": normal(d, f),
            at + "input_layernorm.weight": ones,
            at + "post_attention_layernorm.weight": ones,
        }
    return weights


def random_weights(config):
    d = config["hidden_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    return dict(_weights(d, config["intermediate_size"], config["vocab_size"], kv, config["num_hidden_layers"]))


def write_described(folder, name, **changes):
    """A model of the architecture tests/arch/NAME.json, with this tokenizer's vocabulary; returns its path."""
    rng = random.Random(1)
    config = json.loads((ROOT / "tests" / "arch" / f"{name}.json").read_text()) | changes
    inner = config.get("text_config", config)
    old, inner["vocab_size"] = inner["vocab_size"], VOCAB
    weights = {}
    for line in (ROOT / "tests" / "arch" / f"{name}.txt").read_text().splitlines():
        kind, tensor, *dims = line.split(" ")
        if kind != "tensor":
            continue
        shape = [int(d) for d in dims]
        if tensor.endswith(("embed_tokens.weight", "embeddings.weight", "lm_head.weight")):
            assert shape[0] == old
            shape[0] = VOCAB
        scale = 1.0 if "embed" in tensor else shape[-1] ** -0.5
        around = 1.0 if len(shape) == 1 else 0.0
        weights[tensor] = Tensor(shape, array("f", (rng.gauss(around, 0.1 if around else scale) for _ in range(prod(shape)))))
    return write_model(folder, {k: None for k in CONFIG} | {"eos_token_id": IM_END} | config, weights)


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "mlx"}}, 0
    for name, t in tensors.items():
        size = 4 * len(t.data)
        header[name] = {"dtype": DTYPES[t.data.typecode], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data.tobytes() for t in tensors.values()))


def read_safetensors(path):
    data = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    codes, out = {v: k for k, v in DTYPES.items()}, {}
    for name, t in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + o for o in t["data_offsets"])
            out[name] = Tensor(t["shape"], array(codes[t["dtype"]], data[begin:end]))
    return out


def write_model(folder, config=None, weights=None, chat_template=CHAT_TEMPLATE, eos="<|im_end|>"):
    """A complete folder; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    if chat_template:
        tokenizer_config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_safetensors(folder / "model.safetensors", random_weights(config) if weights is None else weights)
    return folder


def write_adapter(folder, model, rank=2):
    """A LoRA of the first layer's queries and the last one's output, of numbers that change every answer."""
    rng = random.Random(2)
    weights = read_safetensors(Path(model) / "model.safetensors")
    layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    tensors = {}
    for path in ("model.layers.0.self_attn.q_proj", f"model.layers.{layers - 1}.mlp.down_proj"):
        rows, columns = weights[path + ".weight"].shape
        for name, shape in (("lora_a", (columns, rank)), ("lora_b", (rank, rows))):
            tensors[f"{path}.{name}"] = Tensor(shape, array("f", (rng.gauss(0, 1) for _ in range(prod(shape)))))
    folder = Path(folder)
    folder.mkdir(parents=True)
    parameters = {"rank": rank, "scale": 8.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}))
    write_safetensors(folder / "adapters.safetensors", tensors)
    return folder


def environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLXLM_")) and not k.lower().endswith("_proxy")}
    return env | {"HF_HUB_OFFLINE": "1"} | more


def run(*args, env=None, stdin=None, timeout=120, cwd=None):
    return subprocess.run(
        [PROGRAM, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env or environment(),
        cwd=cwd,
        check=False,
    )


def fails(*args, says=(), **kwargs):
    """The command must end with status 1 and one line on stderr that contains each of `says`."""
    result = run(*args, **kwargs)
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.returncode == 1, (result.returncode, result.stdout[-300:], result.stderr[-2000:])
    assert len(lines) == 1 and lines[0].startswith("mlx-lm: error: "), result.stderr
    assert len(lines[0]) < 600, lines[0]
    for part in [says] if isinstance(says, str) else says:
        assert part in lines[0], lines[0]
    return lines[0]
