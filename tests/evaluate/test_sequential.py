"""The sequential models learn what can only be learned from the order of items."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trsr_dist import log
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate import baselines
from trsr_dist.evaluate.baselines import build_rankers
from trsr_dist.evaluate.sequential import (
    GRID,
    MAX_WORK,
    MODELS,
    NUM_NEGATIVES,
    WORK_OF_BODY,
    SequentialRanker,
    SequentialSettings,
    make_embedding,
    make_grid,
    softmax_loss,
    train_sequential,
)
from trsr_dist.log import setup_logging

NUM_ITEMS = 30
SMALL = SequentialSettings(hidden_size=32, num_layers=1, max_length=8, dropout=0.1, learning_rate=1e-2, max_epochs=30)


def cycles(num_users: int, seed: int) -> list[list[int]]:
    """Every user walks through the items in steps of one, from a place of their own."""
    starts = np.random.default_rng(seed).integers(NUM_ITEMS, size=num_users)
    return [[int(start + step) % NUM_ITEMS for step in range(6)] for start in starts]


def hits(ranker: SequentialRanker) -> float:
    """Share of held-out walks whose next item is ranked first of all."""
    walks = cycles(40, seed=9)
    scores = ranker([walk[:-1] for walk in walks], [range(NUM_ITEMS)] * len(walks))
    return float(np.mean([np.argmax(found) == walk[-1] for found, walk in zip(scores, walks, strict=True)]))


@pytest.mark.parametrize("num_negatives", [0, 8])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_next_step_is_learned(name: str, num_negatives: int) -> None:
    settings = replace(SMALL, num_negatives=num_negatives)
    found = train_sequential(name, cycles(300, seed=0), NUM_ITEMS, hits, seed=0, settings=settings)
    assert hits(found.ranker) == found.ndcg > 0.7


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equal_seeds_give_equal_scores_and_leave_the_global_stream_alone(name: str) -> None:
    short = SequentialSettings(hidden_size=8, num_layers=1, max_length=8, max_epochs=2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (train_sequential(name, cycles(50, 1), NUM_ITEMS, lambda r: 0.0, 3, short).ranker for _ in range(2))
    assert torch.rand(1) == expected
    assert (first([[1, 2]], [range(9)])[0] == second([[1, 2]], [range(9)])[0]).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_states_do_not_see_what_follows(name: str) -> None:
    model = MODELS[name](NUM_ITEMS, SMALL).eval()
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 7]]))
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_users_are_ranked_together_as_alone(name: str) -> None:
    torch.manual_seed(0)
    ranker = SequentialRanker(MODELS[name](NUM_ITEMS, SMALL), SMALL.max_length)
    histories, candidates = [[1, 2, 3], [7], list(range(20))], [[4, 5], [1, 2, 3, 9], [0]]
    together = ranker(histories, candidates)
    for history, items, found in zip(histories, candidates, together, strict=True):
        np.testing.assert_allclose(found, ranker([history], [items])[0], atol=1e-5)
        np.testing.assert_allclose(found, ranker([history[-8:]], [items])[0], atol=1e-5)


TINY = SequentialSettings(hidden_size=8, max_epochs=2)


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> list[SequentialSettings]:
    grid = [replace(TINY, hidden_size=4, max_epochs=1), TINY]
    monkeypatch.setattr(baselines, "make_grid", lambda lengths, num_items: grid)
    return grid


def test_trained_models_are_kept_by_histories_settings_seed_and_code(
    run: Path,
    tmp_path: Path,
    small_grid: list[SequentialSettings],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup_logging()
    store = HistoryStore(run / "histories")
    first = build_rankers(store, ["gru4rec"], 0, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(small_grid), "one for each settings"
    assert "2 of 4 settings are tried, each in at most 1 epochs of " in lines[0]
    assert "gru4rec: hidden_size 8, dropout 0.2, learning_rate 0.001: validation NDCG@10 0." in lines[2]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = build_rankers(store, ["gru4rec"], 0, tmp_path)
    assert again.tuning == first.tuning
    seconds = re.compile(r", \d+ s$")
    said = [seconds.sub("", line) for line in capsys.readouterr().out.splitlines()]
    assert said == [seconds.sub("", line) for line in lines]
    users = ([[1, 2], [3]], [[4, 5], [6]])
    pairs = zip(first.rankers["gru4rec"](*users), again.rankers["gru4rec"](*users), strict=True)
    assert all((one == other).all() for one, other in pairs)
    build_rankers(store, ["gru4rec"], 1, tmp_path)
    assert times.items() < {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    assert len(list(tmp_path.iterdir())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "VERSION", 0)
        build_rankers(store, ["gru4rec"], 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    for path in times:
        path.write_bytes(b"no model")
    with pytest.raises(DataError, match=r"gru4rec-.*.safetensors: not a gru4rec of these histories .*; remove it"):
        build_rankers(store, ["gru4rec"], 0, tmp_path)


def test_the_settings_that_rank_validation_users_best_are_chosen(
    run: Path, tmp_path: Path, small_grid: list[SequentialSettings]
) -> None:
    found = build_rankers(HistoryStore(run / "histories"), ["sasrec"], 0, tmp_path)
    tuning = found.tuning["sasrec"]
    assert [point["hidden_size"] for point in tuning["tried"]] == [4, 8]
    best = max(tuning["tried"], key=lambda point: point["ndcg"])
    assert tuning["chosen"] == {key: best[key] for key in GRID[0]}
    assert found.rankers["sasrec"].model.items.embedding_dim == best["hidden_size"]
    assert (tuning["softmax"], tuning["not_tried"]) == ("all 400 items", len(GRID) - 2)


def test_what_the_data_allow() -> None:
    few, many = make_grid([25] * 863, 5000), make_grid([25] * 700_000, 100_000)
    assert [settings.point for settings in few] == list(GRID)
    assert {(settings.num_negatives, settings.batch_size) for settings in few} == {(0, 17)}
    assert [settings.point for settings in many] == [SequentialSettings().point]
    assert (many[0].num_negatives, many[0].batch_size) == (NUM_NEGATIVES, 128)
    assert make_grid([3] * 10, 100)[0].batch_size == 16
    users = MAX_WORK // len(GRID) // (24 * (5000 + WORK_OF_BODY))
    assert len(make_grid([25] * users, 5000)) == len(GRID) > len(make_grid([25] * (users + 1), 5000)) == 1


def test_the_full_softmax_by_its_formula() -> None:
    torch.manual_seed(0)
    items, states, targets = make_embedding(NUM_ITEMS, SMALL), torch.randn(3, 32), torch.tensor([1, 7, 30])
    logits = (states @ items.weight.T).detach().double()
    expected = [math.log(sum(row[1:].exp())) - row[target] for row, target in zip(logits, targets, strict=True)]
    assert softmax_loss(states, targets, items, 0, torch.Generator()).item() == pytest.approx(
        np.mean(expected), abs=1e-5
    )


def test_the_sampled_softmax_estimates_the_sum_over_all_items_without_bias() -> None:
    torch.manual_seed(0)
    sampled = replace(SMALL, num_negatives=5)
    items, state, target = make_embedding(NUM_ITEMS, sampled), torch.randn(1, 32), torch.tensor([7])
    own = (state @ items.weight[7]).item()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [softmax_loss(state, target, items, 5, generator).item() for _ in range(4000)]
        full = softmax_loss(state, target, items, 0, generator).item()
    # A loss is the log of the sum less the target's own logit.
    assert np.mean(np.exp(np.array(losses) + own)) == pytest.approx(math.exp(full + own), rel=0.01)


def test_a_sampled_softmax_moves_the_rows_that_it_met() -> None:
    items = make_embedding(NUM_ITEMS, replace(SMALL, num_negatives=4))
    generator = torch.Generator().manual_seed(0)
    softmax_loss(torch.randn(2, 32), torch.tensor([3, 4]), items, 4, generator).backward()
    assert items.weight.grad.is_sparse
    assert {3, 4} <= set(items.weight.grad.coalesce().indices()[0].tolist()) < set(range(1, NUM_ITEMS + 1))


def test_scores_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    scores = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ranker = train_sequential("sasrec", cycles(60, 1), NUM_ITEMS, lambda r: 0.0, 3, SMALL).ranker
        assert torch.get_num_threads() == threads
        scores.append(ranker([[1, 2]], [range(NUM_ITEMS)])[0])
    torch.set_num_threads(before)
    assert (scores[0] == scores[1]).all()


def test_the_best_epoch_is_kept_and_training_ends_when_it_gets_no_better() -> None:
    metrics = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.2, 0.9])
    states = []

    def validate(ranker: SequentialRanker) -> float:
        states.append(ranker.model.items.weight.clone())
        return next(metrics)

    settings = replace(SMALL, min_epochs=6, patience_epochs=3)
    found = train_sequential("gru4rec", cycles(40, 1), NUM_ITEMS, validate, 3, settings)
    assert found.facts == {"ndcg": 0.3, "best_epoch": 2, "num_epochs": 6}
    assert (found.ranker.model.items.weight == states[1]).all() and (states[1] != states[5]).any()


def test_a_long_training_says_where_it_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    setup_logging()
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    train_sequential("gru4rec", cycles(20, 1), NUM_ITEMS, lambda r: 0.5, 3, replace(SMALL, max_epochs=2))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r".*gru4rec: 2 of 2, [\d.]+/s, best validation NDCG@10 0.5000", last)


def test_arrays_train_as_lists_do() -> None:
    walks = cycles(50, 1)
    scores = []
    for sequences in (walks, [np.array(walk, np.int32) for walk in walks]):
        ranker = train_sequential("sasrec", sequences, NUM_ITEMS, lambda r: 0.5, 3, SMALL).ranker
        scores.append(ranker([[1, 2]], [range(NUM_ITEMS)])[0].tolist())
    assert scores[0] == scores[1]
