"""The model card: what is known is filled in, what only the user knows is marked."""

from __future__ import annotations

import json
from typing import Any

FILL_IN = "_To be filled in._"


def model_card(provenance: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    """README.md of a merged folder or an adapter.

    Args:
        provenance: the folder's provenance.json.
        metrics: the run's evaluation/{split}.json, where there is one.
    """
    base = provenance["base"]["name_or_path"]
    kind = ("peft", "adapter") if provenance["merge"]["adapter_only"] else ("transformers", "finetune")
    return "\n".join(
        [
            *_front_matter(base, *kind),
            "# Recommendation model",
            "",
            f"A language model that answers whether a user will like an item; made from `{base}` with LoRA.",
            "Its score is the log-odds of the answer: logit(yes) - logit(no) at the prompt's last token.",
            "",
            *_section("Training", _training(provenance)),
            *_section("Prompt and answers", _prompt(provenance)),
            *_section("Evaluation", _evaluation(metrics)),
            *_section("Merge", _merge(provenance["merge"])),
            *_section("For you to fill in", _open_points()),
        ]
    )


def _front_matter(base: str, library: str, relation: str) -> list[str]:
    lines = ["---", f"base_model: {json.dumps(base)}", "pipeline_tag: text-generation"]
    lines += [f"library_name: {library}", f"base_model_relation: {relation}"]
    return [*lines, "tags:", "- recommendation", "- lora", "---", ""]


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


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


def _evaluation(metrics: dict[str, Any] | None) -> list[str]:
    if not metrics:
        return [f"{FILL_IN} Run `python tools/evaluate.py --config C --model DIR` on this folder."]
    users = [f"{metrics['num_users']} users, {metrics['num_candidates']} candidates.", ""]
    return users + _table(("metric", "value"), [(name, f"{value:.4f}") for name, value in metrics["metrics"].items()])


def _merge(merge: dict[str, Any]) -> list[str]:
    rows = [(name, value) for name, value in merge.items() if name not in ("adapter", "verification")]
    return _table(("fact", "value"), rows)


def _open_points() -> list[str]:
    points = ("Licence (the base's terms apply)", "Data: origin, consent, licence", "Intended use and users", "Limits")
    return [f"- {point}: {FILL_IN}" for point in points]


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    if not rows:
        return ["Not recorded."]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")
