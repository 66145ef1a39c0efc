"""A double of the Hugging Face hub on loopback: repositories and commits, as its client speaks to it.

Every file travels within the commit. The content-addressed store of large files (Xet) is not imitated.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """What was sent; ``refuses`` makes it answer commits with 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.num_commits = 0
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].removeprefix("/api/models/")
        if "/tree/" in name:
            self._reply([{"type": "file", "path": path, "size": 1, "oid": "0"} for path in self.server.files])
            return
        known = name in self.server.repositories
        self._reply({"id": name, "sha": "0" * 40} if known else {"error": "not found"}, 200 if known else 404)

    def do_POST(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            self.server.repositories[name] = request
            self._reply({"url": f"{self.server.url}/{name}", "id": name})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._reply({"files": files})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._reply({"error": path}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        if self.server.refuses:
            self._reply({"error": "you may not write here"}, 403)
            return
        for line in lines:
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[line["value"]["path"]]
        self.server.num_commits += 1
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        self._reply({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
