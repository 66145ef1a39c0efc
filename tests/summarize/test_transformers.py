"""The transformers engine: each text is what ``generate`` gives for its prompt alone, whatever goes on around it."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.summarize.models import CONTEXT, small_model, tokenizer, write_model
from tests.summarize.world import ROOT, engine_settings
from trsr_dist.errors import ModelError
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.engines.encoding import PromptEncoder
from trsr_dist.summarize.engines.transformers import Sequence, TransformersEngine, is_out_of_memory
from trsr_dist.summarize.quality import clean
from trsr_dist.summarize.requests import Completion, Request

WORDS = "quiet river final stocks window paper winter letter garden signal".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def model() -> object:
    torch.set_num_threads(1)
    return small_model()


def engine(model: object, slots: int = 8, chat: bool = False, max_prompt_tokens: int = 2000) -> TransformersEngine:
    return TransformersEngine(model, PromptEncoder(tokenizer(chat), "auto", max_prompt_tokens), slots)


def ragged(number: int, **options: object) -> list[Request]:
    """Requests of 10 to 300 tokens in and 5 to 60 out."""
    draw = random.Random(number)

    def item() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))

    prompts = [SummaryPrompt("say it", (), tuple(item() for _ in range(draw.randint(1, 4)))) for _ in range(number)]
    return [Request(f"k{i}", prompt, draw.randint(5, 60), **options) for i, prompt in enumerate(prompts)]


def answers(engine: TransformersEngine, requests: list[Request], at_once: int = 1000) -> dict[str, Completion]:
    """Submit as places appear; a key answered twice would be noticed."""
    done: dict[str, Completion] = {}
    for number, request in enumerate(requests):
        engine.submit(request)
        while number + 1 - len(done) >= at_once:
            take(engine, done)
    while len(done) < len(requests):
        take(engine, done)
    assert engine.poll() == []
    return done


def take(engine: TransformersEngine, done: dict[str, Completion]) -> None:
    for completion in engine.poll():
        assert completion.key not in done
        done[completion.key] = completion


@torch.inference_mode()
def generated(model: object, request: Request) -> str:
    ids = tokenizer()(request.prompt.text())["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=request.max_new_tokens, do_sample=False)
    return tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize(("slots", "at_once"), [(1, 1), (3, 5), (32, 1000)])
def test_texts_are_those_of_generate_alone(model: object, slots: int, at_once: int) -> None:
    requests = ragged(30)
    done = answers(engine(model, slots), requests, at_once)
    assert [done[request.key].text for request in requests] == [generated(model, request) for request in requests]
    assert len({completion.text for completion in done.values()}) == len(requests)
    assert all(done[request.key].new_tokens <= request.max_new_tokens for request in requests)


class Renamed(LlamaForCausalLM):
    """Its cache has the name of transformers 5.24 and newer."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **options: object,
    ) -> CausalLMOutputWithPast:
        return super().forward(input_ids, attention_mask, position_ids, cache, **options)


def test_a_cache_by_another_name_is_the_same(model: object) -> None:
    renamed, requests = Renamed(model.config).eval(), ragged(3)
    renamed.load_state_dict(model.state_dict())
    assert answers(engine(renamed), requests) == answers(engine(model), requests)


def test_sampled_texts_depend_on_their_seed_alone(model: object) -> None:
    requests = ragged(12, temperature=0.8, seed=3)
    alone = answers(engine(model, 1), requests)
    crowd = answers(engine(model, 8), [*ragged(30), *requests][30:])
    assert {key: one.text for key, one in crowd.items()} == {key: one.text for key, one in alone.items()}
    other = answers(engine(model, 8), ragged(12, temperature=0.8, seed=4))
    assert sum(other[key].text != alone[key].text for key in alone) > 8


def test_the_end_token_ends_a_text_and_the_limit_cuts_it(model: object) -> None:
    requests = ragged(40)
    done = answers(engine(model), requests)
    for request in requests:
        assert done[request.key].cut == (done[request.key].new_tokens == request.max_new_tokens)
    first = tokenizer()(done["k0"].text, add_special_tokens=False)["input_ids"][0]
    stopping = engine(model)
    stopping._stop_ids |= {first}
    assert not answers(stopping, [Request("k", requests[0].prompt, 50)])["k"].cut


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_numbers_that_are_not_finite_make_no_text(temperature: float) -> None:
    """As float16 gives them with models that were trained in bfloat16: argmax takes them for the largest."""
    broken = small_model()
    broken.get_input_embeddings().weight.data[tokenizer()("\u30c6")["input_ids"][1]] = float("nan")
    bad = Request("bad", SummaryPrompt("say it", (), ("\u30c6" * 400,)), 5, temperature)
    good = sorted(ragged(6, temperature=temperature, seed=1), key=lambda request: len(request.prompt.text()))
    done = answers(engine(broken, slots=2), [bad, *good, replace(bad, key="bad too")], at_once=2)
    assert {key for key, completion in done.items() if completion.error} == {"bad", "bad too"}
    assert "summarize.precision" in done["bad"].error and not done["bad"].text
    alone = answers(engine(small_model(), slots=2), good)
    assert [done[request.key] for request in good] == [alone[request.key] for request in good]


@pytest.mark.parametrize("title", ["**Updated Summary:** ", "Here is what the user likes:\n\n**Summary:** "])
def test_a_title_ends_no_plain_text(model: object, title: str) -> None:
    ids = tokenizer()(f"{title}The user likes tea.\n\nSummary: The user")["input_ids"]
    written = engine(model)._ended(Sequence(Request("k", SummaryPrompt("say it"), len(ids)), [], tokens=ids))
    assert clean(written.text) == ("The user likes tea.", False) and not written.cut


def test_long_prompts_are_trimmed_to_true_tokens(model: object) -> None:
    for chat in (False, True):
        limited = engine(model, chat=chat, max_prompt_tokens=150)
        prompt = SummaryPrompt(
            "say it now", ("likes tennis",), ("short one", "Tennis " * 400, "\u30c6\u30cb\u30b9" * 300)
        )
        ids, cut = limited.encoder.fit(prompt)
        written = limited.encoder.tokenizer.decode(ids)
        assert "say it now" in written and "- likes tennis\n" in written and "- short one\n" in written
        limited.submit(Request("k", prompt, 5))
        limited.submit(Request("all instruction", SummaryPrompt("say it now " * 100), 5))
        refused, completion = limited.poll() + limited.poll()
        assert 100 < completion.prompt_tokens == len(ids) <= 150 and completion.words_cut == cut > 0
        assert "without any item and 150 are allowed" in refused.error


def test_the_chat_template_is_used_where_there_is_one() -> None:
    prompt = SummaryPrompt("say it", (), ("a",))
    chat, plain = (PromptEncoder(tokenizer(chat), "auto", 500).encode(prompt) for chat in (True, False))
    assert tokenizer(True).decode(chat) == f"<|user|>\n{prompt.text()}<|end|>\n<|assistant|>\n"
    assert tokenizer().decode(plain) == prompt.text()


def thinking() -> PreTrainedTokenizerFast:
    """Its template begins the model's thoughts, unless told otherwise."""
    tokens = copy.deepcopy(tokenizer(chat=True))
    tokens.chat_template += "<think>\n{% if not enable_thinking %}</think>\n{% endif %}"
    return tokens


def test_thoughts_that_the_template_begins_are_no_text(model: object) -> None:
    request = Request("k", SummaryPrompt("say it", (), ("a",)), 5)
    for think in (True, False):
        encoder = PromptEncoder(thinking(), "auto", 500, {"enable_thinking": think})
        done = answers(TransformersEngine(model, encoder, 2), [request])["k"]
        assert done.cut and done.text.startswith("<think>") == think
        assert bool(clean(done.text)[0]) != think


def test_a_prompt_beyond_the_models_context_fails_alone(model: object) -> None:
    requests = [*ragged(3), Request("long", SummaryPrompt("say it"), CONTEXT)]
    done = answers(engine(model), requests)
    assert "summarize.max_prompt_tokens" in done["long"].error
    assert [done[f"k{i}"].error for i in range(3)] == [""] * 3


def test_other_kinds_of_attention_and_too_short_a_context_are_refused() -> None:
    model = small_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        engine(model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 500
    assert engine(model, max_prompt_tokens=400)._context == 500
    with pytest.raises(ModelError, match="500 tokens.*summarize.max_prompt_tokens=600"):
        engine(model, max_prompt_tokens=600)
    model.config.layer_types = ["full_attention"] * 2
    with pytest.raises(ModelError, match=f"{CONTEXT} tokens"):
        engine(model, max_prompt_tokens=CONTEXT)


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    """In a process that may grow by 300 MB: 4096 places do not fit, and one giant request not even alone."""
    done = subprocess.run([sys.executable, "-c", _LITTLE_MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    places, same, error = done.stdout.splitlines()[-3:]
    assert 64 <= int(places) < 4096
    assert same == "True"
    assert "out of memory" in error


_LITTLE_MEMORY = """
import resource
import torch
from tests.summarize.models import small_model
from tests.summarize.test_transformers import answers, engine, ragged
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.requests import Request

torch.set_num_threads(1)
model = small_model()
model.config.max_position_embeddings = 10**9
requests = ragged(40)
expected = answers(engine(model, 8), requests)
(now,) = (int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + 300_000_000, now + 300_000_000))
crowded = engine(model, 4096)
requests.insert(20, Request("giant", SummaryPrompt("say it"), 10**8))
done = answers(crowded, requests, at_once=10)
print(crowded.num_slots)
print(all(done[key].text == one.text for key, one in expected.items()))
print(done["giant"].error)
"""


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 45)
    assert is_out_of_memory(caught.value)
    for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert is_out_of_memory(RuntimeError(words))


def load(folder: Path) -> TransformersEngine:
    return TransformersEngine.load(engine_settings(str(folder), precision="float32", prompt_style="plain"))


def test_weights_that_are_missing_are_no_random_ones(tmp_path: Path) -> None:
    write_model(tmp_path)
    load(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if ".layers.1." not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"9 are missing, the first is model\.layers\.1\."):
        load(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


def test_local_layers_of_older_configs_are_refused() -> None:
    model = small_model()
    model.config.attention_layers = ["global", "local"]
    with pytest.raises(ModelError, match="local layers"):
        engine(model)
