"""A served model: a small merged folder, and a real HTTP server that computes its log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.summarize.server import Handler
from tests.tokenizers import sentencepiece
from trsr_dist.files import write_json
from trsr_dist.prompts.builder import PromptBuilder


def make_folder(folder: Path, seed: int = 1, style: str = "chat", base: Path | None = None) -> Path:
    """A merged folder of a random Llama whose tokenizer writes a BOS token and has a chat template."""
    torch.manual_seed(seed)
    tokenizer = sentencepiece()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, initializer_range=0.2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    builder = PromptBuilder(tokenizer, style, max_tokens=900)
    own = {"prompt": builder.settings, "answer_ids": list(builder.answer_ids), "domain": "news"}
    write_json(folder / "provenance.json", own | ({"base": {"name_or_path": str(base)}} if base else {}))
    return folder


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@dataclass
class Served:
    """What a server does with a prompt; as vLLM does, where nothing else is said."""

    model: PreTrainedModel
    tokenizer: Any
    answer_ids: tuple[int, int]
    classifies: bool = False
    knows_ids: bool = True
    """``logprob_token_ids`` and ``return_token_ids``."""
    echoes: bool = True
    names_ids: bool = True
    has_tokenize: bool = True
    refuses: tuple[str, ...] = ()
    """Fields of a request."""
    max_logprobs: int = 20
    special: bool | None = None
    """Special tokens before texts; None: as the request asks."""
    wraps: bool = False
    """Puts texts into its chat template."""
    template: str | None = None
    change: Callable[[list[int]], list[int]] = list
    """What becomes of the token ids of a prompt."""
    score: Callable[[float], float] = float
    """What becomes of a classifier's log-odds."""
    models: Sequence[dict[str, Any]] = field(default_factory=lambda: [{"id": "small"}])

    def __call__(self, handler: Handler, body: dict, tries: int) -> None:
        refused = next((name for name in self.refuses if name in body), "")
        if refused:
            handler.reply({"error": {"message": f"Unknown parameter: '{refused}'", "param": refused}}, 400)
        elif handler.path == "/tokenize" and self.has_tokenize:
            handler.reply({"tokens": self.tokenize(body)})
        elif handler.path == "/classify" and self.classifies:
            prompts = [self.read(prompt, body) for prompt in listed(body["input"])]
            rows = [{"index": i, "probs": [self.score(self.log_odds(ids))]} for i, ids in enumerate(prompts)]
            handler.reply({"data": rows, "usage": {"prompt_tokens": sum(map(len, prompts))}})
        elif handler.path == "/v1/completions" and not self.classifies:
            prompts = [self.read(prompt, body) for prompt in listed(body["prompt"])]
            choices = [
                {"index": i, "finish_reason": "length"} | self.choice(ids, body) for i, ids in enumerate(prompts)
            ]
            handler.reply({"choices": choices[::-1], "usage": {"prompt_tokens": sum(map(len, prompts))}})
        else:
            handler.reply({"detail": "Not Found"}, 404)

    def tokenize(self, body: dict) -> list[int]:
        if "messages" not in body:
            return self.encode(body["prompt"], body)
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, chat_template=self.template
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, text: str, body: dict) -> list[int]:
        if self.wraps:
            return self.tokenize({"messages": [{"role": "user", "content": text}]})
        special = body.get("add_special_tokens", True) if self.special is None else self.special
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def read(self, prompt: str | list[int], body: dict) -> list[int]:
        return self.change(self.encode(prompt, body) if isinstance(prompt, str) else prompt)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of the token after each of the prompt, float32, (num_tokens, vocab_size)."""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def log_odds(self, ids: list[int]) -> float:
        yes, no = self.logprobs(ids)[-1, list(self.answer_ids)].tolist()
        return yes - no

    def choice(self, ids: list[int], body: dict) -> dict[str, Any]:
        values = self.logprobs(ids)
        asked = body.get("logprob_token_ids") if self.knows_ids else None
        top = values[-1].topk(min(body.get("logprobs", 0), self.max_logprobs, values.shape[1])).indices.tolist()
        tops = {self.name(token): float(values[-1, token]) for token in (asked or top)}
        logprobs: dict[str, Any] = {"top_logprobs": [tops], "tokens": [], "token_logprobs": []}
        if body.get("echo") and self.echoes:
            logprobs["tokens"] = [self.name(token) for token in [*ids, 0]]
            follow = [float(values[place, token]) for place, token in enumerate(ids[1:])]
            logprobs["token_logprobs"] = [None, *follow, 0.0]
        told = {"prompt_token_ids": ids} if self.knows_ids and body.get("return_token_ids") else {}
        return {"text": "x", "logprobs": logprobs} | told

    def name(self, token: int) -> str:
        return f"token_id:{token}" if self.names_ids else self.tokenizer.decode([token])


def listed(prompt: Any) -> list[Any]:
    """Prompts of a request, which may hold one or several."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
