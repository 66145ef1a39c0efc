"""Rankings through a real vLLM, by completions and by a classifier, and what tools/verify_server.py says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.merge.models import make_checkpoint
from tests.real.assets import vllm_program, vllm_server
from tests.real.test_serving_classifier import served_base
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.scores import built_in_samples
from trsr_dist.predict import Ranker, Request
from trsr_dist.predict.diagnosis import Local
from trsr_dist.predict.server import ScoreServer, ServerSettings
from trsr_dist.predict.verify import Verification, verify

TOLERANCE = 1e-3
"""Of log-odds, the default of tools/verify_server.py."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A merged folder, the classifier of the same checkpoint, and their base."""
    vllm_program()
    folder = tmp_path_factory.mktemp("ranking")
    base = served_base(folder / "base")
    checkpoint = make_checkpoint(base, folder / "checkpoints" / "step-000007", r=8, lora_alpha=2)
    for head in ("causal", "classifier"):
        merge(checkpoint, folder / head, MergeOptions(head=head, verify="weights"))
    return {"base": base, "causal": folder / "causal", "classifier": folder / "classifier"}


@pytest.fixture(scope="module")
def completions(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(folders["causal"], tmp_path_factory.mktemp("log") / "log") as address:
        yield address


def check(folders: dict[str, Path], address: str, tolerance: float = TOLERANCE) -> Verification:
    local = Local.open(str(folders["causal"]), device="cpu", precision="float32")
    server = ScoreServer(ServerSettings(address), local.prompts.builder)
    found = verify(local, server, built_in_samples("news")[:3], "built-in", ("tokens", "text", "chat"), tolerance)
    print(json.dumps(found.report(), indent=1))
    return found


def test_every_route_of_completions_is_right(folders: dict[str, Path], completions: str) -> None:
    found = check(folders, completions)
    assert found.is_equal and found.server["protocol"] == "completions"
    assert all(route.num_prompts == 24 and not route.order_changes for route in found.routes)


def test_rankings_are_those_of_this_process(folders: dict[str, Path], completions: str) -> None:
    here, there = (
        Ranker.open(str(folders["causal"]), "cpu", "float32"),
        Ranker.connect(completions, str(folders["causal"])),
    )
    requests = [
        Request(tuple(c.text for c in sample.candidates), sample.recent, sample.summary, sample.user)
        for sample in built_in_samples("news")[:3]
    ]
    for one, other in zip(here.rank_many(requests), there.rank_many(requests), strict=True):
        found, expected = ({e.index: e.score for e in ranking.candidates} for ranking in (other, one))
        assert found == pytest.approx(expected, abs=TOLERANCE)


def test_a_classifier_is_right_and_the_base_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with vllm_server(folders["classifier"], tmp_path / "classifier.log", "--runner", "pooling") as address:
        found = check(folders, address)
        assert found.is_equal and found.server["protocol"] == "classify"
    with vllm_server(folders["base"], tmp_path / "base.log") as address:
        found = check(folders, address)
        assert not found.is_equal and found.routes[0].fault.startswith("the base model is served")
