"""The job: a run's train texts in, RUN/base out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trsr_dist.base.corpus import Corpus, Document, PromptDocument, document_text
from trsr_dist.base.pretrain import BaseShape, make_model, pretrain
from trsr_dist.base.texts import ShardTexts
from trsr_dist.base.tokenizer import train_tokenizer
from trsr_dist.config import Config, dump_config
from trsr_dist.files import atomic_folder, writing
from trsr_dist.hashing import hash64
from trsr_dist.log import get_logger, progress, setup_logging, show
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import Prompt
from trsr_dist.run import RunFolder, folder_lock, is_finished, write_manifest

TOKENIZER_DOCUMENTS = 4000
"""Documents that the tokenizer is trained on."""

log = get_logger("base")


def make_base(config: Config, *, force: bool = False, dry_run: bool = False) -> int:
    """Run the stage; see tools/make_tiny_base.py.

    Raises:
        RunError: the train shards are not there, or the output folder is locked or holds another run's files.
        ModelError: the answers do not become single tokens.
    """
    setup_logging(stage="base")
    run = RunFolder(Path(config.run.dir))
    texts = ShardTexts(run.histories, run.split("train"))
    if dry_run:
        show(dump_config(config) + plan_text(config, run, texts))
        return 0
    settings = base_settings(config)
    with writing(run.root), folder_lock(run.base) as lock:
        if is_finished(run.base, settings, texts.inputs, force):
            run.write_config("base", dump_config(config), only_missing=True)
            log.info("%s: made already with these settings; nothing to do (--force redoes it)", run.base)
            return 0
        with atomic_folder(run.base, lock.check) as folder:
            facts = build(config, texts, folder)
            write_manifest(folder, "base", settings, texts.inputs, **facts)
        run.write_config("base", dump_config(config))
    log.info(
        "%s: %s parameters, %d tokens in the vocabulary, pre-trained on %s tokens (loss %.2f)",
        run.base, f"{facts['num_parameters']:,}", facts["vocab_size"], f"{facts['num_tokens']:,}", facts["loss"],
    )  # fmt: skip
    return 0


def base_settings(config: Config) -> dict[str, Any]:
    """Every setting that the output depends on."""
    base, prompt = (section.model_dump(mode="json") for section in (config.base, config.prompt))
    return {**base, "prompt": prompt, "seed": config.run.seed}


def plan_text(config: Config, run: RunFolder, texts: ShardTexts) -> str:
    """What the stage would read, compute and write."""
    base = config.base
    return "\n".join(
        (
            "# plan",
            f"# read the texts of {len(texts)} train users from {run.split('train')}",
            f"# pre-train {base.num_layers} layers of width {base.hidden_size} on {base.steps} steps of "
            f"{base.batch_size} documents of at most {config.prompt.max_tokens} tokens",
            f"# write {run.base}",
        )
    )


def build(config: Config, texts: ShardTexts, folder: Path) -> dict[str, Any]:
    """Fill ``folder`` and return what the manifest tells of it."""
    base, prompt, seed = config.base, config.prompt, config.run.seed
    corpus = Corpus(texts, base.prompt_share, seed)
    tokenizer = make_tokenizer(corpus, prompt.answers, base.vocab_size)
    builder = PromptBuilder(tokenizer, **prompt.model_dump())
    model = make_model(base_shape(config), tokenizer, hash64(seed, "base weights"))
    steps = EncodedSteps(corpus, builder, base.steps, base.batch_size)
    losses = pretrain(model, steps, base.steps, base.learning_rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "num_tokens": steps.num_tokens,
        "loss": round(losses[-1], 4),
    }


def base_shape(config: Config) -> BaseShape:
    """Sizes of the model."""
    base = config.base
    return BaseShape(
        base.hidden_size,
        base.intermediate_size,
        base.num_layers,
        base.num_heads,
        base.num_kv_heads,
        config.prompt.max_tokens,
    )


def make_tokenizer(corpus: Corpus, answers: tuple[str, str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train it on the first documents, with the answers so often that they become tokens before other words do."""
    documents = corpus.documents(0, TOKENIZER_DOCUMENTS)
    often = chain.from_iterable(repeat(answers, TOKENIZER_DOCUMENTS))
    return train_tokenizer(chain((document_text(document, answers) for document in documents), often), vocab_size)


class EncodedSteps:
    """The documents of each step in token ids; counts the tokens."""

    def __init__(self, corpus: Corpus, builder: PromptBuilder, num_steps: int, batch_size: int) -> None:
        self.num_tokens = 0
        self._corpus, self._builder, self._num_steps, self._batch_size = corpus, builder, num_steps, batch_size

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in progress(range(self._num_steps), description="pre-training", unit=" steps"):
            first = step * self._batch_size
            documents = self._corpus.documents(first, first + self._batch_size)
            ids = [encode(document, self._builder) for document in documents]
            self.num_tokens += sum(map(len, ids))
            yield ids


def encode(document: Document, builder: PromptBuilder) -> list[int]:
    """Token ids with the end token; a prompt with its answer, another text cut to the limit of a prompt."""
    end = builder.tokenizer.eos_token_id
    if isinstance(document, PromptDocument):
        user = builder.build(document.sample)
        return [*user.prefix, *user.suffixes[0], builder.answer_ids[document.answer], end]
    ids = builder.encoder.encode([Prompt(("", ""), (document,))])[0]
    return [*ids[: builder.max_tokens], end]
