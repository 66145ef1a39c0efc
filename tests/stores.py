"""Servers of files on loopback, with faults on demand: a folder over HTTP, and moto's S3 where it is installed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from werkzeug.serving import make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

KEY = "AKIAIOSFODNN7EXAMPLE"
NO_MOTO = "needs moto and s3fs: make test-stores"
Fault = Callable[[str], Response | None]


class Store:
    """A running server. ``fault`` looks at every request's path and may answer in the server's place."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.fault: Fault = lambda path: None
        self.paths: list[str] = []
        self._folder = folder
        self._app = _s3() if kind == "s3" else Request.application(self._send)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Any:
        self.paths.append(environ["PATH_INFO"])
        answer = self.fault(environ["PATH_INFO"])
        if answer is None:
            return self._app(environ, start_response)
        if answer.status_code == 444:  # the server is gone
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer(environ, start_response)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def bucket(self) -> str:
        """Moto's state is that of the process."""
        return f"logs-{self._server.port}"

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}" if self.kind == "s3" else f"{self.address}/{name}"

    def put(self, file: Path, name: str) -> None:
        if self.kind == "s3":
            fsspec.filesystem("s3").pipe_file(f"{self.bucket}/{name}", file.read_bytes())
        else:
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(file.read_bytes())

    def stop(self) -> None:
        """New connections are refused, those that are kept alive are dropped."""
        self.fault = lambda path: Response(status=444)
        self._server.shutdown()
        self._server.server_close()

    def _send(self, request: Request) -> Response:
        path = self._folder / request.path[1:]
        return send_file(path, request.environ) if path.is_file() else Response("no such file", 404)


def _s3() -> Callable:
    server = pytest.importorskip("moto.moto_server.werkzeug_app", reason=NO_MOTO)
    pytest.importorskip("s3fs", reason=NO_MOTO)
    return server.DomainDispatcherApplication(server.create_backend_app)


@contextmanager
def running_store(kind: str, folder: Path) -> Iterator[Store]:
    """A server of ``http`` or ``s3``; its client finds address and key in the environment."""
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    store = Store(kind, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("AWS_ENDPOINT_URL", store.address)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", os.urandom(20).hex())
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        if kind == "s3":
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            fsspec.filesystem("s3").mkdir(store.bucket)
        try:
            yield store
        finally:
            store.stop()
