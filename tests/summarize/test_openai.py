"""The OpenAI-compatible engine against a real HTTP server that misbehaves in all the ways servers do."""

from __future__ import annotations

import gzip
import socket
import threading
import time

import pytest

from tests.summarize.server import Answer, Handler, Server, good, prompt_of, refusing, serving
from tests.summarize.world import engine_settings
from trsr_dist.errors import ConfigError, EngineError
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.engines.openai import OpenAIEngine, log
from trsr_dist.summarize.requests import Completion, Request


def at_first(bad: Answer) -> Answer:
    """Good from a request's second try on."""

    def answer(handler: Handler, body: dict, tries: int) -> None:
        (bad if tries == 1 else good)(handler, body, tries)

    return answer


def failing(status: int) -> Answer:
    return lambda handler, body, tries: handler.reply(
        {"error": {"message": "not now"}}, status, {"Retry-After": "0.01"}
    )


def cut_off(handler: Handler, body: dict, tries: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(2)


def slow_first(handler: Handler, body: dict, tries: int) -> None:
    if tries == 1:
        time.sleep(1.0)
    good(handler, body, tries)


def malformed(data: bytes) -> Answer:
    return lambda handler, body, tries: handler.reply(data)


def broken_off(ending: str) -> Answer:
    return lambda handler, body, tries: reply_with(handler, "The user likes", ending)


def reply_with(handler: Handler, text: str | None, ending: str | None) -> None:
    choice = {"index": 0, "finish_reason": ending, "message": {"role": "assistant", "content": text}}
    handler.reply({"id": "x", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 20}})


def engine(server: Server, **options: object) -> OpenAIEngine:
    return OpenAIEngine(engine_settings(base_url=server.address, **{"max_in_flight": 4, "max_retries": 3, **options}))


def ask(client: OpenAIEngine, number: int = 3) -> list[Completion]:
    done: list[Completion] = []
    for i in range(number):
        client.submit(Request(str(i), SummaryPrompt("say", (), ("x" * i,)), 20))
    while len(done) < number:
        done += client.poll()
    client.close()
    return sorted(done, key=lambda completion: completion.key)


def test_a_closed_engine_leaves_no_thread_behind() -> None:
    with serving(good) as server:
        client = engine(server)
        assert ask(client)[0].text == expected()[0]
        for thread in client._threads:
            thread.join(10)
            assert not thread.is_alive()


def expected(number: int = 3) -> list[str]:
    return [f"summary of {len(SummaryPrompt('say', (), ('x' * i,)).text())}" for i in range(number)]


@pytest.mark.parametrize(
    "trouble",
    [
        good,
        failing(500),
        failing(503),
        failing(429),
        cut_off,
        malformed(b"<html>busy</html>"),
        malformed(b'{"choices": []}'),
        malformed(b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": null}}]}'),
        malformed(b'{"object": "error"}'),
        broken_off("abort"),
        broken_off("content_filter"),
    ],
)
def test_texts_arrive_in_spite_of_trouble(trouble: Answer) -> None:
    with serving(at_first(trouble)) as server:
        done = ask(engine(server))
    assert [completion.text for completion in done] == expected()
    assert [(completion.prompt_tokens, completion.new_tokens, completion.error) for completion in done] == [
        (7, 3, "")
    ] * 3


def test_a_slow_reply_is_given_up_and_asked_again() -> None:
    with serving(slow_first) as server:
        done = ask(engine(server, timeout_seconds=0.3), 2)
    assert [completion.text for completion in done] == expected(2)
    assert len(server.requests) == 4


def test_a_server_that_is_too_slow_for_good_blames_no_request() -> None:
    def slow(handler: Handler, body: dict, tries: int) -> None:
        time.sleep(0.5)
        good(handler, body, tries)

    with serving(slow) as server, pytest.raises(EngineError, match="summarize.max_in_flight.*timeout_seconds"):
        ask(engine(server, timeout_seconds=0.1, max_retries=0), 1)


def test_a_text_that_is_broken_off_for_good_is_no_summary() -> None:
    with serving(broken_off("content_filter")) as server:
        (done,) = ask(engine(server, max_retries=1), 1)
    assert not done.text and "content_filter" in done.error and len(server.requests) == 2


@pytest.mark.parametrize("ending", ["stop", "eos", None])
def test_texts_end_in_the_words_of_several_servers(ending: str | None) -> None:
    with serving(lambda handler, body, tries: reply_with(handler, "The user likes tea.", ending)) as server:
        (done,) = ask(engine(server), 1)
    assert (done.text, done.cut, done.error) == ("The user likes tea.", False, "")


def test_what_was_answered_before_the_server_was_lost_is_handed_out() -> None:
    def answer(handler: Handler, body: dict, tries: int) -> None:
        (failing(503) if "xx" in body["messages"][0]["content"] else good)(handler, body, tries)

    with serving(answer) as server:
        client = engine(server, max_retries=0, max_in_flight=1)
        for i in (2, 0, 1):
            client.submit(Request(str(i), SummaryPrompt("say", (), ("x" * i,)), 20))
        while client._done.qsize() < 3:
            time.sleep(0.01)
        assert sorted(completion.key for completion in client.poll()) == ["0", "1"]
        with pytest.raises(EngineError, match="503"):
            client.poll()
        client.close()


def test_a_request_that_fails_for_good_is_one_completion_with_its_reason() -> None:
    with serving(refusing("xx")) as server:
        done = ask(engine(server))
    assert [bool(completion.error) for completion in done] == [False, False, True]
    assert "400" in done[2].error and "the prompt is refused" in done[2].error


def test_a_request_that_cuts_its_own_connection_is_to_blame_itself() -> None:
    def answer(handler: Handler, body: dict, tries: int) -> None:
        (cut_off if "xx" in body["messages"][0]["content"] else good)(handler, body, tries)

    with serving(answer) as server:
        done = ask(engine(server, max_retries=1))
    assert [bool(completion.error) for completion in done] == [False, False, True]


def test_where_the_server_is_gone_no_request_is_to_blame() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = OpenAIEngine(engine_settings(base_url=f"http://127.0.0.1:{port}/v1", timeout_seconds=2.0))
    with pytest.raises(EngineError, match="start the server"):
        client._fit(SummaryPrompt("say", (), ("long " * 200,)))
    with pytest.raises(EngineError, match="start the server"):
        ask(client, 1)


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(good) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.address)
        assert ask(OpenAIEngine(engine_settings()), 1)[0].text == expected(1)[0]
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ConfigError, match="summarize.base_url"):
        OpenAIEngine(engine_settings())


def test_a_server_that_stays_down_or_talks_nonsense_is_reported() -> None:
    with serving(failing(500)) as server:
        assert "500" in ask(engine(server, max_retries=1), 1)[0].error
        assert len(server.requests) == 2
    with serving(malformed(b"nonsense")) as server:
        assert "malformed" in ask(engine(server, max_retries=1), 1)[0].error


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_address_or_model_stops_the_job_at_once(status: int) -> None:
    def refuse(handler: Handler, body: dict, tries: int) -> None:
        handler.reply({"error": {"message": "no"}}, status)

    with serving(refuse) as server, pytest.raises(EngineError, match=str(status)):
        ask(engine(server))


def test_no_more_requests_at_once_than_allowed() -> None:
    working: list[str] = []
    most: list[int] = []

    def answer(handler: Handler, body: dict, tries: int) -> None:
        working.append(prompt_of(body))
        most.append(len(working))
        time.sleep(0.03)
        working.pop()  # before the reply, after which the client may ask again
        good(handler, body, tries)

    with serving(answer) as server:
        ask(engine(server, max_in_flight=5), 30)
    assert len(most) == 30 and 1 < max(most) <= 5


def test_the_chat_template_is_told_not_to_think() -> None:
    with serving(good) as server:
        ask(engine(server, chat_template_kwargs={"enable_thinking": False}), 1)
        ask(engine(server, chat_template_kwargs={"enable_thinking": False}, prompt_style="plain"), 1)
    assert [body.get("chat_template_kwargs") for _, body, _ in server.requests] == [{"enable_thinking": False}, None]


def test_a_server_that_knows_no_template_variables_is_asked_without(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(log, "warning", lambda text, *values: told.append(text % values))

    def strict(handler: Handler, body: dict, tries: int) -> None:
        if "chat_template_kwargs" in body:
            handler.reply({"error": {"message": "Unrecognized request argument: chat_template_kwargs"}}, 400)
        else:
            good(handler, body, tries)

    with serving(strict) as server:
        done = ask(engine(server, chat_template_kwargs={"enable_thinking": False}, max_in_flight=1))
    assert [completion.text for completion in done] == expected() and len(server.requests) == 4
    (line,) = told
    assert "summarize.chat_template_kwargs" in line


def test_thoughts_that_the_server_keeps_apart_are_an_empty_text() -> None:
    with serving(lambda handler, body, tries: reply_with(handler, None, "length")) as server:
        (done,) = ask(engine(server), 1)
    assert (done.text, done.cut, done.error, done.new_tokens) == ("", True, "", 20) and len(server.requests) == 1


def test_the_key_travels_in_the_header_and_shows_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")

    def refuse(handler: Handler, body: dict, tries: int) -> None:
        handler.reply({"error": {"message": "no"}}, 401)

    with serving(refuse) as server, pytest.raises(EngineError) as caught:
        ask(engine(server))
    assert server.requests[0][2] == "Bearer very-secret"
    assert "very-secret" not in str(caught.value)


def test_plain_style_uses_the_completions_protocol_with_stop_strings() -> None:
    with serving(good) as server:
        done = ask(engine(server, prompt_style="plain"), 1)
    path, body, _ = server.requests[0]
    assert path == "/v1/completions" and body["stop"] and body["temperature"] == 0 and "seed" not in body
    assert done[0].text == expected(1)[0]
    assert any(stop in "It likes tea.\n\nSummary: x" for stop in body["stop"]), "a turn that the model makes up"
    assert not any(stop in "**Updated Summary:** It likes tea." for stop in body["stop"]), "a title"


@pytest.mark.parametrize("counts", [True, False])
def test_long_prompts_are_trimmed_by_the_servers_count(counts: bool) -> None:
    def answer(handler: Handler, body: dict, tries: int) -> None:
        if handler.path == "/tokenize" and not counts:
            handler.reply({"error": {"message": "unknown"}}, 404)
        else:
            good(handler, body, tries)

    prompt = SummaryPrompt("keep this", (), ("word " * 500, "short"))
    with serving(answer) as server:
        client = engine(server)
        fitted, cut = client._fit(prompt)
        client.submit(Request("0", prompt, 20))
        client.submit(Request("1", SummaryPrompt("word " * 500), 20))
        done = {completion.key: completion for completion in client.poll() + client.poll()}
        client.close()
    assert done["0"].text == f"summary of {len(fitted.text())}" and done["0"].words_cut == cut
    assert "summarize.max_prompt_tokens" in done["1"].error
    assert fitted.instruction == "keep this" and fitted.items[1] == "short" and cut > 100
    size = len(fitted.text().split()) if counts else len(fitted.text().encode()) // 3
    assert 280 < size <= 400 - 64


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_outage_blames_no_request(status: int) -> None:
    remedy = "lower summarize.max_in_flight or raise summarize.max_retries" if status == 429 else "start the server"
    with serving(failing(status)) as server:
        with pytest.raises(EngineError, match=f"{status}.*{remedy} and run"):
            ask(engine(server, max_retries=1), 1)
        with pytest.raises(EngineError, match=f"{status}.*{remedy} and run"):  # in counting tokens, too
            engine(server, max_retries=1)._fit(SummaryPrompt("say", (), ("long " * 200,)))


def test_a_prompt_that_leaves_no_room_changes_no_later_request() -> None:
    """vLLM names max_tokens in what it says of a prompt that is too long."""

    def answer(handler: Handler, body: dict, tries: int) -> None:
        if "of 0" in prompt_of(body):
            words = "max_tokens must be at least 1, got -45. (parameter=max_tokens, value=-45)"
            handler.reply({"error": {"message": words, "param": "max_tokens"}}, 400)
        else:
            good(handler, body, tries)

    with serving(answer) as server:
        client = engine(server, prompt_style="plain", max_in_flight=1)
        for number in range(3):
            client.submit(Request(str(number), SummaryPrompt(f"say of {number}"), 20))
        done = sorted((client.poll() + client.poll() + client.poll()), key=lambda completion: completion.key)
        client.close()
        assert ["max_tokens" in body for _, body, _ in server.requests] == [True] * len(server.requests)
    assert "at least 1" in done[0].error and not (done[1].error or done[2].error)


def test_a_base_model_wants_another_protocol() -> None:
    words = "default chat template is no longer allowed, so you must provide a chat template"

    def answer(handler: Handler, body: dict, tries: int) -> None:
        handler.reply({"error": {"message": words}}, 400)

    with serving(answer) as server, pytest.raises(EngineError, match=r"set summarize\.prompt_style=plain"):
        ask(engine(server), 1)


LONG = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x" * 3000}}


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": {"a": 1}},
        {"choices": 5},
        {"choices": [None]},
        {"choices": [{"message": []}]},
        {"choices": [LONG]},
        b"[" * 100_000,
        b'{"choices": [], "usage": ' + b"9" * 5000 + b"}",
        b"\xff",
    ],
    ids=range(8),
)
def test_a_reply_of_another_form_is_malformed(reply: object) -> None:
    with serving(lambda handler, body, tries: handler.reply(reply)) as server:
        (done,) = ask(engine(server, max_retries=1), 1)
    assert "malformed" in done.error and not done.text and len(server.requests) == 2


def test_half_a_character_and_odd_counts_do_no_harm() -> None:
    def odd(handler: Handler, body: dict, tries: int) -> None:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a \ud83d b"}}
        handler.reply({"choices": [choice], "usage": {"prompt_tokens": "many", "completion_tokens": -1}})

    with serving(odd) as server:
        (done,) = ask(engine(server), 1)
    assert (done.text, done.prompt_tokens, done.new_tokens, done.error) == ("a \ufffd b", 0, 0, "")


@pytest.mark.parametrize("status", [200, 502])
def test_a_reply_that_drips_is_given_up(status: int) -> None:
    def drip(handler: Handler, body: dict, tries: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    began = time.monotonic()
    with serving(drip) as server, pytest.raises(EngineError, match="timeout_seconds"):
        ask(engine(server, timeout_seconds=0.2, max_retries=0), 1)
    assert time.monotonic() - began < 1.5


def test_a_header_that_drips_is_given_up() -> None:
    def drip(handler: Handler, body: dict, tries: int) -> None:
        for _ in range(60):
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.05)

    began = time.monotonic()
    with serving(drip) as server, pytest.raises(EngineError, match="not begun"):
        ask(engine(server, timeout_seconds=0.2, max_retries=0), 1)
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_reply_is_not_read_to_its_end(packed: bool) -> None:
    sent = []

    def huge(handler: Handler, body: dict, tries: int) -> None:
        if handler.path == "/v1/chat/completions":
            data = gzip.compress(b" " * (1 << 25)) if packed else b" " * (1 << 25)
            handler.reply(data, headers={"Content-Encoding": "gzip"} if packed else None)
            sent.append(len(data))

    with serving(huge) as server:
        (done,) = ask(engine(server, max_retries=0), 1)
    assert ("compressed" if packed else "more than 16777216 bytes") in done.error
    assert packed or not sent  # the connection was closed before all was taken


def refusing_options(*words: str, status: int = 400, **form: object) -> Answer:
    """Good, but for bodies that hold an option; says so in one of the ways servers do."""

    def answer(handler: Handler, body: dict, tries: int) -> None:
        found = next((word for word in words if word in body), None)
        if found is None:
            good(handler, body, tries)
        else:
            handler.reply({"error": {"message": "no", **form} | {"param": form.get("param") and found}}, status)

    return answer


@pytest.mark.parametrize(
    ("option", "style", "form"),
    [
        ("max_tokens", "auto", {"param": True}),
        ("max_tokens", "auto", {"message": "'max_tokens' is not supported; use 'max_completion_tokens' instead."}),
        ("max_tokens", "plain", {"message": "unknown field max_tokens"}),
        ("seed", "auto", {"message": "Unrecognized request argument supplied: seed"}),
        ("seed", "auto", {"param": True}),
        ("stop", "plain", {"message": "Unsupported parameter: 'stop'"}),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_an_option_that_a_server_refuses_is_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch, option: str, style: str, form: dict, status: int
) -> None:
    told = []
    monkeypatch.setattr(log, "warning", lambda text, *values: told.append(text % values))
    with serving(refusing_options(option, status=status, **form)) as server:
        client = engine(server, prompt_style=style, max_in_flight=1)
        client.submit(Request("0", SummaryPrompt("say", (), ("x",)), 20, 0.5))
        client.submit(Request("1", SummaryPrompt("say", (), ("y",)), 20, 0.5))
        done = [client.poll(), client.poll()]
        client.close()
    assert not any(completion.error for (completion,) in done) and len(server.requests) == 3
    bodies = [body for _, body, _ in server.requests]
    assert option in bodies[0] and option not in bodies[1] and option not in bodies[2]
    assert bodies[2].get("max_completion_tokens", bodies[2].get("max_tokens")) == 20
    (line,) = told
    assert option in line


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (("temperature",), "summarize.temperature"),
        (("max_tokens", "max_completion_tokens"), "summarize.max_new_tokens"),
    ],
)
def test_an_option_without_another_way_is_a_settings_error(options: tuple[str, ...], setting: str) -> None:
    with serving(refusing_options(*options, param=True)) as server, pytest.raises(EngineError, match=setting):
        ask(engine(server), 1)


def test_a_prompt_that_is_too_long_for_the_server_is_to_blame_itself() -> None:
    """Such a message names options too."""

    def short(handler: Handler, body: dict, tries: int) -> None:
        words = "'max_tokens' is too large: 20. This model's maximum context length is 30 tokens"
        if "xx" in body["messages"][0]["content"]:
            handler.reply({"error": {"message": words, "param": "max_tokens"}}, 400)
        else:
            good(handler, body, tries)

    with serving(short) as server:
        done = ask(engine(server))
    assert [bool(completion.error) for completion in done] == [False, False, True]


@pytest.mark.parametrize("reply", [b"{broken", b'{"count": null}', b'{"tokens": 3}', b"[]"])
def test_a_server_that_counts_in_another_form_does_not_count(reply: bytes) -> None:
    def miscounting(handler: Handler, body: dict, tries: int) -> None:
        if handler.path == "/tokenize":
            handler.reply(reply)
        else:
            good(handler, body, tries)

    with serving(miscounting) as server:
        client = engine(server, max_prompt_tokens=100)
        fitted, cut = client._fit(SummaryPrompt("say", (), ("word " * 400,)))
        client.close()
    assert cut > 0 and fitted.items[0]


def test_the_process_does_not_wait_for_a_server_that_hangs() -> None:
    def hanging(handler: Handler, body: dict, tries: int) -> None:
        time.sleep(8)

    with serving(hanging) as server:
        client = engine(server, timeout_seconds=60.0)
        client.submit(Request("1", SummaryPrompt("say", (), ("x",)), 20))
        client.close()
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("Thread"))
