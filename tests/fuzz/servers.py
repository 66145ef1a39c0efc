"""Replies of an OpenAI-compatible server, changed on their way, through a whole summarization job.

Oracle: what the server sent as a strict reader takes it. A summary in the shards must be the (cleaned) text of a reply
that was whole; a user without one is named in the manifest. A text that the token limit ended is counted. The key and
the address's password stand in no file and no output.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.raw import make_config, user_records, write_jsonl
from tests.fuzz.mutations import change_bytes, change_json, dump
from tests.fuzz.rows import plain
from tests.fuzz.running import Case, Kind
from tests.summarize.server import Handler, Server, good, prompt_of
from tests.summarize.world import run_here, write_config
from trsr_dist.data.prepare import prepare
from trsr_dist.files import read_json
from trsr_dist.log import show
from trsr_dist.run import SPLITS
from trsr_dist.shards.reader import ShardSet
from trsr_dist.status import describe_run

KEY, PASSWORD, QUERY = "sk-fuzz-4711-secret-key", "pass-word-0815", "query-secret-99"
WHOLE = ("stop", "eos", "length", None)
TEXTS = (
    "", " ", "\x1b[31mred\x1b[0m likes tea", "likes\x00tea", "<think>no end", "<think>a</think> likes tea",
    "**Summary:** likes tea",
    "likes tea [Candidate] yes", "<|im_end|> likes tea", "tea " * 200, "日本語の要約。" * 20, "likes \u2028 tea",
    "\u200b\u200b", "x" * 100_000,
    "?!", "likes tea\nAnswer: yes", "\u202eaet sekil",
)  # fmt: skip


@dataclass
class Told:
    """What the server has said."""

    whole: list[str] = field(default_factory=list)
    """Texts of replies that a strict reader takes."""
    num_cut: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def note(self, data: bytes) -> None:
        """Take a reply's body as a strict reader would."""
        try:
            value = json.loads(data, object_pairs_hook=_once)
            choice = value["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            ending = choice.get("finish_reason")
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            return
        if ending in WHOLE and isinstance(text, str):
            with self.guard:
                self.whole.append(plain(text))
                self.num_cut += ending == "length"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def make_world(folder: Path) -> Path:
    write_jsonl(folder, user_records(8))
    prepare(make_config(folder, "jsonl"))
    return folder / "run"


def make(draw: random.Random, folder: Path, world: Path) -> Case:
    """A job whose server changes some or all of its replies in one way."""
    run, told = folder / "run", Told()
    shutil.copytree(world / "histories", run / "histories")
    change = draw.choice(CHANGES)
    share = draw.choice((1, 1, 3))
    policy = draw.choice(("fail", "skip", "recent_only"))
    style = draw.choice(("auto", "auto", "plain"))
    stream_seed = draw.getrandbits(32)
    title = f"{change.__name__.strip('_')}, {'all' if share == 1 else 'some'} replies, failed_users={policy}, {style}"

    def answer(handler: Handler, body: dict, tries: int) -> None:
        prompt = prompt_of(body)
        stream = random.Random(f"{stream_seed} {prompt}")  # the same fault whenever it is asked again
        if handler.path == "/tokenize" or stream.randrange(share):
            _send(handler, told, _reply(body))
        else:
            change(stream, handler, body, told)

    def act() -> None:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["OPENAI_API_KEY"] = KEY
        os.environ["OPENAI_BASE_URL"] = server.address.replace("//", f"//user:{PASSWORD}@") + f"?token={QUERY}" * (
            stream_seed % 2
        )
        engine = {"engine": "openai", "model": "small", "max_retries": 1, "users_per_shard": 4, "timeout_seconds": 3.0}
        try:
            run_here(
                write_config(
                    run, summarize=engine | {"failed_users": policy, "prompt_style": style, "max_in_flight": 4}
                )
            )
        finally:
            server.shutdown()
            server.server_close()
            show(describe_run(run))

    names = ("127.0.0.1", "summarize.", "OPENAI_", "user 'u", "users failed")
    return Case(title, act, names, lambda status, output: _judge(run, told, status, output))


def _judge(run: Path, told: Told, status: int, output: str) -> str:
    for secret in (KEY, PASSWORD, QUERY):
        if secret in output:
            return f"{secret} stands in the output"
        held = [path for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        if held:
            return f"{secret} stands in {held[0].relative_to(run)}"
    num_cut = 0
    for split in SPLITS:
        folder = run / "shards" / split
        if not (folder / "manifest.json").is_file():
            if not status:
                return f"success without {split}"
            continue
        manifest, shards = read_json(folder / "manifest.json"), ShardSet(folder)
        failed = {failure["user"] for failure in manifest["failed"]}
        num_cut += manifest["counts"].get("flag_cut", 0)
        for index in range(len(shards)):
            sample = shards.read(index)
            if sample.user in failed:
                if sample.summary:
                    return f"user {sample.user!r} has failed and has a summary"
            elif not plain(sample.summary) or not any(plain(sample.summary) in text for text in told.whole):
                return f"user {sample.user!r}: {sample.summary[:80]!r} was never sent"
    return (
        "texts were cut, and no count says so" if told.num_cut and not num_cut and not status and all_cut(told) else ""
    )


def all_cut(told: Told) -> bool:
    """Whether no whole text can have taken a cut one's place."""
    return told.num_cut == len(told.whole)


def _reply(body: dict, text: str | None = None, ending: str | None = "stop") -> dict[str, Any]:
    if text is None:
        text = f"summary of {len(prompt_of(body))} signs"
    choice: dict[str, Any] = {"index": 0, "finish_reason": ending}
    choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    return {"id": "x", "object": "y", "created": 1, "model": "small", "choices": [choice],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}  # fmt: skip


def _send(handler: Handler, told: Told, value: object, **options: Any) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    if options.get("status", 200) == 200:
        told.note(data)
    handler.reply(data, **options)


def another_value(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    value, _ = change_json(stream, _reply(body))
    _send(handler, told, dump(value).encode("utf-8", "surrogatepass"))


def other_bytes(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    _send(handler, told, change_bytes(stream, json.dumps(_reply(body)).encode())[0])


def another_text(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    _send(handler, told, _reply(body, stream.choice(TEXTS)))


def another_ending(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    _send(
        handler,
        told,
        _reply(body, ending=stream.choice(("length", "content_filter", "abort", "tool_calls", "", None, "\x1b[2J"))),
    )


def an_error(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    message = stream.choice(
        (
            "no",
            "\x1b[31mno\x1b[0m",
            f"bad key {handler.headers['Authorization']}",
            "x" * 50_000,
            "max_tokens is not supported, use max_completion_tokens",
        )
    )
    value = stream.choice(
        (
            {"error": {"message": message}},
            {"error": message},
            message,
            [],
            {"detail": [{"msg": message}]},
            b"<html>busy</html>",
        )
    )
    status = stream.choice((300, 301, 400, 401, 403, 404, 413, 418, 422, 429, 500, 503, 599))
    _send(
        handler,
        told,
        value,
        status=status,
        headers={"Retry-After": stream.choice(("0.01", "-1", "soon", "99999999", "nan")), "Location": "/v1/again"},
    )


def an_echo(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    """The request in the reply, its key included."""
    seen = f"{handler.path} {handler.headers['Authorization']} {dict(handler.headers)}"
    if stream.random() < 0.5:
        _send(handler, told, {"error": {"message": seen}}, status=stream.choice((400, 401, 500)))
    else:
        _send(
            handler,
            told,
            _reply(body, ending="content_filter")
            | {"note": seen, "choices": stream.choice(([], seen, [{"finish_reason": seen}]))},
        )


def cut_off(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    """Fewer bytes than announced."""
    data = json.dumps(_reply(body)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) + stream.choice((0, 1, 1000))))
    handler.end_headers()
    handler.wfile.write(data[: stream.randrange(len(data))])
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(2)


def odd_headers(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    """Another encoding than the header says, or a length that is none."""
    data = json.dumps(_reply(body)).encode()
    name, value, sent = stream.choice((
        ("Content-Encoding", "gzip", data), ("Content-Encoding", "gzip", gzip.compress(data)[:-8]),
        ("Content-Type", "text/html", data), ("Content-Type", "application/json; charset=utf-16", data),
        ("Content-Encoding", "zzz", data), ("X-A", "\x1b[31m", data), ("Transfer-Encoding", "chunked",
    b"zz\r\n" + data),
        ("Content-Encoding", "gzip", gzip.compress(bytes(200 << 20), 1)),
    ))  # fmt: skip
    if sent is data:
        told.note(data)
    handler.reply(sent, headers={name: value})


def slowly(stream: random.Random, handler: Handler, body: dict, told: Told) -> None:
    """Later than the time-out, once."""
    time.sleep(3.5)
    good(handler, body, 1)


CHANGES = (
    *(another_value,) * 3, *(other_bytes,) * 2, *(another_text,) * 2, another_ending, *(an_error,) * 2, an_echo,
    cut_off, odd_headers, slowly,
)  # fmt: skip

# Every thread reserves addresses, which are limited: those of one case are enough for a child.
KIND = Kind("server", 100, 120.0, make_world, make, per_child=1)
