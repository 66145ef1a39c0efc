"""The model card: README.md of a merged folder or an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trsr_dist.files import read_json
from trsr_dist.log import get_logger
from trsr_dist.records import has_scale
from trsr_dist.run import RunFolder

FILL_IN = "_To be filled in._"
TRAINING = ("shards", "train", "config", "init_adapter", "teacher")
"""What a provenance.json records of the training."""
OPEN_POINTS = ("Licence (the base's terms apply)", "Data: origin, consent, licence", "Intended use and users")

log = get_logger("merge")


def model_card(provenance: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    """README.md of a merged folder or an adapter: what is known is filled in, what only the user knows is marked.

    Args:
        provenance: the folder's provenance.json.
        metrics: evaluation/{split}.json of this model, where there is one.
    """
    base, merge = provenance["base"]["name_or_path"], provenance["merge"]
    library, relation = ("peft", "adapter") if merge["adapter_only"] else ("transformers", "finetune")
    is_classifier = merge.get("head") == "classifier"
    merge_rows = [(name, value) for name, value in merge.items() if name not in ("adapter", "verification")]
    sections = {
        "Training": _training(provenance),
        "Prompt and answers": _prompt(provenance),
        "Evaluation": _evaluation(metrics, "the checkpoint" if is_classifier else "this folder"),
        "Merge": _table(("fact", "value"), merge_rows),
        "Limits": _limits(provenance),
        "For you to fill in": [f"- {point}: {FILL_IN}" for point in OPEN_POINTS],
    }
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"pipeline_tag: {'text-classification' if is_classifier else 'text-generation'}",
        f"library_name: {library}",
        f"base_model_relation: {relation}",
        "tags:",
        "- recommendation",
        "- lora",
        "---",
        "",
        "# Recommendation model",
        "",
        f"A language model that answers whether a user will like an item; made from `{base}` with LoRA.",
        "Its score is the log-odds of the answer: logit(yes) - logit(no) at the prompt's last token.",
        "",
        *(_use(provenance) if is_classifier else ()),
    ]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join(lines)


def _use(provenance: dict[str, Any]) -> list[str]:
    """How the score of a whole prompt, as the training wrote it, is had from a classifier."""
    special = provenance["prompt"]["style"] == "plain"
    request = {"input": ["PROMPT"], "use_activation": False, "add_special_tokens": special}
    return [
        "This is a classifier: the logit of its one label is the score, its sigmoid the probability of yes against no.",
        "",
        "```python",
        'classifier = pipeline("text-classification", model=FOLDER)',
        f'classifier(prompts, function_to_apply="none", add_special_tokens={special})  # "none": scores',
        "```",
        "",
        f"vLLM: `vllm serve FOLDER --runner pooling`, then POST `{json.dumps(request)}` to `/classify`.",
        "",
    ]


def keep_answers(card: str, earlier: str) -> str:
    """A card with what its owner has filled in, in an earlier one."""
    for start in (f"- {point}: " for point in OPEN_POINTS):
        line = next((line for line in earlier.splitlines() if line.startswith(start)), "")
        card = card.replace(f"{start}{FILL_IN}", line or f"{start}{FILL_IN}")
    return card


def is_evaluation_of(results: dict[str, Any], provenance: dict[str, Any]) -> bool:
    """Whether an evaluation's results are of the model that a provenance.json tells of: base, training and weights.

    A checkpoint, and a merge of an earlier version, record no hash of the adapter: the training has to tell then.
    """
    ours, theirs = (
        {key: one.get(key) for key in TRAINING}
        | {"base": one.get("base", {}).get("fingerprint"), "adapter": one.get("merge", {}).get("adapter_hash")}
        for one in (provenance, results.get("provenance") or {})
    )
    if not (ours["adapter"] and theirs["adapter"]):
        ours["adapter"] = theirs["adapter"] = ours["train"]
    return bool(ours["adapter"]) and ours == theirs


def find_evaluation(run: Path, provenance: dict[str, Any]) -> dict[str, Any] | None:
    """Results of this model in a run folder, those of the test split before those of the validation split."""
    paths = (RunFolder(run).evaluation / f"{split}.json" for split in ("test", "valid"))
    for path in filter(Path.is_file, paths):
        if is_evaluation_of(results := read_json(path), provenance):
            return results
        log.warning("%s is of another model and is left out of the card", path)
    return None


def _training(provenance: dict[str, Any]) -> list[str]:
    rows = [("domain", provenance.get("domain"))]
    rows += [(f"data: {split}", value) for split, value in provenance.get("shards", {}).items()]
    rows += list(provenance.get("train", {}).items())
    rows += [(f"LoRA {name}", value) for name, value in provenance["merge"]["adapter"].items()]
    return _table(("setting", "value"), [(name, value) for name, value in rows if value not in (None, "", [])])


def _prompt(provenance: dict[str, Any]) -> list[str]:
    if not provenance.get("prompt"):
        return ["Not recorded by the adapter's source."]
    rows = [*provenance["prompt"].items(), ("answer token ids (yes, no)", provenance["answer_ids"])]
    return _table(("setting", "value"), rows)


def _evaluation(metrics: dict[str, Any] | None, model: str) -> list[str]:
    """Each metric with its interval, the control's, and the gain over it."""
    if not metrics:
        return [f"{FILL_IN} Run `python tools/evaluate.py --config C --model DIR` on {model}."]
    users = f"{metrics['num_users']} {metrics['split']} users, {metrics['num_candidates']} candidates"
    control, gain = metrics["baselines"]["control"], metrics["personalization_gain"]
    rows = [
        (name, _interval(value, *metrics["confidence"].get(name, ())), f"{control[name]:.4f}", _gain(gain.get(name)))
        for name, value in metrics["metrics"].items()
    ]
    kept = [name for name in metrics["metrics"] if name.startswith(("recall", "ndcg"))]
    others = [(name, *(f"{values[m]:.4f}" for m in kept)) for name, values in metrics["baselines"].items()]
    return [
        f"{users}, negatives: {metrics['candidates']}. The control is the same model with another user's text.",
        "",
        *_table(("metric", "value (95%)", "control", "gain over the control (95%)"), rows),
        "",
        *_table(("beside it", *kept), others),
    ]


def _interval(mean: float, low: float | None = None, high: float | None = None, form: str = ".4f", **_: float) -> str:
    """The mean alone where there are no bounds (evaluate.bootstrap_samples=0)."""
    return f"{mean:{form}}" if low is None else f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _gain(difference: dict[str, float] | None) -> str:
    return _interval(**difference, form="+.4f") if difference else ""


def _limits(provenance: dict[str, Any]) -> list[str]:
    """What follows from how it was made, before what only its owner knows."""
    config = provenance.get("config", {})
    data, train = config.get("data", {}), provenance.get("train", {})
    limits = ["It ranks the candidates it is given, in the item texts' form of the training; it knows no catalogue."]
    if not has_scale(train.get("loss")):
        limits.append(f"Of the {train['loss']} loss: scores compare one user's candidates, they are no probabilities.")
    if data.get("max_history"):
        limits.append(f"Of longer histories it has seen the latest {data['max_history']} items.")
    if summaries := config.get("summarize"):
        engine = " ".join(filter(None, (summaries.get("engine"), summaries.get("model"))))
        limits.append(f"It expects summaries as {engine} writes them ({summaries.get('scheme')}).")
    return [f"- {text}" for text in limits]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return ["Not recorded."]
    lines = [[text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in row] for row in rows]
    cells = [" | ".join(text.replace("|", "\\|") for text in row) for row in lines]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in cells)]
