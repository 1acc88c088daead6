"""The default model, which ./dev setup fetches: a real tokenizer, chat template and 4-bit weights, end to end."""

import json
import pathlib

import pytest
from tiny_model import run

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct.gguf"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="no default model: run ./dev setup")


def answer(*args):
    result = run("generate", "--model", MODEL, "--json", *args)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_knows_the_capital_of_france():
    got = answer("-p", "What is the capital of France?", "-m", 24)
    assert "Paris" in got["text"]
    assert got["generation_tps"] > 5


def test_ends_by_itself():
    got = answer("-p", "Say only the word yes.", "-m", 200)
    assert got["finish_reason"] == "stop" and got["generation_tokens"] < 200


def test_chunked_prefill_agrees():
    text = "Once upon a time there was a fox. " * 30
    args = ("-p", text, "--ignore-chat-template", "-m", 12)
    assert answer(*args)["tokens"] == answer(*args, "--prefill-step-size", 64)["tokens"]


def test_long_answer_is_not_garbage():
    words = answer("-p", "Write a short story about a dog.", "-m", 150)["text"].lower().split()
    # The model may turn to another animal; what must hold is that it is running text, not a loop or noise.
    assert len(words) > 60 and {"the", "a", "of"} <= set(words) and len(set(words)) > len(words) // 3


def test_chunks_and_threads_change_no_bit(tmp_path):
    tokens = ",".join(str((i * 7919 + 13) % 40000) for i in range(150))
    files = []
    for number, options in enumerate([("--threads", 1), ("--threads", 5), ("--chunk", 7), ("--chunk", 64, "--threads", 3), ("--cached",)]):
        out = tmp_path / f"{number}.safetensors"
        assert run("logits", "--model", MODEL, "--tokens", tokens, "--out", out, *options).returncode == 0
        files.append(out.read_bytes())
    assert len(files[0]) > 150 * 49152 * 4 and all(data == files[0] for data in files)


@pytest.mark.parametrize("options", [("--temp", 0.8), ("--temp", 1, "--top-p", 0.9), ("--temp", 1, "--top-k", 20), ("--temp", 1, "--min-p", 0.1)])
def test_a_seed_repeats_an_answer(options):
    args = ("-p", "Tell me something new.", "-m", 30, *options)
    assert answer(*args, "--seed", 5)["tokens"] == answer(*args, "--seed", 5)["tokens"] != answer(*args, "--seed", 6)["tokens"]
