"""A server that echoes what it was sent: key, password and query are in no output and no file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.summarize.server import Answer, Handler, good, prompt_of, serving
from tests.summarize.world import run_here, write_config, write_histories
from trsr_dist.config import load_config
from trsr_dist.connection import Address, Connection
from trsr_dist.errors import ConfigError, TrsrError
from trsr_dist.printable import Secrets, printable
from trsr_dist.status import describe_run
from trsr_dist.summarize.engines.openai import OpenAIEngine

KEY, PASSWORD = "sk-Ab/1+2_secret%key", "p:W0rd!"


def echo(handler: Handler) -> str:
    """All that a server knows of a request: headers, path, and the user and password that Basic stands for."""
    header = handler.headers["Authorization"]
    kind, _, value = header.partition(" ")
    return f"{header} {value} {base64.b64decode(value).decode() if kind == 'Basic' else ''} {handler.path}"


def in_the_error(handler: Handler, body: dict, tries: int) -> None:
    handler.reply({"error": {"message": "x" * 200 + f" refused: {echo(handler)}"}}, 400)


def in_a_gateway_error(handler: Handler, body: dict, tries: int) -> None:
    handler.reply({"error": {"message": f"gone: {echo(handler)}"}}, 503, {"Retry-After": "0.01"})


def in_the_denial(handler: Handler, body: dict, tries: int) -> None:
    handler.reply({"error": {"message": f"wrong key {echo(handler)}"}}, 401)


def in_the_ending(handler: Handler, body: dict, tries: int) -> None:
    handler.reply({"choices": [{"index": 0, "finish_reason": echo(handler), "message": {"content": "x"}}]})


def in_the_text(handler: Handler, body: dict, tries: int) -> None:
    if "golf" in prompt_of(body):
        choice = {"message": {"role": "assistant", "content": f"The user likes {echo(handler)} and tennis."}}
        handler.reply({"choices": [{"index": 0, "finish_reason": "stop", **choice}]})
    else:
        good(handler, body, tries)


@pytest.mark.parametrize("answer", [in_the_error, in_a_gateway_error, in_the_denial, in_the_ending, in_the_text])
@pytest.mark.parametrize("place", ["key", "user", "query"])
def test_no_secret_is_printed_or_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, answer: Answer, place: str
) -> None:
    run = tmp_path / "run"
    write_histories(run, {"train": 3, "valid": 1, "test": 1}, max_history=8)
    summarize = {"engine": "openai", "model": "small", "failed_users": "skip", "max_retries": 0, "users_per_shard": 2}
    config = write_config(run, summarize=summarize)
    said = ""
    with serving(answer) as server:
        addresses = {
            "key": server.address,
            "user": server.address.replace("//", f"//anna:{PASSWORD.replace(':', '%3A')}@"),
            "query": f"{server.address}?api_key={KEY.replace('/', '%2F').replace('+', '%2B').replace('%k', '%25k')}",
        }
        monkeypatch.setenv("OPENAI_BASE_URL", addresses[place])
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        try:
            run_here(config)
        except TrsrError as error:
            said = str(error)
        assert server.requests  # it was reached, whatever the address
    output = capfd.readouterr()
    said += output.out + output.err + describe_run(run)
    kept = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert "***" in said or b"***" in kept  # something was struck
    for secret in (KEY, PASSWORD, *map(_quoted, (KEY, PASSWORD)), _basic()):
        for form in (secret, json.dumps(secret)[1:-1], secret[:8]):
            assert form not in said and form.encode() not in kept, form


def _quoted(text: str) -> str:
    return text.replace("%", "%25").replace("/", "%2F").replace("+", "%2B").replace(":", "%3A").replace("!", "%21")


def _basic() -> str:
    return base64.b64encode(f"anna:{PASSWORD}".encode()).decode()


def test_a_refused_address_does_not_show_its_password(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run")
    for override in (
        f"summarize.base_url=http://anna:{PASSWORD}@host/v1",
        "summarize.base_url=http://host/v1?api_key=geheim",
        f"summarize.base_url=[http://anna:{PASSWORD}@host/v1]",
        f"summarize.base_url={{http://anna:{PASSWORD}@host/v1",
        f"base_url=http://anna:{PASSWORD}@host/v1",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(config, [override])
        assert PASSWORD not in str(caught.value) and "geheim" not in str(caught.value)
        assert "base_url" in str(caught.value)


@pytest.mark.parametrize("address", ["http://anna:pass word@[::1", "http://anna:secret@host:port/v1", "anna:secret@h"])
def test_an_address_that_is_none_is_not_repeated(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a server") as caught:
        OpenAIEngine(address, "small", "auto", {}, 400, 1, 1.0, 0)
    assert "secret" not in str(caught.value) and "pass word" not in str(caught.value)


def test_a_key_that_no_header_takes_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "geheim\nX-Other: 1")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        OpenAIEngine("http://host:1/v1", "small", "auto", {}, 400, 1, 1.0, 0)
    assert "geheim" not in str(caught.value)


def test_an_address_is_taken_apart() -> None:
    found = Address.parse("https://anna:p%40w@host:8000/v1/?a=1&key=long%20one#part", "--server")
    assert (found.public, found.user, found.password) == ("https://host:8000/v1/", "anna", "p@w")
    assert found.query == {"a": "1", "key": "long one"}


def test_short_secrets_are_struck_as_words_only() -> None:
    assert Secrets(["PW", ""]).strike("PW, PWD, xPW and 'PW'") == "***, PWD, xPW and '***'"
    assert Secrets([""]).strike("as it is") == "as it is"
    assert printable("see http://a:b@host/v1?key=1 now") == "see http://***@host/v1?*** now"


def test_a_key_that_is_a_common_word_is_one_in_texts() -> None:
    """Of a server that wants no key; in messages it is struck all the same."""
    found = Connection("http://host:8000/v1", "local", 1.0, 0, "x")
    assert found.secrets.strike("reads local news") == "reads local news"
    assert found.private.strike("wrong key local") == "wrong key ***"
    assert Connection("http://host:8000/v1", "l0cal", 1.0, 0, "x").secrets.strike("an l0cal key") == "an *** key"
