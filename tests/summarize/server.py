"""A real HTTP server that speaks the OpenAI protocol, and misbehaves where a test asks for it.

As a program it takes vLLM's arguments: ``server.py serve MODEL --port PORT``.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler", dict, int], None]
"""From the handler, the request's body and how often this body has come."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        models = getattr(self.server.answer, "models", [{"id": "small", "object": "model"}])
        self.reply({"object": "list", "data": list(models)})

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.requests.append((self.path, body, self.headers.get("Authorization")))
            tries = sum(seen == body and path == self.path for path, seen, _ in self.server.requests)
        self.server.answer(self, body, tries)

    def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def prompt_of(body: dict) -> str:
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def good(handler: Handler, body: dict, tries: int) -> None:
    """A summary that depends on the prompt."""
    if handler.path == "/tokenize":
        handler.reply({"count": len(body["prompt"].split())})
        return
    text = f"summary of {len(prompt_of(body))}"
    choice = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    handler.reply({"id": "x", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def refusing(*words: str) -> Answer:
    """Good, but for prompts that hold one of the words."""

    def answer(handler: Handler, body: dict, tries: int) -> None:
        if any(word in prompt_of(body) for word in words):
            handler.reply({"error": {"message": "the prompt is refused"}}, 400)
        else:
            good(handler, body, tries)

    return answer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), Handler)
        self.answer = answer
        self.guard = threading.Lock()
        self.requests: list[tuple[str, dict, str | None]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up or are killed are part of the tests."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    Server(good, int(sys.argv[sys.argv.index("--port") + 1])).serve_forever()
