"""Downloads from a hub on the loopback interface, into a cache of huggingface_hub's layout."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_model import environment, fails, run, write_model

REPO, SHA = "acme/tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository; `cut` names files whose first transfer breaks off half way."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.extra, self.cut, self.log, self.lfs, self.status = [], set(), [], set(), None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.log.append((self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.status:
            return self.answer(hub.status)
        if self.path.startswith(f"/api/models/{REPO}/revision/"):
            names = [*hub.files, *hub.extra]
            return self.answer(200, json.dumps({"sha": SHA, "siblings": [{"rfilename": n} for n in names]}).encode())
        for prefix in (f"/{REPO}/resolve/{SHA}/", "/blob/"):
            name = self.path.removeprefix(prefix)
            if self.path.startswith(prefix) and name in hub.files:
                return self.send_file(name, linked=prefix != "/blob/" and name in hub.lfs)
        return self.answer(404, X_Error_Code="RepoNotFound")

    def send_file(self, name, linked):
        hub, data = self.server, self.server.files[name]
        etag = hashlib.sha1(data).hexdigest()
        if linked:
            headers = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data)), "Location": f"{hub.url}/blob/{name}"}
            return self.answer(302, ETag='"other"', **headers)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.command == "GET" and name in hub.cut:
            hub.cut.discard(name)
            self.answer(200, data[: len(data) // 2], ETag=f'"{etag}"', Content_Length=str(len(data)))
            self.close_connection = True
            return None
        headers = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return self.answer(206 if start else 200, data[start:], ETag=f'W/"{etag}"', X_Repo_Commit=SHA, **headers)


@pytest.fixture
def hub(tmp_path):
    source = write_model(tmp_path / "source")
    (source / "README.md").write_text("not wanted")
    (source / "code.py").write_text("not wanted either")
    server = Hub(source)
    yield server
    server.shutdown()


@pytest.fixture
def env(hub, tmp_path):
    return environment(HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="0", HOME=str(tmp_path))


def generate(env, *args):
    return run("generate", "--model", REPO, "-p", "hello", "-m", 2, *args, env=env)


def test_download_then_offline(hub, env, tmp_path):
    hub.lfs.add("model.safetensors")
    result = generate(env)
    assert result.returncode == 0, result.stderr
    root = tmp_path / "cache" / "models--acme--tiny"
    assert (root / "refs" / "main").read_text() == SHA
    snapshot = root / "snapshots" / SHA
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for link in snapshot.iterdir():
        data = hub.files[link.name]
        assert link.is_symlink() and link.read_bytes() == data
        assert link.resolve().parent == (root / "blobs").resolve() and link.resolve().name == hashlib.sha1(data).hexdigest()
    assert not list((root / "blobs").glob("*.incomplete"))
    asked = len(hub.log)
    assert generate(env).returncode == 0 and len(hub.log) == asked
    assert generate(env | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}).returncode == 0


def test_resume(hub, env, tmp_path):
    hub.cut.add("model.safetensors")
    fails("generate", "--model", REPO, env=env, says="/model.safetensors")
    blobs = tmp_path / "cache" / "models--acme--tiny" / "blobs"
    (part,) = blobs.glob("*.incomplete")
    assert part.stat().st_size == len(hub.files["model.safetensors"]) // 2
    assert not (blobs.parent / "refs" / "main").exists()
    hub.log.clear()
    assert generate(env).returncode == 0
    ranges = [r for method, path, r, _ in hub.log if method == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [f"bytes={len(hub.files['model.safetensors']) // 2}-"]
    assert (blobs / part.stem).read_bytes() == hub.files["model.safetensors"]


def test_token_is_sent(hub, env):
    assert generate(env | {"HF_TOKEN": "secret"}).returncode == 0
    assert {auth for *_, auth in hub.log} == {"Bearer secret"}
    fails("generate", "--model", "acme/other", env=env | {"HF_TOKEN": "a\nb: c"}, says="HF_TOKEN")


def test_no_such_repository(hub, env):
    fails("generate", "--model", "acme/none", env=env, says=("acme/none", "no such folder, and not a repository"))


def test_server_errors(hub, env):
    for status in (403, 500, 503):
        hub.status = status
        fails("generate", "--model", REPO, env=env, says=str(status))


def test_unreachable(env):
    fails("generate", "--model", REPO, env=env | {"HF_ENDPOINT": "http://127.0.0.1:1"}, says="127.0.0.1:1")
    fails("generate", "--model", REPO, env=env | {"HF_ENDPOINT": "nonsense"})


def test_hostile_listing(hub, env, tmp_path):
    hub.extra = ["../../../evil.json"]
    fails("generate", "--model", REPO, env=env, says="outside")
    hub.extra = ["/evil.json"]
    fails("generate", "--model", REPO, env=env, says="outside")
    assert not list(tmp_path.rglob("evil.json"))


def test_not_a_model(hub, env):
    hub.files = {"model.safetensors": b"x"}
    fails("generate", "--model", REPO, env=env, says="config.json")


def test_offline(hub, env):
    fails("generate", "--model", REPO, env=env | {"HF_HUB_OFFLINE": "1"}, says="offline")
    assert not hub.log
