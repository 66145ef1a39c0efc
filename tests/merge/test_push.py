"""Pushing to a hub on loopback: the real client against a double of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.merge.hub import COMMIT, Hub, running_hub
from tests.merge.models import make_base, make_checkpoint
from trsr_dist.errors import ModelError, RunError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.push import PushOptions, push

REPOSITORY = "team/ranker"
BASE_ID = "Qwen/Qwen2.5-1.5B"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a run folder, evaluated."""
    run = tmp_path_factory.mktemp("run")
    checkpoint = make_checkpoint(make_base(run / "base"), run / "checkpoints" / "step-000007")
    merge(checkpoint, run / "merged", MergeOptions(verify="weights"))
    write_json(run / "evaluation" / "test.json", results(read_json(run / "merged" / "provenance.json")))
    return run / "merged"


def results(provenance: dict) -> dict:
    values = {"recall@3": 0.5, "auc": 0.75}
    gain = {"recall@3": {"mean": 0.25, "low": 0.125, "high": 0.375, "p_value": 0.001}}
    return {
        "split": "test",
        "model": "RUN/merged",
        "candidates": "targets",
        "num_users": 40,
        "num_candidates": 840,
        "metrics": values,
        "confidence": {"recall@3": [0.4, 0.6]},
        "baselines": {"control": {"recall@3": 0.25, "auc": 0.5}, "bm25": {"recall@3": 0.375, "auc": 0.625}},
        "personalization_gain": gain,
        "provenance": provenance,
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def push_to(hub: Hub, folder: Path, **options: object) -> str:
    api = HfApi(endpoint=hub.url, token="hf_secret")
    return push(folder, PushOptions(REPOSITORY, base_model=BASE_ID, **options), api)


def test_all_files_go_in_one_commit(hub: Hub, merged: Path) -> None:
    assert push_to(hub, merged) == f"{hub.url}/{REPOSITORY}/commit/{COMMIT}"
    assert hub.repositories[REPOSITORY]["visibility"] == "private" and hub.num_commits == 1
    assert set(hub.files) == set(read_json(merged / "manifest.json")["files"])
    changed = {name for name, data in hub.files.items() if data != (merged / name).read_bytes()}
    assert changed == {"README.md", "provenance.json"}


def test_card(hub: Hub, merged: Path) -> None:
    push_to(hub, merged)
    card = hub.files["README.md"].decode()
    assert f'base_model: "{BASE_ID}"' in card
    assert "| recall@3 | 0.5000 (0.4000 to 0.6000) | 0.2500 | +0.2500 (+0.1250 to +0.3750) |" in card
    assert "| bm25 | 0.3750 |" in card and "40 test users" in card


def test_no_path_of_this_machine_is_sent(hub: Hub, merged: Path) -> None:
    assert str(merged.parent) in (merged / "provenance.json").read_text()
    push_to(hub, merged)
    texts = b"".join(data for name, data in hub.files.items() if name.endswith((".json", ".md", ".jinja")))
    assert str(merged.parent).encode() not in texts and b"hf_secret" not in texts
    assert json.loads(hub.files["provenance.json"])["answer_ids"] == read_json(merged / "provenance.json")["answer_ids"]


def test_what_the_owner_filled_in_stays(hub: Hub, merged: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = merged / "README.md"
    before = card.read_text()
    card.write_text(before.replace("licence: _To be filled in._", "licence: own logs, with consent"))
    push_to(hub, merged)
    card.write_text(before)
    assert "- Data: origin, consent, licence: own logs, with consent" in hub.files["README.md"].decode()
    assert "the card is open at: Licence" in caplog.text


def test_dry_run_sends_nothing(hub: Hub, merged: Path, capsys: pytest.CaptureFixture) -> None:
    push_to(hub, merged, dry_run=True, public=True)
    printed = capsys.readouterr().out
    assert f"{REPOSITORY} (public)" in printed and "model-00001-of" in printed
    assert hub.repositories == {} and hub.files == {}


def test_an_evaluation_of_another_model(hub: Hub, merged: Path, tmp_path: Path) -> None:
    other = results(read_json(merged / "provenance.json") | {"train": {"step": 1}})
    write_json(tmp_path / "other.json", other)
    with pytest.raises(RunError, match="an evaluation of RUN/merged, another model than"):
        push_to(hub, merged, evaluation=tmp_path / "other.json")
    assert hub.files == {}


def test_a_hub_that_refuses(hub: Hub, merged: Path) -> None:
    hub.refuses = True
    with pytest.raises(RunError, match=r"(?s)the hub refused, nothing was committed: 403.*token's rights"):
        push_to(hub, merged)
    assert hub.num_commits == 0


def test_folders_that_are_no_merge(hub: Hub, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder of tools/merge_lora.py"):
        push_to(hub, merged.parent / "base")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in merged.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json: 2 bytes, expected \d+"):
        push_to(hub, broken)
