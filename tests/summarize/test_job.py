"""Whole jobs: what is made again and what is not, what is refused, and the order in which users may come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from tests.kills import check_stage
from tests.summarize.server import Answer, Handler, Server, good, prompt_of, serving
from tests.summarize.world import run_here, tree_hash, write_config, write_histories
from tests.tokenizers import byte_level
from trsr_dist.cli import config_parser, parse_config
from trsr_dist.config import load_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import detect_ranks
from trsr_dist.errors import ConfigError, ModelError, RunError
from trsr_dist.files import read_json
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Sample
from trsr_dist.run import RunFolder
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize import plans
from trsr_dist.summarize.cache import TextCache
from trsr_dist.summarize.engines.build import (
    build_engine,
    engine_identity,
    hub_commit,
    model_fingerprint,
    recorded_commit,
    revision_to_load,
)
from trsr_dist.summarize.job import Job, Task, sample_config, summarize
from trsr_dist.summarize.plans.graph import raw_text

USERS = {"train": 20, "valid": 3, "test": 3}


def prepared(folder: Path, **settings: object) -> tuple[Path, Path]:
    run = folder / "run"
    write_histories(run, USERS)
    return run, write_config(run, summarize=settings)


@contextmanager
def served(folder: Path, **settings: object) -> Iterator[tuple[Path, Path, Server]]:
    """A job on a good server."""
    with serving(good) as server:
        engine = {"engine": "openai", "model": "small", "base_url": server.address}
        yield *prepared(folder, **engine, **settings), server


def prompts(server: Server) -> list[str]:
    return [prompt_of(body) for _, body, _ in server.requests]


def samples(run: Path, split: str = "train") -> dict[str, Sample]:
    shards = ShardSet(run / "shards" / split)
    return {sample.user: sample for sample in shards.read_many(range(len(shards)))}


def grow(run: Path) -> None:
    """Every user goes on: five more items."""
    (run / "histories").rename(run / "old")
    write_histories(run, USERS, more=5)


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
def test_users_who_go_on_cost_only_their_new_blocks(tmp_path: Path, scheme: str) -> None:
    with served(tmp_path, scheme=scheme, block_size=5, fan_in=100) as (run, config, server):
        run_here(config)
        old, first = samples(run), prompts(server)
        server.requests.clear()
        grow(run)
        with pytest.raises(RunError, match="histories"):
            run_here(config)
        run_here(config, force=True)
        new = samples(run)
        asked = prompts(server)
    assert len(asked) == len(set(asked)) and not set(asked) & set(first)
    for user, sample in new.items():
        before, after = ({tuple(node) for node in one.provenance["nodes"]} for one in (old[user], sample))
        full_blocks = len(old[user].provenance["history"]) // 5
        assert len(before & after) >= full_blocks
        assert len(after - before) <= 3


def test_texts_without_a_model_are_not_looked_for_among_those_of_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read what all others write takes each of many tasks longer than to write its own share."""
    looks, plain_refresh = [], TextCache.refresh
    monkeypatch.setattr(TextCache, "refresh", lambda self: looks.append(None) or plain_refresh(self))
    run_here(prepared(tmp_path / "extractive", users_per_shard=2)[1])
    assert len(looks) == 1
    with served(tmp_path / "served", users_per_shard=2) as (_, config, _):
        run_here(config)
    assert len(looks) > sum(USERS.values()) // 2


def test_a_plan_of_ones_own_is_one_short_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "ends.py").write_text(_ENDS)
    monkeypatch.setattr(plans, "__path__", [*plans.__path__, str(tmp_path / "plans")])
    run, config = prepared(tmp_path, scheme="ends", block_size=3)
    run_here(config)
    for sample in samples(run).values():
        kinds = [node[0] for node in sample.provenance["nodes"]]
        assert kinds == ["end", "end", "both"] and sample.summary


_ENDS = '''
"""The first and the latest block, side by side."""

from trsr_dist.summarize.plans.graph import Node, Plan


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Two blocks and what they have in common."""
    first, last = (0, min(block_size, num_items)), (max(0, num_items - block_size), num_items)
    return Node("end", end, (), *first), Node("end", end, (), *last), Node("both", both, (0, 1))


def end(domain: str) -> str:
    return f"Summarize these {domain}."


def both(domain: str) -> str:
    return f"What do these two summaries of {domain} share?"
'''


def test_raw_shows_the_older_items_whatever_the_engine(tmp_path: Path) -> None:
    """No model is named, and no engine asked; the budget is a setting of the shards, the engine is none."""
    run, config = prepared(tmp_path, scheme="raw", engine="vllm", max_new_tokens=30)
    run_here(config)
    store, before = HistoryStore(run / "histories"), tree_hash(run / "shards")
    texts = {store.catalogue.item(row).id: store.catalogue.text(row) for row in range(len(store.catalogue))}
    shown = samples(run)
    assert len(shown) == USERS["train"]
    for sample in shown.values():
        history = [texts[item] for item in sample.provenance["history"]]
        assert sample.recent == tuple(history[-5:]) and sample.provenance["nodes"] == []
        assert sample.summary == raw_text(history, 5, 30)
        assert not any(text in sample.summary for text in sample.recent)
    assert any(sample.summary for sample in shown.values())
    run_here(config, "summarize.engine=openai", "summarize.model=other")
    assert tree_hash(run / "shards") == before
    with pytest.raises(RunError, match="'max_words': 30.* now .*'max_words': 31"):
        run_here(config, "summarize.max_new_tokens=31")
    run_here(config, "summarize.scheme=none", force=True)
    assert {sample.summary for sample in samples(run).values()} == {""}


def test_an_unknown_scheme_is_named_with_those_there_are(tmp_path: Path) -> None:
    _, config = prepared(tmp_path)
    with pytest.raises(ConfigError, match="summarize.scheme='treelike'.*hierarchical, none, raw, recurrent"):
        parse_config(config_parser("", ""), ["--config", str(config), "summarize.scheme=treelike"])


def test_a_base_url_with_a_password_is_refused(tmp_path: Path) -> None:
    _, config = prepared(tmp_path)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        load_config(config, ["summarize.base_url=http://me:word@host/v1"])


def test_texts_that_a_dead_holder_left_are_used_by_its_heir(tmp_path: Path) -> None:
    """They are written while the heir is at work, so it must look again when it takes over a unit."""
    with served(tmp_path / "calm") as (run, config, _):
        run_here(config)
        texts = TextCache(run / "summaries/journal", "reader")
        records = [texts.get(node[3]) for sample in samples(run).values() for node in sample.provenance["nodes"]]
    with served(tmp_path / "heir", users_per_shard=4, max_in_flight=1) as (run, config, server):
        dead = TextCache(run / "summaries/journal", "dead")
        server.answer = leaving(dead, records)
        run_here(config)
    assert len(server.requests) < len(records) // 2


def leaving(cache: TextCache, records: list[dict]) -> Answer:
    """Good; while the first prompt is answered, another task writes all that it has done."""
    left = iter(records)

    def answer(handler: Handler, body: dict, tries: int) -> None:
        for record in left:
            cache.add(record)
        good(handler, body, tries)

    return answer


def test_other_settings_are_refused_and_forced(tmp_path: Path) -> None:
    run, config = prepared(tmp_path)
    run_here(config)
    before = tree_hash(run / "shards")
    with pytest.raises(RunError, match="block_size=5, now 3"):
        run_here(config, "summarize.block_size=3")
    assert tree_hash(run / "shards") == before
    run_here(config, "summarize.block_size=3", force=True)
    assert read_json(run / "shards/train/manifest.json")["settings"]["block_size"] == 3
    run_here(config, "summarize.block_size=5", force=True)
    assert tree_hash(run / "shards") == before


def test_what_a_kill_right_after_publishing_left_is_cleared(tmp_path: Path) -> None:
    run, config = prepared(tmp_path)
    run_here(config)
    for name in (
        ".train-abc.tmp-host-1",
        read_json(next(run.glob("summaries/progress/*/job.json")))["splits"]["train"]["work"],
    ):
        (run / "summaries/work" / name / "units").mkdir(parents=True)
    for path in (run / "summaries/work").rglob("*"):
        os.utime(path, (1, 1))
    run_here(config)
    assert list((run / "summaries/work").iterdir()) == []


def test_histories_of_any_length(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_histories(run, {"train": 2, "valid": 1, "test": 1}, max_history=110, least=100)
    config = write_config(run, summarize={"block_size": 1, "fan_in": 2})
    for scheme in ("hierarchical", "recurrent"):
        run_here(config, f"summarize.scheme={scheme}", force=True)
        assert all(len(sample.provenance["nodes"]) >= 100 for sample in samples(run).values())


def test_the_missing_engine_is_named_with_its_installation(tmp_path: Path) -> None:
    _, config = prepared(tmp_path, engine="vllm", model="some/model")
    if find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(ConfigError, match="pip install vllm"):
        build_engine(load_config(config).summarize, "some/model", "", 0)


def test_a_hub_model_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as on a node without a network."""
    commit, folder = "a" * 40, tmp_path / "hub" / "models--some--model"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root, config = prepared(tmp_path, engine="transformers", model="some/model", temperature=1)
    assert hub_commit(load_config(config).summarize) == commit
    assert hub_commit(load_config(config, [f"summarize.revision={'b' * 40}"]).summarize) == "b" * 40
    with pytest.raises(ModelError, match="other/model"):
        hub_commit(load_config(config, ["summarize.model=other/model"]).summarize)
    settings = load_config(config).summarize
    assert recorded_commit(settings, tmp_path / "summaries") == commit

    def of_sample(number: int) -> str:
        parts = sample_config(load_config(config), number), RunFolder(root).sample(number)
        return Job(*parts, HistoryStore(root / "histories"), Task.detect(), False, ("train",)).identity["fingerprint"]

    assert of_sample(0) == commit
    (folder / "snapshots" / commit).rename(folder / "snapshots" / ("c" * 40))
    (folder / "refs" / "main").write_text("c" * 40)
    assert hub_commit(settings) == "c" * 40 and recorded_commit(settings, tmp_path / "summaries") == commit
    identity = engine_identity(settings, "some/model", 0, tmp_path / "summaries")
    assert identity["fingerprint"] == revision_to_load(settings, identity) == commit
    assert of_sample(1) == commit, "all samples of a run have one writer"


def test_a_tensor_that_changes_makes_another_model(tmp_path: Path) -> None:
    """As an adapter that is merged into the same folder changes a few, the files' sizes stay."""
    tensors = {f"layer{number:02d}": torch.zeros(50_000) for number in range(40)}
    found = set()
    for changed in (None, "layer00", "layer01", "layer04"):
        others = {changed: torch.ones(50_000)} if changed else {}
        save_file(tensors | others, tmp_path / "model.safetensors")
        found.add(model_fingerprint(tmp_path))
    assert len(found) == 4


def test_a_job_of_other_settings_is_kept_out_while_one_is_at_work(tmp_path: Path) -> None:
    def asking(handler: Handler, body: dict, tries: int) -> None:
        if not refusals:
            other = Job(changed, RunFolder(run), HistoryStore(run / "histories"), Task.detect(), force=False)
            with pytest.raises(RunError, match="block_size") as caught:
                other.run()
            refusals.append(str(caught.value))
        good(handler, body, tries)

    refusals: list[str] = []
    with served(tmp_path, max_in_flight=1) as (run, config, server):
        changed = load_config(config, ["summarize.block_size=3"])
        server.answer = asking
        run_here(config)
    assert "at work here with block_size=5, now 3" in refusals[0]


def test_a_set_whose_manifest_is_not_visible_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS shows it for a while: the work folder is gone, and the shards are not there."""
    run, config = prepared(tmp_path)
    job = Job(load_config(config), RunFolder(run), HistoryStore(run / "histories"), Task.detect(), force=False)
    job._publish(None)
    assert len(job.unpublished) == 3
    run_here(config)
    job._publish(None)
    assert not job.unpublished
    job.unpublished = dict(job.works)
    shutil.rmtree(run / "shards")
    monkeypatch.setattr("trsr_dist.summarize.job.GONE_SECONDS", -1.0)
    with pytest.raises(RunError, match="removed while this task was at work"):
        job._publish(None)


def test_killed_at_every_change_while_a_set_is_redone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_histories(run, {"train": 3, "valid": 1, "test": 1}, max_history=9)
    config = write_config(run)
    check_stage(
        run / "shards" / "train",
        lambda: run_here(config),
        lambda: run_here(config, "run.seed=1", force=True),
        lambda: run_here(config, force=True),
    )
    assert sorted(path.name for path in (run / "shards").iterdir()) == ["test", "train", "valid"]
    assert not list((run / "summaries" / "work").iterdir())


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_tokens_are_counted_as_the_shards_are_written_where_the_tokenizer_is_known(
    tmp_path: Path, num_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    byte_level().save_pretrained(base)
    run, _ = prepared(tmp_path)
    config = load_config(write_config(run, model={"name_or_path": str(base)}))
    for index in range(num_tasks):
        task = Task(index, num_tasks, f"t{index}", detect_ranks())
        monkeypatch.setattr(Task, "detect", lambda task=task: task)
        assert summarize(config) == 0
    shards, builder = ShardSet(run / "shards" / "train"), PromptBuilder(byte_level(), **config.prompt.model_dump())
    shutil.copytree(shards.folder, tmp_path / "train", ignore=shutil.ignore_patterns("lengths-*"))
    with patch.object(PromptBuilder, "build", side_effect=AssertionError("counted again")):
        ahead = measure_lengths(shards, builder)
    assert tree_hash(ahead.folder) == tree_hash(measure_lengths(ShardSet(tmp_path / "train"), builder).folder)


def test_shards_are_written_whatever_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text("{")
    run, _ = prepared(tmp_path)
    run_here(write_config(run, model={"name_or_path": str(tmp_path / "base")}))
    assert len(samples(run)) == USERS["train"] and not list(run.glob("shards/train/lengths-*"))
    assert "lengths could not be measured: model" in capsys.readouterr().out
