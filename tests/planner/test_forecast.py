"""Forecasts against what the stages then do, and for models that no machine here could hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.shards.world import make_builder, make_sample, make_split, write_split
from tests.spawn import run_script
from tests.summarize.world import run_here, tree_hash, write_config, write_histories
from tests.tokenizers import byte_level
from trsr_dist.cli import cluster_options
from trsr_dist.config import load_config
from trsr_dist.config.files import shipped_file
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import ConfigError, RunError
from trsr_dist.planner import here
from trsr_dist.planner.cost import Cluster
from trsr_dist.planner.hardware import Hardware, hardware
from trsr_dist.planner.job import cluster_of, plan_stages
from trsr_dist.planner.memory import StepSettings
from trsr_dist.planner.shape import ModelShape
from trsr_dist.planner.stages import (
    LAYER_SECONDS,
    PlannedStage,
    ScoringSettings,
    SummaryForecast,
    TrainingForecast,
    TrainingSettings,
    forecast_scoring,
    forecast_summaries,
    forecast_training,
)
from trsr_dist.planner.text import in_json, in_words
from trsr_dist.planner.work import SummarySettings, shard_lengths, split_work, summary_work
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan
from trsr_dist.summarize.progress import read_tasks

LLAMA_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 32000)
STEP = StepSettings(8192, "bfloat16", True, ("q_proj", "v_proj"), answers_only=True, dropout=False)
SETTINGS = TrainingSettings(2, 0, 16, 8, full_head=False, shares_prefix=True, step=STEP)


@pytest.mark.parametrize("measured", [False, True])
def test_work_is_that_of_the_planned_rows(tmp_path: Path, measured: bool) -> None:
    shards, builder = make_split(tmp_path / "train", (150, 150)), make_builder()
    settings = PackingSettings(row_tokens=2000, rows_per_step=4, negatives_per_positive=2, seed=0)
    if measured:
        measure_lengths(shards, builder)
    work = split_work(shard_lengths(tmp_path / "train", builder, url=""), 2000, 2, 0)
    assert work.source == ("measured" if measured else "sampled")
    plan = TrainPlan(measure_lengths(shards, builder), settings)
    facts = plan.facts(0)
    assert work.shared.tokens == pytest.approx(facts.num_tokens, rel=0.03)
    assert work.num_rows == pytest.approx(facts.num_rows, abs=1)
    assert work.num_users == 300
    assert work.shared.answers == 900


def test_separate_tokens_are_those_of_the_rows(tmp_path: Path) -> None:
    builder = make_builder()
    shards = write_split(tmp_path / "test", [make_sample(i) for i in range(40)], [40], "test")
    work = split_work(shard_lengths(tmp_path / "test", builder, url=""), 4000, None, 0)
    users = [builder.build(shards.read(index)) for index in range(40)]
    expected = sum(len(user.prefix) * len(user.suffixes) + sum(map(len, user.suffixes)) for user in users)
    assert work.separate.tokens == expected


def cluster(num_nodes: int) -> Cluster:
    return Cluster(hardware("h100"), num_nodes, 8, 0.4, price_per_hour=2.0)


def test_a_model_of_70_billion_needs_its_weights_divided(tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    work = split_work(shard_lengths(tmp_path / "train", make_builder(), url=""), 2000, 1, 0)
    found = forecast_training(LLAMA_70B, work, SETTINGS, cluster(2), chosen="")
    assert found.recommended == "zero3"
    assert found.memory["zero2"].weights == LLAMA_70B.num_parameters * 2
    assert found.memory["zero3"].weights < LLAMA_70B.num_parameters * 2 / 8
    assert found.sent["zero3"] > 100 * found.sent["zero2"]
    assert found.cost.money == pytest.approx(2.0 * found.cost.device_hours)


def test_more_devices_than_rows_bring_nothing(tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    work = split_work(shard_lengths(tmp_path / "train", make_builder(), url=""), 2000, 1, 0)
    times = [forecast_training(LLAMA_70B, work, SETTINGS, cluster(nodes), "zero2").cost.seconds for nodes in (1, 2, 4)]
    assert times[0] > 1.5 * times[1]
    assert times[2] >= times[1]


def test_a_dry_run_reads_sizes_only_and_writes_nothing(tmp_path: Path) -> None:
    """A 70B config without weights; the shards have no measured lengths."""
    run, model = tmp_path / "run", tmp_path / "model"
    write_split(run / "shards" / "train", [make_sample(i) for i in range(30)], [30])
    byte_level().save_pretrained(model)
    sizes = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
    }
    (model / "config.json").write_text(json.dumps(sizes))
    before = sorted(path for path in tmp_path.rglob("*"))
    settings = (f"run.dir={run}", f"model.name_or_path={model}", "train.rows_per_step=16")
    options = ("--config", "configs/quickstart.yaml", "--dry-run", "--nodes", "2", "--hardware", "a100-80gb")
    done = run_script("launch/train.py", *settings, *options)
    assert done.returncode == 0, done.stderr
    assert "68.98G parameters" in done.stdout
    assert "ds_configs/zero3.json is the first that fits" in done.stdout
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run with histories only, and a model of 70 billion weights that has a config and a tokenizer only."""
    write_histories(tmp_path / "run", {"train": 30, "valid": 6, "test": 9})
    byte_level().save_pretrained(tmp_path / "model")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = dict(zip(names, (8192, 80, 64, 8, 28672), strict=True)) | {"vocab_size": 32000}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    model = str(tmp_path / "model")
    return write_config(
        tmp_path / "run",
        model={"name_or_path": model},
        summarize={"engine": "transformers", "model": model, "max_in_flight": 100, "max_prompt_tokens": 900},
    )


def planned(config: Path, *names: str, overrides: tuple[str, ...] = ()) -> list[PlannedStage]:
    return plan_stages(load_config(config, overrides), names, "bfloat16")


@pytest.mark.parametrize("scheme", ["none", "raw"])
def test_histories_alone_are_enough(config: Path, scheme: str) -> None:
    """Before anything is paid: where no engine is asked the prompts are those of the shards, to the token."""
    overrides = (f"summarize.scheme={scheme}", "summarize.max_new_tokens=25")
    (stage,) = planned(config, "summarize", overrides=overrides)
    found = stage.on(cluster(1))
    assert (found.work.num_prompts, found.work.new_tokens, found.cost) == (0, 0, None)
    assert "no model" in in_words([stage], cluster(1))
    before = [stage.on(cluster(1)) for stage in planned(config, "train", "evaluate", overrides=overrides)]
    run_here(config, *overrides)
    after = [stage.on(cluster(1)) for stage in planned(config, "train", "evaluate", overrides=overrides)]
    assert [found.work.source for found in (*before, *after)] == ["histories"] * 2 + ["sampled"] * 2
    for early, late in zip(before, after, strict=True):
        assert early.work.shared.users > 0
        assert replace(early.work, source="sampled") == late.work
        assert early.cost == late.cost


def test_a_summary_is_counted_at_its_longest(config: Path) -> None:
    found = {}
    for limit in (100, 300):
        (stage,) = planned(config, "evaluate", overrides=(f"summarize.max_new_tokens={limit}",))
        work = stage.on(cluster(1)).work
        found[limit] = work.separate.tokens / work.separate.answers
    assert 200 < found[300] - found[100] < 4 * 200, "a byte-level tokenizer takes up to four tokens for one of a word's"


def test_summaries_are_planned_in_the_precision_that_the_engine_takes(config: Path) -> None:
    cores = Cluster(Hardware("CPU core", 1e11, 10**10, 1e10, 1e9, is_cpu=True), 1, 2, 0.5)

    def forecast(precision: str, engine: str, on: Cluster) -> SummaryForecast:
        overrides = (f"summarize.precision={precision}", f"summarize.engine={engine}")
        return planned(config, "summarize", overrides=overrides)[0].on(on)

    half, whole = (forecast(precision, "transformers", cluster(1)) for precision in ("auto", "float32"))
    others = [forecast(*case) for case in (("auto", "transformers", cores), ("float32", "openai", cluster(1)))]
    sizes = [found.weight_bytes / LLAMA_70B.num_parameters for found in (half, whole, *others)]
    assert sizes == [2, 4, 4, 2], "a server has chosen by itself"
    assert whole.key_value_bytes == 2 * half.key_value_bytes and whole.cost.seconds > 1.5 * half.cost.seconds


def test_an_evaluation_of_some_users_is_planned_for_them_alone(config: Path) -> None:
    found = []
    for number in (0, 3, 100):
        (stage,) = planned(config, "evaluate", overrides=(f"evaluate.max_users={number}",))
        found.append(stage.on(cluster(1)))
    everyone, some, more = found
    assert (everyone.work.num_users, some.work.num_users) == (9, 3) and more == everyone
    assert some.flops == pytest.approx(everyone.flops / 3, rel=0.01)


def asked_for(*options: str) -> Cluster:
    return cluster_of(cluster_options(ArgumentParser()).parse_args(options))


def test_the_whole_plan_in_words_and_numbers(config: Path) -> None:
    stages = planned(config, "evaluate", "summarize", "train")
    asked = asked_for("--hardware", "a100-80gb", "--nodes", "3", "--devices-per-node", "2", "--price", "2.0")
    before = sorted(config.parent.rglob("*"))
    words, numbers = in_words(stages, asked), json.loads(in_json(stages, asked))
    assert sorted(config.parent.rglob("*")) == before
    assert list(numbers) == ["cluster", "summarize", "train", "evaluate", "failures", "scaling"]
    for part in ("from the histories", "zero3.json is the first that fits", "<- asked", "stop paying at", "price"):
        assert part in words
    assert words.count("does not fit") == 2, "140 GB of weights, for summaries and for scoring"
    point = next(point for point in numbers["scaling"] if point["num_nodes"] == 3)
    for stage in ("summarize", "train", "evaluate"):
        assert point["costs"][stage] == numbers[stage]["cost"]
        assert numbers[stage]["cost"]["money"] == pytest.approx(2.0 * numbers[stage]["cost"]["device_hours"])


def test_this_machine_is_measured_and_its_cores_take_float32(config: Path) -> None:
    found = asked_for("--hardware", "here", "--devices-per-node", "2")
    assert 1e9 < found.hardware.flops_per_second < 1e15 and found.hardware.memory_bytes > 1e8
    assert found.utilization == found.hardware.utilization
    with pytest.raises(SystemExit):
        asked_for("--hardware", "here", "--devices-per-node", "0")
    if found.hardware.precision == "float32":
        half, whole = (plan_stages(load_config(config), ["train"], auto)[0] for auto in ("bfloat16", "float32"))
        weights = [stage.on(cluster(1)).memory["zero1"].weights for stage in (half, whole)]
        assert weights[1] == 2 * weights[0]
        fixed = load_config(config, ("train.precision=bfloat16",))
        (stage,) = plan_stages(fixed, ["train"], "float32")
        assert stage.on(cluster(1)).memory["zero1"].weights == weights[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_unknown_gpu_is_measured_in_what_it_computes_in(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    for name, value in {
        "is_available": True,
        "get_device_name": "Tesla T4",
        "get_device_properties": SimpleNamespace(total_memory=16 * 10**9),
        "is_bf16_supported": precision == "bfloat16",
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, _value=value, **__: _value)
    rates = {torch.bfloat16: 1e12, torch.float32: 8e12}
    monkeypatch.setattr(here, "_flops_per_second", lambda sizes, device, dtype: rates[dtype])
    monkeypatch.setattr(here, "_copied_bytes_per_second", lambda device: 3e11)
    found = here.this_machine(1)
    assert (found.precision, found.flops_per_second) == (precision, rates[getattr(torch, precision)])
    assert found.computing_in("float32").flops_per_second == rates[torch.float32]


def test_float32_is_planned_at_its_own_rate(config: Path) -> None:
    """A GPU multiplies it at a fraction of the rate of bfloat16."""
    stages = planned(config, "train", "evaluate", overrides=("train.precision=float32",))
    on = cluster(1)
    slow = replace(on, hardware=replace(hardware("h100"), flops_per_second=67e12))
    assert [stage.on(on).cost for stage in stages] == [stage.on(slow).cost for stage in stages]
    fast = planned(config, "train", "evaluate", overrides=("train.precision=bfloat16",))
    scored = [which.on(on).cost.seconds for which in (stages[1], fast[1])]
    assert scored[0] == pytest.approx(989 / 67 * scored[1])
    assert "989 TFLOP/s (67 in float32)" in in_words(stages, on)


@pytest.mark.parametrize("shipped", ["zero1", "zero3", "zero3_offload"])
def test_the_traffic_is_that_of_what_stands_in_the_file(config: Path, shipped: str) -> None:
    """Whatever its name."""
    own = config.parent / ("zero3.json" if shipped == "zero1" else "ours.json")
    shutil.copy(shipped_file(f"ds_configs/{shipped}.json"), own)
    named, found = (
        in_words(planned(config, "train", overrides=(f"train.deepspeed_config={file}",)), cluster(1))
        for file in (f"ds_configs/{shipped}.json", own)
    )
    assert named == found
    (marked,) = (line for line in found.splitlines() if line.endswith("<- train.deepspeed_config"))
    assert marked.split()[0] == shipped


def test_samples_are_of_the_train_users_alone(config: Path) -> None:
    (one,) = planned(config, "summarize")
    (four,) = planned(config, "summarize", overrides=("summarize.samples=4", "summarize.temperature=0.7"))
    work, more = one.on(cluster(1)).work, four.on(cluster(1)).work
    assert (work.num_users, more.num_users) == (45, 30)
    assert more.num_units == 4 * 4
    (train,) = planned(config, "summarize", overrides=("summarize.samples=1", "summarize.temperature=0.7"))
    assert more.num_prompts == 4 * train.on(cluster(1)).work.num_prompts > work.num_prompts


def test_cores_are_told_of_their_own_memory(config: Path) -> None:
    cores = Cluster(Hardware("CPU core", 1e11, 10**10, 1e10, 1e9, process_bytes=6 * 10**8, is_cpu=True), 1, 2, 0.5)
    for on, libraries in ((cores, "0.6 GB for Python and"), (cluster(1), "2.1 GB for CUDA and")):
        stages = planned(config, "train", "evaluate")
        words = in_words(stages, on)
        assert libraries in words and libraries.replace(" GB", "").removesuffix(" and") in words
        assert ("keeps freed memory" in words) == on.hardware.is_cpu


@pytest.mark.parametrize(("script", "stage"), [("launch/summarize.py", "summarize"), ("tools/evaluate.py", "evaluate")])
def test_a_dry_run_is_the_stages_plan(config: Path, script: str, stage: str) -> None:
    before = tree_hash(config.parent)
    model = ("--model", "RUN/merged") if stage == "evaluate" else ()
    done = run_script(script, "--config", config, "--dry-run", "--nodes", "2", *model)
    assert done.returncode == 0, done.stderr
    assert "# plan\ncluster    2 x 8 h100" in done.stdout and f"\n{stage}" in done.stdout
    assert tree_hash(config.parent) == before


def test_a_plan_is_all_that_is_printed(config: Path) -> None:
    """In a new process, since libraries warn as they are imported."""
    command = [sys.executable, "tools/plan.py", "--config", config, "--stage", "evaluate", "--nodes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("cluster    2 x 8 h100")


def test_what_is_missing_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match="'merge': expected one of summarize, train, evaluate"):
        planned(config, "merge")
    elsewhere = (f"run.dir={config.parent / 'nowhere'}",)
    for stage in ("summarize", "train"):
        with pytest.raises(RunError, match="nowhere/histories"):
            planned(config, stage, overrides=elsewhere)
    refused = r"train: 8 devices \(1 x 8\) would share train\.rows_per_step=2; raise it, .* or --devices-per-node"
    with pytest.raises(ConfigError, match=refused):
        in_words(planned(config, "train", overrides=("train.rows_per_step=2",)), cluster(1))
    with pytest.raises(ConfigError, match=r"model\.name_or_path is empty"):
        planned(config, "train", overrides=("model.name_or_path=",))


def test_a_model_that_cannot_share_prefixes_pays_for_separate_sequences(config: Path) -> None:
    def training(window: int | None) -> tuple[TrainingForecast, str]:
        path = config.parent / "model" / "config.json"
        sizes = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": window}
        path.write_text(json.dumps(sizes))
        (stage,) = planned(config, "train")
        return stage.on(cluster(1)), "\n".join(stage.words(stage.on(cluster(1)), cluster(1)))

    (shared, plain), (separate, told) = training(None), training(64)
    assert "run as separate sequences" in told and "run as separate sequences" not in plain
    copies = separate.work.separate.tokens / separate.work.shared.tokens
    assert separate.flops_per_epoch > 0.99 * copies * shared.flops_per_epoch
    assert separate.memory["zero3"].activations > 0.95 * copies * shared.memory["zero3"].activations


def test_prompts_of_summaries_are_those_that_the_job_sends(config: Path) -> None:
    """Counted by the job itself; tokens by four bytes each, and no longer than the limit."""
    run_here(config, "summarize.engine=extractive")
    manifests = [json.loads((config.parent / f"run/shards/{s}/manifest.json").read_text()) for s in ("train", "valid")]
    nodes = sum(manifest["counts"]["nodes"] for manifest in manifests)
    store = HistoryStore(config.parent / "run" / "histories")
    settings = SummarySettings("hierarchical", 5, 8, 120, 40, 8, "news", 16, "vllm")
    work = summary_work(store, settings)
    test = json.loads((config.parent / "run/shards/test/manifest.json").read_text())["counts"]["nodes"]
    assert work.num_prompts == nodes + test
    assert work.num_users == 45 and work.num_units == 4 + 1 + 2
    assert work.new_tokens == 40 * work.num_prompts
    assert (
        work.prompt_tokens
        <= 120 * work.num_prompts
        < summary_work(store, replace(settings, max_prompt_tokens=9000)).prompt_tokens
    )
    found = forecast_summaries(LLAMA_70B, work, settings, cluster(1))
    assert found.weight_bytes == 2 * LLAMA_70B.num_parameters
    assert found.key_value_bytes == 16 * 160 * 2 * 80 * 8 * 128 * 2
    launched = forecast_summaries(LLAMA_70B, work, replace(settings, engine="transformers"), cluster(1))
    least = work.new_tokens / 16 * 80 * LAYER_SECONDS["transformers"] / 8
    assert launched.cost.seconds > max(least, found.cost.seconds)


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
def test_what_a_users_samples_share_is_made_once(tmp_path: Path, scheme: str) -> None:
    """As the job makes it, which keeps texts by their prompts."""
    rows = {"data": {"train_prefixes": 3, "split": [8, 1, 1]}, "demo": {"num_users": 60, "num_items": 300}}
    path = write_config(tmp_path / "run", **rows, summarize={"scheme": scheme, "block_size": 3, "engine": "extractive"})
    assert prepare(load_config(path)) == 0
    store = HistoryStore(tmp_path / "run" / "histories")
    work = summary_work(store, SummarySettings(scheme, 3, 8, 900, 40, 8, "news", 16, "extractive"))
    run_here(path)
    (task,) = read_tasks(next((tmp_path / "run" / "summaries" / "progress").iterdir()))
    assert task.nodes > 1.5 * task.requests
    assert work.num_prompts == pytest.approx(task.requests, rel=0.03), "a few texts of several users are equal"
    assert len(store.first_users("train", 5)) == 5


def test_a_quantized_base_cannot_be_divided(tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    work = split_work(shard_lengths(tmp_path / "train", make_builder(), url=""), 2000, 1, 0)
    settings = replace(SETTINGS, step=replace(STEP, quantization="4bit"))
    found = forecast_training(LLAMA_70B, work, settings, cluster(1), chosen="")
    assert list(found.memory) == ["zero1", "zero2"] and found.recommended == "zero1"
    assert 2 * LLAMA_70B.num_parameters / 4 < found.memory["zero1"].weights < 2 * LLAMA_70B.num_parameters / 3


def test_scoring_is_divided_by_parts_and_passes(tmp_path: Path) -> None:
    write_split(tmp_path / "test", [make_sample(i) for i in range(130)], [130], "test")
    work = split_work(shard_lengths(tmp_path / "test", make_builder(), url=""), 4000, None, 0)
    settings = ScoringSettings(("model", "control"), 4000, "bfloat16")
    one, two = (forecast_scoring(LLAMA_70B, work, settings, replace(cluster(1), devices_per_node=n)) for n in (1, 4))
    assert one.num_parts == 6
    assert two.cost.seconds == pytest.approx(one.cost.seconds * 2 / 6)
    divided = forecast_scoring(LLAMA_70B, work, replace(settings, divided=True), cluster(2))
    assert divided.weight_bytes < one.weight_bytes / 8
    assert divided.flops == one.flops
