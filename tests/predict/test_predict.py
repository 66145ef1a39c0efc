"""Scores of one's own texts equal those of the evaluation, and those of a stranger who has transformers only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.evaluate.world import scores_of
from tests.spawn import run_script
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import ConfigError, DataError, ModelError
from trsr_dist.predict import Ranker, Request
from trsr_dist.predict.lines import as_entry, check_lines, parse_lines
from trsr_dist.predict.ranker import HistorySettings
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import pack_row
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.plans.graph import raw_text

NUM_USERS = 70
STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.load(open(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
yes, no = json.load(open(folder + "/provenance.json"))["answer_ids"]
scores = []
for prompt in prompts:
    logits = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
    scores.append(float(logits[yes] - logits[no]))
assert not any(name.startswith(("trsr_dist", "peft")) for name in sys.modules)
print(json.dumps(scores))
"""


@pytest.fixture(scope="module")
def requests(run: Path) -> list[Request]:
    """Users of the test split by their items' texts alone."""
    store, shards = HistoryStore(run / "histories"), ShardSet(run / "shards" / "test")
    rows = {row.user: row for row in (store.user("test", index) for index in range(store.num_users("test")))}
    found = []
    for sample in shards.read_many(range(NUM_USERS)):
        items = tuple(store.catalogue.text(item) for item in rows[sample.user].history)
        found.append(Request(tuple(c.text for c in sample.candidates), items, name=sample.user))
    return found


@pytest.fixture(scope="module")
def ranker(run: Path) -> Ranker:
    return Ranker.open(str(run / "merged"), device="cpu")


def test_texts_are_scored_as_in_the_evaluation(run: Path, alone: Path, ranker: Ranker, requests: list[Request]) -> None:
    expected, shards = scores_of(alone), ShardSet(run / "shards" / "test")
    samples = shards.read_many(range(NUM_USERS))
    rankings = list(ranker.rank_many(requests))
    assert any(ranking.trims for ranking in rankings)
    for sample, ranking in zip(samples, rankings, strict=True):
        assert ranking.summary == sample.summary
        assert [entry.score for entry in ranking.candidates] == sorted(
            (entry.score for entry in ranking.candidates), reverse=True
        )
        for entry in ranking.candidates:
            candidate = sample.candidates[entry.index]
            assert entry.text == candidate.text
            assert entry.score == pytest.approx(expected[sample.user, candidate.item], abs=1e-5)


@pytest.mark.parametrize("name", ["checkpoints/step-000007", "checkpoints/step-000007/adapter"])
def test_a_checkpoint_and_an_adapter_rank_alike(run: Path, ranker: Ranker, requests: list[Request], name: str) -> None:
    other = Ranker.open(str(run / name), device="cpu")
    for request in requests[:5]:
        expected = {entry.index: entry.score for entry in ranker.rank(request).candidates}
        found = {entry.index: entry.score for entry in other.rank(request).candidates}
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_stranger_with_transformers_alone_gets_the_same_scores(
    run: Path, ranker: Ranker, requests: list[Request], tmp_path: Path
) -> None:
    untrimmed = next(r for r in requests if not ranker.rank(r).trims)
    (tmp_path / "prompts.json").write_text(json.dumps(ranker.prompts(untrimmed)))
    command = [sys.executable, "-c", STRANGER, str(run / "merged"), str(tmp_path / "prompts.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    expected = {entry.index: entry.score for entry in ranker.rank(untrimmed).candidates}
    assert dict(enumerate(scores)) == pytest.approx(expected, abs=1e-4)


def test_other_candidates_of_a_known_user_cost_themselves(run: Path, requests: list[Request]) -> None:
    keeping, plain = (Ranker.open(str(run / "merged"), device="cpu", prefix_cache_mb=size) for size in (64, 0))

    def users(of: list[Request]) -> list[TokenizedUser]:
        return [keeping.builder.build(keeping.sample(request)) for request in of]

    fitting = [request for request, user in zip(requests, users(requests), strict=True) if not user.trims]
    again = [replace(one, candidates=fitting[-1].candidates) for one in fitting[:8]]
    list(keeping.rank_many(fitting[:6]))
    counts: list[int] = []
    hook = register_module_forward_hook(
        lambda *args: counts.append(args[2].shape[1]) if isinstance(args[0], nn.Embedding) else None
    )
    rankings = list(keeping.rank_many(again))
    hook.remove()
    for request, ranking, expected in zip(again, rankings, plain.rank_many(again), strict=True):
        scores, wanted = ({entry.index: entry.score for entry in found.candidates} for found in (ranking, expected))
        assert scores == pytest.approx(wanted, abs=1e-5), request.name
    suffixes = sum(len(suffix) for user in users(again[:6]) for suffix in user.suffixes)
    assert sum(counts) == suffixes + pack_row(users(again[6:])).num_tokens


def test_a_ready_summary_stands_in_the_prompt(ranker: Ranker, requests: list[Request]) -> None:
    request = replace(requests[0], summary="likes  tea\nand jazz")
    assert "[Preference Summary]\nlikes tea and jazz\n" in ranker.prompts(request)[0]
    bare = replace(request, items=())
    assert "[Recent Items]\n(none)" in ranker.prompts(bare)[0]
    assert ranker.rank(bare).candidates[0].score != ranker.rank(request).candidates[0].score


def test_a_scheme_without_prompts_needs_no_ready_summary(
    ranker: Ranker, requests: list[Request], caplog: pytest.LogCaptureFixture
) -> None:
    for scheme, shown in (("raw", True), ("none", False)):
        other, items = copy(ranker), requests[0].items
        recorded = {"scheme": scheme, "engine": "vllm", "max_new_tokens": 12}
        other.history = HistorySettings.of({"config": {"summarize": recorded}})
        expected = raw_text(items, ranker.builder.recent_items, 12) if shown else ""
        assert other.sample(requests[0]).summary == expected and bool(expected) == shown
    assert not caplog.records
    other.history = replace(other.history, scheme="recurrent")
    assert other.sample(requests[0]).summary and "trained on summaries of the engine 'vllm'" in caplog.text


def test_thousands_of_candidates_in_one_request(ranker: Ranker, requests: list[Request]) -> None:
    texts = tuple(f"title: number {number}" for number in range(3000))
    ranking = ranker.rank(replace(requests[0], candidates=texts))
    assert sorted(entry.index for entry in ranking.candidates) == list(range(3000))


def test_unusable_requests_are_named(ranker: Ranker) -> None:
    for nothing in (" ", "\u200b"):
        with pytest.raises(DataError, match=r"request 'u': candidates\[1\] is empty"):
            ranker.rank(Request(("a", nothing), ("b",), name="u"))
        with pytest.raises(DataError, match=r"candidates\[0\] is .* expected a text that is not empty"):
            as_entry(nothing, 0)
    with pytest.raises(DataError, match="request 'u': no candidates"):
        ranker.rank(Request((), ("b",), name="u"))
    with pytest.raises(ModelError, match="nowhere"):
        Ranker.open("nowhere/at/all", device="cpu")


def predict(run: Path, source: Path, target: Path, *more: str) -> subprocess.CompletedProcess:
    options = ("--model", run / "merged", "--input", source, "--output", target)
    return run_script("tools/predict.py", *options, *more)


def test_the_command_ranks_lines_and_names_bad_ones(
    run: Path, ranker: Ranker, requests: list[Request], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"id": "u1", "items": list(requests[0].items), "candidates": list(requests[0].candidates)}
    named = good | {"id": 7, "candidates": [{"id": f"c{i}", "text": text} for i, text in enumerate(good["candidates"])]}
    bad = ['{"items": ["a"]}', "{", '{"summary": 3, "candidates": ["a"]}', '{"item": ["a"]}', '["a"]']
    lines = [json.dumps(good), *bad, "", json.dumps(named), '{"candidates": ["a"]}']
    source.write_text("\n".join(lines) + "\n")
    done = predict(run, source, target)
    assert done.returncode == 1
    assert not target.exists()
    for number, what in ((2, "no candidates"), (3, "not valid JSON"), (4, "summary is 3"), (5, "unknown field 'item'")):
        assert f"in.jsonl:{number}: {what}" in done.stderr
    assert "and 1 more" in done.stderr
    done = predict(run, source, target, "--skip-bad-lines")
    assert done.returncode == 0, done.stderr
    assert "in.jsonl:9: neither items nor summary" in done.stdout
    first, second = (json.loads(line) for line in target.read_text().splitlines())
    expected = [(e.index, e.text, pytest.approx(e.score, abs=1e-5)) for e in ranker.rank(requests[0]).candidates]
    assert (first["id"], second["id"]) == ("u1", 7)
    assert [(e["index"], e["text"], e["score"]) for e in first["ranked"]] == expected
    assert [e["id"] for e in second["ranked"]] == [f"c{index}" for index, *_ in expected]


def test_what_cannot_be_read_or_written_is_named(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"items": ["a"], "candidates": ["b"]}\n')
    for target, more, message in (
        (tmp_path, (), "is a folder"),
        (tmp_path / "." / "in.jsonl", (), "is the input itself"),
        (tmp_path / "out", ("--row-tokens", "-5"), "--row-tokens -5: 64 or more"),
    ):
        done = predict(run, source, target, *more)
        assert done.returncode == 2 and message in done.stderr
    assert source.read_text().startswith('{"items"')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"items": ["a"], "candidates": ["bad \\ud83d"]}', "in.jsonl:1: .*an escape such as"),
        ('{"id": ' + "9" * 5000 + ', "items": ["a"], "candidates": ["b"]}', "in.jsonl:1: not valid JSON"),
        ("[" * 200_000, "in.jsonl:1: not valid JSON"),
        ('{"items": ["a"], "candidates": ["b"], "candidates": ["c"]}', "in.jsonl:1: .*'candidates' stands twice"),
    ],
)
def test_lines_that_no_reader_takes_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        check_lines(tmp_path / "in.jsonl")


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    """As in the logs; some editors write one."""
    (tmp_path / "in.jsonl").write_text('{"summary": "s", "candidates": ["c"]}\r\n' * 2, encoding="utf-8-sig")
    assert [problem for _, problem in parse_lines(tmp_path / "in.jsonl")] == ["", ""]


def test_a_line_without_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n")
    os.truncate(tmp_path / "in.jsonl", 1 << 27)
    with pytest.raises(DataError, match="in.jsonl:2: more than 64 MB without a line end"):
        check_lines(tmp_path / "in.jsonl")


def test_devices_and_files_that_are_none_are_named(run: Path, tmp_path: Path) -> None:
    for name in ("foo", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"device '{name}': not there"):
            Ranker.open(str(run / "merged"), device=name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: not a plain file, which is read twice"):
        check_lines(tmp_path / "pipe")
    with pytest.raises(DataError, match="none: no such file"):
        check_lines(tmp_path / "none")
