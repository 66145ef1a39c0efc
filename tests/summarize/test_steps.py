"""Captured decoding steps: rounded extents, rows that nobody uses, buffers that grow, what a graph depends on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.summarize.models import small_model, tokenizer
from tests.summarize.test_transformers import answers, engine, generated, model, ragged
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.engines import slots as sizes
from trsr_dist.summarize.engines import steps
from trsr_dist.summarize.engines.slots import Extent, Slots
from trsr_dist.summarize.engines.steps import CudaGraph, Steps, side_stream
from trsr_dist.summarize.engines.transformers import TransformersEngine
from trsr_dist.summarize.requests import Request

__all__ = ["model"]
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten._to_copy.default)
"""Operators that make the host wait for a GPU's numbers; the last one where it changes the device."""


class Recorder(TorchDispatchMode):
    """A function's operators on a CPU, repeated on the tensors of the recording, as a graph of kernels repeats the
    addresses that it was captured with; all else is a constant in it.

    Args:
        function: what is recorded.
        memory: addresses of the storages that may be read and are not made within, now.
    """

    def __init__(self, function: Callable[[], None], memory: Callable[[], set[int]]) -> None:
        super().__init__()
        self._memory = memory
        self._calls: list[tuple[object, tuple, dict, object]] = []
        self._made: set[int] = set()
        self._outside: set[int] = set()
        function()
        with self:
            function()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        assert func not in WAITS[:2] and not (func is WAITS[2] and kwargs.get("device", args[0].device).type != "cpu")
        self._outside |= storages((args, kwargs)) - self._made
        result = func(*args, **kwargs)
        self._made |= storages(result) - self._outside
        self._calls.append((func, args, kwargs, result))
        return result

    def __call__(self) -> None:
        assert self._outside <= self._memory()
        for func, args, kwargs, result in self._calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def storages(tree: object) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def owned(engine: TransformersEngine) -> set[int]:
    """The weights and, as they lie now, the buffers of the slots."""
    slots = engine._slots
    caches = [(layer.keys, layer.values) for layer in slots.layers]
    tensors = [*engine.model.parameters(), *engine.model.buffers(), slots._inputs, slots._rows, slots.outputs, caches]
    return storages(tensors)


class Counted:
    """Keeps what was captured, at which extent, and the sequences of each."""

    def __init__(self, engine: TransformersEngine, is_recorded: bool) -> None:
        self.extents: list[tuple[Extent, int]] = []
        self._engine, self._is_recorded = engine, is_recorded

    def __call__(self, function: Callable[[], None], others: Collection[object]) -> Callable[[], None]:
        slots = self._engine._slots
        assert slots.extent not in slots.graphs and [*others] == [*slots.graphs.values()]
        self.extents.append((slots.extent, slots.columns))
        return Recorder(function, partial(owned, self._engine)) if self._is_recorded else function


def capturing(
    model: object, slots: int, is_recorded: bool = True, reads_all: bool = True
) -> tuple[TransformersEngine, Counted]:
    started = engine(model, slots)
    captured = Counted(started, is_recorded)
    started._steps = Steps(model, captured, reads_all)
    return started, captured


def growing(**options: object) -> list[Request]:
    """Longer and longer prompts with answers of all lengths: rows move, the room grows twice."""
    requests = sorted(ragged(20, **options), key=lambda request: len(request.prompt.text()))
    return [*requests, Request("long", SummaryPrompt("say it", (), ("quiet river " * 150,)), 30, **options)]


def flash_here(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    scale: float | None,
    seen: torch.Tensor,
) -> torch.Tensor:
    """What FlashAttention 2 makes of its arguments."""
    columns = torch.arange(longest)
    places = key_starts[:-1, None] + columns
    group = query.shape[1] // keys.shape[1]
    keys, values = (x[places].transpose(1, 2).repeat_interleave(group, dim=1) for x in (keys, values))
    mask = (columns < seen[:, None])[:, None, None]
    queries = query[query_starts[:-1]][:, :, None]
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)[:, :, 0]


@pytest.mark.parametrize(("is_recorded", "reads_all"), [(False, True), (True, True), (True, False)])
def test_texts_of_captured_steps_are_those_of_generate_alone(
    model: object, is_recorded: bool, reads_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "flash", flash_here)
    requests = growing()
    crowd, captured = capturing(model, 12, is_recorded, reads_all)
    done = answers(crowd, requests, at_once=14)
    assert crowd._steps.reads_all == reads_all and model.config._attn_implementation == "sdpa"
    assert [done[request.key].text for request in requests] == [generated(model, request) for request in requests]
    rooms = [room for _, room in captured.extents]
    assert rooms == sorted(rooms) and len({*rooms}) >= 3
    assert len({*captured.extents}) == len(captured.extents)
    assert {extent.rows for extent, _ in captured.extents} == {8, 12}
    assert all(extent.columns % sizes.GROWTH == 0 for extent, _ in captured.extents)
    assert {*crowd._slots.graphs} <= {extent for extent, room in captured.extents if room == rooms[-1]}


def test_sampled_texts_of_captured_steps_are_those_of_plain_ones(model: object) -> None:
    sampled = growing(temperature=0.8, seed=3)
    requests = [greedy if i % 3 else drawn for i, (greedy, drawn) in enumerate(zip(growing(), sampled, strict=True))]
    plain = answers(engine(model, 12), requests, at_once=14)
    assert answers(capturing(model, 12)[0], requests, at_once=14) == plain
    alone = answers(engine(model, 1), sampled)
    assert {key: plain[key].text for key in ("k0", "long")} != {key: alone[key].text for key in ("k0", "long")}
    assert all(plain[r.key] == alone[r.key] for r in requests if r.temperature)


def test_a_row_that_is_not_finite_spoils_no_captured_step() -> None:
    """One is not from its prompt on, others from the token on that they come upon."""
    broken = small_model()
    broken.get_input_embeddings().weight.data[tokenizer()("\u30c6")["input_ids"][1]] = float("nan")
    requests = ragged(20)
    requests.insert(5, Request("bad", SummaryPrompt("say it", (), ("\u30c6" * 400,)), 5))
    done = answers(capturing(broken, 12)[0], requests, at_once=12)
    assert done == answers(engine(broken, 1), requests)
    failed = {key for key, completion in done.items() if "summarize.precision" in completion.error}
    assert "bad" in failed and 1 < len(failed) < 10


@pytest.mark.parametrize("is_missing", [True, False])
def test_an_attention_that_is_not_the_models_is_left(
    model: object, is_missing: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs there is none of these arguments; the other one sees a token too few."""
    if not is_missing:
        monkeypatch.setattr(steps, "flash", lambda *given: flash_here(*given[:-1], given[-1] - 1))
    requests = ragged(10)
    crowd, _ = capturing(model, 8, reads_all=False)
    with caplog.at_level(logging.WARNING):
        assert answers(crowd, requests) == answers(engine(model, 8), requests)
    assert crowd._steps.reads_all and crowd._slots.graphs
    (record,) = caplog.records
    assert ("logits differ by" in record.message) != is_missing and "reads all columns" in record.message


def test_where_capturing_fails_steps_are_plain(model: object, caplog: pytest.LogCaptureFixture) -> None:
    """Here it fails because there is no GPU."""
    requests = ragged(10)
    expected = answers(engine(model, 4), requests)
    crowd = engine(model, 4)
    crowd._steps = Steps(model, partial(CudaGraph, torch.device("cpu")))
    with caplog.at_level(logging.WARNING):
        assert answers(crowd, requests) == expected
    assert [record.message.startswith("decoding without captured graphs") for record in caplog.records] == [True]
    assert not crowd._slots.graphs and not crowd._slots.outputs
    assert crowd._slots.extent.rows < sizes.LEAST_ROWS


def test_a_capture_without_memory_halves_the_rows(model: object) -> None:
    requests = ragged(20)
    crowd, captured = capturing(model, 8)

    def short(function: Callable[[], None], others: Collection[object]) -> Callable[[], None]:
        if crowd.num_slots > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return captured(function, others)

    crowd._steps = Steps(model, short)
    assert answers(crowd, requests) == answers(engine(model, 8), requests)
    assert crowd.num_slots == 4 and {extent.rows for extent, _ in captured.extents} == {4}
    crowd.close()
    assert not crowd._slots.graphs and not crowd._slots.outputs


def test_there_are_few_extents() -> None:
    slots = Slots(1, 100, torch.device("cpu"))
    slots.columns = 32768
    needed = [Extent(rows, columns) for rows in range(1, 101) for columns in range(1, slots.columns, 37)]
    rounded = [slots._rounded(extent) for extent in needed]
    assert {extent.rows for extent in rounded} == {8, 16, 32, 64, 100}
    assert len({*rounded}) == 5 * (8 + 4 * 4)
    for small, large in zip(needed, rounded, strict=True):
        assert large.rows >= small.rows and small.columns <= large.columns <= max(256, 1.25 * small.columns + 256)
    slots.columns = 2304
    assert slots._rounded(Extent(3, 2300)) == (8, 2304)


class FakeStream:
    def __init__(self, device: object = None) -> None:
        self.wait_stream = lambda other: None


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a GPU that is not there."""
    asked: list[str] = []

    class FakeGraph:
        def pool(self) -> str:
            return "shared"

    @contextmanager
    def capture(graph: FakeGraph, *pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        asked.append(" ".join(["begin", *pool]))
        try:
            yield
        finally:
            asked.append("end")

    fakes = {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": nullcontext,
        "graph": capture,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: asked.append(f"mode {mode}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    side_stream.cache_clear()
    return asked


def test_a_capture_is_tried_before_and_memory_is_shared(done: list[str]) -> None:
    device = torch.device("cuda", 0)
    first = CudaGraph(device, lambda: done.append("run"), [])
    assert done == ["run", "mode error", "run", "mode 0", "begin", "run", "end"]
    done.clear()
    CudaGraph(device, lambda: done.append("run"), [first, first])
    assert done[4] == "begin shared"


@pytest.mark.parametrize("failing", [2, 3])
def test_a_failed_capture_is_ended_and_says_why(done: list[str], failing: int) -> None:
    """In the second run because it waits, in the third within the capture."""

    def function() -> None:
        done.append("run")
        if done.count("run") == failing:
            done.append("broken")
            raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason"):
        CudaGraph(torch.device("cuda", 0), function, [])
    assert done[-2:] == (["broken", "mode 0"] if failing == 2 else ["broken", "end"])


def test_the_recorder_notices_what_no_graph_may_do() -> None:
    kept, outside = torch.zeros(2), torch.ones(2)
    replay = Recorder(lambda: kept.copy_(outside + 1), lambda: storages([kept, outside]))
    outside.fill_(5)
    replay()
    assert kept.tolist() == [6, 6]
    with pytest.raises(AssertionError):
        Recorder(lambda: kept.copy_(outside), lambda: storages(kept))()
    with pytest.raises(AssertionError):
        Recorder(lambda: kept.fill_(float(outside.sum())), lambda: storages([kept, outside]))
