"""Reading and laying out safetensors files by the byte, compared with the library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from trsr_dist import weights as tensors_module
from trsr_dist.errors import ModelError
from trsr_dist.files import write_json
from trsr_dist.weights import (
    CODES,
    PICKLE_ERRORS,
    TensorEntry,
    file_entries,
    folder_entries,
    folder_files,
    has_weights,
    header_bytes,
    is_equal,
    named_entries,
    pickle_fault,
    read_rows,
)

TENSORS = {
    "scalar": torch.tensor(3.0),
    "vector": torch.arange(5, dtype=torch.int64),
    "matrix": torch.arange(12.0).view(4, 3).bfloat16(),
    "cube": torch.arange(24, dtype=torch.int8).view(2, 3, 4),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "hollow": torch.zeros(4, 0),
}


def entries_of(folder: Path) -> dict[str, TensorEntry]:
    save_file(TENSORS, folder / "m.safetensors", metadata={"format": "pt"})
    return {entry.name: entry for entry in file_entries(folder / "m.safetensors")}


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def described(dtype: str = "F32", shape: tuple[int, ...] = (2, 3), first: int = 0, last: int = 24) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_sizes(tmp_path: Path) -> None:
    found = {
        name: (entry.dtype, entry.shape, entry.num_rows, entry.row_bytes, entry.num_bytes)
        for name, entry in entries_of(tmp_path).items()
    }
    assert found == {
        "scalar": (torch.float32, (), 1, 4, 4),
        "vector": (torch.int64, (5,), 5, 8, 40),
        "matrix": (torch.bfloat16, (4, 3), 4, 6, 24),
        "cube": (torch.int8, (2, 3, 4), 2, 12, 24),
        "empty": (torch.float16, (0, 4), 0, 8, 0),
        "hollow": (torch.float32, (4, 0), 4, 0, 0),
    }


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7, 12, 100])
def test_blocks_of_rows_are_the_tensors(tmp_path: Path, most: int) -> None:
    for name, entry in entries_of(tmp_path).items():
        blocks = list(read_rows(entry, most))
        expected = TENSORS[name].reshape(entry.num_rows, -1) if TENSORS[name].numel() else None
        if expected is None:
            assert blocks == []
            continue
        columns = expected.shape[1]
        assert [first for first, _ in blocks] == list(range(0, entry.num_rows, max(1, most // columns)))
        assert all(block.shape[1] == columns and block.shape[0] <= max(1, most // columns) for _, block in blocks)
        assert torch.equal(torch.cat([block for _, block in blocks]), expected)


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    entry = next(entry for entry in entries_of(tmp_path).values() if entry.name == "matrix")
    with open(entry.file, "r+b") as stream:
        stream.truncate(entry.start + 13)
    blocks = read_rows(entry, 6)
    next(blocks)
    with pytest.raises(ModelError, match=r"m\.safetensors: ends within matrix"):
        next(blocks)


def test_a_header_that_the_library_reads(tmp_path: Path) -> None:
    """Other characters than ASCII, every dtype, an end that is padded to 8 bytes."""
    listed = [(f"t{code}-ä", code, (2, 3)) for code in CODES.values()] + [("scalar", "F32", ())]
    for number in range(len(listed)):
        header = header_bytes(listed[: number + 1])
        assert len(header) % 8 == 0 and header[8:9] == b"{" and len(header) == 8 + struct.unpack("<Q", header[:8])[0]
        assert len(header.rstrip(b" ")) > len(header) - 8
    total = sum(6 * dtype.itemsize for dtype in CODES) + 4
    found = load(header + bytes(range(total)))
    assert {name: (tuple(tensor.shape), CODES[tensor.dtype]) for name, tensor in found.items()} == {
        name: (shape, code) for name, code, shape in listed
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(header + bytes(range(total)))
    entries = file_entries(path)
    assert [(entry.name, entry.code, entry.shape) for entry in entries] == listed
    assert [entry.start - len(header) for entry in entries] == [
        sum(e.num_bytes for e in entries[:i]) for i in range(11)
    ]
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


def test_entries_stand_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"b": described(first=24, last=48), "__metadata__": {"format": "pt"}, "a": described()}
    path = write_raw(tmp_path / "m.safetensors", header, bytes(48))
    start = 8 + len(json.dumps(header))
    assert [(entry.name, entry.start) for entry in file_entries(path)] == [("a", start), ("b", start + 24)]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": described()}, 23, r"m\.safetensors: \d+ bytes, its header promises \d+: truncated"),
        ({"a": described()}, 25, r"promises"),
        ({"a": described(last=20)}, 20, r"a of shape \[2, 3\] has bytes 0 to 20: damaged"),
        ({"a": described(), "b": described(first=25, last=49)}, 49, r"b of shape .* has bytes 25 to 49: damaged"),
        ({"a": described(), "b": described(first=20, last=44)}, 44, "damaged"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "not a safetensors file"),
        ({"a": {"dtype": "F32", "shape": "2", "data_offsets": "0"}}, 4, "a is {'dtype'"),
        ([], 0, "not a safetensors file"),
        (b"[" * 100_000, 0, "not a safetensors file"),
        (b"not json", 0, "not a safetensors file"),
        (b"\xff{}", 0, "not a safetensors file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = write_raw(tmp_path / "m.safetensors", header, bytes(data))
    with pytest.raises(ModelError, match=message):
        file_entries(path)


def test_a_file_that_is_missing_or_cut_within_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ModelError, match=r"m\.safetensors: missing"):
        file_entries(path)
    with pytest.raises(ModelError, match="a pipe, socket or device"):
        file_entries(Path("/dev/null"))
    path.write_bytes(b"1234567")
    with pytest.raises(ModelError, match="not a safetensors file"):
        file_entries(path)
    write_raw(path, {}, b"", length=2**64 - 1)
    with pytest.raises(ModelError, match="header of 18446744073709551615 bytes in a file of 10"):
        file_entries(path)
    write_raw(path, {}, b"", length=11)
    with pytest.raises(ModelError, match="header of 11 bytes in a file of 10: truncated"):
        file_entries(path)
    write_raw(path, {}, b"")
    assert file_entries(path) == []
    monkeypatch.setattr(tensors_module, "MAX_HEADER_BYTES", 2)
    assert file_entries(path) == []
    monkeypatch.setattr(tensors_module, "MAX_HEADER_BYTES", 1)
    with pytest.raises(ModelError, match="header of 2 bytes"):
        file_entries(path)


class TestFolders:
    def save(self, folder: Path, *names: str, index: dict[str, str] | None = None) -> None:
        for number, name in enumerate(names, 1):
            save_file({name: torch.zeros(2)}, folder / f"model-{number}.safetensors")
        if index is not None:
            write_json(folder / "model.safetensors.index.json", {"weight_map": index})

    def test_the_index_names_the_files(self, tmp_path: Path) -> None:
        self.save(tmp_path, "a", "b", "c", index={"b": "model-2.safetensors", "a": "model-1.safetensors"})
        assert [path.name for path in folder_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
        assert [[entry.name for entry in entries] for entries in folder_entries(tmp_path)] == [["a"], ["b"]]

    def test_a_single_file(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
        assert [[entry.name for entry in entries] for entries in folder_entries(tmp_path)] == [["a"]]
        assert load_file(folder_files(tmp_path)[0]).keys() == {"a"}

    def test_files_stand_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        names = [f"model-{number:05d}-of-00020.safetensors" for number in range(1, 21)]
        self.save(tmp_path, index={f"t{i}": name for i, name in enumerate(reversed(names))})
        assert [path.name for path in folder_files(tmp_path)] == names

    @pytest.mark.parametrize("index", [{"weight_map": {"a": 1}}, {"weight_map": ["a"]}, {}])
    def test_an_index_of_another_form(self, tmp_path: Path, index: dict) -> None:
        write_json(tmp_path / "model.safetensors.index.json", index)
        with pytest.raises(ModelError, match=r"index\.json: .*weight_map"):
            folder_files(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"index\.json\); only safetensors weights"):
            folder_entries(tmp_path)

    def test_a_tensor_in_two_files(self, tmp_path: Path) -> None:
        self.save(tmp_path, "a", "a", index={"a": "model-1.safetensors", "b": "model-2.safetensors"})
        with pytest.raises(ModelError, match="in two files"):
            folder_entries(tmp_path)

    @pytest.mark.parametrize("names", ["az", "z", "azyxwvutsrqpbc"])
    def test_files_and_index_disagree(self, tmp_path: Path, names: str) -> None:
        """The first name that is in one of them only."""
        self.save(tmp_path, "a", index=dict.fromkeys(names, "model-1.safetensors"))
        first = {"az": "z", "z": "a", "azyxwvutsrqpbc": "b"}[names]
        with pytest.raises(
            ModelError, match=rf": {first} is in model\.safetensors\.index\.json or in the files, not in"
        ):
            folder_entries(tmp_path)

    def test_one_file_counts_before_an_index(self, tmp_path: Path) -> None:
        """As transformers reads them."""
        assert not has_weights(tmp_path)
        self.save(tmp_path, "a", index={"a": "model-1.safetensors"})
        assert has_weights(tmp_path) and named_entries(tmp_path).keys() == {"a"}
        save_file({"b": torch.zeros(2)}, tmp_path / "model.safetensors")
        assert has_weights(tmp_path) and named_entries(tmp_path)["b"].file == tmp_path / "model.safetensors"
        (tmp_path / "model.safetensors.index.json").unlink()
        assert has_weights(tmp_path)

    def test_an_index_that_leads_out_of_the_folder(self, tmp_path: Path) -> None:
        self.save(tmp_path, "a", index={"a": "model-1.safetensors", "b": "../model-2.safetensors"})
        with pytest.raises(ModelError, match="names files outside its folder"):
            folder_files(tmp_path)

    @pytest.mark.parametrize("name", ["b.bin", "c.pt", "c.pth"])
    def test_a_pickle_is_named_and_not_read(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        (tmp_path / "z.bin").touch()
        with pytest.raises(ModelError, match=rf"index\.json\); {name.replace('.', '[.]')}, a pickle"):
            folder_files(tmp_path)


def test_equal_values_in_blocks_and_in_other_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "COMPARED_ELEMENTS", 4)
    first = torch.arange(12.0).view(6, 2)
    last = first.clone()
    last[5, 1] += 1
    tensors = {"a": first, "b": first.bfloat16(), "c": last, "d": first.view(2, 6).clone(), "e": first[:5].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = named_entries(tmp_path)
    assert [is_equal(entries["a"], entries[name]) for name in "abcde"] == [True, True, False, False, False]
    monkeypatch.undo()
    assert is_equal(entries["a"], entries["b"]) and not is_equal(entries["a"], entries["c"])


def test_a_quantized_dtype_is_refused_where_its_values_are_wanted(tmp_path: Path) -> None:
    header = {"a": described("F8_E4M3", last=6), "b": described(first=6, last=30)}
    quantized, plain = file_entries(write_raw(tmp_path / "m.safetensors", header, bytes(30)))
    assert (quantized.code, plain.num_bytes) == ("F8_E4M3", 24)
    with pytest.raises(ModelError, match=r"m\.safetensors: a has dtype F8_E4M3.*unquantized"):
        list(read_rows(quantized, 10))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnpicklingError("Weights only load failed ... GLOBAL os.system"), "it holds code, which is not run"),
        (UnpicklingError("Unsupported operand 5"), "it holds code, which is not run"),
        (UnpicklingError("pickle data was truncated\nmore"), "pickle data was truncated"),
        (ValueError("GLOBAL"), "GLOBAL"),
        (EOFError(), "EOFError"),
    ],
)
def test_why_a_pickle_cannot_be_read(error: Exception, reason: str) -> None:
    assert pickle_fault(error) == reason and isinstance(error, PICKLE_ERRORS)
