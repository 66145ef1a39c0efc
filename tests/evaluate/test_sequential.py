"""The sequential models learn what can only be learned from the order of items."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate import rankers
from trsr_dist.evaluate.rankers import build_rankers
from trsr_dist.evaluate.sequential import MODELS, SequentialRanker, SequentialSettings, train_sequential
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


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_next_step_is_learned(name: str) -> None:
    ranker = train_sequential(name, cycles(300, seed=0), NUM_ITEMS, hits, seed=0, settings=SMALL)
    assert hits(ranker) > 0.7


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equal_seeds_give_equal_scores_and_leave_the_global_stream_alone(name: str) -> None:
    short = SequentialSettings(hidden_size=8, num_layers=1, max_length=8, max_epochs=2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (train_sequential(name, cycles(50, 1), NUM_ITEMS, lambda r: 0.0, 3, short) for _ in range(2))
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


def test_a_trained_model_is_kept_by_histories_and_seed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    setup_logging()
    short = partial(SequentialSettings, hidden_size=8, max_epochs=2)
    monkeypatch.setattr(rankers, "SequentialSettings", short)
    store = HistoryStore(run / "histories")
    first = build_rankers(store, ["gru4rec"], 0, tmp_path)["gru4rec"]
    assert "gru4rec: epoch 2  loss " in capsys.readouterr().out
    again = build_rankers(store, ["gru4rec"], 0, tmp_path)["gru4rec"]
    text = capsys.readouterr().out
    assert "trained before" in text and "epoch" not in text
    users = ([[1, 2], [3]], [[4, 5], [6]])
    assert all((one == other).all() for one, other in zip(first(*users), again(*users), strict=True))
    build_rankers(store, ["gru4rec"], 1, tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(b"no model")
    kept[1].write_bytes(b"no model")
    with pytest.raises(DataError, match=r"gru4rec-.*.safetensors: not a gru4rec of these histories .*; remove it"):
        build_rankers(store, ["gru4rec"], 0, tmp_path)


def test_scores_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    scores = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ranker = train_sequential("sasrec", cycles(60, 1), NUM_ITEMS, lambda r: 0.0, 3, SMALL)
        assert torch.get_num_threads() == threads
        scores.append(ranker([[1, 2]], [range(NUM_ITEMS)])[0])
    torch.set_num_threads(before)
    assert (scores[0] == scores[1]).all()


def test_few_users_train_for_steps_not_epochs() -> None:
    epochs = []
    settings = SequentialSettings(hidden_size=8, num_layers=1, max_length=8, batch_size=20, patience_steps=30)
    train_sequential("gru4rec", cycles(40, 1), NUM_ITEMS, lambda r: float(not epochs.append(1)), 3, settings)
    assert len(epochs) == 1 + 15, "two steps an epoch; the first is the best"


def test_arrays_train_as_lists_do_with_a_line_a_minute(capsys: pytest.CaptureFixture) -> None:
    setup_logging()
    walks = cycles(50, 1)
    scores = []
    for sequences in (walks, [np.array(walk, np.int32) for walk in walks]):
        ranker = train_sequential("sasrec", sequences, NUM_ITEMS, lambda r: 0.5, 3, SMALL)
        scores.append(ranker([[1, 2]], [range(NUM_ITEMS)])[0].tolist())
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert "best validation 0.5000, of epoch 1" in lines[0]
    assert scores[0] == scores[1]
