"""mlx-lm chat from outside: line by line from a pipe, and on a terminal (a pty)."""

import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from array import array

import pytest
from tiny_model import CONFIG, IM_END, PROGRAM, Tensor, environment, fails, random_weights, run, write_adapter, write_described, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose answers do not end by themselves."""
    weights = random_weights(CONFIG)
    head = weights["lm_head.weight"]
    data, width = array("f", head.data), head.shape[1]
    data[IM_END * width : (IM_END + 1) * width] = array("f", [0.0] * width)
    weights["lm_head.weight"] = Tensor(head.shape, data)
    return write_model(tmp_path_factory.mktemp("endless"), weights=weights)


def piped(model, lines, *args, tokens=8, env=None):
    """Runs a conversation from a pipe; `lines` is text or bytes."""
    return subprocess.run(
        [PROGRAM, "chat", "--model", str(model), "-m", str(tokens), *map(str, args)],
        input=lines if isinstance(lines, bytes) else lines.encode(),
        capture_output=True,
        timeout=120,
        env=env or environment(),
        check=False,
    )


def talk(model, folder, lines, *args, **kwargs):
    """The messages after a conversation without errors."""
    file = folder / "talk.json"
    result = piped(model, f"{lines}\n/save {file}\n", *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text())


def contents(messages, role):
    return [m["content"] for m in messages if m["role"] == role]


# --- from a pipe -------------------------------------------------------------------------------------------------------------------


def test_drafts_leave_the_conversation_as_it_is(model, tmp_path):
    config = CONFIG | {"num_hidden_layers": 1}
    draft = write_model(tmp_path / "draft", config, random_weights(config))
    lines = "hello\nhello hello\nand again"
    plain = talk(model, tmp_path, lines, tokens=20)
    for flags in (["--draft-model", draft, "--num-draft-tokens", 4], ["--draft-model", model], ["--ngram-draft-tokens", 6]):
        assert talk(model, tmp_path, lines, *flags, tokens=20) == plain, flags
    assert talk(model, tmp_path, lines, "--max-kv-size", 40, tokens=20) == talk(model, tmp_path, lines, "--max-kv-size", 40, "--ngram-draft-tokens", 6, tokens=20)
    result = piped(model, "hello\n", "--ngram-draft-tokens", 1000)
    assert result.returncode == 1 and b"ngram_draft_tokens" in result.stderr
    result = piped(model, "hello\n", "--draft-model", draft, "--ngram-draft-tokens", 2)
    assert result.returncode == 1 and b"wanted one of them" in result.stderr



def test_turns(model, tmp_path):
    messages = talk(model, tmp_path, "hello\nand then?\nlast")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert contents(messages, "user") == ["hello", "and then?", "last"]
    result = piped(model, "hello\nand then?\nlast\n")
    assert result.returncode == 0 and result.stderr == b""
    assert result.stdout.decode() == "".join(text + "\n" for text in contents(messages, "assistant"))


def test_first_turn_is_generate(model, tmp_path):
    (answer,) = contents(talk(model, tmp_path, "hello", "--system-prompt", "Be brief.", tokens=30), "assistant")
    result = run("generate", "--model", model, "--json", "-p", "hello", "-m", 30, "--system-prompt", "Be brief.")
    assert answer == json.loads(result.stdout)["text"]


@pytest.mark.parametrize("flags", [[], ["--max-kv-size", 40], ["--prefill-step-size", 5]], ids=["whole", "window", "chunks"])
def test_kept_caches_change_nothing(model, tmp_path, flags):
    """The third answer, with caches from two turns, is the one of a new process that loads these two turns."""
    lines = ["one", "two words", "three words now"]
    messages = talk(model, tmp_path, "\n".join(lines), "--temp", 0, *flags, tokens=20)
    (tmp_path / "two.json").write_text(json.dumps(messages[:4]))
    again = talk(model, tmp_path, f"/load {tmp_path / 'two.json'}\n{lines[2]}", *flags, tokens=20)
    if "--max-kv-size" not in flags:  # a window that was trimmed in decoding order sees other tokens
        assert again == messages
    assert len(again) == 6


def test_multi_line_messages(model, tmp_path):
    messages = talk(model, tmp_path, 'a\\\nb\\\n\\\nc\n"""\n/quit\n  q\\\n\nend\n"""')
    assert contents(messages, "user") == ["a\nb\n\nc", "/quit\n  q\\\n\nend"]


def test_input_may_end_anywhere(model):
    for lines in ("", "\n\n   \n", "q\n", "/quit", "/exit\n"):
        result = piped(model, lines)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b""), lines
    whole = piped(model, "hi\n").stdout
    for lines in ("hi", 'hi\r\n', '"""\nhi\n"""', '"""\nhi', "hi\nq\nnot seen\n"):
        result = piped(model, lines)
        assert (result.returncode, result.stdout) == (0, whole), lines
    assert piped(model, "hi\\").returncode == 0


def test_reset_and_system(model, tmp_path):
    first = talk(model, tmp_path, "hello", tokens=20)
    assert talk(model, tmp_path, "something else\nr\nhello", tokens=20) == first
    assert talk(model, tmp_path, "something else\n/reset\nhello", tokens=20) == first
    system = talk(model, tmp_path, "/system Be kind.\nhello", tokens=20)
    assert system == talk(model, tmp_path, "hello", "--system-prompt", "Be kind.", tokens=20)
    assert system[0] == {"role": "system", "content": "Be kind."} and system[1:] != first
    assert talk(model, tmp_path, "/system\nhello", "--system-prompt", "x", tokens=20) == first
    assert talk(model, tmp_path, "hello\nr", "--system-prompt", "x") == [{"role": "system", "content": "x"}]


def test_help_and_unknown_commands(model):
    for command in ("h", "/help"):
        assert "/save FILE" in piped(model, command + "\n").stdout.decode()
    result = piped(model, "/lod x\nh\n")
    assert result.returncode == 1 and b"unknown command '/lod'; wanted /load" in result.stderr
    assert b"/save FILE" in result.stdout
    assert piped(model, "/usr/bin is what?\n").stdout.count(b"\n") >= 1


def test_bytes_that_are_no_text(model, tmp_path):
    file = tmp_path / "t.json"
    result = piped(model, b"a\xff\xc3(\x00b \xe4\xb8\n/save " + bytes(file) + b"\n")
    assert result.returncode == 0, result.stderr
    assert json.loads(file.read_text())[0]["content"] == "a\ufffd\ufffd(\x00b \ufffd"


def test_long_lines(model, tmp_path):
    messages = talk(model, tmp_path, "x" * 3000 + "\nshort", tokens=2)
    assert [len(text) for text in contents(messages, "user")] == [3000, 5]
    result = piped(model, "y" * (6 << 20) + "\nshort\n")
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1 and b"line: got more than" in result.stderr
    assert result.stdout == piped(model, "short\n").stdout


def test_error_keeps_the_conversation(model, tmp_path):
    file = tmp_path / "t.json"
    lines = f"hello\n{'x' * 4000}\nmore\n/save {file}\n"
    result = subprocess.run(
        [PROGRAM, "chat", "--model", str(model), "-m", "4"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(MLXLM_MEMORY_BYTES="300000"),
        check=False,
    )
    assert result.returncode == 1 and "GB" in result.stderr and "available" in result.stderr
    assert contents(json.loads(file.read_text()), "user") == ["hello", "more"]


# MLX throws a std::runtime_error where memory ends; the size is that of the keys of 6144 tokens.
NO_MEMORY = """
#include <stddef.h>
extern void* __libc_malloc(size_t);
void* malloc(size_t size) { return size > 1536000 && size < 1600000 ? NULL : __libc_malloc(size); }
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="wants LD_PRELOAD and a compiler")
def test_memory_that_ends_keeps_the_conversation(tmp_path):
    config = CONFIG | {"num_key_value_heads": 4}
    model, file = write_model(tmp_path / "m", config, random_weights(config)), tmp_path / "t.json"
    (tmp_path / "none.c").write_text(NO_MEMORY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "none.so", tmp_path / "none.c"], check=True)
    args = [PROGRAM, "chat", "--model", str(model), "-m", "4", "--prefill-step-size", "8192"]
    result = subprocess.run(
        args,
        input=f"hello\n{'x' * 6000}\nmore\n/save {file}\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(LD_PRELOAD=str(tmp_path / "none.so")),
        check=False,
    )
    assert result.returncode == 1 and "error: memory: " in result.stderr, result.stderr
    assert contents(json.loads(file.read_text()), "user") == ["hello", "more"]


# Shows only a part of what was said, as templates do that leave out what a model thought.
STRIPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' else m.content[:1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["nemotron_h", "gemma3_text", "llama4", "falcon_h1"])
def test_caches_that_cannot_go_back_keep_the_earlier_turns(tmp_path, name):
    model = write_described(tmp_path / "m", name)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STRIPS}))
    lines = [f"message {i} " + "of some length " * 3 for i in range(4)]
    messages = talk(model, tmp_path, "\n".join(lines), "--stats", tokens=12)
    result = piped(model, "\n".join(lines), "--stats", tokens=12)
    kept = [int(k) for k in re.findall(r"and (\d+) kept", result.stderr.decode())]
    first = len("<" + "user\n" + lines[0])
    assert len(kept) == 3 and kept[0] >= first and kept[1] >= 2 * first and kept[2] >= 3 * first, result.stderr
    (tmp_path / "three.json").write_text(json.dumps(messages[:6]))
    assert talk(model, tmp_path, f"/load {tmp_path / 'three.json'}\n{lines[3]}", tokens=12) == messages
    back = f"{lines[0]}\n{lines[1]}\nr\n{lines[0]}\n{lines[1]}"
    assert talk(model, tmp_path, back, tokens=12) == messages[:4]


def test_snapshots_are_left_out_where_memory_is_short(tmp_path):
    model = write_described(tmp_path / "m", "gemma3_text")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STRIPS}))
    lines = "a long message " * 20 + "\nand more"

    def turns(memory):
        return piped(model, lines, "--stats", tokens=12, env=environment(MLXLM_MEMORY_BYTES=str(memory)))

    memory = 1 << 14
    while (tight := turns(memory)).returncode != 0:  # until both turns fit, but not twice the first one
        assert b"available are" in tight.stderr
        memory = memory * 6 // 5
    roomy = turns(memory * 4)
    assert b"kept" not in tight.stderr and b"kept" in roomy.stderr, (tight.stderr, roomy.stderr)
    assert tight.stdout == roomy.stdout


def test_adapter(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    adapted = talk(model, tmp_path, "hello", "--adapter-path", adapter, tokens=20)
    assert adapted != talk(model, tmp_path, "hello", tokens=20)
    result = run("generate", "--model", model, "--adapter-path", adapter, "--json", "-p", "hello", "-m", 20)
    assert contents(adapted, "assistant") == [json.loads(result.stdout)["text"]]


def test_statistics_from_a_pipe(model):
    result = piped(model, "hello\nmore\n", "--stats")
    plain = piped(model, "hello\nmore\n")
    assert result.returncode == 0 and result.stdout == plain.stdout and plain.stderr == b""
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 2 and all(re.match(r"\[prompt \d+ tokens.*answer \d+ tokens, [\d.]+/s", line) for line in lines), lines


def test_statistics_on_a_terminal_beside_the_pipe(model):
    ours, theirs = pty.openpty()
    args = [PROGRAM, "chat", "--model", str(model), "-m", "4"]
    result = subprocess.run(args, input=b"hello\n", stdout=subprocess.PIPE, stderr=theirs, timeout=60, env=environment(), check=False)
    os.close(theirs)
    assert result.returncode == 0 and b"tokens" not in result.stdout
    assert b"answer 4 tokens" in os.read(ours, 65536)
    os.close(ours)


def test_seed(model, tmp_path):
    def sampled(seed):
        return talk(model, tmp_path, "hello\nr\nhello", "--temp", 1, "--seed", seed, "--min-p", 0.01, "--top-p", 0.9)

    assert sampled(3) == sampled(3) and sampled(3) != sampled(4)
    first, second = piped(model, "hello\nr\nhello\n", "--temp", 1, tokens=40).stdout, piped(model, "hello\n", "--temp", 1, tokens=40).stdout
    assert first.startswith(second) and first != second + second


def test_interrupt_ends_a_pipe(endless):
    args = [PROGRAM, "chat", "--model", str(endless), "-m", "-1"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdin.write(b"hello\nmore\n")
        process.stdin.flush()
        assert process.stdout.read(30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == b""


# --- saved conversations -----------------------------------------------------------------------------------------------------------


def test_save_and_load(model, tmp_path):
    first = tmp_path / "a b.json"
    result = piped(model, f"hello\n/save {first}\nr\n/load {first}\n/save {tmp_path / 'second'}\n", "--system-prompt", "Be kind. ☕")
    assert result.returncode == 0, result.stderr
    assert first.read_text() == (tmp_path / "second").read_text()
    assert "☕" in first.read_text() and first.read_text().endswith("]\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b.json", "second"]
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"model": "x", "messages": json.loads(first.read_text())}))
    assert talk(model, tmp_path, f"/load {wrapped}") == json.loads(first.read_text())


@pytest.mark.parametrize(
    "content,says",
    [
        ("", "bad.json"),
        ("[{", "bad.json"),
        ("\xff\x00", "bad.json"),
        ("[" * 100000, "bad.json"),
        ("null", "wanted a list of messages"),
        ("{}", "wanted a list of messages"),
        ("[1]", "message 0: wanted an object"),
        ('[{"role": "user"}]', "message 0: has no content"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "message 0: has no content"),
        ('[{"role": 5, "content": "x"}]', "message 0: has no role"),
        ('[{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]', "message 1: has an unknown role"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "message 1: is a system message"),
    ],
)
def test_broken_file(model, tmp_path, content, says):
    bad, kept = tmp_path / "bad.json", tmp_path / "kept.json"
    bad.write_text(content, encoding="latin-1")
    result = piped(model, f"hello\n/load {bad}\nmore\n/save {kept}\n")
    errors = [line for line in result.stderr.decode().splitlines() if "error" in line]
    assert result.returncode == 1 and len(errors) == 1 and says in errors[0] and len(errors[0]) < 600
    assert json.loads(kept.read_text()) == talk(model, tmp_path, "hello\nmore")


def test_files_that_cannot_be(model, tmp_path):
    for command, says in {
        "/load": "name of a file",
        "/save": "name of a file",
        f"/load {tmp_path}/none": "no such file",
        f"/load {tmp_path}": "is no file",
        "/load /dev/zero": "is no file",
        f"/save {tmp_path}": str(tmp_path),
        f"/save {tmp_path}/none/x": "none/x",
    }.items():
        result = piped(model, command + "\nhello\n")
        assert result.returncode == 1 and says in result.stderr.decode() and result.stderr.count(b"\n") == 1, command
        assert result.stdout == piped(model, "hello\n").stdout
    assert list(tmp_path.iterdir()) == []


def test_template_refuses_a_loaded_conversation(tmp_path):
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    model = write_model(tmp_path / "m", chat_template=strict)
    (tmp_path / "bad.json").write_text(json.dumps([{"role": "user", "content": "x"}]))
    result = piped(model, f"hello\n/load {tmp_path / 'bad.json'}\nmore\n/save {tmp_path / 't.json'}\n")
    assert b"must alternate" in result.stderr
    assert contents(json.loads((tmp_path / "t.json").read_text()), "user") == ["hello", "more"]


# --- bad command lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--adapter-path", "x"], "x: no such adapter folder"),
        (["--kv-bits", "7"], "kv_bits"),
        (["--kv-bits", "4", "--kv-group-size", "48"], "kv_group_size"),
        (["--temp", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-k", "260"], "top_k"),
        (["--xtc-threshold", "0.7"], "xtc_threshold"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-kv-size", "0"], "max_kv_size"),
        (["--prefill-step-size", "0"], "prefill_step_size"),
        (["--seed", "-1"], "seed"),
        (["--threads", "-1"], "threads"),
        (["--chat-template-config", "{"], "--chat-template-config"),
        (["--extra-eos-token", "no such token"], "no such token"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_bad_flags(model, flags, says):
    fails("chat", "--model", model, *flags, says=says, stdin="hello\n")


def test_flags_of_the_reference(model):
    flags = ["--trust-remote-code", "--temp", 0.5, "--top-p", 0.9, "--xtc-probability", 0.5, "--xtc-threshold", 0.2, "--seed", 7]
    flags += ["--max-kv-size", 64, "--prefill-step-size", 16, "--max-tokens", 5, "--system-prompt", "x", "--pipeline"]
    result = run("chat", "--model", model, *flags, stdin="hello\nagain\n")
    assert result.returncode == 0, result.stderr
    assert "256" in run("chat", "--help").stdout and "/load FILE" in run("chat", "--help").stdout


def test_model_without_a_template(tmp_path):
    fails("chat", "--model", write_model(tmp_path / "m", chat_template=None), says="no chat template", stdin="hello\n")


# --- on a terminal -----------------------------------------------------------------------------------------------------------------


class Terminal:
    """The program on a pty of its own, with its state in `folder`."""

    def __init__(self, model, folder, *args, term="xterm", **env):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = environment(TERM=term, XDG_STATE_HOME=str(folder), HOME=str(folder), LC_ALL="C.UTF-8", **env)
            os.execve(PROGRAM, [PROGRAM, "chat", "--model", str(model), *map(str, args)], env)
        self.seen, self.at, self.begin = b"", 0, 0

    def read(self, timeout):
        if not select.select([self.fd], [], [], timeout)[0]:
            return False
        try:
            piece = os.read(self.fd, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            piece = b""
        self.seen += piece
        return bool(piece)

    def expect(self, pattern, timeout=30):
        """Waits for what matches after the last match; returns all up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.compile(pattern, re.S).search(self.seen, self.at)):
            assert self.read(max(0, deadline - time.monotonic())) or time.monotonic() < deadline, (pattern, self.seen[self.at :][-2000:])
        text, self.at = self.seen[self.at : match.end()], match.end()
        return text

    def send(self, text):
        os.write(self.fd, text if isinstance(text, bytes) else text.encode())

    def status(self, timeout=20):
        """Waits for the end; the exit status, negative for a signal."""
        deadline = time.monotonic() + timeout
        while self.read(max(0, deadline - time.monotonic())):
            pass
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError("still running")

    def __enter__(self):
        self.expect(b">> ")
        self.begin = self.at
        return self

    def __exit__(self, *_):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


TURN_END = rb"\[prompt \d+ tokens.*?GB\]"


@pytest.fixture(params=["xterm", "dumb"])
def term(request):
    return request.param


def test_terminal_turns_and_quit(model, tmp_path, term):
    with Terminal(model, tmp_path, "-m", 8, term=term) as t:
        t.send("hello\n")
        assert b"kept" not in t.expect(TURN_END)
        t.expect(b">> ")
        t.send("more\n")
        assert b"cut by --max-tokens" in t.expect(TURN_END) and b"kept" in t.seen
        assert (b"\x1b[" in t.seen[t.begin :]) == (term == "xterm")
        t.expect(b">> ")
        t.send("q\n")
        assert t.status() == 0


def test_terminal_end_of_input(model, tmp_path, term):
    with Terminal(model, tmp_path, term=term) as t:
        t.send("\x04")
        assert t.status() == 0


def test_terminal_interrupt_stops_the_answer(endless, tmp_path, term):
    with Terminal(endless, tmp_path, "-m", -1, term=term) as t:
        t.send("hello\n")
        t.expect(b"hello\r*\n.{30}")
        begin = time.monotonic()
        t.send("\x03")
        assert b"stopped" in t.expect(TURN_END) and time.monotonic() - begin < 5
        t.expect(b">> ")
        t.send(f"/save {tmp_path}/t.json\n")
        t.expect(b"Saved 2 messages")
        user, assistant = json.loads((tmp_path / "t.json").read_text())
        assert user["content"] == "hello" and len(assistant["content"]) >= 10
        t.expect(b">> ")
        t.send("\x04")
        assert t.status() == 0


def test_terminal_interrupt_stops_a_long_prompt(model, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{"role": "user", "content": "x" * 60000}, {"role": "assistant", "content": "y"}]))
    with Terminal(model, tmp_path, "-m", 4, "--prefill-step-size", 100000, term="dumb") as t:
        t.send(f"/load {tmp_path}/long.json\n")
        t.expect(b"Loaded 2 messages.*>> ")
        t.send("hello\n")
        t.expect(b"hello")
        time.sleep(0.7)
        begin = time.monotonic()
        t.send("\x03")
        t.expect(b"stopped before the answer", timeout=60)
        assert time.monotonic() - begin < 1.5
        t.expect(b">> ")
        t.send("r\n")
        t.expect(b"forgotten.*>> ")
        t.send("hello\n")
        t.expect(TURN_END)
        t.send("\x04")
        assert t.status() == 0


@pytest.mark.parametrize("command", ["generate", "batch_generate", "cache_prompt"])
def test_interrupt_stops_a_long_prompt(model, tmp_path, command):
    text = "x" * 60000
    (tmp_path / "prompts").write_text(json.dumps({"prompt": text}) + "\n")
    args = {
        "generate": ["-p", "-", "--prefill-step-size", 100000],
        "batch_generate": ["--prompts", tmp_path / "prompts", "--prefill-step-size", 100000],
        "cache_prompt": ["--prompt", "-", "--prompt-cache-file", tmp_path / "c.safetensors"],
    }[command]
    args = [PROGRAM, command, "--model", str(model), *map(str, args)]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        if command != "batch_generate":
            process.stdin.write(text.encode())
        process.stdin.close()
        process.stdin = None
        time.sleep(2)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert time.monotonic() - begin < 1.5 and process.returncode == 130, err
    assert not (tmp_path / "c.safetensors").exists()


def test_terminal_interrupt_clears_the_line(model, tmp_path, term):
    with Terminal(model, tmp_path, "-m", 4, term=term) as t:
        t.send("not this")
        t.expect(b"this")
        t.send("\x03")
        t.expect(b">> ")
        t.send('"""\nnor that')
        t.expect(b"that")
        t.send("\x03")
        t.expect(b">> ")
        t.send("but this\n")
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send(f"/save {tmp_path}/t.json\n")
        t.expect(b"Saved 2 messages")
        assert json.loads((tmp_path / "t.json").read_text())[0]["content"] == "but this"
        t.expect(b">> ")
        t.send("\x03")
        t.expect(b">> ")
        t.send("\x04")
        assert t.status() == 0


SLOW_INPUT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <unistd.h>
int poll(struct pollfd* wanted, nfds_t count, int timeout) {
  int (*real)(struct pollfd*, nfds_t, int) = dlsym(RTLD_NEXT, "poll");
  const int ready = real(wanted, count, timeout);
  if (ready > 0) for (int i = 0; i < 5; ++i) usleep(1000);
  return ready;
}
ssize_t read(int file, void* to, size_t count) {
  ssize_t (*real)(int, void*, size_t) = dlsym(RTLD_NEXT, "read");
  const ssize_t got = real(file, to, count);
  if (isatty(file)) for (int i = 0; i < 5; ++i) usleep(1000);
  return got;
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="wants LD_PRELOAD and a compiler")
def test_terminal_interrupt_is_never_lost(model, tmp_path, term):
    """Ctrl-C right after a line, with a program that is slow between poll() and read() and after read()."""
    (tmp_path / "slow.c").write_text(SLOW_INPUT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "slow.so", tmp_path / "slow.c", "-ldl"], check=True)
    with Terminal(model, tmp_path, "-m", 4, term=term, LD_PRELOAD=str(tmp_path / "slow.so")) as t:
        for i in range(12):
            t.send('"""\nnor that')
            time.sleep(i / 1000)
            t.send("\x03")
            t.expect(b">> ", timeout=10)
        t.send("\x04")
        assert t.status() == 0


def test_terminal_commands_and_blocks(model, tmp_path, term):
    with Terminal(model, tmp_path, "-m", 4, term=term) as t:
        t.send("h\n")
        t.expect(b"/save FILE.*>> ")
        t.send("/nothing\n")
        t.expect(b"mlx-lm: error: unknown command.*>> ")
        t.send("/system Be kind.\n")
        t.expect(b"system prompt is set.*>> ")
        t.send('"""\n')
        t.expect(rb"\.\.\. ")
        t.send("q\n")
        t.expect(rb"\.\.\. ")
        t.send('r\n"""\n')
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send("a\\\nb\n")
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send(f"/save {tmp_path}/t.json\n")
        t.expect(b"Saved 5 messages")
        messages = json.loads((tmp_path / "t.json").read_text())
        assert messages[0]["content"] == "Be kind." and contents(messages, "user") == ["q\nr", "a\nb"]
        t.expect(b">> ")
        t.send("/load /dev/null\n")
        t.expect(b"is no file.*>> ")
        t.send("r\n")
        t.expect(b"forgotten.*>> ")
        t.send("/quit\n")
        assert t.status() == 0


def edits_lines():
    if not shutil.which("ldd"):  # macOS, which always has it
        return True
    return "libedit" in subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(not edits_lines(), reason="built without libedit")
def test_terminal_editing_and_history(model, tmp_path):
    history = tmp_path / "mlx-lm" / "chat_history"
    with Terminal(model, tmp_path, "-m", 4) as t:
        t.send("hallö ☕\x1b[D\x1b[D\x7fo\n")  # two to the left, o for ö
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send("\x1b[200~two\rlines\\\x1b[201~ more\n")
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send("\x1b[A\x1b[A!\n")  # the first again
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send(f"/save {tmp_path}/t.json\n")
        t.expect(b"Saved")
        t.expect(b">> ")
        t.send("\x04")
        assert t.status() == 0
    assert contents(json.loads((tmp_path / "t.json").read_text()), "user") == ["hallo ☕", "two\nlines\\ more", "hallo ☕!"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text().splitlines() == ["hallo ☕", "two\\nlines\\\\ more", "hallo ☕!", f"/save {tmp_path}/t.json"]
    with Terminal(model, tmp_path, "-m", 4) as t:
        t.send("\x1b[A\x1b[A\x1b[A\n")
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send(f"/save {tmp_path}/t.json\n")
        t.expect(b"Saved")
    assert contents(json.loads((tmp_path / "t.json").read_text()), "user") == ["two\nlines\\ more"]


def test_terminal_history_that_cannot_be_kept(model, tmp_path):
    (tmp_path / "mlx-lm").write_text("no folder")
    with Terminal(model, tmp_path, "-m", 4) as t:
        t.send("hello\n")
        t.expect(TURN_END)
        t.expect(b">> ")
        t.send("\x04")
        assert t.status() == 0


def test_terminal_is_not_steered_by_answers(model, tmp_path):
    with Terminal(model, tmp_path, "-m", 400, "--temp", 1.5, term="dumb") as t:
        t.send("hello\n")
        t.expect(TURN_END)
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", t.seen[t.begin :])


def test_a_cache_that_cannot_be_quantized(model):
    result = piped(model, "hello\n", "--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    assert result.returncode == 1 and b"this model's cache cannot be quantized" in result.stderr
