"""The job: a run's train texts in, RUN/base out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerFast

from trsr_dist.base.corpus import Corpus, Document, PromptDocument, document_text
from trsr_dist.base.pretrain import make_model, pretrain, train_tokenizer
from trsr_dist.config import Config, dump_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.files import atomic_folder, writing
from trsr_dist.hashing import hash64
from trsr_dist.locks import folder_lock
from trsr_dist.log import get_logger, progress, setup_logging, show
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import Prompt
from trsr_dist.records import Sample
from trsr_dist.run import RunFolder, check_inputs, is_finished, write_manifest
from trsr_dist.shards.reader import ShardSet

TOKENIZER_DOCUMENTS = 4000
"""Documents that the tokenizer is trained on."""

ROPE_THETA = 500_000.0

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
    base, prompt = (section.model_dump(mode="json") for section in (config.base, config.prompt))
    settings = {**base, "prompt": prompt, "seed": config.run.seed}
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
    documents = (document_text(document, prompt.answers) for document in corpus.documents(0, TOKENIZER_DOCUMENTS))
    # The answers stand so often that they become tokens before other words do.
    tokenizer = train_tokenizer(chain(documents, prompt.answers * TOKENIZER_DOCUMENTS), base.vocab_size)
    builder = PromptBuilder(tokenizer, **prompt.model_dump())
    model = make_model(llama_config(config, tokenizer), hash64(seed, "base weights"))
    num_tokens = 0

    def encoded_steps() -> Iterator[list[list[int]]]:
        nonlocal num_tokens
        for step in progress(range(base.steps), description="pre-training", unit=" steps"):
            first = step * base.batch_size
            ids = [encode(document, builder) for document in corpus.documents(first, first + base.batch_size)]
            num_tokens += sum(map(len, ids))
            yield ids

    losses = pretrain(model, encoded_steps(), base.steps, base.learning_rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "num_tokens": num_tokens,
        "loss": round(losses[-1], 4),
    }


def llama_config(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Sizes of the base."""
    base = config.base
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_kv_heads,
        max_position_embeddings=config.prompt.max_tokens,
        # Heads are few and narrow: slow rotations leave most of each to compare words, wherever they stand.
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        # The usual 0.02 suits wide models; in a narrow one attention starts so flat that it hardly learns.
        initializer_range=base.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(document: Document, builder: PromptBuilder) -> list[int]:
    """Token ids with the end token; a prompt with its answer, another text cut to the limit of a prompt."""
    end = builder.tokenizer.eos_token_id
    if isinstance(document, PromptDocument):
        user = builder.build(document.sample)
        return [*user.prefix, *user.suffixes[0], builder.answer_ids[document.answer], end]
    ids = builder.encoder.encode([Prompt(("", ""), (document,))])[0]
    return [*ids[: builder.max_tokens], end]


class ShardTexts:
    """The texts of a run's train users, read when asked for; holds the ids of the catalogue in memory.

    Args:
        histories: ``RUN/histories``.
        shards: ``RUN/shards/train``.

    Raises:
        RunError: one of them is not there, or the shards were made from other histories.
        DataError: there is no train user.
    """

    def __init__(self, histories: Path, shards: Path) -> None:
        store = HistoryStore(histories)
        self._catalogue = store.catalogue
        self._shards = ShardSet(shards)
        self.inputs = {"histories": store.manifest_hash, "train": self._shards.manifest_hash}
        check_inputs(shards, {"histories": store.manifest_hash})
        if not len(self._shards):
            raise DataError(f"{shards}: no train user to take texts from; give data.split a share for train")
        self._rows = {item: row for row, item in enumerate(self._catalogue.numbers())}

    def __len__(self) -> int:
        """Number of train users."""
        return len(self._shards)

    def sample(self, user: int) -> Sample:
        """A train user's sample."""
        return self._shards.read(user)

    def history(self, sample: Sample) -> list[str]:
        """Item texts of the sample's user, oldest first, without the target."""
        return [self._catalogue.text(self._rows[item]) for item in sample.provenance["history"]]
