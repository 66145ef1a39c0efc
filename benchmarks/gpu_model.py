"""A model in Llama-2-7b's shape on a GPU: training steps, their alternatives, scoring, memory and kernels.

Random weights. Without a GPU a tiny shape runs through the same code; that says nothing of speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import median
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import LLAMA2_7B, Row, rate_row, ratio_row, separate_workload, shared_workload
from benchmarks.ways import ANSWERS, INSTRUCTION, LORA_RANK, TARGETS, make_user, row_work, suffix_lengths
from trsr_dist.config.sections import LoraSection
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.attention.backends import choose_backend
from trsr_dist.model.compilation import compile_layers, warm_up
from trsr_dist.model.fp8 import check_fp8, hold_in_fp8
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.kernels import choose_kernels, use_kernels
from trsr_dist.model.recommender import Recommender, enable_recomputation
from trsr_dist.planner.flops import forward_flops, training_flops
from trsr_dist.planner.memory import StepSettings, ZeroSetting, rank_memory
from trsr_dist.planner.shape import ModelShape
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import pack_row

LLAMA_2_7B = LlamaConfig(**LLAMA2_7B, max_position_embeddings=4096)
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=3000,
    max_position_embeddings=4096,
)
PREFIX, SUFFIX = 1024, 64
ROW_TOKENS = 8192
REPEATS = 5
MATRIX = 8192
PRODUCTS, WARM_UPS = 20, 20
"""Matrix products that are timed at once, and how often before they are timed: half a second on an H100."""
COPIED_BYTES = 4 * 2**30
TOP_KERNELS = 8


Whole = Literal["nothing", "layer", "head"]
Recompute = bool | Literal["selective"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and what is measured."""

    device: torch.device
    dtype: torch.dtype
    config: LlamaConfig
    prefix: int
    row_tokens: int
    matrix: int

    @classmethod
    def choose(cls, scale: float) -> Setting:
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.bfloat16, LLAMA_2_7B, PREFIX, round(ROW_TOKENS * scale), MATRIX)
        return cls(torch.device("cpu"), torch.float32, TINY, 128, 1024, 256)


def matrix_rate(setting: Setting) -> float:
    """FLOP/s of a large matrix product: what the device can reach at best."""
    size = setting.matrix
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b

    for _ in range(WARM_UPS):  # an idle device runs at a fraction of its clock
        products()
    return PRODUCTS * 2 * size**3 / median(times_of(products, setting.device))


def copy_rate(setting: Setting) -> float:
    """Bytes read and written a second by a large copy on the device."""
    size = COPIED_BYTES if setting.device.type == "cuda" else COPIED_BYTES // 64
    a, b = (torch.ones(size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    return 2 * size / median(times_of(lambda: b.copy_(a), setting.device))


class Bench:
    """A model with LoRA layers on the device.

    Args:
        setting: of the model and its rows.
        rate: measured FLOP/s of a matrix product.
        in_fp8: whether the base is held in FP8.

    Raises:
        ConfigError: it cannot be held so here.
    """

    def __init__(self, setting: Setting, rate: float, in_fp8: bool = False) -> None:
        self._setting = setting
        self._rate = rate
        self.shape = ModelShape.from_config(setting.config.to_dict())
        torch.manual_seed(0)
        with setting.device:
            causal = AutoModelForCausalLM.from_config(setting.config, dtype=setting.dtype)
        causal.requires_grad_(False)
        if in_fp8:
            check_fp8(setting.device, setting.dtype)
            hold_in_fp8(causal, setting.device)
        add_lora(causal, 0, **LoraSection(r=LORA_RANK, dropout=0.0, target_modules=TARGETS).model_dump())
        head_dim = setting.config.hidden_size // setting.config.num_attention_heads
        self.backend = choose_backend("auto", setting.device, setting.dtype, head_dim)
        self.model = Recommender(causal, ANSWERS, self.backend).train()

    @property
    def num_lora(self) -> int:
        return self.shape.num_lora_parameters(LORA_RANK, TARGETS)

    def training(self, count: int, recompute: Recompute = False) -> list[Row]:
        """A row of users with ``count`` candidates each, forward and backward."""
        users = self._users(count)
        if recompute:
            enable_recomputation(self.model.causal, selective=recompute == "selective")
        step, on_gpu = self._shared_step(users), self._setting.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = times_of(step, self._setting.device)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        if recompute:
            disable = getattr(self.model.causal, "activation_checkpointing_disable", None)
            (disable or self.model.causal.gradient_checkpointing_disable)()
        how = {False: "", True: ", recomputed", "selective": ", recomputed selectively"}[recompute]
        return self._rows(users, times, peak, f"train 1+{count - 1}{how}", recompute)

    def compiled(self, count: int) -> list[Row]:
        """What compiled layers gain in training and in scoring, and what they cost before the first step."""
        users, device, layers = self._users(count), self._setting.device, self.model.causal.model.layers
        started = time.perf_counter()
        compile_layers(self.model)
        warm_up(self.model, answers_only=True)
        seconds = time.perf_counter() - started
        code = [layer._compiled_call_impl for layer in layers]

        def using(chosen: list[object], run: Callable[[], object]) -> Callable[[], object]:
            def step() -> None:
                for layer, one in zip(layers, chosen, strict=True):
                    layer._compiled_call_impl = one
                run()

            return step

        train, score, none = self._shared_step(users), self._scoring_step(users), [None] * len(code)
        rows = [Row("gpu", "compiled layers", "time before the first step", seconds, "s")]
        for name, run in (("training", train), ("scoring", score)):
            plain, fast = times_in_turns((using(none, run), using(code, run)), device)
            rows.append(ratio_row("gpu", "compiled layers", f"gain in {name} 1+{count - 1}", plain, fast))
        using(none, lambda: None)()
        return rows

    def alternatives(self, count: int) -> list[Row]:
        """The same users as separate sequences: tightly padded one by one, and packed through the same kernels."""
        users = self._users(count)
        alone = users[0].choose([0])
        fitting = max(1, self._setting.row_tokens // (len(alone.prefix) + SUFFIX))
        packed = [users[0].choose([number % count]) for number in range(fitting)]
        steps = (self._shared_step(users), self._shared_step([alone], "head"), self._separate_step(packed))
        ours, one, together = times_in_turns(steps, self._setting.device)
        case, bound = f"train 1+{count - 1}", self._counted(users[0])
        fast = [seconds / len(users) for seconds in ours]
        slow = [seconds * count / fitting for seconds in together]
        single = [seconds * count for seconds in one]
        return [
            ratio_row("gpu", case, "padded one by one, whole head / ours", single, fast),
            ratio_row("gpu", case, "packed separately / ours", slow, fast, bound),
        ]

    @torch.no_grad()
    def scoring(self, count: int) -> list[Row]:
        """Candidates of users ranked by one pass."""
        users = self._users(count)
        row = pack_row(users)
        times = times_of(self._scoring_step(users), self._setting.device)
        flops = forward_flops(self.shape, row_work(row), self.num_lora, answer_pairs=row.num_separate_tokens)
        bound, case = len(users) * self._rate / flops, f"score 1+{count - 1}"
        return [
            rate_row("gpu", case, "users a second", len(users), times, "1/s", bound),
            rate_row("gpu", case, "tokens a second", row.num_tokens, times, "1/s"),
        ]

    def savings(self, count: int) -> list[Row]:
        """What is left out beyond the sharing of prefixes, each alone."""
        users, case = self._users(count), f"train 1+{count - 1}"
        steps = (self._shared_step(users), self._shared_step(users, "layer"), self._separate_step(users))
        ours, layer, instruction = times_in_turns(steps, self._setting.device)
        return [
            ratio_row("gpu", case, "gain of the last layer at the answers", layer, ours),
            ratio_row("gpu", case, "gain of the instruction once a row", instruction, ours),
        ]

    def fused(self, count: int) -> list[Row]:
        """Tokens a second on Liger's kernels over those on the stock layers.

        Raises:
            ConfigError: they cannot run here.
        """
        choose_kernels("liger", self._setting.device, self._setting.config)
        plain = self._shared_step(self._users(count))

        def step() -> None:
            bound = use_kernels(self.model.causal)
            plain()
            for module in bound:
                del module.forward

        times = times_in_turns((plain, step), self._setting.device)
        return [ratio_row("gpu", f"train 1+{count - 1}", "gain of fused kernels", *times)]

    def quantized(self, count: int) -> list[Row]:
        """Tokens a second on a base in FP8 over those on the whole one, and how far the answers' log-odds move.

        Raises:
            ConfigError: there are no FP8 products here.
        """
        users, case = self._users(count), f"train 1+{count - 1}"
        other = Bench(self._setting, self._rate, in_fp8=True)
        times = times_in_turns((self._shared_step(users), other._shared_step(users)), self._setting.device)
        inputs = RowInputs(pack_row(users), self._setting.device)
        with torch.no_grad():
            pairs = [bench.model(inputs, "pair") for bench in (self, other)]
        whole, held = (pair[:, 0] - pair[:, 1] for pair in pairs)
        moved = float((held - whole).square().mean().sqrt() / whole.std())
        note = "root mean square, of the spread of random weights' log-odds"
        return [
            ratio_row("gpu", case, "gain of an FP8 base", *times),
            Row("gpu", case, "log-odds moved by an FP8 base", moved, "", note),
        ]

    def kernels(self, count: int) -> list[Row]:
        """Where the time of a training step goes: the kernels that take longest, and the time that the GPU idles."""
        if self._setting.device.type != "cuda":
            return []
        step = self._shared_step(self._users(count))
        seconds = median(times_of(step, self._setting.device))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        averages = sorted(profiler.key_averages(), key=lambda entry: -entry.self_device_time_total)
        busy = sum(entry.self_device_time_total for entry in averages) / 1e6
        case = f"train 1+{count - 1}, profiled"
        if not busy:
            return [Row("gpu", case, "GPU idle", nan, "", "not run: the profiler saw no kernel on the device")]
        rows = [Row("gpu", case, "GPU idle", max(0.0, 1 - busy / seconds), "", "of a step without the profiler")]
        return rows + [
            Row("gpu", case, entry.key[:60], entry.self_device_time_total / 1e6 / busy, "", f"{entry.count} calls")
            for entry in averages[:TOP_KERNELS]
        ]

    def _users(self, count: int) -> list[TokenizedUser]:
        per_user = self._setting.prefix + count * SUFFIX * 3 // 4
        number = max(1, self._setting.row_tokens // per_user)
        names = [f"user {i}" for i in range(number)]
        return [
            make_user(name, self._setting.prefix, suffix_lengths(name, SUFFIX, count), INSTRUCTION) for name in names
        ]

    def _shared_step(self, users: list[TokenizedUser], whole: Whole = "nothing") -> Callable[[], object]:
        """Forward and backward of one row; the last layer or the output head too at all positions where asked."""
        row = pack_row(users)

        def step() -> None:
            inputs = RowInputs(row, self._setting.device)
            states = self.model.states(inputs, answers_only=whole == "nothing")
            if whole == "layer":
                states = states[inputs.layout.answer_index]
            logits = self.model.causal.lm_head(states)
            if whole == "head":
                logits = logits[inputs.layout.answer_index]
            cross_entropy(logits.float(), 3 + inputs.labels, reduction="sum").backward()

        return step

    def _scoring_step(self, users: list[TokenizedUser]) -> Callable[[], object]:
        row = pack_row(users)

        @torch.no_grad()
        def step() -> None:
            self.model.eval()(RowInputs(row, self._setting.device), "pair")
            self.model.train()

        return step

    def _separate_step(self, prompts: list[TokenizedUser]) -> Callable[[], object]:
        """One row whose users share nothing, for each begins with another token."""
        return self._shared_step(
            [replace(prompt, prefix=(100 + number, *prompt.prefix[1:])) for number, prompt in enumerate(prompts)]
        )

    def _rows(
        self, users: list[TokenizedUser], times: list[float], peak: int, case: str, recompute: Recompute
    ) -> list[Row]:
        """The bound of the users is that of the matrix rate: its share is the MFU."""
        row = pack_row(users)
        flops = training_flops(self.shape, row_work(row), self.num_lora, answer_pairs=row.num_separate_tokens)
        settings = StepSettings(row.num_tokens, "bfloat16", recompute, TARGETS, answers_only=True, dropout=False)
        predicted = rank_memory(self.shape, self.num_lora, settings, ZeroSetting(0), world_size=1)
        users_bound = len(users) * self._rate / flops
        tokens = rate_row("gpu", case, "tokens a second", row.num_tokens, times, "1/s")
        rows = [
            replace(tokens, note=f"row of {row.num_tokens} tokens, {self.backend}"),
            rate_row("gpu", case, "users a second", len(users), times, "1/s", users_bound),
        ]
        if peak:
            needed = predicted.weights + predicted.adapter + predicted.gradients + predicted.activations
            rows.append(Row("gpu", case, "peak memory", peak / 1e9, "GB", f"planner: {needed / 1e9:.1f} GB"))
        return rows

    def _counted(self, user: TokenizedUser) -> float:
        """Operations of separate prompts over shared ones."""
        lengths = [len(suffix) for suffix in user.suffixes]
        works = separate_workload(len(user.prefix), lengths), shared_workload(len(user.prefix), lengths)
        separate, shared = (training_flops(self.shape, work, self.num_lora) for work in works)
        return separate / shared


def times_of(step: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    return times_in_turns((step,), device)[0]


def times_in_turns(steps: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Seconds of each call of each step, the steps in turns, after one call of each that is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(REPEATS):
        for step, seconds in zip(steps, times, strict=True):
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            seconds.append(time.perf_counter() - began)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
