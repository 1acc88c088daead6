"""The program from outside: good runs, and one clear line for every bad input."""

import json
import os
import signal
import struct
import subprocess
import time
from math import cos, exp, prod, sin

import pytest
from tiny_model import CONFIG, PROGRAM, VOCAB, environment, fails, random_weights, read_safetensors, run, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


def generate_json(model, *args, **kwargs):
    result = run("generate", "--model", model, "--json", *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# --- good runs ---------------------------------------------------------------------------------------------------------------------


def test_version_and_help():
    assert run("--version").stdout.strip()
    for command in ("chat", "generate", "describe", "logits"):
        text = run(command, "--help").stdout
        assert "--model" in text and "Example" in text
    assert "[100]" in run("generate", "--help").stdout.replace("=", "[", 1) or "100" in run("generate", "--help").stdout


def test_greedy_is_deterministic(model):
    first = generate_json(model, "-p", "hello", "-m", 20)
    again = generate_json(model, "-p", "hello", "-m", 20, "--prefill-step-size", 7)
    assert first["tokens"] == again["tokens"] and len(first["tokens"]) == 20
    assert first["finish_reason"] == "length" and first["generation_tokens"] == 20
    assert first["generation_tps"] > 0 and first["prompt_tps"] > 0 and first["peak_memory_gb"] > 0


def test_prompt_tokens_are_those_of_the_template(model):
    assert generate_json(model, "-p", "hi", "-m", 1)["prompt_tokens"] == len("\x00user\nhi\x00\n\x00assistant\n")
    assert generate_json(model, "-p", "hi", "-m", 1, "--ignore-chat-template")["prompt_tokens"] == 2
    assert generate_json(model, "-p", r"a\n\tb", "-m", 1, "--ignore-chat-template")["prompt_tokens"] == 4
    assert generate_json(model, "-p", "hi", "-m", 1, "--system-prompt", "x")["prompt_tokens"] > 20


def test_stdin_prompt(model):
    text = "from a pipe"
    assert generate_json(model, "-p", "-", "-m", 8, stdin=text)["tokens"] == generate_json(model, "-p", text, "-m", 8)["tokens"]


def test_verbose_output(model):
    out = run("generate", "--model", model, "-p", "hello", "-m", 5).stdout
    assert out.startswith("==========\n") and "\n==========\nPrompt: " in out
    assert "Generation: 5 tokens, " in out and "Peak memory: " in out and " GB" in out
    assert "==========" not in run("generate", "--model", model, "-p", "hello", "-m", 5, "--verbose", "False").stdout


def test_seed_repeats(model):
    args = ("-p", "hello", "-m", 12, "--temp", 1.0, "--top-p", 0.9, "--min-p", 0.01, "--top-k", 50, "--xtc-probability", 0.5)
    assert generate_json(model, *args, "--seed", 3)["tokens"] == generate_json(model, *args, "--seed", 3)["tokens"]
    assert generate_json(model, *args, "--seed", 3)["tokens"] != generate_json(model, *args, "--seed", 4)["tokens"]


def test_stops_at_end_of_text(model):
    tokens = generate_json(model, "-p", "hello", "-m", 20)["tokens"]
    stop_at = next(i for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
    stopped = generate_json(model, "-p", "hello", "-m", 20, "--extra-eos-token", tokens[stop_at])
    assert stopped["finish_reason"] == "stop" and stopped["tokens"] == tokens[:stop_at]
    assert stopped["generation_tokens"] == stop_at + 1


def test_stop_text(model):
    whole = generate_json(model, "-p", "hello", "-m", 30)
    at = next(i for i in range(3, len(whole["text"]) - 1) if whole["text"].find(whole["text"][i : i + 2]) == i)
    stopped = generate_json(model, "-p", "hello", "-m", 30, "--stop", whole["text"][at : at + 2])
    assert stopped["finish_reason"] == "stop" and stopped["text"] == whole["text"][:at]


def test_default_model_from_the_environment(model):
    result = run("generate", "-m", 2, env=environment(MLXLM_DEFAULT_MODEL=str(model)))
    assert result.returncode == 0 and str(model) in result.stderr


def test_interrupt(model):
    args = [PROGRAM, "generate", "--model", str(model), "-p", "hello", "-m", "-1"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        head = b""
        while len(head) < 30:
            piece = os.read(process.stdout.fileno(), 64)
            assert piece, process.stderr.read()
            head += piece
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - begin < 5
    assert b"Generation: " in out and b"error" not in err


def test_describe(model):
    d = json.loads(run("describe", model, "--json").stdout)
    count = sum(prod(t.shape) for t in random_weights(CONFIG).values())
    assert d["model_type"] == "llama" and d["layers"] == 2 and d["parameters"] == count
    assert d["bits_per_weight"] == pytest.approx(32, abs=0.01) and d["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert "llama" in run("describe", model).stdout


def test_logits_cached_and_chunked(model, tmp_path):
    tokens = ",".join(str(7 * i % 250) for i in range(19))
    outputs = {}
    for name, flags in {"whole": [], "cached": ["--cached"], "chunk": ["--chunk", 5]}.items():
        result = run("logits", "--model", model, "--tokens", tokens, "--out", tmp_path / name, *flags)
        assert result.returncode == 0, result.stderr
        outputs[name] = read_safetensors(tmp_path / name)["logits"]
        assert outputs[name].shape == (19, VOCAB) and outputs[name].data.typecode == "f"
    for name in ("cached", "chunk"):
        assert list(outputs[name].data) == pytest.approx(list(outputs["whole"].data), abs=2e-4)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def reference_logits(weights, tokens):
    """The tiny llama in plain Python."""
    w = {k: t.rows() if len(t.shape) == 2 else t.data for k, t in weights.items()}

    def linear(name, x):
        return [dot(row, x) for row in w[name]]

    def norm(x):
        scale = (dot(x, x) / len(x) + 1e-5) ** -0.5
        return [v * scale for v in x]

    def rotated_heads(x, position):
        out = []
        for h in range(0, len(x), 16):
            a, b = x[h : h + 8], x[h + 8 : h + 16]
            angles = [position * 10000.0 ** (-i / 8) for i in range(8)]
            out.append(
                [p * cos(t) - q * sin(t) for p, q, t in zip(a, b, angles, strict=True)]
                + [q * cos(t) + p * sin(t) for p, q, t in zip(a, b, angles, strict=True)]
            )
        return out

    def attend(q, keys, values):
        scores = [dot(q, k) / 4 for k in keys]
        best = max(scores)
        probs = [exp(s - best) for s in scores]
        return [dot(probs, column) / sum(probs) for column in zip(*values, strict=True)]

    caches = [([], []) for _ in range(2)]
    logits = []
    for position, token in enumerate(tokens):
        x = list(w["model.embed_tokens.weight"][token])
        for i, (keys, values) in enumerate(caches):
            p = f"model.layers.{i}."
            h = norm(x)
            q = rotated_heads(linear(p + "self_attn.q_proj.weight", h), position)
            keys.append(rotated_heads(linear(p + "self_attn.k_proj.weight", h), position))
            v = linear(p + "self_attn.v_proj.weight", h)
            values.append([v[:16], v[16:]])
            o = [attend(q[n], [k[n // 2] for k in keys], [v[n // 2] for v in values]) for n in range(4)]
            o = linear(p + "self_attn.o_proj.weight", [v for head in o for v in head])
            x = [a + b for a, b in zip(x, o, strict=True)]
            h = norm(x)
            gate, up = linear(p + "mlp.gate_proj.weight", h), linear(p + "mlp.up_proj.weight", h)
            down = linear(p + "mlp.down_proj.weight", [g / (1 + exp(-g)) * u for g, u in zip(gate, up, strict=True)])
            x = [a + b for a, b in zip(x, down, strict=True)]
        logits += linear("lm_head.weight", norm(x))
    return logits


def test_logits_are_llama(model, tmp_path):
    tokens = [5, 17, 3, 200, 41, 41, 9]
    result = run("logits", "--model", model, "--tokens", ",".join(map(str, tokens)), "--out", tmp_path / "l.safetensors")
    assert result.returncode == 0, result.stderr
    got = read_safetensors(tmp_path / "l.safetensors")["logits"]
    assert list(got.data) == pytest.approx(reference_logits(random_weights(CONFIG), tokens), abs=1e-3)


# --- bad command lines -------------------------------------------------------------------------------------------------------------


def test_unknown_command():
    fails("generat", says="generate")
    fails("frobnicate", says="unknown command")
    fails("lora", says="not supported yet")
    fails()


def test_unknown_flag(model):
    fails("generate", "--model", model, "--frobnicate", says="frobnicate")


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--temp", "-1"], "temperature"),
        (["--temp", "nan"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--top-k", "-3"], "top_k"),
        (["--top-k", "260"], "top_k"),
        (["--xtc-probability", "2"], "xtc_probability"),
        (["--xtc-threshold", "0.7"], "xtc_threshold"),
        (["--min-tokens-to-keep", "0"], "min_tokens_to_keep"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "ten"], "max-tokens"),
        (["--prefill-step-size", "0"], "prefill_step_size"),
        (["--max-kv-size", "0"], "max_kv_size"),
        (["--seed", "-1"], "seed"),
        (["--image", "x.png"], "--image"),
        (["--adapter-path", "x"], "x: no such adapter folder"),
        (["-qa"], "quantize_activations: "),
        (["--extra-eos-token", "no such token"], "no such token"),
        (["--chat-template-config", "{"], "--chat-template-config"),
        (["--chat-template-config", "[1]"], "--chat-template-config"),
    ],
)
def test_bad_values(model, flags, says):
    fails("generate", "--model", model, "-p", "hello", *flags, says=says)


def test_empty_prompt(model):
    fails("generate", "--model", model, "-p", "", says="prompt")
    fails("generate", "--model", model, "-p", "", "--ignore-chat-template", says="prompt")
    fails("generate", "--model", model, "-p", "-", stdin="", says="prompt")


def test_prompt_longer_than_memory(model):
    env = environment(MLXLM_MEMORY_BYTES="100000")
    fails("generate", "--model", model, "-p", "x" * 4000, "-m", 1, env=env, says=("4", "GB", "available"))


def test_bad_logits_tokens(model, tmp_path):
    for tokens in ("", "1,,2", "1,x", "-1", str(VOCAB), "99999999999999999999"):
        fails("logits", "--model", model, f"--tokens={tokens}", "--out", tmp_path / "x")
    fails("logits", "--model", model, "--tokens", "1", "--out", tmp_path / "none" / "x", says="none")


# --- bad models --------------------------------------------------------------------------------------------------------------------


def bad_model(folder, says):
    fails("generate", "--model", folder, "-p", "hello", "-m", 1, says=says)


def test_no_such_model(tmp_path):
    bad_model(tmp_path / "none", "no such folder")
    bad_model("no/such-repository", "no/such-repository: no such folder, and not a repository")
    bad_model("../../etc/passwd/x", "no such folder")
    bad_model("a/b/c", "wanted org/name")
    (tmp_path / "empty").mkdir()
    bad_model(tmp_path / "empty", "config.json")


def test_no_default_model(tmp_path):
    env = environment(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    if "no --model given" not in run("generate", "-m", 1, env=env).stderr:
        fails("generate", env=env, says="--model")


def test_unknown_architecture(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "lama"}))
    bad_model(folder, ("lama", "llama"))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"model_type": 5}', "{}", '{"model_type": "llama"}', "\x00\x01", "[" * 100000],
    ids=["empty", "cut", "list", "null", "type", "no-type", "no-sizes", "binary", "deep"],
)
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    bad_model(folder, "config.json" if content != "{}" else "")


@pytest.mark.parametrize(
    "key,value",
    [
        ("hidden_size", -64),
        ("hidden_size", "big"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**12),
        ("vocab_size", 0),
        ("num_key_value_heads", 3),
        ("rope_scaling", {"rope_type": "frobnicate"}),
        ("quantization", {"group_size": 7, "bits": 99}),
    ],
)
def test_contradictory_config(folder, key, value):
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    bad_model(folder, "")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    bad_model(folder, "tokenizer.json")


def test_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    bad_model(folder, "tokenizer")


def test_template_that_raises(tmp_path):
    bad_model(write_model(tmp_path / "m", chat_template="{{ raise_exception('roles must alternate') }}"), "roles must alternate")
    bad_model(write_model(tmp_path / "m", chat_template="{% for %}"), "template")


def test_tensors_that_do_not_fit(tmp_path):
    def with_weights(change):
        weights = random_weights(CONFIG)
        change(weights)
        return write_model(tmp_path / "m", weights=weights)

    name = "model.layers.1.mlp.up_proj.weight"
    bad_model(with_weights(lambda w: w.pop(name)), name)
    bad_model(with_weights(lambda w: w.update({"model.layers.1.mlp.sideways_proj.weight": w[name]})), "sideways_proj")
    bad_model(with_weights(lambda w: w.update({name: w[name].rows(96)})), (name, "96", "128"))
    bad_model(with_weights(lambda w: w.update({name: w[name].integers()})), name)
    bad_model(with_weights(lambda w: w.clear()), "")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    bad_model(folder, "safetensors")


def test_missing_shard(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors", "model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bad_model(folder, "model-00002-of-00002.safetensors")


def lying(header, data=b"\0" * 64, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape=(4, 4), dtype="F32", offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        lying(b"{"),
        lying(b"[]"),
        lying(b"\xff\xfe{}"),
        lying({"a": entry(offsets=(0, 128))}),
        lying({"a": entry(offsets=(64, 0))}),
        lying({"a": entry(offsets=(-64, 0))}),
        lying({"a": entry(shape=(4, 5))}),
        lying({"a": entry(shape=(2**40, 2**40))}),
        lying({"a": entry(shape=(-4, -4))}),
        lying({"a": entry(dtype="F99")}),
        lying({"a": entry(), "b": entry()}),
        lying({"a": {"dtype": "F32"}}),
        lying({"a": 5}),
        lying({"a": entry()}, data=b"\0" * 10),
    ],
    ids=lambda c: str(len(c)) + "b",
)
def test_lying_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    bad_model(folder, "model.safetensors")


def test_truncated_safetensors(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        bad_model(folder, "model.safetensors")


def test_broken_gguf(tmp_path):
    for name, content in {"a": b"", "b": b"GGUF", "c": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "d": b"\0" * 100}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        bad_model(tmp_path / f"{name}.gguf", f"{name}.gguf")
