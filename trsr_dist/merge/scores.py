"""Proof by scores: the base with its adapter and the merged model rank the same, under nothing but transformers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trsr_dist.errors import ModelError
from trsr_dist.log import progress
from trsr_dist.model.adapters import Adapter, attach
from trsr_dist.pretrained import BaseSource, load_causal, load_classifier, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_instruction
from trsr_dist.records import Candidate, Sample, TokenizedUser
from trsr_dist.run import MANIFEST, RunFolder
from trsr_dist.shards.reader import ShardSet

TOPICS = ("politics", "tennis", "markets", "cooking", "space travel", "theatre", "cycling", "medicine")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Log-odds difference that is accepted at least, by the output's dtype."""
ROUNDINGS = 4
"""This many roundings of the largest logit are accepted: both models round both logits."""
SPARE = 1.1
"""A model in memory over its weights."""
NUM_SAMPLES = 6
NUM_CANDIDATES = 6
ACTIVATION_BYTES = 2**30
"""Allowed for one prompt's activations and the loader's buffers."""


@dataclass(frozen=True, slots=True)
class ScoreCheck:
    """Log-odds of base + adapter against those of the merged model, on the same prompts."""

    num_users: int
    num_prompts: int
    num_pairs: int
    """Pairs of one user's candidates."""
    largest_difference: float
    mean_difference: float
    rank_flips: int
    """Pairs that the two models order differently."""
    tolerance: float
    dtype: str
    device: str
    prompts: str


def check_scores(
    base: Path,
    adapter: Adapter,
    merged: Path,
    users: Sequence[TokenizedUser],
    answer_ids: tuple[int, int],
    dtype: torch.dtype,
    num_bytes: int,
    tolerance: float | None,
    prompts: str,
    is_classifier: bool = False,
) -> ScoreCheck:
    """Score the users' prompts with both models, one in memory at a time.

    Args:
        num_bytes: of the weights in memory, the adapter's too.
        tolerance: largest log-odds difference that is accepted; None: by the dtype and the logits' size.
        prompts: where the prompts come from, for the record.
        is_classifier: the merged model's logit is the log-odds.

    Raises:
        ModelError: a log-odds differs by more than ``tolerance``, or is not finite.
    """
    device = scoring_device(num_bytes)
    model = attach(_load(base, dtype, device), adapter).eval()
    before, largest = log_odds(model, users, answer_ids)
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if is_classifier:
        after = classifier_log_odds(merged, users, dtype, device)
    else:
        after, _ = log_odds(_load(merged, dtype, device), users, answer_ids)
    gc.collect()
    if tolerance is None:
        # Logits are rounded to the dtype: the larger they are, the coarser.
        tolerance = max(TOLERANCES.get(dtype, 1e-4), ROUNDINGS * torch.finfo(dtype).eps * largest)
    return compare(before, after, tolerance, str(dtype).removeprefix("torch."), device, prompts)


def scoring_device(num_bytes: int) -> str:
    """The GPU where it has room for a model of this size, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if torch.cuda.mem_get_info()[0] > SPARE * num_bytes + ACTIVATION_BYTES else "cpu"


def _load(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load_causal(BaseSource(str(folder)), dtype).to(device).eval()


@torch.no_grad()
def log_odds(
    model: torch.nn.Module, users: Sequence[TokenizedUser], answer_ids: tuple[int, int]
) -> tuple[list[torch.Tensor], float]:
    """logit(yes) - logit(no) of each candidate, float32, one tensor a user; each prompt is a separate sequence.

    The second value is the largest of these logits, by its absolute value.
    """
    device = next(model.parameters()).device
    scores, largest = [], 0.0
    for user in progress(users, description="score", unit="user"):
        row = []
        for suffix in user.suffixes:
            ids = torch.tensor([[*user.prefix, *suffix]], device=device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            yes, no = (logits[answer].float().item() for answer in answer_ids)
            row.append(torch.tensor(yes - no))
            largest = max(largest, abs(yes), abs(no))
        scores.append(torch.stack(row))
    return scores, largest


@torch.no_grad()
def classifier_log_odds(
    folder: Path, users: Sequence[TokenizedUser], dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """A classifier's logits of each candidate, float32, one tensor a user.

    A user's prompts are one batch. The folder's own tokenizer fills it up, by turns on the left and on the right.
    """
    model, tokenizer = load_classifier(folder, dtype).to(device).eval(), load_tokenizer(BaseSource(str(folder)))
    scores = []
    for number, user in enumerate(progress(users, description="score", unit="user")):
        ids = [[*user.prefix, *suffix] for suffix in user.suffixes]
        side = ("left", "right")[number % 2]
        batch = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        scores.append(logits[:, 0].float().cpu())
    return scores


def compare(
    before: list[torch.Tensor], after: list[torch.Tensor], tolerance: float, dtype: str, device: str, prompts: str
) -> ScoreCheck:
    """Differences and rank flips.

    Raises:
        ModelError: the largest difference is beyond ``tolerance``, or a score is not finite.
    """
    differences = (torch.cat(after) - torch.cat(before)).abs()
    pairs = [(u, i, j) for u, row in enumerate(before) for i, j in combinations(range(len(row)), 2)]
    flips = sum(bool((before[u][i] - before[u][j]) * (after[u][i] - after[u][j]) < 0) for u, i, j in pairs)
    result = ScoreCheck(
        num_users=len(before),
        num_prompts=differences.numel(),
        num_pairs=len(pairs),
        largest_difference=differences.max().item(),
        mean_difference=differences.mean().item(),
        rank_flips=flips,
        tolerance=tolerance,
        dtype=dtype,
        device=device,
        prompts=prompts,
    )
    if not result.largest_difference <= tolerance:
        raise ModelError(
            f"scores of base + adapter and of the merged model differ by up to {result.largest_difference:.3g} in "
            f"{dtype} (mean {result.mean_difference:.3g}, {flips} of {len(pairs)} pairs change order), allowed is "
            f"{tolerance:.3g}; nothing is published. Where that is the dtype's rounding, merge with --dtype float32 or "
            "raise --tolerance"
        )
    return result


def sample_users(builder: PromptBuilder, samples: Sequence[Sample]) -> list[TokenizedUser]:
    """Tokenized prompts with at most ``NUM_CANDIDATES`` candidates of each sample."""
    users = [builder.build(sample) for sample in samples]
    return [user.choose(range(min(NUM_CANDIDATES, len(user.suffixes)))) for user in users]


def users_to_compare(run: Path | None, num_users: int, domain: str) -> tuple[list[Sample], str]:
    """Users of a run's held-out split, those of valid before those of test, or built-in ones; and which they are."""
    for split in ("valid", "test") if run is not None else ():
        folder = RunFolder(run).split(split)
        if (folder / MANIFEST).is_file() and (users := read_users(folder, num_users)):
            return users, f"shards/{split}"
    return built_in_samples(domain)[:num_users], "built-in prompts"


def read_users(shards: Path, num_users: int) -> list[Sample]:
    """The first users of a split."""
    with closing(ShardSet(shards, any_wording=True)) as users:
        return users.read_many(range(min(num_users, len(users))))


def built_in_samples(domain: str) -> list[Sample]:
    """Users whose taste is two topics, for models whose own data is not at hand."""
    samples = []
    for number in range(NUM_SAMPLES):
        liked = (TOPICS[number], TOPICS[number + 2])
        recent = tuple(f"category: {topic}; title: What is new in {topic}" for topic in liked)
        topics = TOPICS[number:] + TOPICS[:number]
        items = [Candidate(str(i), f"category: {topic}; title: A day of {topic}", 0) for i, topic in enumerate(topics)]
        summary = f"Reads mostly about {liked[0]} and, now and then, about {liked[1]}."
        samples.append(Sample(str(number), recommend_instruction(domain), summary, recent, tuple(items)))
    return samples
