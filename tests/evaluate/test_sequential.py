"""The sequential models learn what can only be learned from the order of items."""

import numpy as np
import pytest
import torch

from trsr_dist.evaluate.sequential import MODELS, SequentialRanker, SequentialSettings, train_sequential

NUM_ITEMS = 30
SMALL = SequentialSettings(hidden_size=32, num_layers=1, max_length=8, dropout=0.1, learning_rate=1e-2, max_epochs=30)


def cycles(num_users: int, seed: int) -> list[list[int]]:
    """Every user walks through the items in steps of one, from a place of their own."""
    starts = np.random.default_rng(seed).integers(NUM_ITEMS, size=num_users)
    return [[int(start + step) % NUM_ITEMS for step in range(6)] for start in starts]


def hits(ranker: SequentialRanker) -> float:
    """Share of held-out walks whose next item is ranked first of all."""
    walks = cycles(40, seed=9)
    return float(np.mean([np.argmax(ranker(walk[:-1], range(NUM_ITEMS))) == walk[-1] for walk in walks]))


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
    assert (first([1, 2], range(9)) == second([1, 2], range(9))).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_states_do_not_see_what_follows(name: str) -> None:
    model = MODELS[name](NUM_ITEMS, SMALL).eval()
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 7]]))
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


def test_scores_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    scores = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ranker = train_sequential("sasrec", cycles(60, 1), NUM_ITEMS, lambda r: 0.0, 3, SMALL)
        assert torch.get_num_threads() == threads
        scores.append(ranker([1, 2], range(NUM_ITEMS)))
    torch.set_num_threads(before)
    assert (scores[0] == scores[1]).all()


def test_few_users_train_for_steps_not_epochs() -> None:
    epochs = []
    settings = SequentialSettings(hidden_size=8, num_layers=1, max_length=8, batch_size=20, patience_steps=30)
    train_sequential("gru4rec", cycles(40, 1), NUM_ITEMS, lambda r: float(not epochs.append(1)), 3, settings)
    assert len(epochs) == 1 + 15, "two steps an epoch; the first is the best"
