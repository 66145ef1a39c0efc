"""Sequential recommenders without text, in their published form: GRU4Rec and SASRec, small and in plain PyTorch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trsr_dist.log import get_logger

LOG_SECONDS = 60.0
PADDING = 0
"""Embedding row of padding; item row i has embedding row i + 1."""

log = get_logger("evaluate")


@dataclass(frozen=True, slots=True)
class SequentialSettings:
    """Sizes and training of both models."""

    hidden_size: int = 64
    num_layers: int = 2
    max_length: int = 50
    """Latest items that the model sees."""
    dropout: float = 0.2
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_epochs: int = 200
    patience_epochs: int = 5
    patience_steps: int = 500
    """Training stops after both numbers of epochs and optimizer steps without a better validation metric: of few users
    an epoch is a handful of steps, and both models stand at chance for the first hundreds."""


class Gru4Rec(nn.Module):
    """Item embeddings into a GRU; scores against the same embeddings (Hidasi et al., ICLR 2016)."""

    def __init__(self, num_items: int, settings: SequentialSettings) -> None:
        super().__init__()
        size = settings.hidden_size
        self.items = nn.Embedding(num_items + 1, size, padding_idx=PADDING, sparse=True)
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(size, size, batch_first=True)
        nn.init.normal_(self.items.weight, std=0.02)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """int64 (batch, length) to states (batch, length, hidden)."""
        return self.gru(self.dropout(self.items(sequences)))[0]

    def loss(self, states: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy where the other targets of the mini-batch are the negatives."""
        real = targets != PADDING
        choices, place = torch.unique(targets[real], return_inverse=True)
        return functional.cross_entropy(states[real] @ self.items(choices).T, place)


class SasRec(nn.Module):
    """Causal self-attention over item and position embeddings (Kang and McAuley, ICDM 2018)."""

    def __init__(self, num_items: int, settings: SequentialSettings) -> None:
        super().__init__()
        size = settings.hidden_size
        self.items = nn.Embedding(num_items + 1, size, padding_idx=PADDING, sparse=True)
        self.positions = nn.Embedding(settings.max_length, size)
        self.dropout = nn.Dropout(settings.dropout)
        block = nn.TransformerEncoderLayer(size, 1, size, settings.dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, settings.num_layers, nn.LayerNorm(size), enable_nested_tensor=False)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """int64 (batch, length) to states (batch, length, hidden)."""
        length = sequences.shape[1]
        inputs = self.items(sequences) * self.items.embedding_dim**0.5 + self.positions(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(self.dropout(inputs), mask=mask, is_causal=True)

    def loss(self, states: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Binary cross-entropy of the next item against one uniformly drawn negative at every position."""
        real = targets != PADDING
        drawn = torch.randint(1, self.items.num_embeddings, (int(real.sum()),), generator=generator)
        positive = (states[real] * self.items(targets[real])).sum(-1)
        negative = (states[real] * self.items(drawn)).sum(-1)
        return (functional.softplus(-positive) + functional.softplus(negative)).mean()


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


def train_sequential(
    name: str,
    sequences: Sequence[Sequence[int]],
    num_items: int,
    validate: Callable[[SequentialRanker], float],
    seed: int,
    settings: SequentialSettings,
) -> SequentialRanker:
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
        best, best_state, waited, said = -1.0, copy.deepcopy(model.state_dict()), 0, time.monotonic()
        for epoch in range(1, settings.max_epochs + 1):
            loss = _train_epoch(model, optimizers, sequences, generator, settings)
            metric = validate(ranker)
            waited = 0 if metric > best else waited + 1
            waited_steps = waited * -(-len(sequences) // settings.batch_size)
            if metric > best:
                best, best_state = metric, copy.deepcopy(model.state_dict())
            if waited >= settings.patience_epochs and waited_steps >= settings.patience_steps:
                break
            if time.monotonic() - said >= LOG_SECONDS:
                said = time.monotonic()
                log.info("%s: epoch %d  loss %.4f  validation %.4f  best %.4f", name, epoch, loss, metric, best)
        log.info("%s: epoch %d  loss %.4f  best validation %.4f, of epoch %d", name, epoch, loss, best, epoch - waited)
        model.load_state_dict(best_state)
    return ranker


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Adam; of the item embeddings a step moves the rows that it met alone, else it would cost the whole catalogue."""
    items = [model.items.weight]
    others = [parameter for parameter in model.parameters() if parameter is not model.items.weight]
    options = {"lr": learning_rate, "betas": (0.9, 0.98)}
    return [torch.optim.SparseAdam(items, **options), torch.optim.Adam(others, **options)]


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
) -> float:
    """One pass over the sequences; the mean loss of its steps."""
    model.train()
    losses = []
    order = torch.randperm(len(sequences), generator=generator).tolist()
    for first in range(0, len(order), settings.batch_size):
        chosen = [sequences[i][-settings.max_length - 1 :] for i in order[first : first + settings.batch_size]]
        batch = _pad(chosen)
        model.zero_grad()
        loss = model.loss(model(batch[:, :-1]), batch[:, 1:], generator)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _pad(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Embedding rows, int64 (batch, longest), padded on the right, where causal models cannot see it."""
    batch = torch.full((len(sequences), max(map(len, sequences))), PADDING)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = torch.tensor(sequence) + 1
    return batch
