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
from trsr_dist.merge.card import find_evaluation, is_evaluation_of
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.push import PushOptions, base_of, push, without_paths

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
    created = hub.repositories[REPOSITORY]  # huggingface_hub 1 asks for private=true
    assert (created.get("visibility") == "private" or created.get("private") is True) and hub.num_commits == 1
    assert set(hub.files) == set(read_json(merged / "manifest.json")["files"])
    changed = {name for name, data in hub.files.items() if data != (merged / name).read_bytes()}
    assert changed == {"README.md", "provenance.json"}


def test_card(hub: Hub, merged: Path) -> None:
    push_to(hub, merged)
    card = hub.files["README.md"].decode()
    assert f'base_model: "{BASE_ID}"' in card
    assert "| recall@3 | 0.5000 (0.4000 to 0.6000) | 0.2500 | +0.2500 (+0.1250 to +0.3750) |" in card
    assert "| bm25 | 0.3750 |" in card and "40 test users" in card


def test_card_of_an_evaluation_without_intervals(hub: Hub, merged: Path, tmp_path: Path) -> None:
    """``evaluate.bootstrap_samples: 0``."""
    found = results(read_json(merged / "provenance.json"))
    write_json(
        tmp_path / "test.json", found | {"confidence": {}, "personalization_gain": {"recall@3": {"mean": -0.25}}}
    )
    push_to(hub, merged, evaluation=tmp_path / "test.json")
    assert "| recall@3 | 0.5000 | 0.2500 | -0.2500 |" in hub.files["README.md"].decode()


def test_no_path_of_this_machine_is_sent(hub: Hub, merged: Path) -> None:
    assert str(merged.parent) in (merged / "provenance.json").read_text()
    push_to(hub, merged)
    texts = b"".join(data for name, data in hub.files.items() if name.endswith((".json", ".md", ".jinja")))
    assert str(merged.parent).encode() not in texts and b"hf_secret" not in texts
    assert json.loads(hub.files["provenance.json"])["answer_ids"] == read_json(merged / "provenance.json")["answer_ids"]


def test_no_address_of_this_network_is_sent() -> None:
    """That of the summarizer's server stands in the config of a checkpoint."""
    config = {"summarize": {"base_url": "http://node17.lab:8000/v1"}, "data": {"path": "hf://datasets/team/logs"}}
    found = {"summarize": {"base_url": "v1"}, "data": {"path": "hf://datasets/team/logs"}}
    assert without_paths({"config": config}) == {"config": found}


def test_files_of_an_earlier_model_leave_with_the_commit(hub: Hub, merged: Path) -> None:
    """transformers reads model.safetensors before an index, and an adapter_config.json before both."""
    old = ["model.safetensors", "adapter_config.json", "adapter_model.safetensors", "vocab.json", "chat_template.json"]
    own = [".gitattributes", "figures/model.png", "notes.json", "ranker.gguf"]
    hub.repositories[REPOSITORY] = {}
    hub.files = dict.fromkeys([*old, *own], b"earlier")
    push_to(hub, merged)
    assert hub.num_commits == 1
    assert set(hub.files) == {*read_json(merged / "manifest.json")["files"], *own}


def test_a_hub_that_cannot_be_reached(merged: Path) -> None:
    with running_hub() as gone:
        pass
    with pytest.raises(RunError, match=r"team/ranker: the hub at http://127.0.0.1:\d+ gave no answer \(.*refused"):
        push_to(gone, merged)


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


@pytest.mark.parametrize("merges", [True, False], ids=["merge", "checkpoint"])
@pytest.mark.parametrize(
    "change",
    [
        {"train": {"step": 1}},
        {"shards": {"train": "1" * 64}},
        {"config": {"lora": {"r": 8}}},
        {"init_adapter": {"folder": "x", "sha256": "1"}},
        {"teacher": {"model": "x"}},
        {"base": {"fingerprint": "1"}},
        {"merge": {"adapter_hash": "1"}},
        {},
    ],
    ids=str,
)
def test_an_evaluation_of_another_model(change: dict, merges: bool, hub: Hub, merged: Path, tmp_path: Path) -> None:
    """Of a checkpoint the training has to tell, of a merged folder the adapter's hash does, too."""
    other = read_json(merged / "provenance.json") | change
    if not merges:
        del other["merge"]
    write_json(tmp_path / "other.json", results(other))
    if not change or (not merges and "merge" in change):
        push_to(hub, merged, evaluation=tmp_path / "other.json")
        return
    with pytest.raises(RunError, match="an evaluation of RUN/merged, another model than"):
        push_to(hub, merged, evaluation=tmp_path / "other.json")
    assert hub.files == {}


def test_the_runs_own_evaluation_is_found(merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That of test, else that of valid: the same when it is merged and when it is pushed."""
    provenance = read_json(merged / "provenance.json")
    assert find_evaluation(merged.parent, provenance)["split"] == "test"
    write_json(tmp_path / "evaluation" / "test.json", results(provenance | {"train": {"step": 1}}))
    assert find_evaluation(tmp_path, provenance) is None and "is of another model and is left out" in caplog.text
    write_json(tmp_path / "evaluation" / "valid.json", results(provenance) | {"split": "valid"})
    assert find_evaluation(tmp_path, provenance)["split"] == "valid"


def test_evaluations_of_models_of_which_nothing_is_recorded() -> None:
    """Adapters from elsewhere on one base: only their hash tells them apart."""
    base = {"base": {"fingerprint": "1"}}
    one, other = (base | {"merge": {"adapter_hash": name}} for name in "ab")
    assert is_evaluation_of(results(one), one) and not is_evaluation_of(results(one), other)
    assert not is_evaluation_of(results(base), base) and not is_evaluation_of({}, base)


def test_an_adapter_names_its_base_on_the_hub(hub: Hub, merged: Path, tmp_path: Path) -> None:
    """Its templates go with it; every file that keeps the base's name has the hub's."""
    run = tmp_path / "run"
    checkpoint = make_checkpoint(make_base(run / "base"), run / "checkpoints" / "step-000007")
    merge(checkpoint, run / "adapter", MergeOptions(adapter_only=True))
    push_to(hub, run / "adapter")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == BASE_ID
    (run / "base" / "additional_chat_templates").mkdir()
    (run / "base" / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        write_json(run / "base" / name, read_json(run / "base" / name) | {key: str(run / "base")})
    merge(checkpoint / "adapter", run / "merged", MergeOptions(verify="none"))
    push_to(hub, run / "merged")
    assert hub.files["additional_chat_templates/tools.jinja"] == b"x"
    assert json.loads(hub.files["config.json"])["_name_or_path"] == BASE_ID
    assert not [name for name, data in hub.files.items() if str(tmp_path).encode() in data]


@pytest.mark.parametrize(
    ("recorded", "origin", "found"),
    [
        ("Qwen/Qwen2.5-1.5B", "", "Qwen/Qwen2.5-1.5B"),
        ("gpt2", "", "gpt2"),
        ("runs/quickstart/base", "", "base"),
        ("./models/base", "", "base"),
        ("models/base", "", "base"),
        ("models/base", BASE_ID, BASE_ID),
        ("/data/base", BASE_ID, BASE_ID),
    ],
)
def test_a_folder_is_no_hub_id(
    recorded: str, origin: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings record the base as the config names it, relative to where they ran."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "provenance.json", {"base": {"name_or_path": recorded}})
    if origin:
        write_json(tmp_path / "MODEL.json", {"model": origin})
    assert base_of(tmp_path, "") == found and base_of(tmp_path, "own/id") == "own/id"


def test_a_hub_that_refuses(hub: Hub, merged: Path) -> None:
    hub.refuses = True
    with pytest.raises(RunError, match=r"(?s)the hub refused, nothing was committed: 403.*token's rights"):
        push_to(hub, merged)
    assert hub.num_commits == 0


def test_folders_that_are_no_merge(hub: Hub, merged: Path, tmp_path: Path) -> None:
    for other in ("base", "checkpoints/step-000007", "nowhere"):
        with pytest.raises(ModelError, match="no folder of tools/merge_lora.py; merge the checkpoint first"):
            push_to(hub, merged.parent / other)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in merged.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json: 2 bytes, expected \d+"):
        push_to(hub, broken)
