"""Sequential recommenders without text, GRU4Rec and SASRec: the grid they are tuned over, the models, their training.

Both learn by softmax cross-entropy of the next item. With the binary loss of one negative that SASRec was published
with it ranks worse than it can, which flatters what it is compared with (Klenitskiy and Vasilev, RecSys 2023; Petrov
and Macdonald, RecSys 2023; Xu et al., arXiv 2402.06216 and 2408.14238).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trsr_dist.log import get_logger, progress

GRID: tuple[dict[str, Any], ...] = (
    {"hidden_size": 64, "dropout": 0.2, "learning_rate": 5e-3},
    {"hidden_size": 64, "dropout": 0.5, "learning_rate": 5e-3},
    {"hidden_size": 64, "dropout": 0.2, "learning_rate": 1e-2},
    {"hidden_size": 64, "dropout": 0.5, "learning_rate": 1e-2},
)
MAX_LOGITS = 2**25
"""Of a step: with more positions times items than these (128 MiB in float32, three times) the softmax is sampled."""
NUM_NEGATIVES = 1024
STEPS_PER_EPOCH = 50
BATCH_SIZES = (16, 128)
"""Users of a step, at least and at most; between them the number that gives an epoch ``STEPS_PER_EPOCH``."""
MAX_WORK = 4 * 10**9
"""Logits of an epoch, summed over the grid: beyond them the settings' defaults alone are trained."""
WORK_OF_BODY = 4096
"""What the layers below the softmax cost at a position, in logits."""
PADDING = 0
"""Embedding row of padding; item row i has embedding row i + 1."""
INITIAL_DEVIATION = 0.1
"""Of item embeddings. With the published 0.01 to 0.02 the softmax stays at chance for twice the steps."""

VERSION = 1
"""Raised whenever equal data, seed and settings train another model; part of the keys of kept ones."""

log = get_logger("evaluate")


@dataclass(frozen=True, slots=True)
class SequentialSettings:
    """Sizes and training of GRU4Rec and SASRec."""

    hidden_size: int = 64
    dropout: float = 0.2
    learning_rate: float = 1e-3
    num_layers: int = 2
    """Of SASRec."""
    max_length: int = 50
    """Latest items that the model sees."""
    batch_size: int = 16
    """Users of an optimizer step."""
    num_negatives: int = 0
    """Items that a step's sampled softmax draws; 0: the softmax over the whole catalogue."""
    min_epochs: int = 8
    """Both models stay at chance for the first hundreds of steps."""
    max_epochs: int = 30
    patience_epochs: int = 3
    """Training stops after this many epochs without a better validation metric."""

    @property
    def point(self) -> dict[str, Any]:
        """What differs within the grid."""
        return {key: value for key, value in asdict(self).items() if key in GRID[0]}


def make_grid(lengths: Sequence[int], num_items: int) -> list[SequentialSettings]:
    """The points of the grid that are tried.

    Args:
        lengths: items of each train user.
        num_items: of the catalogue.
    """
    least, most = BATCH_SIZES
    batch_size = min(max(len(lengths) // STEPS_PER_EPOCH, least), most)
    max_length = SequentialSettings().max_length
    num_negatives = NUM_NEGATIVES if batch_size * max_length * num_items > MAX_LOGITS else 0
    positions = sum(min(length - 1, max_length) for length in lengths)
    work = positions * ((num_negatives or num_items) + WORK_OF_BODY)
    points = GRID if len(GRID) * work <= MAX_WORK else ({},)
    return [SequentialSettings(**point, batch_size=batch_size, num_negatives=num_negatives) for point in points]


class Gru4Rec(nn.Module):
    """Item embeddings into a GRU; scores against the same embeddings (Hidasi et al., ICLR 2016)."""

    def __init__(self, num_items: int, settings: SequentialSettings) -> None:
        super().__init__()
        size = settings.hidden_size
        self.items = make_embedding(num_items, settings)
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(size, size, batch_first=True)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """int64 (batch, length) to states (batch, length, hidden)."""
        return self.dropout(self.gru(self.dropout(self.items(sequences)))[0])


class SasRec(nn.Module):
    """Causal self-attention over item and position embeddings (Kang and McAuley, ICDM 2018)."""

    def __init__(self, num_items: int, settings: SequentialSettings) -> None:
        super().__init__()
        size = settings.hidden_size
        self.items = make_embedding(num_items, settings)
        self.positions = nn.Embedding(settings.max_length, size)
        self.dropout = nn.Dropout(settings.dropout)
        block = nn.TransformerEncoderLayer(size, 1, size, settings.dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, settings.num_layers, nn.LayerNorm(size), enable_nested_tensor=False)
        nn.init.normal_(self.positions.weight, std=INITIAL_DEVIATION)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """int64 (batch, length) to states (batch, length, hidden)."""
        length = sequences.shape[1]
        inputs = self.items(sequences) * self.items.embedding_dim**0.5 + self.positions(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(self.dropout(inputs), mask=mask, is_causal=True)


def make_embedding(num_items: int, settings: SequentialSettings) -> nn.Embedding:
    """Rows of the items after that of padding. A sampled softmax moves the rows alone that it met (sparse gradients):
    otherwise a step would cost the whole catalogue."""
    items = nn.Embedding(num_items + 1, settings.hidden_size, PADDING, sparse=settings.num_negatives > 0)
    nn.init.normal_(items.weight, std=INITIAL_DEVIATION)
    with torch.no_grad():
        items.weight[PADDING] = 0
    return items


def softmax_loss(
    states: torch.Tensor, targets: torch.Tensor, items: nn.Embedding, num_negatives: int, generator: torch.Generator
) -> torch.Tensor:
    """Mean cross-entropy of the next items under the softmax over all items.

    With negatives, the sum over the other items is estimated without bias by that over uniformly drawn ones, each of
    which stands for num_items / num_negatives: log Q correction (Bengio and Senecal, 2008; scaled cross-entropy in
    arXiv 2408.14238).

    Args:
        states: float32 (num_positions, hidden).
        targets: embedding rows of the next items, int64 (num_positions,).
        items: their embeddings.
        num_negatives: drawn for all positions together; 0: none, all items are summed.
        generator: of the draws.
    """
    if not num_negatives:
        return functional.cross_entropy(states @ items.weight[1:].T, targets - 1)
    drawn = torch.randint(1, items.num_embeddings, (num_negatives,), generator=generator)
    own = (states * items(targets)).sum(-1, keepdim=True)
    others = states @ items(drawn).T + math.log((items.num_embeddings - 1) / num_negatives)
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    return functional.cross_entropy(torch.cat([own, others], dim=1), torch.zeros_like(targets))


MODELS = {"gru4rec": Gru4Rec, "sasrec": SasRec}


class SequentialRanker:
    """A trained model as a ranker of candidates.

    Args:
        model: of ``MODELS``.
        max_length: latest items that it sees.
    """

    def __init__(self, model: nn.Module, max_length: int) -> None:
        self.model = model
        self._max_length = max_length

    @torch.no_grad()
    def __call__(self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Item rows of users' histories and candidates to scores, float64, per user of shape (num_candidates,)."""
        self.model.eval()
        with one_thread():
            seen = [history[-self._max_length :] for history in histories]
            last = torch.tensor([len(history) - 1 for history in seen])
            states = self.model(_pad(seen))[torch.arange(len(seen)), last]
            sizes = [len(items) for items in candidates]
            rows = torch.tensor([item + 1 for items in candidates for item in items])
            scores = (self.model.items(rows) * states.repeat_interleave(torch.tensor(sizes), dim=0)).sum(-1)
        return [part.double().numpy() for part in scores.split(sizes)]


def make_ranker(name: str, num_items: int, settings: SequentialSettings) -> SequentialRanker:
    """A ranker with fresh weights, from torch's global stream."""
    return SequentialRanker(MODELS[name](num_items, settings), settings.max_length)


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and how it came about."""

    ranker: SequentialRanker
    ndcg: float
    """The best NDCG@10 of the validation users."""
    best_epoch: int
    """Whose weights are kept."""
    num_epochs: int

    @property
    def facts(self) -> dict[str, float]:
        """All but the ranker."""
        return {"ndcg": self.ndcg, "best_epoch": self.best_epoch, "num_epochs": self.num_epochs}


def train_sequential(
    name: str,
    sequences: Sequence[Sequence[int]],
    num_items: int,
    validate: Callable[[SequentialRanker], float],
    seed: int,
    settings: SequentialSettings,
) -> Trained:
    """Train on the train users' sequences; the epoch with the best validation metric is kept.

    Args:
        name: ``gru4rec`` or ``sasrec``.
        sequences: item rows, oldest first, the target last.
        num_items: of the catalogue.
        validate: higher is better.
        seed: of weights, order, dropout and negatives.
        settings: sizes and training.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        ranker = make_ranker(name, num_items, settings)
        model = ranker.model
        generator, optimizers = torch.Generator().manual_seed(seed), make_optimizers(model, settings.learning_rate)
        best, best_epoch, best_state, epoch = -math.inf, 0, model.state_dict(), 0
        bar = progress(range(1, settings.max_epochs + 1), description=name, unit="epoch")
        for epoch in bar:
            _train_epoch(model, optimizers, sequences, generator, settings)
            metric = validate(ranker)
            if metric > best:
                best, best_epoch, best_state = metric, epoch, copy.deepcopy(model.state_dict())
            if epoch >= settings.min_epochs and epoch - best_epoch >= settings.patience_epochs:
                break
            bar.set_postfix_str(f"best validation NDCG@10 {best:.4f}", refresh=False)
        model.load_state_dict(best_state)
    return Trained(ranker, best, best_epoch, epoch)


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Adam; of sparse item embeddings it moves the rows that a step met alone."""
    items = [model.items.weight]
    others = [parameter for parameter in model.parameters() if parameter is not model.items.weight]
    options = {"lr": learning_rate, "betas": (0.9, 0.98)}
    of_items = torch.optim.SparseAdam if model.items.sparse else torch.optim.Adam
    return [of_items(items, **options), torch.optim.Adam(others, **options)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_epoch(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    sequences: Sequence[Sequence[int]],
    generator: torch.Generator,
    settings: SequentialSettings,
) -> None:
    """One pass over the sequences."""
    model.train()
    order = torch.randperm(len(sequences), generator=generator).tolist()
    for first in range(0, len(order), settings.batch_size):
        batch = _pad([sequences[i][-settings.max_length - 1 :] for i in order[first : first + settings.batch_size]])
        targets = batch[:, 1:]
        is_real = targets != PADDING
        model.zero_grad()
        states = model(batch[:, :-1])[is_real]
        softmax_loss(states, targets[is_real], model.items, settings.num_negatives, generator).backward()
        for optimizer in optimizers:
            optimizer.step()


def _pad(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Embedding rows, int64 (batch, longest), padded on the right, where causal models cannot see it."""
    batch = torch.full((len(sequences), max(map(len, sequences))), PADDING)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = torch.tensor(sequence) + 1
    return batch
