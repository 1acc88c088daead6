"""cache_prompt and generate --prompt-cache-file from outside; files are exchanged with mlx_lm where MLXLM_PYTHON names a Python that has it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_model import IM_END, IM_START, environment, fails, run, write_adapter, write_described, write_model

ONE_HEAD_OF_32 = {"num_attention_heads": 2, "num_key_value_heads": 1}
BEGINNING, END = "Once upon a time there was a cache. ", "It was quantized"
PYTHON = os.environ.get("MLXLM_PYTHON", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cached"), ONE_HEAD_OF_32)


def make_cache(model, file, *args, prompt=BEGINNING):
    result = run("cache_prompt", "--model", model, "--prompt-cache-file", file, "--prompt", prompt, *args)
    assert result.returncode == 0, result.stderr
    return result


def tokens(*args, **kwargs):
    result = run("generate", "--json", "-m", 12, *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["tokens"]


def metadata(file):
    data = Path(file).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_an_answer_from_a_cache_is_that_from_the_whole_prompt(model, tmp_path):
    file = tmp_path / "c.safetensors"
    result = make_cache(model, file)
    count = len("\x00user\n" + BEGINNING)
    assert f"Processed {count:6d} tokens (" in result.stdout and "Peak memory: " in result.stdout and result.stdout.endswith("Saving...\n")
    assert metadata(file)["0.model"] == str(model) and json.loads(metadata(file)["0.tokenizer_config"]) == {"trust_remote_code": False}
    whole = tokens("--model", model, "-p", BEGINNING + END)
    assert tokens("--prompt-cache-file", file, "-p", END) == whole
    assert tokens("--prompt-cache-file", file, "-p", END, "--model", model) == whole  # and the file is as it was
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_reads_stdin_and_other_templates(model, tmp_path):
    file = tmp_path / "c.safetensors"
    result = run("cache_prompt", "--model", model, "--prompt-cache-file", file, "--prompt", "-", stdin=BEGINNING)
    assert result.returncode == 0, result.stderr
    assert tokens("--prompt-cache-file", file, "-p", END) == tokens("--model", model, "-p", BEGINNING + END)
    prefilled = ["--prefill-response", "Sure"]
    assert tokens("--prompt-cache-file", file, "-p", END, *prefilled) == tokens("--model", model, "-p", BEGINNING + END, *prefilled)


def test_a_model_without_template(tmp_path):
    model = write_model(tmp_path / "plain", ONE_HEAD_OF_32, chat_template=None)
    make_cache(model, tmp_path / "c.safetensors")
    assert tokens("--prompt-cache-file", tmp_path / "c.safetensors", "-p", END) == tokens("--model", model, "-p", BEGINNING + END)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantized(model, tmp_path, bits):
    file, quantized = tmp_path / "c.safetensors", ["--kv-bits", bits, "--kv-group-size", 32, "--quantized-kv-start", 0]
    make_cache(model, file, *quantized)
    assert metadata(file)["1.0"] == "QuantizedKVCache"
    first = tokens("--prompt-cache-file", file, "-p", END, *quantized)
    assert first == tokens("--prompt-cache-file", file, "-p", END) and first
    assert tokens("--model", model, "-p", BEGINNING, "--max-kv-size", 16, *quantized)
    if bits == 8:
        assert first == tokens("--model", model, "-p", BEGINNING + END)


def test_converts_when_due(model, tmp_path):
    make_cache(model, tmp_path / "c.safetensors", "--kv-bits", 8, "--kv-group-size", 32)
    assert metadata(tmp_path / "c.safetensors")["1.0"] == "KVCache"  # the default start is 5000 tokens
    make_cache(model, tmp_path / "c.safetensors", "--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 42)
    assert metadata(tmp_path / "c.safetensors")["1.0"] == ("QuantizedKVCache" if len("\x00user\n" + BEGINNING) >= 42 else "KVCache")


def test_bounded(model, tmp_path):
    file = tmp_path / "c.safetensors"
    make_cache(model, file, "--max-kv-size", 16)
    assert metadata(file)["1.0"] == "RotatingKVCache"
    assert tokens("--prompt-cache-file", file, "-p", END)


def test_eos_token_of_the_file(model, tmp_path):
    """It is kept in the file, and ends the answers to it."""
    file = tmp_path / "c.safetensors"
    make_cache(model, file)
    whole = tokens("--prompt-cache-file", file, "-p", END)
    last = next(t for t in whole[2:] if t < IM_START and t not in whole[:2])
    names = {i: c for c, i in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].items()}
    make_cache(model, file, "--eos-token", names[last])
    assert json.loads(metadata(file)["0.tokenizer_config"])["eos_token"] == names[last]
    assert tokens("--prompt-cache-file", file, "-p", END) == whole[: whole.index(last)]
    fails("cache_prompt", "--model", model, "--prompt-cache-file", file, "--prompt", "x", "--eos-token", "no such", says="no such")


def test_adapter(model, tmp_path):
    adapter, file = write_adapter(tmp_path / "adapter", model), tmp_path / "c.safetensors"
    make_cache(model, file, "--adapter-path", adapter)
    adapted = tokens("--prompt-cache-file", file, "-p", END, "--adapter-path", adapter)
    assert adapted == tokens("--model", model, "-p", BEGINNING + END, "--adapter-path", adapter)
    assert adapted != tokens("--prompt-cache-file", file, "-p", END)  # keys of the one, weights of the other
    make_cache(model, file)
    assert adapted != tokens("--prompt-cache-file", file, "-p", END)


def test_mlx_model_is_the_default(tmp_path):
    model = write_model(tmp_path / "mlx_model", ONE_HEAD_OF_32)
    arguments = ["cache_prompt", "--prompt-cache-file", "c.safetensors", "--prompt", BEGINNING]
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert metadata(tmp_path / "c.safetensors")["0.model"] == "mlx_model"
    result = run("generate", "--json", "-m", 12, "--prompt-cache-file", "c.safetensors", "-p", END, cwd=tmp_path)
    assert json.loads(result.stdout)["tokens"] == tokens("--model", model, "-p", BEGINNING + END)


def test_bad_input(model, tmp_path):
    file, other = tmp_path / "c.safetensors", write_model(tmp_path / "other")
    cache_prompt = ["cache_prompt", "--model", model, "--prompt-cache-file", file]
    fails(*cache_prompt, says="--prompt")
    fails("cache_prompt", "--model", model, "--prompt", "x", says="--prompt-cache-file")
    fails("cache_prompt", "--model", model, "--prompt", "x", "--prompt-cache-file", tmp_path / "none" / "c", says="no such folder")
    fails("cache_prompt", "--model", model, "--prompt", "x", "--prompt-cache-file", tmp_path, says="folder")
    fails(*cache_prompt, "--prompt", "x", "--kv-bits", 7, says="got 7")
    fails(*cache_prompt, "--prompt", "x", "--kv-bits", 0, says="got 0")
    fails(*cache_prompt, "--prompt", "x", "--kv-bits", 4, says=["got 64", "32 numbers"])
    fails(*cache_prompt, "--prompt", "x", "--kv-bits", 4, "--kv-group-size", 30, says="got 30")
    fails(*cache_prompt, "--prompt", "x", "--max-kv-size", 0, says="max_kv_size")
    fails(*cache_prompt, "--prompt", "x", "--adapter-path", tmp_path / "a", says=str(tmp_path / "a"))
    assert not file.exists()
    fails("generate", "--model", other, "-p", "x", "--kv-bits", 4, "--kv-group-size", 32, says="16 numbers")
    fails("generate", "--prompt-cache-file", file, "-p", "x", says=str(file))

    make_cache(model, file, "--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 0)
    generate = ["generate", "--prompt-cache-file", file, "-p", END]
    fails(*generate, "--kv-bits", 8, says=["kv_bits: got 8", "4 bits"])
    fails(*generate, "--kv-group-size", 64, says=["kv_group_size: got 64", "32"])
    fails(*generate, "--model", other, says=["--model", str(model)])
    data = file.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        fails(*generate, says="c.safetensors")
    file.write_bytes(data.replace(str(model).encode(), str(other).encode().ljust(len(str(model)))[: len(str(model))]))
    fails(*generate)
    fails("generate", "--prompt-cache-file", Path(model) / "model.safetensors", "-p", "x", says="prompt cache")


def test_of_another_model_in_the_same_place(tmp_path):
    model, file = write_model(tmp_path / "m", ONE_HEAD_OF_32), tmp_path / "c.safetensors"
    make_cache(model, file)
    write_model(model, {"num_attention_heads": 4, "num_key_value_heads": 2})
    fails("generate", "--prompt-cache-file", file, "-p", END, says=["wanted [1, 2, tokens, 16]", "another model"])
    write_model(model, ONE_HEAD_OF_32 | {"num_hidden_layers": 1})
    fails("generate", "--prompt-cache-file", file, "-p", END, says="got caches of 2 layers, wanted 1")


def test_memory_is_refused_with_both_figures(model, tmp_path):
    file, little = tmp_path / "c.safetensors", environment(MLXLM_MEMORY_BYTES="30000")
    arguments = ["cache_prompt", "--model", model, "--prompt-cache-file", file, "--prompt", "x" * 150]
    fails(*arguments, says=["GB", "available are 0.000 GB"], env=little)
    # 157 tokens take 40 kB as 16-bit numbers, and 13 kB in 4 bits once steps are short.
    quantized = ["--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 0]
    fails(*arguments, *quantized, says="GB", env=little)
    make_cache(model, file)
    fails("generate", "--prompt-cache-file", file, "-p", "x", says=["GB", "c.safetensors"], env=environment(MLXLM_MEMORY_BYTES="1000"))


@pytest.mark.skipif(not PYTHON, reason="MLXLM_PYTHON names no Python with mlx_lm to exchange files with")
@pytest.mark.parametrize(
    "kind, classes",
    [
        ("plain", {"KVCache"}),
        ("3 bits", {"QuantizedKVCache"}),
        ("8 bits", {"QuantizedKVCache"}),
        ("bounded", {"RotatingKVCache"}),
        ("falcon_h1", {"CacheList"}),
        ("llama4", {"ChunkedKVCache", "KVCache"}),
        ("gemma3_text", {"RotatingKVCache", "KVCache"}),
        ("lfm2", {"ArraysCache", "KVCache"}),
        ("qwen3_next", {"ArraysCache", "KVCache"}),
    ],
)
def test_exchange_with_python(model, tmp_path, kind, classes):
    if (Path(__file__).parents[1] / "arch" / f"{kind}.json").exists():
        model = write_described(tmp_path / "model", kind)
    bits = int(kind[0]) if "bits" in kind else None
    bounded = 16 if kind == "bounded" else None
    options = ["--kv-bits", bits, "--kv-group-size", 32, "--quantized-kv-start", 0] if bits else ["--max-kv-size", 16] if bounded else []
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    make_cache(model, ours, *options)
    prefix = [IM_START, *("user\n" + BEGINNING).encode()]
    suffix = [*END.encode(), IM_END, 10, IM_START, *b"assistant\n"]
    arguments = dict(model=str(model), ours=str(ours), theirs=str(theirs), prefix=prefix, suffix=suffix, bits=bits, bounded=bounded, tokens=12)
    script = Path(__file__).parent / "prompt_cache_exchange.py"
    result = subprocess.run([PYTHON, script, json.dumps(arguments)], capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert result.returncode == 0, result.stderr
    python = json.loads(result.stdout.splitlines()[-1])
    config = json.loads((model / "config.json").read_text())
    assert set(python["kinds"]) == classes and python["metadata"]["model"] == str(model)
    assert len(python["kinds"]) == config.get("text_config", config)["num_hidden_layers"]
    from_ours = tokens("--prompt-cache-file", ours, "-p", END)
    until_end = python["tokens"] + [IM_END]
    assert from_ours == until_end[: until_end.index(IM_END)]
    assert tokens("--prompt-cache-file", theirs, "-p", END) == from_ours
