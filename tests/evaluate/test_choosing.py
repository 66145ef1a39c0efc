"""Sampled summaries chosen by the ranker: which is best, what is learned from it, and from no held-out user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.evaluate.test_teacher import copy_run
from tests.spawn import run_ranks
from tests.summarize.server import Handler, prompt_of, serving
from trsr_dist.config import Config, load_config
from trsr_dist.errors import ConfigError, DataError, RunError
from trsr_dist.evaluate.choosing import Exchange, choose_summaries, target_log_share, write_choice
from trsr_dist.evaluate.teacher import score_shards
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.prompts.text import Prompt
from trsr_dist.records import Candidate, Sample
from trsr_dist.run import RunFolder
from trsr_dist.shards.inspect.job import Options, inspect_shards
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import open_table
from trsr_dist.summarize.job import summarize

NUM_SAMPLES = 3


def inventive(handler: Handler, body: dict, tries: int) -> None:
    """Another summary for another seed."""
    words = f"likes {body['seed'] % 97} and {len(prompt_of(body))}"
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": words}}
    handler.reply({"id": "x", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def config_of(run: Path, *overrides: str) -> Config:
    sampling = [f"summarize.samples={NUM_SAMPLES}", "summarize.temperature=1", "summarize.model=small"]
    engine = ["summarize.engine=openai", "summarize.base_url=http://127.0.0.1:1/v1", *sampling]
    return load_config(run / "config.yaml", [f"run.dir={run}", *engine, *overrides])


@pytest.fixture(scope="module")
def sampled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with scored samples of its train users."""
    folder = copy_run(run, tmp_path_factory.mktemp("choosing") / "run")
    with serving(inventive) as server:
        config = config_of(folder, f"summarize.base_url={server.address}")
        assert summarize(config) == 0
        num_requests = len(server.requests)
        assert summarize(config) == 0 and len(server.requests) == num_requests
    with pytest.raises(RunError, match=r"run tools/score_shards.py with this config and --model RUN/merged"):
        choose_summaries(config, "RUN/merged", 0.0)
    assert score_shards(config, "RUN/merged") == 0
    assert choose_summaries(config, "RUN/merged", 0.0) == 0
    return folder


def sample_sets(run: Path) -> list[ShardSet]:
    return [ShardSet(RunFolder(run).sample(number).split("train")) for number in range(NUM_SAMPLES)]


def read_lines(run: Path, kind: str) -> Iterator[dict]:
    with open(run / "samples" / "chosen" / kind / "train.jsonl") as lines:
        yield from map(json.loads, lines)


def test_samples_differ_by_their_texts_alone(run: Path, sampled: Path) -> None:
    plain, sets = ShardSet(run / "shards" / "train"), sample_sets(sampled)
    for index in range(len(plain)):
        own, *samples = (shards.read(index) for shards in (plain, *sets))
        assert len({sample.summary for sample in samples}) > 1
        assert {(s.user, s.recent, s.candidates) for s in samples} == {(own.user, own.recent, own.candidates)}
    assert (sampled / "shards" / "train" / "manifest.json").read_bytes() == (
        plain.folder / "manifest.json"
    ).read_bytes()
    assert not [path for split in ("valid", "test") for path in (sampled / "samples").rglob(f"{split}-*.tar")]


def test_the_sample_with_the_largest_share_of_the_target_is_learned(sampled: Path) -> None:
    sets = sample_sets(sampled)
    tables = [open_table(next(shards.folder.glob("scores-*")), shards.manifest_hash, "").values for shards in sets]
    learned = {user: list(lines) for user, lines in groupby(read_lines(sampled, "sft"), lambda line: line["user"])}
    preferred = {user: list(lines) for user, lines in groupby(read_lines(sampled, "dpo"), lambda line: line["user"])}
    for index in range(len(sets[0])):
        samples = [shards.read(index) for shards in sets]
        target = [candidate.label for candidate in samples[0].candidates].index(1)
        odds = [np.exp(table[index, : len(samples[0].candidates)].astype(np.float64)) for table in tables]
        shares = [one[target] / one.sum() for one in odds]
        best, worst = samples[int(np.argmax(shares))], samples[int(np.argmin(shares))]
        lines = learned.pop(best.user)
        assert len(lines) == len(best.provenance["nodes"])
        assert lines[-1]["completion"] == [{"role": "assistant", "content": best.summary}]
        blocks = [line for line in lines if "[Items]" in line["prompt"][0]["content"]]
        pairs = preferred.pop(best.user, [])
        assert 0 < len(pairs) <= len(blocks), "a merge of other texts is another prompt"
        if len(blocks) == 1:
            assert pairs[0]["chosen"][0]["content"] == best.summary
            assert pairs[0]["rejected"][0]["content"] == worst.summary
    assert not learned and not preferred


class Taught:
    """Two samples of one user (``data.train_prefixes``), as one of the sampled summaries has them."""

    def __init__(self, number: int) -> None:
        candidates = (Candidate("a", "a", 1), Candidate("b", "b", 0))
        samples = [Sample(user, "", "", (), candidates, {"history": []}) for user in ("u~1", "u")]
        self.number, self.table = number, SimpleNamespace(values=np.float32([[number, 0], [-number, 0]]))
        self.shards = MagicMock(read=samples.__getitem__, __len__=lambda _: 2, manifest=PLAIN)

    def exchanges(self, sample: Sample, items: list[str]) -> list[Exchange]:
        return [Exchange(prompt, f"{sample.user} {self.number}", False) for prompt in ("block", f"of {sample.user}")]


PLAIN = {"settings": {"summarizer": {"prompt_style": "plain"}}}


def test_what_a_users_samples_share_is_taught_once(tmp_path: Path) -> None:
    """The texts of one are better for one target and worse for the other."""
    store = SimpleNamespace(catalogue=SimpleNamespace(ids=[], text=None), has_earlier=True)
    facts = write_choice(tmp_path, [Taught(0), Taught(1)], store, 0.0)
    lines = {kind: (tmp_path / kind / "train.jsonl").read_text().splitlines() for kind in ("sft", "dpo")}
    for kind in lines:
        assert [json.loads(line)["prompt"] for line in lines[kind]] == ["block", "of u~1", "of u"]
    assert [json.loads(line)["chosen"] for line in lines["dpo"]] == [" u~1 1", " u~1 1", " u 0"]
    assert (facts["sft"], facts["dpo"]) == (3, 3)


def test_the_ranker_of_the_run_knows_no_held_out_user(sampled: Path) -> None:
    """The samples' shards are others than those it was trained on; their users are not."""
    for shards in sample_sets(sampled):
        table = open_table(next(shards.folder.glob("scores-*")), shards.manifest_hash, "")
        assert table.manifest["trained_on_these_shards"] is True


def test_the_reward_is_the_listwise_share() -> None:
    scores, is_positive = np.log(np.float32([1, 2, 4, 3])), np.array([False, True, True, False])
    assert target_log_share(scores, is_positive) == pytest.approx((np.log(2 / 6) + np.log(4 / 8)) / 2)
    assert target_log_share(np.float32([500, -500, 0]), np.array([False, True, False])) == pytest.approx(-1000)


def test_a_choice_is_bound_to_scores_and_settings(sampled: Path, capsys: pytest.CaptureFixture) -> None:
    config, folder = config_of(sampled), sampled / "samples" / "chosen"
    before = (folder / "sft" / "train.jsonl").stat().st_mtime_ns
    assert choose_summaries(config, "RUN/merged", 0.0) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(RunError, match="made with setting min_gain=0.0, now 0.5"):
        choose_summaries(config, "RUN/merged", 0.5)
    assert (folder / "sft" / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="samples=1: a choice needs two or more"):
        choose_summaries(config_of(sampled, "summarize.samples=1"), "RUN/merged", 0.0)
    for wrong in ("summarize.temperature=0", "summarize.engine=extractive", "summarize.scheme=none"):
        with pytest.raises(ConfigError, match=f"summarize.samples={NUM_SAMPLES} are all the same"):
            config_of(sampled, wrong)


def test_texts_that_are_gone_are_told(sampled: Path, tmp_path: Path) -> None:
    run = copy_run(sampled, tmp_path / "run")
    for number in range(NUM_SAMPLES):
        sample = run / "samples" / f"{number:03d}"
        sample.mkdir(parents=True)
        (sample / "shards").symlink_to(sampled / "samples" / f"{number:03d}" / "shards")
    with pytest.raises(
        DataError, match=r"journal: without the text \w+ of user .*; remove .* launch/summarize.py again"
    ):
        choose_summaries(config_of(run), "RUN/merged", 0.0)
    assert not (run / "samples" / "chosen").exists()


def test_held_out_users_among_the_lessons_are_told(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lessons = sampled / "samples" / "chosen"
    assert inspect_shards(sampled / "shards", Options(num_samples=0, lessons=lessons)) == 0
    user = ShardSet(sampled / "shards" / "test").read(3).user
    (tmp_path / "sft").mkdir()
    with open(tmp_path / "sft" / "train.jsonl", "w") as file:
        file.writelines(json.dumps(line | {"user": user}) + "\n" for line in read_lines(sampled, "sft"))
    assert inspect_shards(sampled / "shards", Options(num_samples=0, lessons=tmp_path)) == 1
    assert "error: test: the summarizer has learned from the targets of 1 of its users" in capsys.readouterr().out
    with pytest.raises(DataError, match="not a folder that tools/choose_summaries.py wrote"):
        inspect_shards(sampled / "shards", Options(num_samples=0, lessons=tmp_path / "sft"))


def learn(rank: int, world_size: int, run: Path, output: Path) -> None:
    """A step of supervised and of preference tuning with TRL."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    for kind, trainer, settings in (("sft", SFTTrainer, SFTConfig), ("dpo", DPOTrainer, DPOConfig)):
        data = load_dataset(str(run / "samples" / "chosen" / kind), split="train", cache_dir=str(output / "cache"))
        args = settings(output_dir=str(output / kind), max_steps=1, use_cpu=True, bf16=False, report_to="none")
        adapter = LoraConfig(target_modules=["q_proj"])
        made = trainer(str(run / "base"), args=args, train_dataset=data, peft_config=adapter)
        if kind == "sft":
            check_tokens(made.train_dataset[0], data[0], run / "base")
        made.train()


def check_tokens(row: dict, line: dict, base: Path) -> None:
    """What is trained on is what the engine reads and writes."""
    tokenizer = load_tokenizer(BaseSource(str(base)))
    encoder = Encoder(tokenizer, "chat", line["chat_template_kwargs"])
    prompt = encoder.encode([Prompt((line["prompt"][0]["content"],), ())])[0]
    assert row["input_ids"][: len(prompt)] == prompt
    learned = row["input_ids"][len(prompt) :]
    assert row["labels"] == [-100] * len(prompt) + learned
    assert tokenizer.decode(learned).startswith(line["completion"][0]["content"])
    assert tokenizer.eos_token_id in learned


def test_trl_learns_what_the_engine_reads_and_writes(sampled: Path, tmp_path: Path) -> None:
    run_ranks(learn, 1, sampled, tmp_path)
