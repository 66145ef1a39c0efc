"""What vLLM serves of a checkpoint, its classifier and its adapter as it is: the log-odds of tools/predict.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.merge.models import make_checkpoint
from tests.real.assets import has_model, model_folder, vllm_program, vllm_server
from tests.tokenizers import byte_level
from trsr_dist.config.kinds import NO_THOUGHTS
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.scores import built_in_samples
from trsr_dist.predict.ranker import Ranker, Request
from trsr_dist.prompts.text import recommend_text
from trsr_dist.records import TokenizedUser

TOLERANCE = 1e-4
REPLY_SECONDS = 300


@dataclass(frozen=True)
class Expected:
    """What the served scores are compared with."""

    base: Path
    checkpoint: Path
    prompts: list[list[str]]
    """Texts, by user."""
    contents: list[list[str]]
    """The same without the chat template."""
    users: list[TokenizedUser]
    scores: list[torch.Tensor]
    """float32 log-odds in the candidates' order, one tensor a user."""
    answer_ids: tuple[int, int]

    @property
    def ids(self) -> list[list[int]]:
        return [[*user.prefix, *suffix] for user in self.users for suffix in user.suffixes]


def served_base(folder: Path) -> Path:
    """SmolLM2 where it is there, else a small random model of a shape that vLLM's CPU kernels know."""
    if has_model():
        return model_folder()
    torch.manual_seed(1)
    tokenizer = byte_level(chat=True)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), head_dim=64, initializer_range=0.1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Prompts of a few users, and their scores under an adapter of every linear layer."""
    vllm_program()
    folder = tmp_path_factory.mktemp("serving")
    base = served_base(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"target_modules": targets, "r": 8, "lora_alpha": 2}
    checkpoint = make_checkpoint(base, folder / "checkpoints" / "step-000007", **options)
    ranker = Ranker.open(str(checkpoint), "cpu", "float32")
    prompts, contents, users, scores = [], [], [], []
    for sample in built_in_samples("news")[:3]:
        request = Request(tuple(c.text for c in sample.candidates), sample.recent, sample.summary)
        sample = ranker.sample(request)
        entries = sorted(ranker.rank(request).candidates, key=lambda entry: entry.index)
        prompts.append(ranker.prompts(request))
        contents.append(
            [recommend_text(sample.instruction, sample.summary, sample.recent, c) for c in request.candidates]
        )
        users.append(ranker.builder.build(sample))
        scores.append(torch.tensor([entry.score for entry in entries]))
    assert torch.cat(scores).std() > 100 * TOLERANCE, "there is something to compare"
    return Expected(base, checkpoint, prompts, contents, users, scores, ranker.builder.answer_ids)


def post(address: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    with urlopen(HttpRequest(address, data, {"Content-Type": "application/json"}), timeout=REPLY_SECONDS) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def classifier(expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("classifier")
    merge(expected.checkpoint, folder / "merged", MergeOptions(head="classifier", verify="weights"))
    with vllm_server(folder / "merged", folder / "log", "--runner", "pooling") as address:
        yield address


def classes(address: str, inputs: Any, **options: Any) -> torch.Tensor:
    rows = post(f"{address}/classify", {"input": inputs, **options})["data"]
    assert [row["index"] for row in rows] == list(range(len(inputs))) and {row["label"] for row in rows} == {"yes"}
    return torch.tensor([row["probs"] for row in rows]).squeeze(1)


def assert_equal(found: torch.Tensor, scores: torch.Tensor, what: str) -> None:
    difference = (found - scores).abs()
    print(f"{what}: largest difference {difference.max():.2g}, mean {difference.mean():.2g}, of {len(scores)} scores")
    assert difference.max() < TOLERANCE


def test_classify_gives_the_log_odds(classifier: str, expected: Expected) -> None:
    scores = torch.cat(expected.scores)
    assert_equal(classes(classifier, expected.ids, use_activation=False), scores, "/classify, token ids")
    prompts = sum(expected.prompts, [])
    found = classes(classifier, prompts, use_activation=False, add_special_tokens=False)
    assert_equal(found, scores, "/classify, texts")
    one = torch.cat([classes(classifier, [ids], use_activation=False) for ids in expected.ids[:3]])
    assert_equal(one, scores[:3], "/classify, one by one")
    assert_equal(classes(classifier, expected.ids), scores.sigmoid(), "/classify, probabilities")


def test_messages_need_the_generation_prompt(classifier: str, expected: Expected) -> None:
    def score(**options: Any) -> float:
        messages = [{"role": "user", "content": expected.contents[0][0]}]
        body = {"messages": messages, "use_activation": False, "chat_template_kwargs": NO_THOUGHTS, **options}
        return post(f"{classifier}/classify", body)["data"][0]["probs"][0]

    expected_score = expected.scores[0][0].item()
    assert score(add_generation_prompt=True) == pytest.approx(expected_score, abs=TOLERANCE)
    assert score() != pytest.approx(expected_score, abs=100 * TOLERANCE), "vLLM leaves it out unless it is asked to"


def test_rerank_and_score_join_prefix_and_suffix(classifier: str, expected: Expected) -> None:
    for prompts, scores in zip(expected.prompts, expected.scores, strict=True):
        prefix = os.path.commonprefix(prompts)
        suffixes = [prompt.removeprefix(prefix) for prompt in prompts]
        body = {"query": prefix, "documents": suffixes, "use_activation": False}
        results = post(f"{classifier}/rerank", body)["results"]
        assert [row["index"] for row in results] == scores.argsort(descending=True).tolist()
        found = torch.tensor([row["relevance_score"] for row in sorted(results, key=lambda row: row["index"])])
        assert_equal(found, scores, "/rerank")
        body = {"text_1": prefix, "text_2": suffixes, "use_activation": False}
        rows = post(f"{classifier}/score", body)["data"]
        assert_equal(torch.tensor([row["score"] for row in rows]), scores, "/score")


def test_an_adapter_is_served_as_it_is(expected: Expected, tmp_path: Path) -> None:
    modules = f"ranker={expected.checkpoint / 'adapter'}"
    options = ("--enable-lora", "--max-lora-rank", "16", "--lora-modules", modules, "--served-model-name", "base")
    with vllm_server(expected.base, tmp_path / "log", *options) as address:
        adapted, base = (completions(address, name, expected) for name in ("ranker", "base"))
    scores = torch.cat(expected.scores)
    assert_equal(adapted, scores, "adapter")
    assert (base - scores).abs().max() > 100 * TOLERANCE, "the base is another model"


def completions(address: str, model: str, expected: Expected) -> torch.Tensor:
    """Log-odds by the answers' log-probabilities."""
    options = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
    body = {"model": model, "prompt": expected.ids, "logprob_token_ids": list(expected.answer_ids), **options}
    choices = sorted(post(f"{address}/v1/completions", body)["choices"], key=lambda choice: choice["index"])
    tables = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
    yes, no = ([table[f"token_id:{token}"] for table in tables] for token in expected.answer_ids)
    return torch.tensor(yes) - torch.tensor(no)
