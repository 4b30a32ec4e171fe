"""A hub on this machine that serves folders as models: what is asked of it, and with which token, is written down."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models by name, and the requests that came."""

    models: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Models whose files only a token opens."""
    fetched: list[str] = field(default_factory=list)
    """Files that were sent, as owner/name/file."""
    tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers of all requests."""

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for a path."""
        self.tokens.add(token)
        api, rest = path.startswith("/api/models/"), path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(rest[:2]), rest[2:]
        folder = self.models.get(name)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if not api:
            return self._file(name, folder, "/".join(rest[2:]), token)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": _etag(folder / file)} for file in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _file(self, name: str, folder: Path, file: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        if name in self.gated and token is None:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if not (folder / file).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.fetched.append(f"{name}/{file}")
        return 200, {"ETag": f'"{_etag(folder / file)}"', "X-Repo-Commit": COMMIT}, (folder / file).read_bytes()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def running(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a hub, and make it the one that huggingface_hub asks, with an empty cache; the connection is cut after the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, content = hub.answer(urlparse(self.path).path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
