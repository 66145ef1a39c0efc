"""Classifiers give the log-odds of the causal model: under transformers alone, whatever the padding and the head."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    PhiConfig,
    PretrainedConfig,
    pipeline,
)

from tests.merge.models import TARGETS, load, make_adapter, make_base, make_checkpoint, rename_tensors, seal, tensors_of
from tests.merge.test_ties import TYING, UNTYING
from tests.spawn import run_script
from tests.tokenizers import byte_level, with_end_token, word_level
from trsr_dist.errors import ModelError, RunError, TrsrError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge import inputs
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.predict.ranker import Ranker, Request
from trsr_dist.prompts.builder import PromptBuilder

CLASSIFIER = MergeOptions(head="classifier", verify="scores")
WEIGHTS_ONLY = MergeOptions(head="classifier", verify="weights")
ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
REQUEST = Request(
    candidates=("title: Rain", "category: sports; title: A final in the rain", "title: Stocks rise for a day", "x"),
    items=("title: Tea", "title: Cups and saucers"),
)
TOLERANCE = 1e-4
DORA = {"target_modules": ["lm_head"], "use_dora": True}
HEADS = [(settings, tied) for settings in (*UNTYING, DORA) for tied in (False, True)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return make_checkpoint(base, tmp_path / "step-000007")


def ranked(model: Path) -> tuple[list[str], torch.Tensor]:
    """Prompts, and the scores that tools/predict.py gives."""
    ranker = Ranker.open(str(model), "cpu", "float32")
    entries = sorted(ranker.rank(REQUEST).candidates, key=lambda entry: entry.index)
    scores = torch.tensor([entry.score for entry in entries])
    assert scores.std() > 0.05, "candidates differ"
    return ranker.prompts(REQUEST), scores


def classified(folder: Path, prompts: list[str], side: str = "", dtype: str = "float32") -> torch.Tensor:
    """Logits as any user would have them; with a ``side`` in one batch that is padded there."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    if side:
        batches = [tokenizer(prompts, padding=True, padding_side=side, **options)]
        assert not batches[0]["attention_mask"].all(), "there is padding"
    else:
        batches = [tokenizer(prompt, **options) for prompt in prompts]
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    assert logits.shape == (len(prompts), 1)
    return logits[:, 0].float()


def assert_classifies_alike(folder: Path, prompts: list[str], expected: torch.Tensor) -> None:
    for side in ("", "left", "right"):
        assert (classified(folder, prompts, side) - expected).abs().max() < TOLERANCE, side


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_the_log_odds_of_predict(kind: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_base(tmp_path / "base", kind, tied=tied), tmp_path / "step-000007")
    folder = tmp_path / "classifier"
    merge(checkpoint, folder, CLASSIFIER)
    config = read_json(folder / "config.json")
    assert config["architectures"] == [f"{ARCHITECTURES[kind]}ForSequenceClassification"]
    assert (config["num_labels"], config["id2label"], config["label2id"]) == (1, {"0": "yes"}, {"yes": 0})
    assert "lm_head.weight" not in tensors_of(folder)
    prompts, scores = ranked(checkpoint)
    assert_classifies_alike(folder, prompts, scores)


def test_the_pipeline_gives_log_odds_and_probabilities(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "classifier", CLASSIFIER)
    prompts, scores = ranked(checkpoint)
    classifier = pipeline("text-classification", model=str(tmp_path / "classifier"), device="cpu")
    for batch_size in (1, 4):
        options = {"batch_size": batch_size, "add_special_tokens": False}
        raw = classifier(prompts, function_to_apply="none", **options)
        assert {entry["label"] for entry in raw} == {"yes"}
        assert torch.tensor([entry["score"] for entry in raw]) == pytest.approx(scores, abs=TOLERANCE)
        probabilities = torch.tensor([entry["score"] for entry in classifier(prompts, **options)])
        assert probabilities == pytest.approx(scores.sigmoid(), abs=TOLERANCE)
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "add_special_tokens=False)" in card


@pytest.mark.parametrize(("settings", "tied"), [*HEADS, *((settings, True) for settings in TYING)], ids=str)
def test_adapters_of_the_head(settings: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(adapter, tmp_path / "classifier", CLASSIFIER)
    yes, no = PromptBuilder(byte_level(chat=True)).answer_ids
    ids = torch.arange(20, 50).unsqueeze(0)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(load(base), adapter)(ids).logits[0, -1]
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")(ids).logits
    assert found.item() == pytest.approx((logits[yes] - logits[no]).item(), abs=TOLERANCE)
    assert {"model.embed_tokens.weight", "score.weight"} < tensors_of(tmp_path / "classifier").keys()


def test_a_base_that_was_saved_without_its_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    rename_tensors(base, lambda name: name.removeprefix("model."))
    checkpoint = make_checkpoint(base, tmp_path / "step-000007")
    merge(checkpoint, tmp_path / "classifier", CLASSIFIER)
    assert_classifies_alike(tmp_path / "classifier", *ranked(checkpoint))


def test_sixteen_bit_models_keep_the_score_in_float32(tmp_path: Path) -> None:
    """Their distance to the float32 scores of the same weights is stated."""
    checkpoint = make_checkpoint(make_base(tmp_path / "base", dtype="bfloat16"), tmp_path / "step-000007")
    merge(checkpoint, tmp_path / "classifier", CLASSIFIER)
    merge(checkpoint, tmp_path / "causal", MergeOptions(verify="weights"))
    kinds = {tensor.dtype for name, tensor in tensors_of(tmp_path / "classifier").items() if name != "score.weight"}
    assert kinds == {torch.bfloat16}
    assert tensors_of(tmp_path / "classifier")["score.weight"].dtype == torch.float32
    prompts, scores = ranked(tmp_path / "causal")
    assert_classifies_alike(tmp_path / "classifier", prompts, scores)
    distance = (classified(tmp_path / "classifier", prompts, "left", "bfloat16") - scores).abs()
    print(f"bfloat16 against float32: largest {distance.max():.3g}, mean {distance.mean():.3g} of {scores.std():.3g}")
    assert 0 < distance.max() < 0.1


def set_padding(base: Path, pad: str | None) -> None:
    path = base / "tokenizer_config.json"
    values = read_json(path) | {"pad_token": pad}
    write_json(path, {name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize("pad", [None, "<|end|>", "\u010a"], ids=["none", "the end token", "a prompt's last token"])
def test_padding_is_right_whatever_the_tokenizer_has(pad: str | None, base: Path, tmp_path: Path) -> None:
    """Pooling reads the last token that is not padding: a prompt's last one must not be it."""
    set_padding(base, pad)
    found = AutoTokenizer.from_pretrained(base)
    assert found.pad_token == pad
    last = byte_level(chat=True)("<|assistant|>\n")["input_ids"][-1]
    assert (found.pad_token_id == last) == (pad == "\u010a")
    checkpoint = make_checkpoint(base, tmp_path / "step-000007")
    merge(checkpoint, tmp_path / "classifier", CLASSIFIER)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "classifier")
    assert tokenizer.pad_token == "<|end|>"
    assert read_json(tmp_path / "classifier" / "config.json")["pad_token_id"] == tokenizer.eos_token_id
    assert_classifies_alike(tmp_path / "classifier", *ranked(checkpoint))


def test_wrong_padding_is_not_published(
    base: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = byte_level(chat=True)("<|assistant|>\n")["input_ids"][-1]
    monkeypatch.setattr(inputs, "padding_token", lambda *_: ("\u010a", last))
    with pytest.raises(ModelError, match=r"scores of base \+ adapter and of the merged model differ"):
        merge(checkpoint, tmp_path / "classifier", CLASSIFIER)
    assert not (tmp_path / "classifier").exists()


@pytest.mark.parametrize("wrong", ["sign", "answer"])
def test_a_wrong_head_is_found_by_the_read_back(
    wrong: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is changed behind the writer, before it is read back."""
    from trsr_dist.merge import job

    write = job.write_weights

    def then_spoil(folder: Path, plan: Any) -> None:
        write(folder, plan)
        path = next(path for path in folder.glob("*.safetensors") if "score.weight" in load_file(path))
        tensors = load_file(path)
        tensors["score.weight"] *= -1 if wrong == "sign" else 1.001
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(job, "write_weights", then_spoil)
    with pytest.raises(ModelError, match=r"row 0 of score\.weight is not base \+ adapter"):
        merge(checkpoint, tmp_path / "classifier", WEIGHTS_ONLY)
    assert not (tmp_path / "classifier").exists()


def other_base(folder: Path, config: PretrainedConfig) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_level(chat=True).save_pretrained(folder)
    return folder


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def gemma2(folder: Path) -> Path:
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 2}
    return other_base(folder, Gemma2Config(vocab_size=len(byte_level()), **sizes))


def phi(folder: Path) -> Path:
    return other_base(folder, PhiConfig(vocab_size=len(byte_level()), **SIZES))


def gpt2(folder: Path) -> Path:
    return make_base(folder, "gpt2")


def no_single_answers(folder: Path) -> Path:
    make_base(folder)
    word_level(("Answer", "tea")).save_pretrained(folder)
    return folder


def appends_its_end(folder: Path) -> Path:
    make_base(folder)
    with_end_token().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gemma2, "final_logit_softcapping=30.0"),
        (phi, r"its head has a bias \(lm_head\.bias\)"),
        (gpt2, "model_type is 'gpt2'; --head classifier expects one of llama, mistral, qwen2, qwen3"),
        (no_single_answers, "needs two answers of one token each"),
        (appends_its_end, r"its tokenizer appends '<\|end\|>' to every text"),
    ],
)
def test_what_no_classifier_can_be_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    targets = ["c_attn"] if make is gpt2 else TARGETS[:1]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=make is gpt2)
    with pytest.raises(ModelError, match=message) as caught:
        merge(adapter, tmp_path / "classifier", CLASSIFIER)
    assert "--head causal" in str(caught.value)
    assert not (tmp_path / "classifier").exists()


def test_answers_of_several_tokens_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    provenance = read_json(checkpoint / "provenance.json")
    provenance["prompt"]["answers"] = ["I would say so", "no"]
    write_json(checkpoint / "provenance.json", provenance)
    seal(checkpoint)
    with pytest.raises(ModelError, match="I would say so.*are not two different single tokens"):
        merge(checkpoint, tmp_path / "classifier", CLASSIFIER)


def test_a_classifier_is_no_language_model_for_other_commands(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "classifier", WEIGHTS_ONLY)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, a classifier.*name the checkpoint"):
        Ranker.open(str(tmp_path / "classifier"), "cpu", "float32")
    copy = Path(shutil.copytree(checkpoint / "adapter", tmp_path / "copy"))
    with pytest.raises(TrsrError, match="a classifier"):
        merge(copy, tmp_path / "again", MergeOptions(base=str(tmp_path / "classifier")))


def test_another_head_is_another_setting(checkpoint: Path, tmp_path: Path) -> None:
    output, causal = tmp_path / "merged", MergeOptions(verify="weights")
    merge(checkpoint, output, causal)
    with pytest.raises(RunError, match="made with setting head=None, now 'classifier'"):
        merge(checkpoint, output, WEIGHTS_ONLY)
    merge(checkpoint, output, MergeOptions(head="classifier", verify="weights", update=True))
    number = (output / "config.json").stat().st_ino
    merge(checkpoint, output, WEIGHTS_ONLY)
    assert (output / "config.json").stat().st_ino == number, "merged already"
    with pytest.raises(RunError, match="made with setting head='classifier'"):
        merge(checkpoint, output, causal)
    with pytest.raises(TrsrError, match="leave it out, or --head"):
        merge(checkpoint, tmp_path / "adapter", MergeOptions(head="classifier", adapter_only=True))


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    done = run_script("tools/merge_lora.py", "--checkpoint", checkpoint, "--output", folder, "--head", "classifier")
    assert done.returncode == 0 and "largest difference" in done.stdout, done.stderr
    provenance = read_json(folder / "provenance.json")
    assert provenance["prompt"]["style"] == "chat" and len(provenance["answer_ids"]) == 2
    assert provenance["merge"]["head"] == "classifier" and (folder / "chat_template.jinja").is_file()
