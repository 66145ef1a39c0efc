"""One measurement of TRL's SFTTrainer with packing, run by the ``trl`` suite in TRL's own environment."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.common import Timer, timed
from benchmarks.ways import LORA_RANK, SHAPE, TARGETS


class Epochs(TrainerCallback):
    """CPU seconds of each epoch's steps, from the first batch to the last optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._context = timed()
        self._timer: Timer = self._context.__enter__()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._context.__exit__(None, None, None)
        self.seconds.append(self._timer.cpu)


def train(prompts: Sequence[Sequence[int]], row_tokens: int, num_epochs: int) -> list[float]:
    """CPU seconds of each epoch; prompts in packed rows, the loss at the answers."""
    torch.set_num_threads(1)
    epochs = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)),
            args=settings(folder, row_tokens, num_epochs),
            train_dataset=Dataset.from_list([example(prompt) for prompt in prompts]),
            processing_class=unused_tokenizer(),
            peft_config=LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
            callbacks=[epochs],
        )
        trainer.train()
    return epochs.seconds


def settings(folder: str, row_tokens: int, num_epochs: int) -> SFTConfig:
    """Float32 on the CPU, without recomputation: as ours."""
    return SFTConfig(
        output_dir=folder,
        packing=True,
        max_length=row_tokens,
        per_device_train_batch_size=1,
        num_train_epochs=num_epochs,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def example(prompt: Sequence[int]) -> dict[str, list[int]]:
    """A prompt and its answer, which alone counts in the loss."""
    return {"input_ids": [*prompt, 3], "labels": [-100] * len(prompt) + [3]}


def unused_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer insists on one; the prompts are token ids."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def main() -> None:
    print(json.dumps(train(**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
