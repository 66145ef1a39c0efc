"""The parts of the training that need no ranks: DeepSpeed's config, checkpoints, reasons to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.kills import killed_at_every_change
from tests.model.world import make_row
from tests.train.jobs import wait_until
from trsr_dist.config import Config
from trsr_dist.config.files import read_zero_config
from trsr_dist.config.sections import DataSection
from trsr_dist.environment import Ranks
from trsr_dist.errors import CheckpointError, ConfigError, RunError
from trsr_dist.log import setup_logging
from trsr_dist.metric_log import MetricLog, read_metrics
from trsr_dist.train import lifecycle
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState, read_checkpoint
from trsr_dist.train.engine import complete_zero_config, zero_setting
from trsr_dist.train.job import _provenance
from trsr_dist.train.lifecycle import (
    DATA,
    METRICS,
    ROW,
    SAVING,
    SUMS,
    VALIDATION,
    Heartbeat,
    StopReasons,
    StopSignals,
    Walltime,
    describe_ranks,
    read_heartbeats,
    stuck_ranks,
)
from trsr_dist.train.meter import Sums, count_pairs
from trsr_dist.train.monitor import Monitor, Progress
from trsr_dist.train.start import check_settings

ROOT = Path(__file__).parents[2]
NAME = "model.layers.0.self_attn.q_proj.lora_B.default.weight"


class TestZeroConfig:
    @pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
    def test_every_shipped_file_is_complete_for_deepspeed(self, path: Path) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig

        settings = complete_zero_config(read_zero_config(path), 4, 1, "bfloat16", 1.0, on_gpu=True)
        parsed = DeepSpeedConfig(settings)
        assert parsed.gradient_accumulation_steps == 4
        assert parsed.gradient_clipping == 1.0
        assert parsed.bfloat16_config.enabled
        assert parsed.zero_optimization_stage == zero_setting(settings).stage

    @pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "bf16", "optimizer", "scheduler"])
    def test_a_setting_with_an_owner_is_refused(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: "auto"}))
        with pytest.raises(ConfigError, match=rf"{key}.*train\."):
            read_zero_config(path)

    @pytest.mark.parametrize(
        "values",
        [
            {"offload_optimizer": None},
            {"reduce_bucket_size": "auto"},
            {"reduce_bucket_size": 1.5},
            {"overlap_comm": 1},
            {"offload_param": {"device": "nvme"}},  # no checkpoint is made of what lies there
            {"round_robin_gradients": True},  # DeepSpeed reads gradients from the wrong places then
            {"offload_optimizer": {"pin_memory": "yes"}},
        ],
    )
    def test_a_value_that_is_left_open_or_wrong_is_refused(self, tmp_path: Path, values: dict) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2} | values}))
        with pytest.raises(
            ConfigError, match=rf"zero_optimization\.{next(iter(values))}.*: input should .*found .*leave the key out"
        ):
            read_zero_config(path)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("data_types", {"grad_accum_dtype": "fp32"}),  # sums in an optimizer that no checkpoint is made for
            ("communication_data_type", "fp16"),  # other sums over ranks
            ("gradient_allreduce_op", "sum"),  # gradients as many times too large as there are ranks
            ("managed_gradient_accumulation", False),  # a step a row
            ("zero_optimization.compute_grad_norm", False),
            ("zero_optimization.zero_quantized_gradients", True),
            ("zero_optimization.reduce_bucket", 5e7),  # a typo
            ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}),
        ],
    )
    def test_what_would_train_otherwise_or_break_later_is_refused(self, tmp_path: Path, key: str, value: Any) -> None:
        path, zero = tmp_path / "ds.json", {"stage": 2}
        section, _, name = key.rpartition(".")
        path.write_text(
            json.dumps(
                {"zero_optimization": zero | ({name: value} if section else {})} | ({} if section else {name: value})
            )
        )
        with pytest.raises(
            ConfigError, match=rf"ds\.json: .*{name}.*: extra inputs are not permitted.*leave the key out"
        ):
            read_zero_config(path)

    def test_what_deepspeed_prints_may_be_set(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}))
        assert read_zero_config(path)["wall_clock_breakdown"]

    @pytest.mark.parametrize("text", ["{", "{}", '{"zero_optimization": {"stage": 4}}'])
    def test_broken_files_are_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(ConfigError, match=r"ds\.json"):
            read_zero_config(tmp_path / "ds.json")
        with pytest.raises(ConfigError, match=r"ds_configs/"):
            read_zero_config(tmp_path / "missing.json")

    def test_stage_0_in_bfloat16_becomes_stage_1(self) -> None:
        settings = {"zero_optimization": {"stage": 0}}
        stages = [
            zero_setting(complete_zero_config(settings, 1, 1, precision, 0, on_gpu=False)).stage
            for precision in ("float32", "bfloat16")
        ]
        assert stages == [0, 1]


class TestCheckpoints:
    def save(self, folder: CheckpointFolder, step: int) -> Path:
        tensors = {f"{kind}/{NAME}": torch.full((2, 3), float(step)) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        return folder.save(tensors, TrainerState(step, step, {"epoch": 0}), {"peft_type": "LORA"}, {"train": {}})

    @pytest.mark.parametrize(("rank", "times"), [(0, 1), (1, 0)])
    def test_what_all_ranks_find_alike_is_told_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, times: int
    ) -> None:
        setup_logging(rank, "train")
        found = read_checkpoint(self.save(CheckpointFolder(tmp_path, 2), 7))
        found = replace(found, state=replace(found.state, settings={"steps": 9}))
        check_settings(found, {"steps": 8}, {})
        said = capsys.readouterr()
        assert (said.out + said.err).count("steps was 9 up to step 7, now it is 8") == times

    def test_a_million_steps_are_more_than_999900(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 2)
        for step in (999_800, 999_900, 1_000_000):
            self.save(folder, step)
        assert folder.newest().state.step == 1_000_000
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1000000", "step-999900"]

    @pytest.mark.parametrize(
        "name", ["state.json", "optimizer.safetensors", "adapter/adapter_model.safetensors", "manifest.json"]
    )
    def test_a_cut_file_falls_back_to_the_one_before(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        self.save(folder, 1)
        path = self.save(folder, 2) / name
        path.write_bytes(path.read_bytes()[:-3])
        assert folder.newest().state.step == 1
        path.unlink()
        assert folder.newest().state.step == 1

    def test_nothing_readable_is_an_error_not_a_fresh_start(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        (self.save(folder, 1) / "state.json").unlink()
        with pytest.raises(CheckpointError, match="none of 1 checkpoints"):
            folder.newest()

    def test_a_superseded_run_cannot_publish(self, tmp_path: Path) -> None:
        def fence() -> None:
            raise RunError("lost")

        self.save(CheckpointFolder(tmp_path, 3), 1)
        with pytest.raises(RunError, match="lost"):
            self.save(CheckpointFolder(tmp_path, 3, fence), 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
        assert (tmp_path / "latest").read_text().strip() == "step-000001"

    def test_half_written_folders_are_tidied_and_never_read(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        self.save(folder, 1)
        left = tmp_path / ".step-000002.tmp-host-1"
        left.mkdir()
        save_file({}, left / "optimizer.safetensors")
        assert folder.newest().state.step == 1
        folder.tidy()
        assert left.exists(), "another host may be writing it"
        for path in (left, *left.iterdir()):
            os.utime(path, (1, 1))
        folder.tidy()
        assert not left.exists()

    def test_one_that_was_being_replaced_is_found_again(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, 3)
        self.save(folder, 1)
        path = self.save(folder, 2)
        path.rename(tmp_path / ".step-000002.old-host-1")
        folder.tidy()
        assert folder.newest().folder == path
        assert not list(tmp_path.glob(".*"))

    def test_killed_at_every_change_while_one_is_saved_again(self, tmp_path: Path) -> None:
        folder, root = CheckpointFolder(tmp_path, 2), tmp_path / "step-000002"
        seen: list[float] = []

        def save(value: float) -> None:
            folder.tidy()
            tensors = {f"{kind}/{NAME}": torch.full((2, 3), value) for kind in ("weight", "exp_avg", "exp_avg_sq")}
            folder.save(tensors, TrainerState(2, 2, {}), {}, {})

        self.save(folder, 1)
        save(0.0)
        for _ in killed_at_every_change(lambda: save(len(seen) + 1.0), f"{tmp_path}/[^/]*step[^/]*"):
            folder.tidy()
            value = float(folder.newest().tensors[f"weight/{NAME}"][0, 0])
            assert folder.newest().folder == root and value in (len(seen), len(seen) + 1)
            assert not list(tmp_path.glob(".step-*"))
            seen.append(value)
            save(float(len(seen)))
        assert {value - number for number, value in enumerate(seen)} == {0, 1}

    def test_killed_at_every_change_while_all_are_removed(self, tmp_path: Path) -> None:
        folder, numbers = CheckpointFolder(tmp_path, 3), set()
        steps = [self.save(folder, step) for step in (1, 2)]
        for _ in killed_at_every_change(folder.clear, f"{tmp_path}/[^/]*step[^/]*"):
            folder.tidy()
            left = folder._folders()
            assert all(read_checkpoint(path).state for path in left) and not list(tmp_path.glob(".step-*"))
            numbers.add(len(left))
            steps = [self.save(folder, step) for step in (1, 2)]
        assert numbers == {0, 1, 2} and not any(map(Path.exists, steps))


class TestStopping:
    @pytest.fixture(autouse=True)
    def handlers(self) -> Iterator[None]:
        """Signals have their usual meaning again after each test."""
        before = {number: signal.getsignal(number) for number in lifecycle.SIGNALS}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def test_time_for_a_step_and_a_save_is_kept(self) -> None:
        walltime = Walltime(time.time() + 100)
        walltime.saw("step", 10)
        walltime.saw("save", 20)
        assert walltime.has_time_for("step")
        walltime.saw("step", 60)
        assert not walltime.has_time_for("step")
        assert Walltime(None).has_time_for("step")

    def test_time_for_a_validation_is_kept(self, tmp_path: Path) -> None:
        walltime = Walltime(time.time() + 100)
        signals = StopSignals()
        reasons = StopReasons(tmp_path, signals, walltime, is_main=True)
        assert reasons.allow_validation(at_start=False)
        walltime.saw("validation", 80)
        assert walltime.has_time_for("step")
        assert not reasons.allow_validation(at_start=False)
        assert reasons.allow_validation(at_start=True), "no later start has more time"

    def test_signals_are_remembered(self, tmp_path: Path) -> None:
        signals = StopSignals()
        reasons = StopReasons(tmp_path, signals, Walltime(None), is_main=True)
        assert reasons.reason() == ""
        signal.raise_signal(signal.SIGUSR1)
        assert reasons.reason() == "signal SIGUSR1"

    def test_only_a_later_event_ends_the_process_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, exits = [100.0], []
        monkeypatch.setattr(lifecycle.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(lifecycle.os, "_exit", exits.append)
        signals = StopSignals()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.received, exits) == ("SIGUSR1", [])
        clock[0] += 30
        signal.raise_signal(signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]

    @pytest.mark.parametrize("is_starting", [True, False])
    def test_a_rank_that_is_left_alone_before_its_first_step_leaves(self, tmp_path: Path, is_starting: bool) -> None:
        rank = f"""
            import time
            from pathlib import Path
            from trsr_dist.train.lifecycle import StopSignals, follow_launcher
            follow_launcher()
            signals = StopSignals(lambda: {is_starting})
            Path("ready").touch()
            try:
                while not signals.received:
                    time.sleep(0.05)
                Path("noted").touch()
            finally:
                Path("left").touch()
        """
        (tmp_path / "rank.py").write_text(textwrap.dedent(rank))
        launcher = "import subprocess, sys; subprocess.run([sys.executable, 'rank.py'])"
        with subprocess.Popen([sys.executable, "-c", launcher], cwd=tmp_path) as process:
            wait_until(lambda: (tmp_path / "ready").exists(), 60)
            process.kill()
        wait_until(lambda: (tmp_path / "left").exists(), 10)
        assert (tmp_path / "noted").exists() != is_starting

    def test_only_rank_zero_looks_for_the_file(self, tmp_path: Path) -> None:
        signals = StopSignals()
        (tmp_path / "STOP").touch()
        found = [StopReasons(tmp_path, signals, Walltime(None), is_main).reason() for is_main in (True, False)]
        assert "STOP" in found[0]
        assert found[1] == ""


def test_a_start_that_was_cut_off_does_not_beat_over_the_next_one(tmp_path: Path) -> None:
    old, new = (Heartbeat(tmp_path, Ranks(job_id="7", restart=restart), 100) for restart in (0, 1))
    old.start()
    new.start()
    for heartbeat, step in ((new, 2), (old, 9)):
        heartbeat.at(step, "forward")
        heartbeat.stop()
    assert [(beat["restart"], beat["step"]) for beat in read_heartbeats(tmp_path / "heartbeats")] == [(1, 2)]


def test_who_keeps_a_training_from_going_on() -> None:
    """Rank, step, count, phase, whether it is late, seconds since its last sign of life."""

    def stuck(*ranks: tuple[int, int, str, bool, float]) -> list[int]:
        names = ("step", "count", "phase", "is_late", "time")
        beats = [dict(zip(names, values, strict=True)) | {"rank": rank} for rank, values in enumerate(ranks)]
        return [beat["rank"] for beat in stuck_ranks([beat | {"time": 100 - beat["time"]} for beat in beats], 100, 40)]

    assert stuck((9, 1, ROW, True, 1), (9, 2, SUMS, False, 1)) == [], "one still works"
    assert stuck((9, 2, SUMS, True, 1), (9, 1, ROW, True, 1)) == [1], "the one that is behind"
    assert stuck((9, 2, SUMS, True, 1), (9, 2, SUMS, True, 1)) == [0, 1], "the network"
    assert stuck((9, 2, SUMS, True, 1), (9, 1, ROW, False, 41)) == [1], "without a sign of life"
    assert stuck((8, 5, METRICS, True, 1), (8, 99, VALIDATION, False, 1)) == [], "a larger share of the validation"
    assert stuck((8, 5, VALIDATION, True, 1), (8, 99, VALIDATION, False, 1)) == [0]


def test_a_phase_is_late_after_the_limit_and_by_far_longer_than_any_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, heartbeat = [0.0], Heartbeat(tmp_path, Ranks(rank=1, world_size=3), 40)
    monkeypatch.setattr("trsr_dist.train.lifecycle.time.monotonic", lambda: clock[0])

    def is_late(phase: str, seconds: int, look_seconds: int = 5) -> bool:
        heartbeat.at(1, phase)
        for _ in range(seconds // look_seconds):
            clock[0] += look_seconds
            heartbeat._watch()
        return heartbeat._is_late()

    heartbeat._looked = 0.0
    assert not is_late(SAVING, 4000)
    assert not is_late(f"{ROW} of 9 tokens", 60), "the first one compiles"
    assert not is_late(f"{ROW} of 8 tokens", 175) and is_late(f"{ROW} of 8 tokens", 530)
    assert not is_late(DATA, 5) and not is_late(DATA, 40) and is_late(DATA, 125)
    assert not is_late(DATA, 3000, 3000), "the whole machine stood still"
    heartbeat.stop()


@pytest.mark.parametrize("stall", ["write", "clock", "read", "errors"])
def test_a_disk_that_stalls_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stall: str) -> None:
    """Every call of the watch may be the one that waits; the other rank writes again a little later."""
    clock, exits, hang = [1000.0], [], 40.0
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: clock[0])
    first, second = (Heartbeat(tmp_path, Ranks(rank=rank, world_size=2), hang) for rank in (0, 1))
    monkeypatch.setattr(lifecycle.faulthandler, "dump_traceback_later", lambda *args, **more: None)
    monkeypatch.setattr(lifecycle.os, "_exit", lambda code: exits.append((code, clock[0])))
    waiting = {}

    def slow(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **more: Any) -> Any:
            clock[0] += waiting.pop(name, 0.0)
            if waiting.get("errors", 0.0) > clock[0]:
                raise OSError("stale")
            return call(*args, **more)

        return wait

    def write(path: Path, value: object, durable: bool) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
        os.utime(path, (clock[0], clock[0]))

    monkeypatch.setattr(lifecycle, "write_json", slow("write", write))
    monkeypatch.setattr(lifecycle, "server_time_ns", slow("clock", lambda folder: int(clock[0] * 1e9)))
    monkeypatch.setattr(lifecycle, "read_heartbeats", slow("read", read_heartbeats))

    def watch(*heartbeats: Heartbeat, seconds: float) -> None:
        until = clock[0] + seconds
        while clock[0] < until:
            for heartbeat in heartbeats:
                heartbeat.at(1, ROW)
                with suppress(OSError):
                    heartbeat._watch()
            clock[0] += 5

    watch(first, second, seconds=60)
    waiting[stall] = clock[0] + 100 if stall == "errors" else 100.0
    watch(first, seconds=110)  # the other rank's call takes 10 seconds longer
    watch(first, second, seconds=60)
    assert exits == []
    since = clock[0]
    watch(first, seconds=60)
    assert exits[0][0] == lifecycle.EXIT_STUCK and exits[0][1] - since <= hang + 10


def test_a_torn_heartbeat_hides_no_other(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, Ranks(host="here"), 100)
    heartbeat.start()
    heartbeat.stop()
    (tmp_path / "heartbeats" / "rank-00003.json").touch()
    assert "rank 0 on here" in describe_ranks(tmp_path / "heartbeats")


def test_steps_since_the_last_line_are_shown_at_the_end(tmp_path: Path) -> None:
    monitor = Monitor(MetricLog(tmp_path, "train"), 100, 0, 10, lambda sums: 0.0, 0.0)
    for step in range(1, 14):
        monitor.add(Progress(step, 0, 1e-4, 1.0, 0.5, True), Sums(loss=float(step), weight=1.0, tokens=7.0))
    monitor.close({}, {})
    rows = [(row["step"], row["train/loss"], row["train/tokens_per_second"]) for row in read_metrics(tmp_path)]
    assert rows == [(10, 5.5, 14.0), (13, 12.0, 14.0)]


def test_a_checkpoint_names_the_shards_it_was_trained_on(tmp_path: Path) -> None:
    """Whatever has been put in their place meanwhile."""
    builder = SimpleNamespace(settings={}, answer_ids=(1, 2))
    model = SimpleNamespace(name="base", builder=builder, precision="float32", zero=SimpleNamespace(stage=1))
    prepared = SimpleNamespace(model=model, initial=None, stream=SimpleNamespace(teacher=None))
    prepared.fingerprint, prepared.num_steps = "0123", 9
    describe = _provenance(Config(data=DataSection(format="demo")), prepared, None)
    assert describe(TrainerState(1, 1, {"shards": "4567"}))["shards"] == {"train": "4567"}


def test_pairs_are_those_of_the_mask() -> None:
    from trsr_dist.model.attention.layout import Layout

    for head in (0, 12):
        row = make_row(head)
        assert count_pairs(row) == int(Layout.of(row, torch.device("cpu")).mask.sum())
