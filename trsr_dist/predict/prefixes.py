"""Keys and values of the prefixes that were read last: new candidates of a user who was ranked before cost themselves.

Prompt caching (arXiv 2311.04934) for packed rows: the attention reads kept prefixes from here, and of their users the
suffixes alone run through the model. Prefixes are told by their token ids, never by the user.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from threading import Lock

import numpy as np
import torch

from trsr_dist.evaluate.parts import PartScorer
from trsr_dist.model.attention.backends import Attend
from trsr_dist.model.attention.layout import Layout
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow

Ids = tuple[int, ...]
KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer and prefix, after the rotary embedding, each (num_tokens, num_kv_heads, head_dim)."""


@dataclass
class Keeping:
    """An ``Attend`` that copies the keys and values of some prefixes of a row."""

    attend: Attend
    users: Sequence[int]
    """Whose, by their places in the row."""
    layers: list[list[KeysValues]] = field(default_factory=list)
    """By layer, then as ``users``."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
    ) -> torch.Tensor:
        head, ends = layout.head, list(accumulate(layout.prefixes, initial=layout.head))
        spans = [slice(ends[user], ends[user + 1]) for user in self.users]
        self.layers.append([tuple(torch.cat((x[:head], x[span])) for x in (k, v)) for span in spans])
        return self.attend(q, k, v, layout, answers_only, scale)


@dataclass
class Reading:
    """An ``Attend`` of suffixes behind kept prefixes."""

    attend: Attend
    prefixes: Sequence[Sequence[KeysValues]]
    """By user of the row, then by layer; some are longer than the layout says."""
    num_read: int = 0
    """Layers."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
    ) -> torch.Tensor:
        pairs = list(zip((layers[self.num_read] for layers in self.prefixes), layout.prefixes, strict=True))
        keys, values = ([kept[which][:length] for kept, length in pairs] for which in (0, 1))
        self.num_read += 1
        return self.attend(q, torch.cat((*keys, k)), torch.cat((*values, v)), layout, answers_only, scale)


class PrefixCache:
    """Scores users by a model and keeps their prefixes; the least recently used ones make room. Safe to use from
    several threads, one at a time.

    Args:
        model: with shared prefixes.
        row_tokens: length limit of a packed row.
        limit_bytes: of all keys and values that are kept.
    """

    def __init__(self, model: Recommender, row_tokens: int, limit_bytes: int) -> None:
        self._model = model
        self._row_tokens = row_tokens
        self._limit_bytes = limit_bytes
        layers, num_kv_heads = model.causal.model.layers, model.causal.config.num_key_value_heads
        self._token_bytes = 2 * len(layers) * num_kv_heads * layers[0].self_attn.head_dim * model.causal.dtype.itemsize
        self._kept: OrderedDict[Ids, list[KeysValues]] = OrderedDict()
        """By layer; the prefix that was used last stands last."""
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are kept."""
        return sum(map(len, self._kept)) * self._token_bytes

    def score_users(self, users: Sequence[TokenizedUser]) -> list[np.ndarray]:
        """float32 log-odds of every user's candidates. Kept prefixes are read first, before others take their room."""
        scores: dict[int, np.ndarray] = {}
        with self._lock:
            cut = [self._cut(user) for user in users]
            for is_kept in (True, False):
                places = [place for place, user in enumerate(users) if (cut[place] is not user) == is_kept]
                part = PartScorer([cut[place] for place in places], self._row_tokens)
                for number, row in enumerate(part.rows()):
                    part.take(number, self._score_row(row))
                scores |= zip(places, part.scores(), strict=True)
        return [scores[place] for place in range(len(users))]

    def _cut(self, user: TokenizedUser) -> TokenizedUser:
        """The user with the kept part of the prefix alone, where what follows costs less before each suffix.

        A prefix is what all candidates of a request have in common, so that other candidates may end it earlier.
        """
        length = self._find(user.prefix)[1]
        rest = user.prefix[length:]
        # A user who is cut is not kept. All prompts begin with the same instruction, which is less than half of most:
        # for that much of another user's, one with a single candidate is not cut.
        if len(rest) * max(len(user.suffixes), 2) >= len(user.prefix):
            return user
        return replace(user, prefix=user.prefix[:length], suffixes=tuple(rest + suffix for suffix in user.suffixes))

    def _find(self, prefix: Ids) -> tuple[Ids, int]:
        """The kept prefix that begins with the most tokens of another one, and their number."""
        return max(
            ((kept, _num_common(kept, prefix)) for kept in self._kept), key=lambda pair: pair[1], default=((), 0)
        )

    @torch.no_grad()
    def _score_row(self, row: PackedRow) -> np.ndarray:
        """As ``recommender.score_row``, of the suffixes alone where all prefixes of the row are kept."""
        prefixes = [tuple(ids.tolist()) for ids in row.prefixes()]
        found = [self._find(prefix) for prefix in prefixes]
        is_kept = all(length == len(prefix) for (_, length), prefix in zip(found, prefixes, strict=True))
        if is_kept:
            for kept, _ in found:
                self._kept.move_to_end(kept)
            attend = Reading(self._model.attend, [self._kept[kept] for kept, _ in found])
        else:
            attend = Keeping(self._model.attend, self._make_room(prefixes))
        pair = self._model(RowInputs(row, self._model.device, is_kept), "pair", attend=attend)
        if not is_kept:
            for user, *layers in zip(attend.users, *attend.layers, strict=True):
                self._kept[prefixes[user]] = layers
        return (pair[:, 0] - pair[:, 1]).cpu().numpy()

    def _make_room(self, prefixes: Sequence[Ids]) -> list[int]:
        """Places of the prefixes that will be kept: the last ones, where a row has more than the limit allows."""
        chosen: dict[Ids, int] = {}
        room = self._limit_bytes
        for place, prefix in reversed(list(enumerate(prefixes))):
            size = len(prefix) * self._token_bytes
            if prefix not in chosen and size <= room:
                chosen[prefix], room = place, room - size
                self._kept.pop(prefix, None)
        while self.num_bytes > room:
            self._kept.popitem(last=False)
        return list(chosen.values())


def _num_common(one: Ids, other: Ids) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
