"""Merged models and adapters to the Hugging Face hub, each with its card, in one commit."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from trsr_dist.bases import ORIGIN, is_path
from trsr_dist.errors import ModelError, RunError
from trsr_dist.files import read_json
from trsr_dist.log import get_logger, show
from trsr_dist.merge.card import FILL_IN, find_evaluation, is_evaluation_of, keep_answers, model_card
from trsr_dist.merge.output import TOKENIZER
from trsr_dist.model.artifacts import PROVENANCE, read_provenance
from trsr_dist.run import MANIFEST, read_manifest

CARD = "README.md"
NAMES_OF_BASE = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}
"""File, and the key in it."""
OF_A_MODEL = re.compile(
    rf"(adapter_config\.json|(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin|index\.json)|({'|'.join(TOKENIZER)})[^/]*)"
)
"""Files that decide what is loaded: beside a new model, those of an earlier one would be."""
UNREACHABLE = HfHubHTTPError.__bases__
"""What the hub's client raises without an answer: the error of its HTTP library, and OSError."""
ADDRESS = re.compile(r"/|https?://")

log = get_logger("push")


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What goes where."""

    repository: str
    """``owner/name`` on the hub."""
    evaluation: Path | None = None
    """Results of an evaluation of this model; None: those of its run folder, where there are any."""
    base_model: str = ""
    """The base's hub id, where the folder knows only a path."""
    public: bool = False
    dry_run: bool = False


def push(folder: Path, options: PushOptions, api: HfApi) -> str:
    """Upload a folder of ``tools/merge_lora.py``, whole or not at all; returns the commit's address.

    The card gets the evaluation's figures and keeps what its owner has filled in. Paths of this machine and addresses
    of servers in provenance.json are cut to their last part; PEFT's and transformers' own files name the base as the
    card does. Weights, tokenizer and adapter settings of an earlier push that are not in this one are deleted by the
    same commit.

    Raises:
        ModelError: it is no such folder, or not all of it is there.
        RunError: the evaluation is of another model, or the hub refuses or cannot be reached.
    """
    files = complete_files(folder)
    provenance = without_paths(read_json(folder / PROVENANCE))
    provenance["base"]["name_or_path"] = base_of(folder, options.base_model)
    card = model_card(provenance, evaluation_of(folder, options.evaluation))
    texts = {
        CARD: keep_answers(card, (folder / CARD).read_text(encoding="utf-8")),
        PROVENANCE: json_text(provenance),
        **with_base(folder, files, provenance["base"]["name_or_path"]),
    }
    if open_points := [line for line in texts[CARD].splitlines() if FILL_IN in line]:
        log.warning("the card is open at: %s", "; ".join(line.lstrip("- ") for line in open_points))
    if options.dry_run:
        visibility = "public" if options.public else "private"
        sizes = files | {name: len(text.encode()) for name, text in texts.items()}
        names = "\n".join(f"  {name} ({size:,} bytes)" for name, size in sizes.items())
        show(f"{texts[CARD]}\nwould go to {options.repository} ({visibility}):\n{names}")
        return ""
    operations = [
        CommitOperationAdd(name, io.BytesIO(texts[name].encode()) if name in texts else folder / name) for name in files
    ]
    return _upload(options, operations, api)


def _upload(options: PushOptions, operations: list[CommitOperationAdd], api: HfApi) -> str:
    name, old = options.repository, []
    try:
        if api.repo_exists(name):
            log.info("%s exists and keeps its visibility", name)
            old = stale_files(api.list_repo_files(name), {operation.path_in_repo for operation in operations})
        else:
            api.create_repo(name, private=not options.public)
        if old:
            log.info("deleted by this commit, since they are of an earlier model: %s", ", ".join(old))
        deletions = [CommitOperationDelete(path) for path in old]
        commit = api.create_commit(name, [*operations, *deletions], commit_message="Upload by trsr_dist")
    except LocalTokenNotFoundError:
        raise RunError("no token for the hub: set HF_TOKEN, or run `hf auth login`") from None
    except HFValidationError as error:
        raise RunError(f"--repo {name}: {error}; expected owner/name") from None
    except HfHubHTTPError as error:
        raise RunError(
            f"{name}: the hub refused, nothing was committed: {error}; check the name and the token's rights"
        ) from error
    except UNREACHABLE as error:
        raise RunError(
            f"{name}: the hub at {api.endpoint} gave no answer ({error}); check the network and HF_ENDPOINT, then run "
            "it again"
        ) from error
    log.info("pushed %d files: %s", len(operations), commit.commit_url)
    return commit.commit_url


def stale_files(present: Collection[str], pushed: Container[str]) -> list[str]:
    """Files of an earlier model that would be loaded beside or in place of the pushed one."""
    return sorted(name for name in present if name not in pushed and OF_A_MODEL.fullmatch(name))


def complete_files(folder: Path) -> dict[str, int]:
    """Names and bytes of the files that the merge wrote, all of them there.

    Raises:
        ModelError: it is no finished merge, or a file is missing or of another size.
    """
    if not (folder / MANIFEST).is_file() or "merge" not in read_provenance(folder):
        raise ModelError(
            f"{folder}: no folder of tools/merge_lora.py; merge the checkpoint first, with --adapter-only for the "
            "adapter alone"
        )
    files = read_manifest(folder)["files"]
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size and name != CARD:  # its owner may have filled it in
            raise ModelError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, expected {size}; merge again"
            )
    return files


def with_base(folder: Path, files: Container[str], base: str) -> dict[str, str]:
    """Files in which PEFT and transformers keep a name or path of the base, with ``base`` in its place."""
    texts = {}
    for name, key in NAMES_OF_BASE.items():
        values = read_json(folder / name, finite=False) if name in files else {}
        if values.get(key):
            texts[name] = json_text(values | {key: base})
    return texts


def json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def base_of(folder: Path, given: str) -> str:
    """Hub id of the base: as given, as recorded, or what a fetched base was made from; a path's last part otherwise."""
    recorded = read_json(folder / PROVENANCE)["base"]["name_or_path"]
    if given:
        return given
    if (folder / ORIGIN).is_file():
        return read_json(folder / ORIGIN)["model"]
    if not (is_path(recorded) or Path(recorded).is_dir()):
        return recorded
    log.warning("the base is known as a folder, %s; --base-model names it on the hub", recorded)
    return Path(recorded).name


def without_paths(value: Any) -> Any:
    """The same with absolute paths and addresses of servers cut to their last part: they tell of this machine and
    network and help nobody else."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and ADDRESS.match(value) else value


def evaluation_of(folder: Path, given: Path | None) -> dict[str, Any] | None:
    """Results for the card: as given, or those of the run around the folder.

    Raises:
        RunError: the given file is missing, or of another model.
    """
    provenance = read_json(folder / PROVENANCE)
    if given is None:
        return find_evaluation(folder.parent, provenance)
    if not given.is_file():
        raise RunError(f"{given}: no such file; tools/evaluate.py writes evaluation/test.json")
    if not is_evaluation_of(results := read_json(given), provenance):
        raise RunError(f"{given}: an evaluation of {results['model']}, another model than {folder}; evaluate this one")
    return results
