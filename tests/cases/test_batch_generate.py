"""mlx-lm batch_generate from outside: the answers of generate, in order, and one clear line for every broken line."""

import json
import os
import pty
import re
import signal
import subprocess
import time

import pytest
from tiny_model import CONFIG, IM_END, PROGRAM, environment, random_weights, run, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_answers_of_generate_in_input_order(model, tmp_path):
    lines = [
        {"prompt": "hello", "max_tokens": 12},
        {"prompt": "once upon a time " * 20, "max_tokens": 3, "id": "second"},
        {"prompt": "sampled", "temp": 0.9, "seed": 7, "top_p": 0.8},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12},
    ]
    result = run("batch_generate", "--model", model, "--prompts", write(tmp_path, *lines), "-m", 20, "--batch-size", 3)
    assert result.returncode == 0, result.stderr
    got = answers(result)
    assert [a["line"] for a in got] == [1, 2, 3, 4] and got[1]["id"] == "second"
    assert got[0]["tokens"] == got[3]["tokens"] and len(got[0]["tokens"]) == 12
    assert "3 done" not in result.stderr and "4 done, 0 failed" in result.stderr
    for line, a in zip(lines[:3], got):
        args = ["-m", line.get("max_tokens", 20)]
        for flag in ("temp", "seed"):
            args += [f"--{flag}", line[flag]] if flag in line else []
        args += ["--top-p", line["top_p"]] if "top_p" in line else []
        alone = json.loads(run("generate", "--model", model, "-p", line["prompt"], "--json", *args).stdout)
        for key in ("text", "tokens", "finish_reason", "prompt_tokens", "generation_tokens"):
            assert a[key] == alone[key], key


def test_quantized_caches_and_drafts_as_alone(tmp_path):
    config = CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = write_model(tmp_path / "model", config, random_weights(config))
    small = config | {"num_hidden_layers": 1}
    draft = write_model(tmp_path / "draft", small, random_weights(small))
    lines = [{"prompt": "hello " * n, "max_tokens": 16} for n in (1, 5, 9)]
    lines.append(lines[1] | {"kv_bits": 0, "num_draft_tokens": 0})
    for flags in (
        ["--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 20],
        ["--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 0, "--max-kv-size", 24],
        ["--ngram-draft-tokens", 6],
        ["--draft-model", draft, "--num-draft-tokens", 4],
    ):
        result = run("batch_generate", "--model", model, "--prompts", write(tmp_path, *lines), *flags)
        assert result.returncode == 0, result.stderr
        got = answers(result)
        for line, a in zip(lines[:3], got):
            alone = json.loads(run("generate", "--model", model, "-p", line["prompt"], "--json", "-m", 16, *flags).stdout)
            assert a["tokens"] == alone["tokens"], flags
        assert ("\nDrafts: " in result.stderr) == (flags[0] == "--draft-model")
    assert run("batch_generate", "--model", model, "--prompts", write(tmp_path, *lines), "--kv-bits", 4).returncode == 1  # in groups of 64
    for bad in ({"kv_bits": 7}, {"ngram_draft_tokens": 300}, {"num_draft_tokens": 3}, {"quantized_kv_start": -1}):
        result = run("batch_generate", "--model", model, "--prompts", write(tmp_path, {"prompt": "x"} | bad, lines[0]))
        assert result.returncode == 1 and "error" in answers(result)[0] and "error" not in answers(result)[1], bad


@pytest.mark.parametrize("flags", [[], ["--system-prompt", "s"]], ids=["plain", "system"])
def test_broken_lines_are_named_and_the_others_answered(model, tmp_path, flags):
    good = {"prompt": "hello", "max_tokens": 2}
    broken = ["{", "[1]", {"text": "x"}, {"prompt": 5}, {"prompt": "x", "messages": []}, {"messages": []}, {"prompt": "x", "temp": "hot"},
              {"prompt": "x", "temp": -1}, {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "top_k": 10**9}, {"prompt": "x", "seed": -3},
              {"prompt": "x", "stop": [1]}, {"prompt": "x", "logit_bias": {"a": 1}}, {"prompt": "x", "logit_bias": {"100000": 1}},
              {"prompt": "x", "max_tokens": 1.5}, {"messages": [{"content": "no role"}]}, {"messages": ["x"]}, {"messages": [None]}, {"messages": [{"role": 1, "content": "x"}]},
              {"messages": {"role": "user"}}, {"messages": [{"role": "user", "content": {"a": [1]}}, 5]}, "\x00", "null"]
    path = write(tmp_path, good, *broken, "", good)
    result = run("batch_generate", "--model", model, "--prompts", path, *flags)
    assert result.returncode == 1, result.stderr
    got = answers(result)
    assert len(got) == len(broken) + 2
    assert got[0]["finish_reason"] == "length" and got[-1]["tokens"] == got[0]["tokens"]
    for number, answer in enumerate(got[1:-1], 2):
        assert answer["line"] == number
        if "error" in answer:
            assert f"line {number}: " in result.stderr
    assert all("error" in a for a in got[1:-1])
    strict = run("batch_generate", "--model", model, "--prompts", path, "--strict", *flags)
    assert strict.returncode == 1 and strict.stdout == "" and "line 2: " in strict.stderr and strict.stderr.count("\n") <= 2


def test_stdin_and_empty_files(model, tmp_path):
    result = run("batch_generate", "--model", model, "--prompts", "-", "-m", 2, stdin='{"prompt": "x"}\n')
    assert result.returncode == 0 and len(answers(result)) == 1
    result = run("batch_generate", "--model", model, "--prompts", write(tmp_path), "--quiet")
    assert result.returncode == 0 and result.stdout == "" and result.stderr == ""
    assert run("batch_generate", "--model", model, "--prompts", tmp_path / "none").returncode == 1


def test_ctrl_c_keeps_what_is_done(model, tmp_path):
    path = write(tmp_path, {"prompt": "hello", "max_tokens": 2}, *[{"prompt": "hello", "max_tokens": 100000, "logit_bias": {str(IM_END): -100}}] * 3)
    process = subprocess.Popen([PROGRAM, "batch_generate", "--model", str(model), "--prompts", str(path)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment())
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and json.loads(first)["finish_reason"] == "length"
    assert "1 done, 0 failed, 3 not finished" in err


def test_progress_on_a_terminal(model, tmp_path):
    ours, theirs = pty.openpty()
    args = [PROGRAM, "batch_generate", "--model", str(model), "--prompts", str(write(tmp_path, *[{"prompt": "hello", "max_tokens": 9}] * 3))]
    result = subprocess.run(args, stdout=subprocess.PIPE, stderr=theirs, timeout=60, env=environment(), check=False)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(ours)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 3
    assert b"[........................] 0 of 3 prompts, " in seen and b" tokens-per-sec" in seen
    assert re.search(rb"\r\x1b\[K\[[#.]{24}\] \d of 3 prompts, \d+ tokens", seen)
    assert b"3 done, 0 failed" in seen.rsplit(b"\x1b[K", 1)[1]  # the bar is gone when the summary comes


def test_processes_share_a_folder_of_prefixes(model, tmp_path):
    """Some write what others read and evict, and one is killed: the answers stay, the budget holds, nothing half-written stays."""
    beginnings = [f"{i} once upon a time " * 12 for i in range(16)]
    prompts = write(tmp_path, *({"prompt": beginnings[i % 16] + "x" * (i // 16), "max_tokens": 6} for i in range(32)))
    folder, budget = tmp_path / "prefixes", 1_000_000
    plain = ["batch_generate", "--model", model, "--prompts", prompts]
    shared = [*plain, "--prefix-cache-dir", folder, "--prefix-cache-bytes", budget]
    alone = run(*plain)
    assert alone.returncode == 0, alone.stderr
    wanted = [a["tokens"] for a in answers(alone)]
    assert len(wanted) == 32

    def start():
        return subprocess.Popen(
            [PROGRAM, *map(str, shared)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )

    for delay in (0.02, 0.05, 0.08, 0.12):
        running, victim = [start(), start()], start()
        time.sleep(delay)
        victim.kill()
        victim.communicate(timeout=60)
        for process in running:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert [json.loads(line)["tokens"] for line in out.splitlines()] == wanted
            assert "ignored" not in err and "not kept" not in err
    last = run(*shared)
    assert [a["tokens"] for a in answers(last)] == wanted
    files = [f for f in folder.iterdir() if f.name != ".lock"]
    assert 0 < len(files) < len(beginnings) and all(f.name.endswith(".safetensors") for f in files)
    assert sum(f.stat().st_size for f in files) <= budget
