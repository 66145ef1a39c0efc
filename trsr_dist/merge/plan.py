"""Which tensors the merged folder holds, from what they are made, and in which file each stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from trsr_dist.errors import ModelError
from trsr_dist.merge.changes import Change
from trsr_dist.weights import CODES, DTYPES, SINGLE, TensorEntry, read_rows

HEAD, SCORE = "lm_head.weight", "score.weight"
"""Of the causal model, and of the classifier."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged folder."""

    name: str
    code: str
    """The format's name of the dtype."""
    source: TensorEntry
    change: Change | None
    answers: tuple[int, int] | None = None
    """Rows of the changed source, whose difference is this tensor's one row; None: all rows are taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.answers is None else (1, *self.source.shape[1:])

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.code].itemsize

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are the base's."""
        return self.change is None and self.answers is None and self.code == self.source.code

    def blocks(self, max_elements: int, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks of whole rows: (first row, the base's values, the merged ones, computed in ``dtype``)."""
        if self.answers is None:
            for first, base in read_rows(self.source, max_elements):
                yield first, base, base if self.change is None else self.change.rows(base, first, dtype)
            return
        rows = [(number, next(read_rows(self.source.row(number), max_elements))[1]) for number in self.answers]
        yes, no = (row.to(dtype) if self.change is None else self.change.rows(row, n, dtype) for n, row in rows)
        yield 0, torch.cat([row for _, row in rows]).abs().amax(dim=0, keepdim=True), yes - no


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Files of the merged folder, each with its tensors in order."""

    files: tuple[tuple[Output, ...], ...]
    unties: bool
    """The base's config says that embedding and output head are one tensor, in the merged model they are two."""

    @property
    def outputs(self) -> list[Output]:
        return [output for file in self.files for output in file]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    @property
    def file_names(self) -> list[str]:
        count = len(self.files)
        if count == 1:
            return [SINGLE]
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    @property
    def index(self) -> dict[str, object]:
        """Content of model.safetensors.index.json."""
        pairs = zip(self.file_names, self.files, strict=True)
        names = {output.name: name for name, file in pairs for output in file}
        return {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(names.items()))}


def make_plan(
    by_file: Sequence[Sequence[TensorEntry]],
    changes: dict[str, Change],
    tied: dict[str, str],
    keep_tied: bool,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
    unties: bool = False,
) -> MergePlan:
    """Lay the output out in the base's order; without ``max_shard_bytes`` in the base's files too.

    Args:
        by_file: the base's tensors.
        changes: by stored name.
        tied: tensors that share another's weights, with the other's name.
        keep_tied: a change of one is one of both.
        dtype: of the output; None: the base's.
        max_shard_bytes: of a file; None: as the base's.
        unties: the base itself stores another head than its config says.

    Raises:
        ModelError: a changed tensor is not in the base, or has another shape there.
    """
    entries = {entry.name: entry for file in by_file for entry in file}
    changes, copies = _resolve_ties(entries, changes, tied, keep_tied)
    made = {copy for names in copies.values() for copy in names}
    _check_changes({**entries, **{copy: entries[name] for name, names in copies.items() for copy in names}}, changes)
    files: list[list[Output]] = []
    for file in by_file:
        outputs = []
        for entry in file:
            names = [] if entry.name in made else [entry.name]
            names += copies.get(entry.name, [])
            code = CODES[dtype] if dtype is not None and entry.dtype.is_floating_point else entry.code
            outputs += [Output(name, code, entry, changes.get(name)) for name in names]
        files.append(outputs)
    if max_shard_bytes is not None:
        files = _shard([output for file in files for output in file], max_shard_bytes)
    return MergePlan(tuple(tuple(file) for file in files if file), unties or bool(copies))


def _resolve_ties(
    entries: dict[str, TensorEntry], changes: dict[str, Change], tied: dict[str, str], keep_tied: bool
) -> tuple[dict[str, Change], dict[str, list[str]]]:
    """A tied pair of which the adapter changes one side, or each differently, becomes two tensors.

    Returns:
        Changes, and by name of a stored tensor the further tensors that are made from it.
    """
    changes, copies = dict(changes), {}
    for target, source in tied.items():
        stored = source if source in entries else target
        if target not in changes and source not in changes or stored not in entries:
            continue
        if keep_tied:
            change = changes.get(source) or changes[target]
            changes = {name: other for name, other in changes.items() if name not in (source, target)}
            changes |= {name: change for name in (source, target) if name in entries}
        else:
            copies.setdefault(stored, []).append(target if stored == source else source)
    return changes, copies


def _check_changes(entries: dict[str, TensorEntry], changes: dict[str, Change]) -> None:
    for name, change in changes.items():
        if name not in entries:
            raise ModelError(
                f"the adapter changes {name}, which the base does not have; it was trained on another base "
                "(name the right one with --base)"
            )
        shape = entries[name].shape
        rows, columns = entries[name].num_rows, prod(shape[1:])
        if change.replacement is not None and tuple(change.replacement.shape) != shape:
            raise ModelError(
                f"the adapter replaces {name} by shape {tuple(change.replacement.shape)}, the base has {shape}: "
                "another vocabulary or base; resize the base first and name it with --base"
            )
        if change.left is not None and change.right is not None:
            found = (change.left.shape[0], change.right.shape[1])
            if found != (rows, columns) or len(shape) != 2:
                raise ModelError(f"the adapter's update of {name} has shape {found}, the base {shape}: another base")
        for vector in (change.magnitude, change.added):
            if vector is not None and vector.numel() != rows:
                raise ModelError(f"the adapter's vector for {name} has {vector.numel()} values, the base {rows} rows")


def _shard(outputs: list[Output], max_bytes: int) -> list[list[Output]]:
    """Greedy, in order; a tensor larger than the limit gets its own file."""
    files: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if files[-1] and size + output.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(output)
        size += output.num_bytes
    return files


def classifier_plan(plan: MergePlan, tied: dict[str, str], prefix: str, answer_ids: tuple[int, int]) -> MergePlan:
    """The same files with ``score.weight`` instead of the head.

    Args:
        plan: of the causal model.
        tied: names of tensors that share another's weights, with the other's name.
        prefix: of all tensors but the head; a base that was saved without its head stores names without it.
        answer_ids: rows of yes and no.

    Raises:
        ModelError: the head has no such rows.
    """
    by_name = {output.name: output for output in plan.outputs}
    head = by_name.get(HEAD) or by_name[tied[HEAD]]
    if max(answer_ids) >= head.source.num_rows:
        raise ModelError(
            f"{head.source.file}: {head.source.name} has {head.source.num_rows} rows, the answers are tokens "
            f"{answer_ids}: the tokenizer of another model; restore the right one"
        )
    # float32 in any model: the rows nearly cancel, and servers multiply heads in float32.
    score = Output(SCORE, "F32", head.source, head.change, answer_ids)

    def renamed(output: Output) -> Output:
        return output if output.name.startswith(prefix) else replace(output, name=prefix + output.name)

    files = [[score if output.name == HEAD else renamed(output) for output in file] for file in plan.files]
    if HEAD not in by_name:
        files[-1].append(score)
    return replace(plan, files=tuple(map(tuple, files)))
