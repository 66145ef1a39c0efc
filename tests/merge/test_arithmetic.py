"""What an adapter does to tensors, and how far a written weight may be off, against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trsr_dist.errors import ModelError
from trsr_dist.merge.changes import Change
from trsr_dist.merge.plan import Output
from trsr_dist.merge.verify import WeightCheck, _check_tensor
from trsr_dist.weights import file_entries

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
LEFT, RIGHT = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[0.5, -0.5]])
UPDATED = torch.tensor([[2.0, 1.0], [13.0, -6.0], [105.0, -94.0]])
"""``BASE + 2 * LEFT @ RIGHT``."""


class TestChange:
    def test_a_low_rank_update(self) -> None:
        change = Change(left=LEFT, right=RIGHT, scale=2.0)
        assert change.rows(BASE, 0).equal(UPDATED)
        assert change.rows(BASE[1:], 1).equal(UPDATED[1:]), "a block from row 1 on"
        found = change.rows(BASE.bfloat16(), 0, torch.float64)
        assert found.dtype == torch.float64 and found.equal(UPDATED.double())

    def test_nothing_or_one_half_changes_nothing(self) -> None:
        for change in (Change(), Change(left=LEFT), Change(right=RIGHT)):
            assert change.rows(BASE, 0).equal(BASE)

    def test_a_replacement_comes_before_the_update(self) -> None:
        change = Change(replacement=BASE * 10, left=LEFT, right=RIGHT, scale=2.0)
        assert change.rows(BASE[1:2], 1).tolist() == [[40.0, 30.0]]
        assert Change(replacement=BASE).rows(BASE * 2, 0, torch.float64).dtype == torch.float64
        assert Change(replacement=torch.tensor([7.0, 8.0, 9.0])).rows(torch.zeros(2, 1), 1).tolist() == [[8.0], [9.0]]

    def test_magnitudes_are_the_norms_of_the_rows(self) -> None:
        change = Change(magnitude=torch.tensor([1.0, 10.0, 2.0]))
        assert change.rows(torch.tensor([[3.0, 4.0], [0.0, -5.0]]), 1).tolist() == [[6.0, 8.0], [0.0, -2.0]]

    def test_a_bias_gets_its_scaled_part(self) -> None:
        change = Change(added=torch.tensor([1.0, 2.0, 3.0]), scale=0.5)
        assert change.rows(torch.tensor([[10.0], [20.0]]), 1).tolist() == [[11.0], [21.5]]


def check(
    folder: Path,
    exact: torch.Tensor,
    written: torch.Tensor,
    base: torch.Tensor | None = None,
    change: Change | None = None,
) -> WeightCheck:
    """Compare ``written`` with the base plus what makes it ``exact``.

    Args:
        folder: an empty one.
        exact: float64, shape (rows, columns), representable in float32.
        written: the same shape, in the dtype of the file.
        base: likewise, in float32; None: ``exact`` itself, changed by nothing.
        change: of the base; None: it is replaced by ``exact``.
    """
    if change is None and base is not None:
        change = Change(replacement=exact.float())
    entries = []
    for name, tensor in (("base", exact.float() if base is None else base), ("merged", written)):
        save_file({"w": tensor.contiguous()}, folder / f"{name}.safetensors")
        entries += file_entries(folder / f"{name}.safetensors")
    result = WeightCheck()
    _check_tensor(Output("w", entries[1].code, entries[0], change), entries[1], result)
    return result


class TestTolerance:
    """Half a rounding of the dtype, and 1e-6 of the row's largest value."""

    def off_by(self, folder: Path, share: float) -> WeightCheck:
        """A small value beside one of 64 is off by this share of 64."""
        exact = torch.tensor([[1.0, 2.0], [0.0, 64.0]], dtype=torch.float64)
        written = exact.clone()
        written[1, 0] += 64 * share
        return check(folder, exact, written.float())

    def test_float32_noise_passes_and_more_does_not(self, tmp_path: Path) -> None:
        found = self.off_by(tmp_path, 0.9e-6)
        assert found.largest_difference == pytest.approx(64 * 0.9e-6)
        assert found.largest_relative == pytest.approx(0.9e-6)
        with pytest.raises(
            ModelError, match=r"merged\.safetensors: row 1 of w is not base \+ adapter.*difference 7.04e"
        ):
            self.off_by(tmp_path, 1.1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_one_rounding_passes_and_two_do_not(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """At 1 the spacing is eps: half of it is one rounding, that is 0.5 * eps * 1."""
        eps = torch.finfo(dtype).eps
        exact = torch.tensor([[1.0, 1.0 + 0.5 * eps]], dtype=torch.float64)
        assert check(tmp_path, exact, torch.tensor([[1.0, 1.0]], dtype=dtype)).largest_difference == 0.5 * eps
        exact = torch.tensor([[1.0, 1.0 + 0.51 * eps]], dtype=torch.float64)
        with pytest.raises(ModelError, match="row 0 of w"):
            check(tmp_path, exact, torch.tensor([[1.0, 1.0]], dtype=dtype))

    def test_what_the_update_cancels_counts_for_the_noise(self, tmp_path: Path) -> None:
        """The base's 1000 leaves float32 noise of its size in a sum of about 1."""
        base = torch.tensor([[1000.0, 1.0]])
        exact = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
        found = check(tmp_path, exact, torch.tensor([[1.0009, 1.0]]), base)
        assert found.largest_relative == pytest.approx(0.9e-6, rel=1e-3)
        with pytest.raises(ModelError, match="row 0"):
            check(tmp_path, exact, torch.tensor([[1.0011, 1.0]]), base)

    def test_the_sum_is_compared_in_float64(self, tmp_path: Path) -> None:
        """In float32 the update of 2**-30 would vanish on both sides."""
        one, change = torch.ones(1, 1), Change(left=torch.ones(1, 1), right=torch.full((1, 1), 2.0**-30))
        assert check(tmp_path, one.double(), one, one, change).largest_difference == 2**-30

    @pytest.mark.parametrize("changed", [False, True])
    def test_large_rows_do_not_cover_small_ones(self, tmp_path: Path, changed: bool) -> None:
        exact = torch.tensor([[64.0], [1.0]], dtype=torch.float64)
        base = torch.tensor([[640.0], [1.0]]) if changed else None
        with pytest.raises(ModelError, match="row 1"):
            check(tmp_path, exact, torch.tensor([[64.0], [1.00001]]), base)

    def test_zero_stays_zero(self, tmp_path: Path) -> None:
        zero = torch.zeros(2, 2, dtype=torch.float64)
        assert check(tmp_path, zero, zero.float()) == WeightCheck()
        smallest = torch.finfo(torch.bfloat16).tiny * torch.finfo(torch.bfloat16).eps
        check(tmp_path, zero, torch.full((2, 2), smallest, dtype=torch.bfloat16))
        with pytest.raises(ModelError, match="row 0"):
            check(tmp_path, zero, torch.full((2, 2), 2 * smallest, dtype=torch.bfloat16))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_is_wrong(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(ModelError, match="row 2"):
            check(tmp_path, torch.ones(3, 1, dtype=torch.float64), torch.tensor([[1.0], [1.0], [value]]))

    def test_the_largest_of_all_rows_is_kept(self, tmp_path: Path) -> None:
        exact = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
        found = check(tmp_path, exact, torch.tensor([[2.0 + 2**-20], [0.5 + 2**-21]]))
        assert (found.largest_difference, found.largest_relative) == (2**-20, pytest.approx(2**-20))
        figures = {"num_changed": 0, "num_copied": 0, "largest_difference": 2**-20, "largest_relative": 2**-20}
        assert asdict(found) == pytest.approx(figures)
