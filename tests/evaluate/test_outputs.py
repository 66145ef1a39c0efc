"""What an evaluation writes, counted again from the part files and the shards by other means."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disks import FULL, closed_to_others, mounted_disk, remount
from tests.evaluate.world import ROOT, numbers_of, parts_of, run_command, scores_of, write_config
from tests.kills import killed_at_every_change
from trsr_dist.config import load_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate import job, report
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.job import evaluate
from trsr_dist.evaluate.reduce import Reduced
from trsr_dist.evaluate.report import publish
from trsr_dist.shards.reader import ShardSet

NUM_USERS = 146


@pytest.fixture(scope="module")
def ranks(run: Path, alone: Path) -> dict[str, int]:
    """Place of each user's target by sorted scores."""
    scores, shards = scores_of(alone), ShardSet(run / "shards" / "test")
    places = {}
    for index in range(len(shards)):
        sample = shards.read(index)
        order = sorted(sample.candidates, key=lambda c: -scores[sample.user, c.item])
        places[sample.user] = 1 + [c.label for c in order].index(1)
    return places


def test_metrics_equal_a_plain_count(alone: Path, ranks: dict[str, int]) -> None:
    results = numbers_of(alone)
    assert results["tie_rate"] == 0
    found = results["metrics"]
    for k in (1, 3):
        inside = [rank for rank in ranks.values() if rank <= k]
        assert found[f"recall@{k}"] == pytest.approx(len(inside) / NUM_USERS)
        assert found[f"mrr@{k}"] == pytest.approx(sum(1 / rank for rank in inside) / NUM_USERS)
        assert found[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(rank + 1) for rank in inside) / NUM_USERS)
    assert found["auc"] == pytest.approx(sum((7 - rank) / 6 for rank in ranks.values()) / NUM_USERS)


def test_slices_are_the_users_of_that_kind(run: Path, alone: Path, ranks: dict[str, int]) -> None:
    store = HistoryStore(run / "histories")
    users = [store.user("test", index) for index in range(store.num_users("test"))]
    catalogue, popularity = store.catalogue, store.catalogue.column("popularity")
    category = {row.user: catalogue.category(row.candidates[row.labels.index(1)]) for row in users}
    slices = {(row["slice"], row["value"]): row for row in numbers_of(alone)["slices"]}
    assert {kind for kind, _ in slices} >= {"history length", "summary scheme", "trimmed", "target"}
    assert slices["summary scheme", "hierarchical"]["num_users"] == NUM_USERS
    seen = [r.user for r in users if popularity[r.candidates[r.labels.index(1)]]]
    row = slices["target", "seen in training"]
    assert row["num_users"] == len(seen) < NUM_USERS
    assert row["metrics"]["recall@3"] == pytest.approx(sum(ranks[user] <= 3 for user in seen) / len(seen))
    trimmed = numbers_of(alone)["trims"]["users"]
    assert slices["trimmed", "yes"]["num_users"] == trimmed
    assert slices["trimmed", "no"]["num_users"] == NUM_USERS - trimmed
    counts = Counter(category.values())
    assert {value for kind, value in slices if kind == "category"} == {c for c, n in counts.items() if n > 30}


def test_calibration_counts_every_candidate_and_moves_by_the_training_ratio(alone: Path) -> None:
    """One negative per positive in training, six here: the correction is log(1 / 6) for every score."""
    scores = list(scores_of(alone).values())
    found = numbers_of(alone)["calibration"]
    for name, shift in (("raw", 0.0), ("corrected", math.log(1 / 6))):
        bins = found[name]["bins"]
        assert sum(entry["count"] for entry in bins) == len(scores) == 7 * NUM_USERS
        total = sum(entry["count"] * entry["predicted"] for entry in bins)
        assert total == pytest.approx(sum(1 / (1 + math.exp(-score - shift)) for score in scores))
        assert sum(entry["count"] * entry["observed"] for entry in bins) == pytest.approx(NUM_USERS)


def test_compare_gives_the_gain_of_the_results(alone: Path) -> None:
    command = [sys.executable, "tools/compare.py", str(alone), str(alone / "test" / "control"), "--top-k", "1", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        match = re.match(r"(R|MRR|NDCG)@3 ", line)
        if match:
            name = {"R": "recall", "MRR": "mrr", "NDCG": "ndcg"}[match[1]] + "@3"
            gain = numbers_of(alone)["personalization_gain"][name]["mean"]
            assert float(line.split()[3]) == pytest.approx(gain, abs=1e-4)
    assert f"{NUM_USERS} users" in done.stdout


def test_the_report_holds_tables_figures_and_examples(alone: Path) -> None:
    page, results = (alone / "report.html").read_text(), numbers_of(alone)
    assert page.count("<svg") == 4, "the run has no training, so no curves"
    assert page.count("target at rank") == 10
    for name in ("random", "popularity", "base", "control"):
        assert f"{results['baselines'][name]['ndcg@3']:.4f}" in page
    assert f"{results['personalization_gain']['ndcg@3']['mean']:+.4f}" in page
    assert "Answer yes or no" not in page
    assert results["provenance"]["base"]["fingerprint"] in page


def test_tensorboard_holds_scalars_and_figures(run: Path, alone: Path, tmp_path: Path) -> None:
    for name in ("histories", "shards", "base", "merged", "metrics.jsonl"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "metrics.jsonl").unlink()
    config = write_config(tmp_path, run={"tensorboard": True}, evaluate={"max_users": 20, "baselines": ["popularity"]})
    evaluate(config, "RUN/merged")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "evaluate")).Reload()
    results = numbers_of(tmp_path / "evaluation")
    assert events.Scalars("test/recall@3")[0].value == pytest.approx(results["metrics"]["recall@3"])
    assert events.Scalars("test/recall@3")[0].step == 7
    gain = results["personalization_gain"]["auc"]["mean"]
    assert events.Scalars("test_gain/auc")[0].value == pytest.approx(gain)
    assert {"test/Recall by K", "test/Calibration"} <= set(events.Tags()["images"])


def test_the_validation_split_has_separate_files(run: Path, tmp_path: Path) -> None:
    config = write_config(run, "valid.yaml", evaluate={"split": "valid", "baselines": []})
    evaluate(config, "RUN/merged", output=str(tmp_path))
    assert (tmp_path / "valid.json").is_file()
    assert not (tmp_path / "test.json").exists()


def test_a_full_disk_keeps_the_parts_that_are_whole(run: Path, alone: Path, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "64k") as disk:
        status, text = run_command(run, disk)
        assert status == 1 and FULL in text and "Traceback" not in text
        kept = parts_of(disk)
        remount(disk, "size=64m")
        assert run_command(run, disk)[0] == 0
        assert kept.items() <= parts_of(disk).items() == parts_of(alone).items()
        assert numbers_of(disk)["metrics"] == numbers_of(alone)["metrics"]


def test_colleagues_may_read_all_outputs(run: Path, alone: Path) -> None:
    """Those of prepare, summarize, merge and evaluate; base and checkpoint of this run are not the stages' own."""
    parts = [run / name for name in ("histories", "shards", "summaries", "merged", "config", "metrics.jsonl")]
    files = [path for part in parts for path in (part, *part.rglob("*"))]
    files += alone.rglob("*")  # the folder is the test's, and pytest's own are closed
    assert len(files) > 40 and closed_to_others(files) == []


def published(run: Path, alone: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Evaluation, Reduced]:
    """What an evaluation in a copy of the folder publishes; here it does not."""
    found: list[tuple[Evaluation, Reduced]] = []
    shutil.copytree(alone, output)
    (output / "test" / "manifest.json").unlink()
    monkeypatch.setattr(job, "publish", lambda *arguments: found.append(arguments))
    evaluate(load_config(run / "config.yaml"), "RUN/merged", output=str(output))
    return found[0]


def test_curves_are_those_of_the_models_own_training(
    run: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, reduced = published(run, alone, tmp_path / "out", monkeypatch)
    rows = [{"stage": "train", "step": step, "train/loss": 1.0} for step in (1, 2)]
    monkeypatch.setattr(report, "read_metrics", lambda root: iter(rows))
    for trained, num_figures in ((True, 5), (False, 4), (None, 4)):
        publish(found, replace(reduced, results=reduced.results | {"trained_on_these_shards": trained}))
        assert found.report.read_text().count("<svg") == num_figures


def test_killed_at_every_change_of_what_is_published(
    run: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the manifest is there again, which comes last, it counts as unfinished and is published again."""
    output = tmp_path / "out"
    arguments = published(run, alone, output, monkeypatch)
    publish(*arguments)
    files = [output / name for name in ("test.json", "test/manifest.json", "report.html", "config/evaluate.yaml")]
    contents = [path.read_bytes() for path in files]
    done = []
    for _ in killed_at_every_change(lambda: publish(*arguments), "|".join(map(str, files))):
        done.append(arguments[0].is_done(force=False))
        assert all(path.read_bytes() == content for path, content in zip(files, contents, strict=True) if path.exists())
        assert not [path for path in files if not path.exists() and path.name != "manifest.json"]
    assert done == [True] + [False] * len(files)
    assert [path.read_bytes() for path in files] == contents and arguments[0].is_done(force=False)


def test_one_user_has_no_control(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml", ["evaluate.max_users=1"])
    with pytest.raises(DataError, match="the control needs another user's text"):
        evaluate(config, "RUN/merged", output=str(tmp_path))
