"""Which checkpoint is the best, when training is over, and which folders stay."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict
from logging import WARNING
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.disks import closed_to_others
from trsr_dist.errors import CheckpointError, RunError
from trsr_dist.files import read_json, sha256_of, write_json
from trsr_dist.model import artifacts
from trsr_dist.train import checkpoints
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState, read_checkpoint

NAME = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
VALIDATION = {"metric": "auc", "users": 9}


def at(step: int, **changes: object) -> TrainerState:
    return TrainerState(step, step, {}, **changes)


def save(folder: CheckpointFolder, step: int) -> Path:
    tensors = {f"{kind}/{NAME}": torch.full((2, 3), float(step)) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    return folder.save(tensors, at(step), {"peft_type": "LORA"}, {"train": {"step": step}})


class TestBest:
    def test_the_first_value_is_the_best_so_far(self) -> None:
        found = at(4, awaits_validation=True).validated(-0.5)
        assert (found.best_value, found.best_step, found.num_bad_evaluations) == (-0.5, 4, 0)
        assert not found.awaits_validation

    def test_a_higher_value_is_better_and_an_equal_one_is_not(self) -> None:
        start = at(4, best_value=0.7, best_step=2, num_bad_evaluations=3, awaits_validation=True)
        better = start.validated(0.8)
        assert (better.best_value, better.best_step, better.num_bad_evaluations) == (0.8, 4, 0)
        for value in (0.7, 0.6):
            found = start.validated(value)
            assert (found.best_value, found.best_step, found.num_bad_evaluations) == (0.7, 2, 4)
            assert not found.awaits_validation

    def test_under_another_metric_nothing_is_the_best(self) -> None:
        known = at(4, best_value=0.7, best_step=2, num_bad_evaluations=3, validation=VALIDATION)
        assert known.under(dict(VALIDATION)) == known
        other = known.under(VALIDATION | {"users": 8})
        assert (other.best_value, other.best_step, other.num_bad_evaluations) == (None, 0, 0)
        assert other.validation == VALIDATION | {"users": 8}
        kept = at(4, best_value=0.7, best_step=2, num_bad_evaluations=3).under(VALIDATION)
        assert kept == known

    def test_a_run_begins_without_a_best(self) -> None:
        assert asdict(TrainerState(1, 2, {"epoch": 0})) == {
            "step": 1,
            "adam_step": 2,
            "stream": {"epoch": 0},
            "best_value": None,
            "best_step": 0,
            "num_bad_evaluations": 0,
            "awaits_validation": False,
            "validation": None,
            "skipped_steps": 0,
            "data_errors": 0,
            "seconds": 0.0,
            "settings": None,
        }

    @pytest.mark.parametrize(
        ("step", "bad", "patience", "is_over"),
        [(9, 0, 0, False), (10, 0, 0, True), (11, 0, 0, True), (9, 5, 0, False), (9, 2, 3, False), (9, 3, 3, True),
         (9, 4, 3, True), (10, 0, 3, True)],
    )  # fmt: skip
    def test_training_is_over(self, step: int, bad: int, patience: int, is_over: bool) -> None:
        assert at(step, num_bad_evaluations=bad).is_over(10, patience) is is_over

    def test_a_step_without_a_checkpoint_is_not_marked(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 2)
        save(folder, 3)
        folder.mark_best(3)
        folder.mark_best(4)
        assert (tmp_path / "best").read_text() == "step-000003\n"


class TestFolders:
    def test_the_best_stays_until_another_is(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 1)
        for step, names in ((1, {1}), (2, {1, 2}), (3, {1, 3}), (4, {3, 4}), (5, {3, 5})):
            save(folder, step)
            if step in (1, 3):
                folder.mark_best(step)
            assert {int(path.name[5:]) for path in tmp_path.glob("step-*")} == names
            assert (tmp_path / "latest").read_text() == f"step-{step:06d}\n"

    def test_what_is_read_is_what_was_saved(self, tmp_path: Path) -> None:
        tensors = {f"{kind}/{NAME}": torch.rand(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        state = at(7, best_value=0.5, best_step=3, num_bad_evaluations=2, validation=VALIDATION, seconds=1.5)
        path = CheckpointFolder(tmp_path, 2).save(tensors, state, {"r": 4}, {"train": {"step": 7}})
        assert closed_to_others(path.rglob("*")) == []
        found = read_checkpoint(path)
        assert found.state == state and found.provenance == {"train": {"step": 7}} and found.folder == path
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
        assert read_json(path / "adapter" / "adapter_config.json") == {"r": 4}

    def test_the_layout_is_a_contract(self, tmp_path: Path) -> None:
        assert save(CheckpointFolder(tmp_path, 2), 1).name == "step-000001"
        path = save(CheckpointFolder(tmp_path, 2), 1_234_567)
        assert path.name == "step-1234567"
        names = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors"]
        names += ["provenance.json", "state.json"]
        assert list(read_json(path / "manifest.json")["files"]) == names
        assert sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()) == sorted(
            [*names, "manifest.json"]
        )
        assert read_checkpoint(path).digest == sha256_of(path / "manifest.json")
        assert load_file(path / "adapter" / "adapter_model.safetensors").keys() == {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        }
        assert load_file(path / "optimizer.safetensors").keys() == {f"exp_avg/{NAME}", f"exp_avg_sq/{NAME}"}

    def test_a_file_with_the_name_of_a_checkpoint_is_none(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 1)
        save(folder, 1)
        (tmp_path / "step-000009").touch()
        assert folder.newest().state.step == 1
        save(folder, 2)
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002", "step-000009"]

    def test_a_damaged_one_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = CheckpointFolder(tmp_path, 2)
        save(folder, 1)
        path = save(folder, 2) / "state.json"
        path.unlink()
        with caplog.at_level("WARNING", "trsr"):
            assert folder.newest().state.step == 1
        said = f"{path}: missing, truncated or changed since it was written; falling back to the checkpoint before it"
        assert caplog.record_tuples == [("trsr.checkpoint", WARNING, said)]

    def test_what_killed_processes_left_is_put_right_for_each_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recovered, dead, root = [], object(), tmp_path / "run" / "checkpoints"
        monkeypatch.setattr(checkpoints, "recover_folder", lambda *given: recovered.append(given))
        folder = CheckpointFolder(root, 2)
        folder.tidy()
        for left in ("step-000001.tmp-node.local-1", "step-000001.old-node-2", "step-1000000.old-node-1"):
            (root / f".{left}").mkdir()
        folder.tidy(dead)
        assert sorted(recovered) == [(root / "step-000001", dead), (root / "step-1000000", dead)]

    def test_clearing_removes_all_but_foreign_files(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        for step in (1, 2):
            save(folder, step)
        folder.mark_best(1)
        (tmp_path / "step-notes").mkdir()
        folder.clear()
        assert [path.name for path in tmp_path.iterdir()] == ["step-notes"]
        assert folder.newest() is None
        folder.clear()

    @pytest.mark.parametrize("best", [100, 300])
    def test_after_a_fall_back_the_pointers_and_what_is_kept_are_of_what_is_whole(
        self, tmp_path: Path, best: int
    ) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        for step in (100, 200, 300):
            save(folder, step)
        folder.mark_best(best)
        for step in (200, 300):
            (tmp_path / f"step-{step:06d}" / "optimizer.safetensors").write_bytes(b"x")
        folder.resume_at(folder.newest())
        assert (tmp_path / "latest").read_text() == "step-000100\n"
        assert (tmp_path / "best").is_file() == (best == 100), "a best step of the lost ones is none"
        for step in (110, 120):
            assert save(folder, step) == folder.newest().folder
        assert [path.name for path in folder._folders()] == ["step-000100", "step-000110", "step-000120"]
        assert (tmp_path / "latest").read_text() == "step-000120\n"

    def test_a_run_that_is_lost_while_it_publishes_removes_no_later_step(self, tmp_path: Path) -> None:
        calls = []

        def fence() -> None:
            calls.append(1)
            if len(calls) > 1:
                raise RunError("lost")

        save(CheckpointFolder(tmp_path, 2), 9)
        with pytest.raises(RunError, match="lost"):
            save(CheckpointFolder(tmp_path, 2, fence), 3)
        assert (tmp_path / "step-000009").is_dir()

    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE])
    def test_a_disk_that_refuses_for_a_moment_throws_no_work_away(
        self, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = CheckpointFolder(tmp_path, 2)
        save(folder, 1)
        path = save(folder, 2) / "optimizer.safetensors"

        def read(name: Path) -> str:
            if name == path:
                raise OSError(number, os.strerror(number), str(name))
            return sha256_of(name)

        monkeypatch.setattr(artifacts, "sha256_of", read)
        with pytest.raises(RunError, match=rf"{path}: {os.strerror(number)}; "):
            folder.newest()
        path.unlink()
        assert folder.newest().state.step == 1

    def test_a_lost_run_clears_nothing(self, tmp_path: Path) -> None:
        def fence() -> None:
            raise RunError("lost")

        save(CheckpointFolder(tmp_path, 3), 1)
        with pytest.raises(RunError, match="lost"):
            CheckpointFolder(tmp_path, 3, fence).clear()
        assert (tmp_path / "step-000001").is_dir() and (tmp_path / "latest").is_file()

    @pytest.mark.parametrize("change", [{"size": 1}, {"sha256": "0" * 64}], ids=["size", "sha256"])
    def test_a_file_that_is_not_the_listed_one(self, tmp_path: Path, change: dict) -> None:
        path = save(CheckpointFolder(tmp_path, 3), 1)
        listed = read_json(path / "manifest.json")
        listed["files"]["state.json"] |= change
        write_json(path / "manifest.json", listed)
        with pytest.raises(CheckpointError, match=r"state\.json: missing, truncated or changed"):
            read_checkpoint(path)

    def test_a_manifest_of_another_form(self, tmp_path: Path) -> None:
        path = save(CheckpointFolder(tmp_path, 3), 1)
        listed = read_json(path / "manifest.json")
        listed["files"]["state.json"]["sha256"] = 1
        write_json(path / "manifest.json", listed)
        with pytest.raises(
            CheckpointError, match=r"not a whole checkpoint .*manifest\.json: files\.state\.json\.sha256"
        ):
            read_checkpoint(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_one_value_that_is_not_finite_is_enough(self, tmp_path: Path, value: float) -> None:
        tensors = {f"weight/{NAME}": torch.tensor([1.0, value])}
        with pytest.raises(CheckpointError, match="not finite"):
            CheckpointFolder(tmp_path, 3).save(tensors, at(1), {}, {})
        assert not list(tmp_path.iterdir())

    def test_an_empty_tensor_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"lora_B.* is empty or not finite"):
            CheckpointFolder(tmp_path, 3).save({f"weight/{NAME}": torch.zeros(0, 3)}, at(1), {}, {})

    @pytest.mark.parametrize("fault", ["value", "name"])
    def test_a_disk_that_gives_back_other_tensors(
        self, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file and its hash agree, but it is not what was to be written."""
        whole = checkpoints.write_tensors

        def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
            if path.name == "optimizer.safetensors":
                name = next(iter(tensors))
                other = {name: tensors[name] + 1} if fault == "value" else {"exp_avg/other": tensors.pop(name)}
                tensors = tensors | other
            whole(tensors, path)

        monkeypatch.setattr(checkpoints, "write_tensors", write)
        with pytest.raises(CheckpointError, match="read back, it is not what was written"):
            save(CheckpointFolder(tmp_path, 3), 1)
        assert not list(tmp_path.iterdir())
