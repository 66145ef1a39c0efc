"""What a GPU does with the paper's model: tokens, users and useful FLOP/s, memory, attention back ends, scoring, texts.

Each measurement stands alone: one that fails, or for which the time is up, is a row that says so, and the others count.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from statistics import median

import torch

from benchmarks import summarize
from benchmarks.common import Row
from benchmarks.decoding import by_in_flight
from benchmarks.gpu_model import SUFFIX, Bench, Setting, copy_rate, matrix_rate, times_of
from benchmarks.ways import INSTRUCTION
from trsr_dist.errors import ConfigError
from trsr_dist.model.attention.backends import build_backend, choose_backend
from trsr_dist.model.attention.layout import Layout

CANDIDATES = (2, 5, 21)
BACKENDS = ("flash_attn", "flash_attn_4", "torch", "flex", "dense")
WRITER = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
"""The summarizer's shape, 1.2 billion weights."""
NUM_PROMPTS = 8
IN_FLIGHT = (1, 8, 32, 128)
FAILED, LATE = "failed: ", "not run: the time was up"

Measure = Callable[[], list[Row]]


def run(scale: float, until: float = math.inf, keep: Callable[[list[Row]], None] | None = None) -> list[Row]:
    """All measurements.

    Args:
        scale: multiplies the rows' length.
        until: no measurement begins after this ``time.monotonic()``.
        keep: called with the rows so far, after each measurement.
    """
    setting = Setting.choose(scale)
    rows = [_device_row(setting)]
    for case, measure in measurements(setting):
        rows += attempt(case, measure, until)
        if keep is not None:
            keep(rows)
    return rows


def measurements(setting: Setting) -> list[tuple[str, Measure]]:
    """Name and measurement, the most telling first."""
    rate = cache(lambda: matrix_rate(setting))
    bandwidth = cache(lambda: copy_rate(setting))
    bench = cache(lambda: Bench(setting, rate()))
    product = f"matrix product of {setting.matrix}"
    training = [(f"train 1+{count - 1}", partial(lambda n: bench().training(n), count)) for count in CANDIDATES]
    kernels = [
        (f"attention, 1+{count - 1}, {name}", partial(attention, name, count, setting))
        for count in (2, 21)
        for name in BACKENDS
    ]
    return [
        (product, lambda: [Row("gpu", product, "rate", rate() / 1e12, "TFLOP/s")]),
        ("copy", lambda: [Row("gpu", "copy on the device", "rate", bandwidth() / 1e9, "GB/s", "read and written")]),
        *training,
        ("train 1+1, recomputed", lambda: bench().training(2, recompute=True)),
        ("train 1+1, recomputed selectively", lambda: bench().training(2, recompute="selective")),
        ("compiled layers", lambda: bench().compiled(2)),
        ("train 1+1, the alternatives", lambda: bench().alternatives(2)),
        ("train 1+20, the alternatives", lambda: bench().alternatives(21)),
        ("score 1+20", lambda: bench().scoring(21)),
        ("train 1+4, profiled", lambda: bench().kernels(5)),
        ("train 1+4, further savings", lambda: bench().savings(5)),
        ("train 1+4, fused kernels", lambda: bench().fused(5)),
        ("train 1+4, FP8 base", lambda: bench().quantized(5)),
        ("summarizing", lambda: generation(setting, rate(), bandwidth())),
        *kernels,
    ]


def attempt(case: str, measure: Measure, until: float) -> list[Row]:
    """A measurement's rows, or one that says why there are none."""
    if time.monotonic() > until:
        return [_missing(case, LATE)]
    try:
        return measure()
    except ConfigError as error:
        return [_missing(case, f"not run: {error}")]
    except Exception as error:  # whatever a device or another version of a library does, the other measurements count
        said = (str(error).strip() or repr(error)).splitlines()[0][:200]
        return [_missing(case, f"{FAILED}{type(error).__name__}: {said}")]
    finally:
        gc.collect()
        with suppress(RuntimeError):  # after some errors the device fails at everything
            torch.cuda.empty_cache()


def is_complete(rows: list[Row]) -> bool:
    """Whether nothing failed or came too late. What cannot run here, such as a package that is missing, may be."""
    return not any(row.note.startswith((FAILED, LATE)) for row in rows)


def attention(name: str, count: int, setting: Setting) -> list[Row]:
    """A back end alone, forward and backward.

    Raises:
        ConfigError: it cannot run here.
    """
    config, device = setting.config, setting.device
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attend = build_backend(choose_backend(name, device, setting.dtype, head_dim))
    users = max(1, setting.row_tokens // (setting.prefix + count * SUFFIX))
    layout = Layout(INSTRUCTION, (setting.prefix,) * users, ((SUFFIX,) * count,) * users, device)
    shape = (layout.num_tokens, heads, head_dim)
    *operands, gradient = (torch.randn(shape, device=device).to(setting.dtype) for _ in range(4))
    q, k, v = (operand.requires_grad_() for operand in operands)

    def step() -> None:
        torch.autograd.grad(attend(q, k, v, layout, False, head_dim**-0.5), (q, k, v), gradient)

    times = times_of(step, device)
    low, value, high = (1000 * pick(times) for pick in (min, median, max))
    return [Row("gpu", f"attention, {users} users, 1+{count - 1}", name, value, "ms", "", low, high)]


def generation(setting: Setting, rate: float, bandwidth: float) -> list[Row]:
    """The summarizer's engine against one ``generate`` call a prompt, and by the number of texts in flight."""
    on_gpu = setting.device.type == "cuda"
    tokenizer = summarize.make_tokenizer()
    with setting.device:
        model = summarize.make_model(tokenizer, WRITER if on_gpu else summarize.TINY).to(setting.dtype)
    requests = summarize.ragged(tokenizer, NUM_PROMPTS if on_gpu else 4)
    rows = summarize.against_generate(model, tokenizer, requests, rate, "gpu", repeats=2)
    return rows + by_in_flight(model, tokenizer, IN_FLIGHT if on_gpu else IN_FLIGHT[:1], rate, bandwidth)


def _missing(case: str, reason: str) -> Row:
    return Row("gpu", case, "-", math.nan, "", reason)


def _device_row(setting: Setting) -> Row:
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "no GPU: a tiny model on the CPU"
    return Row("gpu", name, "torch", float(".".join(torch.__version__.split(".")[:2])), "", torch.__version__)
