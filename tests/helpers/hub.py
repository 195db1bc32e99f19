"""A Hugging Face cache on disk, laid out as huggingface_hub does, and a hub that serves folders over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

NAME = "someone/tiny-moe"


def commit_of(number: int) -> str:
    return hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()


def cached(cache: Path, source: Path, commit: str, refs: tuple[str, ...] = ("main",), name: str = NAME) -> Path:
    """The files of a folder as a snapshot of the cache; returns its folder."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        content = file.read_bytes()
        blob = model / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    for ref in refs:
        place = model / "refs" / ref
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(commit)
    return snapshot


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str | None = None) -> None:
    """As HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE do for a new process."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", endpoint is None)
    if endpoint is not None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


class Hub:
    """What is served, and what was asked for.

    Attributes:
        commit: of `main`. files: path in the model to content. cut: paths whose next download ends after so many bytes. down: paths that
            are refused. asked: (path, bytes asked for, None for all) of each download, in order.
    """

    def __init__(self, source: Path, commit: str):
        self.commit = commit
        self.files = {file.relative_to(source).as_posix(): file.read_bytes() for file in sorted(source.rglob("*")) if file.is_file()}
        self.cut: dict[str, int] = {}
        self.down: set[str] = set()
        self.asked: list[tuple[str, str | None]] = []
        self.endpoint = ""

    def downloaded(self) -> list[str]:
        """Paths, each as often as it was asked for."""
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if path == f"/api/models/{NAME}/revision/main":
            self._json({"id": NAME, "sha": hub.commit})
        elif path.startswith(f"/api/models/{NAME}/tree/{hub.commit}"):
            self._json([{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in hub.files.items()])
        else:
            self._file(send=True)

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, send: bool) -> None:
        hub, name = self.hub, self.path.partition("?")[0].removeprefix(f"/{NAME}/resolve/{self.hub.commit}/")
        data = hub.files.get(name)
        if data is None or (send and name in hub.down):
            self.send_response(404 if data is None else 403)
            self.send_header("X-Error-Code", "EntryNotFound" if f"/resolve/{hub.commit}/" in self.path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(wanted[1]) if wanted else 0
        last = min(len(data), int(wanted[2]) + 1) if wanted and wanted[2] else len(data)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        for header, value in (("ETag", f'"{_etag(data)}"'), ("X-Repo-Commit", hub.commit), ("Content-Length", str(last - first))):
            self.send_header(header, value)
        self.end_headers()
        if not send:
            return
        hub.asked.append((name, self.headers.get("Range")))
        if name in hub.cut:
            last = first + hub.cut.pop(name)
            self.close_connection = True
        self.wfile.write(data[first:last])

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal of the tests."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` on a port of this machine, at `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
