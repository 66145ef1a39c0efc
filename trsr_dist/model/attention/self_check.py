"""Runs a back end once against exact attention, with the model's heads on its device, before anything depends on it.

Kernels differ by device, version and head size, and a wrong gradient trains without an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trsr_dist.errors import ConfigError
from trsr_dist.log import get_logger
from trsr_dist.model.attention.backends import Attend, build_backend, choose_backend, dense_attention
from trsr_dist.model.attention.layout import Layout

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative L2 error; the kernels measured reach a quarter of it, a lost term of a gradient is percents."""
LENGTHS = (9, (70, 33, 140), ((5, 17), (30,), (8, 8, 8)))
"""Head, prefixes and suffixes of the row that is read."""

log = get_logger("model")


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def choose_checked(name: str, device: torch.device, dtype: torch.dtype, heads: Heads) -> str:
    """As ``choose_backend``, of the back ends that give right results here.

    Raises:
        ConfigError: the asked back end cannot run here, or gives wrong results.
    """
    refused: list[str] = []
    while True:
        choice = choose_backend(name, device, dtype, heads.head_dim, refused)
        fault = "" if choice == "dense" else fault_of(build_backend(choice), device, dtype, heads)
        if not fault:
            return choice
        if name != "auto":
            raise ConfigError(f"model.attention={name} does not work here: {fault}; use auto")
        log.warning("attention back end %s is left out, since it does not work here: %s", choice, fault)
        refused.append(choice)


def fault_of(attend: Attend, device: torch.device, dtype: torch.dtype, heads: Heads) -> str:
    """What is wrong with a back end in training, in scoring or behind kept prefixes; empty where nothing is."""
    head, prefixes, suffixes = LENGTHS
    whole = Layout(head, prefixes, suffixes, device)
    behind = Layout(0, prefixes, suffixes, device, num_kept=sum(prefixes))
    for layout, answers_only in ((whole, False), (whole, True), (behind, False), (behind, True)):
        try:
            fault = _compare(attend, layout, answers_only, dtype, heads)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel's own checks, its compiler's, the driver's: there is no common class
            fault = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if fault:
            return fault
    return ""


def _compare(attend: Attend, layout: Layout, answers_only: bool, dtype: torch.dtype, heads: Heads) -> str:
    device, generator = layout.device, torch.Generator().manual_seed(0)
    num_queries = layout.num_answers if answers_only else layout.num_tokens - layout.num_kept
    counts = ((num_queries, heads.num_heads), *((layout.num_tokens, heads.num_kv_heads),) * 2)
    drawn = [
        torch.randn(*count, heads.head_dim, generator=generator).to(device, dtype) for count in (*counts, counts[0])
    ]

    def run(function: Attend, as_dtype: torch.dtype) -> list[torch.Tensor]:
        *operands, grad = (x.to(as_dtype) for x in drawn)
        with torch.enable_grad():
            operands = [x.requires_grad_() for x in operands]
            out = function(*operands, layout, answers_only, heads.head_dim**-0.5)
            return [x.detach().float() for x in (out, *torch.autograd.grad(out, operands, grad))]

    found, exact = run(attend, dtype), run(dense_attention, torch.float32)
    for part, right, name in zip(found, exact, ("its output", "dq", "dk", "dv"), strict=True):
        error = float((part - right).norm() / right.norm())
        if not error <= TOLERANCES[dtype]:
            return f"{name} differs from exact attention by {error:.2g} of its size ({TOLERANCES[dtype]:.0e} may)"
    return ""
