"""Summaries that SmolLM2 writes: in this process those of ``generate``, and through a real server the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.summarize import answers_of
from tests.merge.models import load
from tests.real.assets import data_settings, model_folder, real_tokenizer, vllm_program
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.run import SPLITS
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.cache import TextCache, prompt_hash
from trsr_dist.summarize.engines.encoding import PromptEncoder
from trsr_dist.summarize.engines.transformers import TransformersEngine
from trsr_dist.summarize.plans.graph import hierarchical, node_prompt
from trsr_dist.summarize.quality import clean
from trsr_dist.summarize.requests import Request

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 32
NEW_TOKENS = 16
NUM_USERS = 20
SERVED = 0.9
"""Least share of equal texts: sums in another order decide near-ties otherwise."""
SERVER_OPTIONS = "--dtype float32 --enforce-eager --max-model-len 2048"


@pytest.fixture(scope="module")
def model() -> Any:
    return load(model_folder()).eval()


@pytest.fixture
def engine(model: Any) -> TransformersEngine:
    """Its places are fewer than the prompts, so that they are taken again."""
    return TransformersEngine(model, PromptEncoder(real_tokenizer("smollm2"), "auto", 2048), num_slots=12)


def block_prompts(store: HistoryStore, split: str) -> dict[str, SummaryPrompt]:
    """Prompts of all users' first-level summaries, by their hashes."""
    prompts = []
    for number in range(store.num_users(split)):
        items = [store.catalogue.text(item) for item in store.user(split, number).history]
        prompts += [
            node_prompt(node, items, (), "news") for node in hierarchical(len(items), 5, 8) if node.kind == "block"
        ]
    return {prompt_hash(prompt): prompt for prompt in prompts}


def requests_of(prompts: dict[str, SummaryPrompt]) -> list[Request]:
    return [Request(key, prompt, NEW_TOKENS) for key, prompt in prompts.items()]


def test_texts_are_those_of_generate(run: Path, model: Any, engine: TransformersEngine) -> None:
    """Each prompt alone in ``generate``, many at once in the engine."""
    requests = requests_of(block_prompts(HistoryStore(run / "histories"), "train"))[:NUM_PROMPTS]
    done = answers_of(engine, requests)
    expected = {request.key: generate(model, request) for request in requests}
    assert {key: completion.text for key, completion in done.items()} == expected
    assert len(set(expected.values())) > NUM_PROMPTS / 2


@torch.inference_mode()
def generate(model: Any, request: Request) -> str:
    tokenizer, chat = real_tokenizer("smollm2"), [{"role": "user", "content": request.prompt.text()}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_users_summarized_through_a_real_server(tmp_path: Path, engine: TransformersEngine) -> None:
    """vLLM in float32 counts the tokens of our prompts as we do, and writes the texts of the engine in this process."""
    program, run = vllm_program(), tmp_path / "run"
    assert prepare(load_config("configs/smollm2.yaml", settings_of(run))) == 0
    summarize_with_vllm(program, run, tmp_path)
    served, store = records_of(run), HistoryStore(run / "histories")
    prompts = {key: prompt for split in SPLITS for key, prompt in block_prompts(store, split).items()}
    assert len(prompts) >= NUM_USERS and prompts.keys() < served.keys(), "and there are merges"
    found = answers_of(engine, requests_of(prompts))
    assert all(served[key]["prompt_tokens"] == found[key].prompt_tokens for key in prompts)
    greedy = [key for key in prompts if "sampled" not in served[key]]
    same = sum(served[key]["text"] == clean(found[key].text)[0] for key in greedy)
    assert len(greedy) > len(prompts) / 2 and same >= SERVED * len(greedy)


def settings_of(run: Path) -> list[str]:
    """At most two blocks and a merge a user."""
    summarize = {"engine": "openai", "model": model_folder(), "max_new_tokens": NEW_TOKENS, "max_in_flight": 8}
    data = {"max_users": NUM_USERS, "max_history": 8, "domain": "news", "candidates": "uniform"}
    return [
        f"run.dir={run}",
        "run.tensorboard=false",
        "train.pool_size=4",
        *data_settings(),
        *(f"data.{name}={value}" for name, value in data.items()),
        *(f"summarize.{name}={value}" for name, value in summarize.items()),
    ]


def summarize_with_vllm(program: Path, run: Path, logs: Path) -> None:
    """The whole stage beside the job's server, as a Slurm job has it."""
    environment = os.environ | {
        "TRSR_VLLM": str(program),
        "TRSR_VLLM_OPTIONS": SERVER_OPTIONS,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_PROCID": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    stage = [sys.executable, "launch/summarize.py", "--config", "configs/smollm2.yaml", *settings_of(run)]
    command = ["bash", "slurm/with_vllm.sh", str(logs), str(model_folder()), *stage]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def records_of(run: Path) -> dict[str, dict[str, Any]]:
    """Texts, flags and counts by the prompt's hash, of all users, none of whom has failed."""
    cache, found, num_users = TextCache(run / "summaries" / "journal", "reader"), {}, 0
    for split in SPLITS:
        shards = ShardSet(run / "shards" / split)
        for sample in shards.read_many(range(len(shards))):
            assert sample.summary and "failed" not in sample.provenance
            found |= {prompt: cache.get(key) for *_, key, prompt in sample.provenance["nodes"]}
            num_users += 1
    cache.close()
    assert num_users == NUM_USERS
    return found
