"""A small Llama from nothing: tokenizer, random weights, and language modelling on whatever device it stands on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
PIECES = r"(?<=\p{L}) \p{L}+|\p{L}+|\p{N}+|[^\p{L}\p{N}]+"
"""Words, numbers, and what stands between them. A blank belongs to a word only behind another word, so that a topic is
the same token in ``sports/tennis (4)`` and in ``subcategory: tennis``: a small model has no time to learn that two
tokens mean the same."""
WARMUP_SHARE = 0.05
ADAM_RATE = 0.5
"""AdamW's learning rate as a share of Muon's."""
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
PART_TOKENS = 4096
"""Documents of a step run in parts of at most this many tokens, padding included."""
IGNORED = -100
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EPSILON = 1e-7


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Equal texts give an equal one; each encoded text begins with the begin token.

    Args:
        texts: of the corpus.
        vocab_size: the largest number of tokens; fewer where the texts do not hold enough different words.
    """
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    begin = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def make_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A Llama with random float32 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, steps: Iterable[Sequence[Sequence[int]]], num_steps: int, learning_rate: float
) -> list[float]:
    """Train in place, from the present weights.

    Args:
        model: trained.
        steps: the documents of each step, in token ids.
        num_steps: how many steps there are, for the schedule.
        learning_rate: peak; rises linearly in the first steps, then falls linearly to 0.

    Returns:
        Mean loss of each step, in nats per token.
    """
    optimizers = make_optimizers(model, learning_rate)
    warmup = max(1, round(WARMUP_SHARE * num_steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(num_steps - step, 0) / max(num_steps - warmup, 1), 1.0)

    schedules = [LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    losses = []
    for documents in steps:
        losses.append(accumulate(model, documents))
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    return losses


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms.

    Muon learns more from few tokens: after 400 thousand of a demo, a loss of 0.52 nats against 0.75 with AdamW alone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=learning_rate, weight_decay=WEIGHT_DECAY),
        AdamW(others, lr=ADAM_RATE * learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True),
    ]


def accumulate(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Add the gradient of the mean loss over all predicted tokens; returns that loss."""
    count, total = sum(len(document) - 1 for document in documents), 0.0
    for part in parts(documents, PART_TOKENS):
        ids, targets = (tensor.to(model.device) for tensor in pad(part, model.config.pad_token_id))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / count).backward()
        total += loss.item()
    return total / count


def parts(documents: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    """Documents of like length together, each part within ``max_tokens`` once it is padded, or of one document."""
    made: list[list[Sequence[int]]] = []
    for document in sorted(documents, key=len):
        if not made or (len(made[-1]) + 1) * len(document) > max_tokens:
            made.append([])
        made[-1].append(document)
    return made


def pad(documents: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next tokens, int64 (documents, longest - 1), padded on the right, where causal models cannot see."""
    longest = max(map(len, documents)) - 1
    ids = torch.full((len(documents), longest), padding)
    targets = torch.full((len(documents), longest), IGNORED)
    for row, document in enumerate(documents):
        ids[row, : len(document) - 1] = torch.tensor(document[:-1])
        targets[row, : len(document) - 1] = torch.tensor(document[1:])
    return ids, targets


class Muon(Optimizer):
    """Muon in float32 (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon), for matrices.

    Momentum whose steps are made orthogonal: each changes a matrix by one whose singular values are near the learning
    rate. PyTorch's own iterates in bfloat16, which most CPUs emulate: there a step takes seconds.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate, for matrices that are not higher than wide.
        momentum: of the gradients, Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for (height, width), matrices in shapes.items():
                directions = []
                for matrix in matrices:
                    average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                    average.lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(average, group["momentum"]))
                steps = orthogonal(torch.stack(directions))
                rate = group["lr"] * max(1.0, height / width) ** 0.5
                for matrix, step in zip(matrices, steps, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of each matrix U S V^T, by Newton-Schulz iteration: singular values from about 0.7 to 1.2.

    Args:
        matrices: float32, shape (number, height, width).
    """
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    found = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        squares = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), found, beta=a)
    return found if wide is matrices else found.mT
