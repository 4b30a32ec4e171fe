"""A dataset of a hub on this machine, fetched by the datasets library itself: which of it is read, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow
import pytest
from pyarrow import parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train-*}, {split: test, path: small/test-*}]
- config_name: large
  data_files: [{split: train, path: large/train-*}]
---
"""


def rows(name: str) -> bytes:
    held = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"text": f"{name} {number}"} for number in range(20)]), held)
    return held.getvalue()


FILES = {f"{name}-0.parquet": rows(name) for name in ("small/train", "small/test", "large/train")} | {"README.md": CARD.encode()}


class _Hub(BaseHTTPRequestHandler):
    """The routes of the hub that the library asks for, for owner/name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, api = unquote(urlparse(self.path).path), "/api/datasets/owner/name"
        if path == api or path.startswith(f"{api}/revision"):
            self._json(
                {"id": "owner/name", "sha": COMMIT, "private": False, "tags": [], "siblings": [{"rfilename": file} for file in FILES]}
            )
        elif path.startswith(f"{api}/tree/"):
            self._json(self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        elif path.startswith("/datasets/owner/name/resolve/"):
            self._file(path.removeprefix("/datasets/owner/name/resolve/").partition("/")[2])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        found = [self._entry(path) for path in asked if path in FILES]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in FILES)]
        self._json([*found, *({"type": "directory", "path": path, "oid": COMMIT} for path in folders)])

    def _tree(self, folder: str) -> list[dict[str, object]]:
        inside = [file for file in FILES if not folder or file.startswith(f"{folder}/")]
        if "recursive=true" in self.path.lower():
            files = inside
        else:
            files = [file for file in inside if file.count("/") == (folder.count("/") + 1 if folder else 0)]
        folders = {file.partition("/")[0] for file in inside if "/" in file and not folder}
        return [*map(self._entry, files), *({"type": "directory", "path": path, "oid": COMMIT} for path in sorted(folders))]

    def _entry(self, file: str) -> dict[str, object]:
        return {"type": "file", "path": file, "size": len(FILES[file]), "oid": hashlib.sha1(FILES[file]).hexdigest()}

    def _file(self, file: str) -> None:
        if file not in FILES:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content, headers = FILES[file], {"ETag": f'"{self._entry(file)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"})
            return
        self._send(200, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from aerogel.data import text
from aerogel.errors import AerogelError
found = {}
for source in sys.argv[1:]:
    try:
        found[source] = text.documents(source)
    except AerogelError as error:
        found[source] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_library_fetches_what_is_named(endpoint: str, tmp_path: Path) -> None:
    expected = {
        "owner/name:small": [f"small/train {number}" for number in range(20)],
        "owner/name:small:test": [f"small/test {number}" for number in range(20)],
        "owner/name:large:train[:25%]": [f"large/train {number}" for number in range(5)],
    }
    refused = {
        "owner/name": "available configs: ['small', 'large']",
        "owner/name:none": "'none' not found",
        "owner/name:large:test": "Available splits: ['train']",
        "owner/none": "it is not there or private (HF_TOKEN)",
    }
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    given = [sys.executable, "-c", READ, *expected, *refused]
    made = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(made.stdout)
    assert {source: found[source] for source in expected} == expected
    for source, complaint in refused.items():
        assert complaint in found[source]
        assert "\n" not in found[source]
