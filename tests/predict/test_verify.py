"""The check of a server: silent where scores are ours, and each fault provoked and named."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.predict.world import Served, load, make_folder
from tests.spawn import run_script
from tests.summarize.server import Handler, serving
from tests.tokenizers import GEMMA_TEMPLATE, sentencepiece
from trsr_dist.errors import ConfigError, EngineError
from trsr_dist.files import write_json
from trsr_dist.merge.scores import built_in_samples
from trsr_dist.model.loading import find_model
from trsr_dist.predict.diagnosis import Local
from trsr_dist.predict.server import ScoreServer, ServerSettings
from trsr_dist.predict.verify import TOLERANCE, Verification, default_tolerance, find_samples, verify
from trsr_dist.shards.manifest import write_split_manifest
from trsr_dist.shards.writer import write_shard

NUM_USERS = 3
BOS = 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, trained on chat or on plain prompts, its base, and another model."""
    root = tmp_path_factory.mktemp("folders")
    base = make_folder(root / "base", seed=2)
    plain = make_folder(root / "plain", style="plain")
    return {
        "base": base,
        "chat": make_folder(root / "chat", base=base),
        "plain": plain,
        "other": make_folder(root / "o", 3),
    }


@pytest.fixture(scope="module")
def locals_(folders: dict[str, Path]) -> dict[str, Local]:
    return {name: Local.open(str(folders[name]), device="cpu") for name in ("chat", "plain")}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], locals_: dict[str, Local]) -> Served:
    return Served(load(folders["chat"]), sentencepiece(), locals_["chat"].prompts.builder.answer_ids)


def check(local: Local, served: Served, routes: tuple[str, ...] = ("tokens",), tolerance: float = 1e-4) -> Verification:
    with serving(served) as server:
        asked = ScoreServer(
            ServerSettings(server.address, timeout_seconds=60, top_logprobs=served.max_logprobs), local.prompts.builder
        )
        return verify(local, asked, built_in_samples("news")[:NUM_USERS], "built-in", routes, tolerance)


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("classifies", [False, True])
def test_a_right_server_is_found_right_on_every_route(
    locals_: dict[str, Local], served: Served, style: str, classifies: bool
) -> None:
    answers = locals_[style].prompts.builder.answer_ids
    right = replace(served, classifies=classifies, answer_ids=answers)
    found = check(locals_[style], right, ("tokens", "text", "chat"), 1e-5)
    assert found.is_equal, "\n".join(found.lines())
    compared = [route.route for route in found.routes if route.num_prompts]
    assert compared == (["tokens", "text", "chat"] if style == "chat" else ["tokens", "text"])
    assert all(route.num_prompts == 8 * NUM_USERS and not route.order_changes for route in found.routes[:2])


def cut(length: int, at_end: bool) -> Callable[[list[int]], list[int]]:
    return lambda ids: ids[:length] if at_end else ids[-length:]


NAMED = {
    "doubled BOS": {"change": lambda ids: [BOS, *ids]},
    "missing BOS": {"change": lambda ids: ids[1:]},
    "prompts are cut to 40 tokens, their beginning": {"change": cut(40, False)},
    "prompts are cut to 150 tokens, their end": {"change": cut(150, True)},
}


@pytest.mark.parametrize("words", NAMED)
@pytest.mark.parametrize("tells", [True, False], ids=["told", "imitated"])
def test_faults_of_prompts(locals_: dict[str, Local], served: Served, words: str, tells: bool) -> None:
    """Named by the token ids that the server tells, or, where it tells none, by imitating them here."""
    found = check(locals_["chat"], replace(served, knows_ids=tells, max_logprobs=1000, **NAMED[words])).routes[0]
    assert found.fault.startswith(words) and found.largest_difference > 1e-3


@pytest.mark.parametrize("tells", [True, False], ids=["told", "imitated"])
def test_faults_of_the_text_route(locals_: dict[str, Local], served: Served, tells: bool) -> None:
    """A server that adds special tokens whatever it is asked doubles the template's BOS; token ids stay right."""
    told = {"knows_ids": tells, "has_tokenize": tells, "max_logprobs": 1000}
    found = check(locals_["chat"], replace(served, special=True, **told), ("tokens", "text"))
    assert not found.routes[0].fault and found.routes[1].fault.startswith("doubled BOS") and not found.is_equal
    answers = locals_["plain"].prompts.builder.answer_ids
    found = check(locals_["plain"], replace(served, special=False, answer_ids=answers, **told), ("tokens", "text"))
    assert not found.routes[0].fault and found.routes[1].fault.startswith("missing BOS") and not found.is_equal

    found = check(locals_["plain"], replace(served, wraps=True, answer_ids=answers, **told), ("text",))
    assert found.routes[0].fault.startswith("another template: the chat template is put around it")


def test_another_template_for_messages(locals_: dict[str, Local], served: Served) -> None:
    found = check(locals_["chat"], replace(served, template=GEMMA_TEMPLATE), ("tokens", "chat"))
    assert not found.routes[0].fault
    assert found.routes[1].fault.startswith("another template or tokenizer: from token")
    assert "<start_of_tur" in found.routes[1].fault and "[INST]" in found.routes[1].fault
    found = check(locals_["chat"], replace(served, has_tokenize=False), ("tokens", "chat"))
    assert found.is_equal and found.routes[1].note == "the server has no /tokenize"


def test_faults_of_weights(folders: dict[str, Path], locals_: dict[str, Local], served: Served) -> None:
    for name, words in (("base", "the base model is served"), ("other", "another adapter or other weights")):
        found = check(locals_["chat"], replace(served, model=load(folders[name]))).routes[0]
        assert found.fault.startswith(words) and found.order_changes > 0
    half = replace(served, model=load(folders["chat"], "bfloat16"))
    found = check(locals_["chat"], half)
    assert found.routes[0].fault.startswith("16-bit rounding") and found.routes[0].largest_difference < 0.25
    assert check(locals_["chat"], half, tolerance=0.25).is_equal


def test_a_base_that_is_as_near_as_16_bits_is_named(served: Served, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    load(base, "bfloat16").float().save_pretrained(base)
    gentle = Local.open(str(make_folder(tmp_path / "gentle", base=base)), device="cpu")
    found = check(gentle, replace(served, model=load(base))).routes[0]
    assert found.fault.startswith("the base model is served") and found.largest_difference < 0.25


def test_faults_of_answers(locals_: dict[str, Local], served: Served) -> None:
    yes, no = served.answer_ids
    tokenizer = sentencepiece()
    others = tuple(tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    assert others != (yes, no)
    classifier = replace(served, classifies=True)
    for changes, words in (
        ({"answer_ids": (no, yes)}, "swapped answer tokens"),
        ({"answer_ids": others}, "wrong answer tokens"),
        ({"score": lambda x: 1 / (1 + 2.718281828459045**-x)}, "probabilities come back"),
        ({"score": lambda x: 0.7 * x + 0.5}, "scores are 0.7 times ours +0.5"),
        ({"score": lambda x: 0.5}, "constant scores: every candidate gets 0.5"),
        ({"score": lambda x: float("inf")}, "scores that are not finite"),
    ):
        found = check(locals_["chat"], replace(classifier, **changes)).routes[0]
        assert found.fault.startswith(words), found.fault
        assert found.constant == words.startswith("constant")


def test_missing_log_probabilities(locals_: dict[str, Local], served: Served) -> None:
    silent = replace(served, knows_ids=False, echoes=False, max_logprobs=1)
    found = check(locals_["chat"], silent)
    assert found.routes[0].missing_share == 1.0 and not found.is_equal
    assert found.routes[0].fault.startswith("missing log-probabilities: no log-probability of 'yes' (token")


def test_of_a_server_that_fails_no_more_is_asked(locals_: dict[str, Local], served: Served) -> None:
    num_failed = 0

    def failing(handler: Handler, body: dict, tries: int) -> None:
        nonlocal num_failed
        if "logprobs" not in body:  # which protocol it has
            served(handler, body, tries)
            return
        num_failed += 1
        handler.reply({"error": {"message": "the GPU is lost"}}, 500)

    with serving(failing) as server:
        settings = ServerSettings(server.address, max_in_flight=1, max_retries=1)
        asked = ScoreServer(settings, locals_["chat"].prompts.builder)
        with pytest.raises(EngineError, match="the GPU is lost"):
            verify(locals_["chat"], asked, built_in_samples("news")[:NUM_USERS], "built-in", ["tokens"], 1e-4)
        assert num_failed <= 4, "two tries of the prompt that failed, and of one under way"


def test_users_come_from_the_run_beside_the_model_or_are_built_in(tmp_path: Path, locals_: dict[str, Local]) -> None:
    samples, origin = find_samples(str(tmp_path / "merged"), None, 2, "news")
    assert len(samples) == 2 and origin == "built-in prompts"
    step, shards = tmp_path / "checkpoints" / "step-000007", tmp_path / "shards" / "test"
    for name in ("adapter/adapter_config.json", "provenance.json"):
        write_json(step / name, {})
    (step.parent / "latest").write_text(step.name)
    write_split_manifest(shards, [write_shard(shards / "test-000000.tar", built_in_samples("news")[:3])], {}, {})
    for model in ("", "merged", "checkpoints", "checkpoints/latest", "checkpoints/step-000007/adapter", step):
        samples, origin = find_samples(str(tmp_path / model), None, 2, "news")
        assert (len(samples), origin) == (2, "shards/test"), model
    assert find_samples(str(tmp_path), shards, 9, "news") == (built_in_samples("news")[:3], str(shards))
    with pytest.raises(ConfigError, match="holds no manifest.json; name a split"):
        find_samples(str(tmp_path), tmp_path, 9, "news")
    assert default_tolerance(locals_["chat"]) == TOLERANCE
    halved = Local(locals_["chat"].prompts, torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    assert default_tolerance(halved) == 0.25


def test_a_model_of_the_hub_has_the_prompts_of_its_training(
    folders: dict[str, Path], locals_: dict[str, Local], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the local cache, as on a node without a network."""
    copy = tmp_path / "models--team--ranker"
    shutil.copytree(folders["plain"], copy / "snapshots" / ("a" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = Local.open("team/ranker", device="cpu")
    assert found.prompts.provenance == locals_["plain"].prompts.provenance
    assert found.prompts.builder.settings == locals_["plain"].prompts.builder.settings
    assert default_tolerance(found) == TOLERANCE
    (copy / "snapshots" / ("a" * 40) / "provenance.json").unlink()
    assert find_model("team/ranker").provenance == {}


def test_the_command(folders: dict[str, Path], served: Served, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    common = ("--model", folders["chat"], "--num-users", 2, "--device", "cpu", "--json", figures)
    with serving(served) as server:
        done = run_script("tools/verify_server.py", *common, "--server", server.address)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "what is served is what was trained" in done.stdout
        found = json.loads(figures.read_text())
        assert found["is_equal"] and [route["route"] for route in found["routes"]] == ["tokens", "text", "chat"]
    with serving(replace(served, change=lambda ids: [BOS, *ids])) as server:
        done = run_script("tools/verify_server.py", *common, "--server", server.address, "--routes", "tokens")
        assert done.returncode == 1 and "tokens: doubled BOS" in done.stdout
        assert not json.loads(figures.read_text())["is_equal"]
    done = run_script("tools/verify_server.py", *common, "--server", server.address, "--max-retries", 1)
    assert done.returncode == 1 and "that the server runs" in done.stderr


def test_without_the_client_of_servers_the_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connection", "predict.server", "predict.verify", "summarize.engines.openai"):
        monkeypatch.delitem(sys.modules, f"trsr_dist.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    for module in ("predict.server", "predict.verify", "summarize.engines.openai"):
        with pytest.raises(ConfigError, match=r"pip install 'trsr_dist\[openai\]'"):
            import_module(f"trsr_dist.{module}")
    assert "--routes" in runpy.run_path("tools/verify_server.py")["build_parser"]().format_help()
