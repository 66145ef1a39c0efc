"""Requests that fail for good, in whole jobs against a real server: who is left out, what is told, what stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.summarize.server import Server, good, refusing, serving
from tests.summarize.world import run_here, run_job, start, tree_hash, write_config, write_histories
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError, EngineError
from trsr_dist.files import read_json
from trsr_dist.records import Sample
from trsr_dist.shards.reader import ShardSet

USERS = {"train": 20, "valid": 3, "test": 3}


def prepared(folder: Path, server: Server, **settings: object) -> tuple[Path, Path]:
    """Run folder and config of a job on the server."""
    run = folder / "run"
    write_histories(run, USERS, max_history=12)
    engine = {"engine": "openai", "model": "small", "base_url": server.address, "max_retries": 1, "users_per_shard": 4}
    return run, write_config(run, summarize=engine | settings)


def train_samples(run: Path) -> dict[str, Sample]:
    shards = ShardSet(run / "shards" / "train")
    return {sample.user: sample for sample in shards.read_many(range(len(shards)))}


def poison(run: Path, *users: str) -> list[str]:
    """Texts that stand in the prompts of these users alone, or of few others."""
    store = HistoryStore(run / "histories")
    rows = [store.user("train", number) for number in range(store.num_users("train"))]
    return [store.catalogue.text(row.history[0]) for row in rows if row.user in users]


def failing(run: Path, server: Server, *users: str) -> set[str]:
    """Make the server refuse the users' first items; all users who have one of them in their history."""
    words = poison(run, *users)
    server.answer = refusing(*words)
    store = HistoryStore(run / "histories")
    rows = [store.user("train", number) for number in range(store.num_users("train"))]
    return {row.user for row in rows if {store.catalogue.text(item) for item in row.history} & set(words)}


def test_skipped_users_are_missing_and_named(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path, server, failed_users="skip")
        failed = failing(run, server, "train-3", "train-7")
        run_here(config)
    manifest = read_json(run / "shards/train/manifest.json")
    in_order = sorted(failed, key=lambda user: int(user.removeprefix("train-")))
    assert [failure["user"] for failure in manifest["failed"]] == in_order
    assert all("the prompt is refused" in failure["reason"] and failure["key"] for failure in manifest["failed"])
    assert set(train_samples(run)) == {f"train-{i}" for i in range(USERS["train"])} - failed
    assert manifest["num_users"] == USERS["train"] - len(failed)


def test_a_split_that_lost_all_its_users_is_not_published(tmp_path: Path) -> None:
    with serving(refusing("")) as server:
        run, config = prepared(tmp_path, server, failed_users="skip")
        with pytest.raises(EngineError, match="train: all 20 users failed.*the prompt is refused"):
            run_here(config)
    assert not (run / "shards").exists()


def test_users_kept_with_recent_items_only_say_so(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path, server, failed_users="recent_only", scheme="recurrent")
        failed = failing(run, server, "train-3")
        run_here(config)
    samples = train_samples(run)
    assert len(samples) == USERS["train"]
    for user, sample in samples.items():
        assert (sample.summary == "") == (user in failed) == ("failed" in sample.provenance)
        assert sample.recent
        assert len(sample.provenance["blocks"]) == len(sample.provenance["nodes"]) or user in failed


def test_by_default_a_failure_stops_the_job_and_nothing_is_lost(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path / "calm", server)
        run_here(config)
        expected, calls = tree_hash(run / "shards"), len(server.requests)
    with serving(good) as server:
        run, config = prepared(tmp_path / "wild", server)
        failing(run, server, "train-3")
        with pytest.raises(EngineError, match="the prompt is refused.*summarize.failed_users"):
            run_here(config)
        assert not (run / "shards").exists()
        server.answer = good
        run_here(config)
        assert len(server.requests) <= calls + 2 * 32, "finished texts were asked for again"
    assert tree_hash(run / "shards") == expected


def test_the_tolerance_is_that_of_all_tasks_and_starts(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path, server, failed_users="skip", max_failures=2, users_per_shard=1)
        failed = failing(run, server, "train-1", "train-8", "train-12", "train-17")
        assert len(failed) > 2
        tasks = [start(config, rank=rank, world_size=2) for rank in range(2)]
        outputs = [task.communicate(timeout=120)[0] for task in tasks]
        assert any(task.returncode == 1 for task in tasks) and "summarize.max_failures" in "".join(outputs), outputs
        with pytest.raises(EngineError, match="summarize.max_failures"):
            run_here(config)
        assert not (run / "shards/train").exists()
        run_here(config, "summarize.max_failures=100")
    assert len(train_samples(run)) == USERS["train"] - len(failed)


def test_a_lost_server_stops_the_job_and_blames_no_user(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path, server, failed_users="skip", max_retries=0)
    with pytest.raises(EngineError, match="start the server"):
        run_here(config)
    with serving(good) as server:
        run_here(config, f"summarize.base_url={server.address}")
    assert len(train_samples(run)) == USERS["train"]


def test_a_target_among_the_sources_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_histories(run, USERS, max_history=12, leak=True)
    with serving(good) as server:
        settings = {"engine": "openai", "model": "small", "base_url": server.address}
        config = write_config(run, summarize=settings, data={"format": "demo"})
        with pytest.raises(DataError, match="is also in the history"):
            run_here(config)
        assert server.requests == []
        run_here(config, "data.repeated_target=keep")
    counts = read_json(run / "shards/train/manifest.json")["counts"]
    assert counts["repeated_targets"] == USERS["train"]


def test_the_key_is_in_no_file_and_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with serving(good) as server:
        run, config = prepared(tmp_path, server, failed_users="skip")
        failing(run, server, "train-3")
        output = run_job(config)
        assert {key for _, _, key in server.requests} == {"Bearer very-secret"}
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"very-secret" in content for content in [*files, output.encode()])


def test_a_finished_stage_and_a_forced_one_make_no_call(tmp_path: Path) -> None:
    with serving(good) as server:
        run, config = prepared(tmp_path, server)
        run_here(config)
        calls, shards = len(server.requests), tree_hash(run / "shards")
        run_here(config)
        (run / "shards/train/train-000001.tar").write_bytes(b"damaged")
        assert tree_hash(run / "shards") != shards
        run_here(config, "summarize.base_url=", force=True)
        assert len(server.requests) == calls, "nor is an engine built"
    assert tree_hash(run / "shards") == shards
