"""Hazards of every op that projects kept units: what its tests share, as classes to inherit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_paths import kernel_of
from torch import Tensor
from torch.library import opcheck

from bonsai_fast.testing.cases import Wave


def strided(tensor: Tensor) -> Tensor:
    """The same numbers as every other row of a wider buffer, NaN around them."""
    num_rows, size, *rest = tensor.shape
    buffer = tensor.new_full((2 * num_rows, size + 7, *rest), math.nan)
    return buffer[::2, 3 : 3 + size].copy_(tensor)


class ProjectionTests:
    """Attributes that a subclass sets:

    op: the op.
    make: (sizes, *shape, device) -> wave, first tensor [T, ...], weight, further arguments.
    multiple: the multiple of its `KeptLists`.
    SMALL, WIDE: shapes for `make`; WIDE for the comparison bit by bit.
    OPTIONS: keyword arguments of the op.
    """

    op: Any
    make: Callable[..., tuple[Any, ...]]
    multiple = 1
    SMALL: tuple[int, ...]
    WIDE: tuple[int, ...]
    OPTIONS: dict[str, Any]

    @pytest.fixture(params=["kernel", "op"])
    def function(self, request: pytest.FixtureRequest) -> Callable[..., Tensor]:
        return kernel_of(self.op) if request.param == "kernel" else self.op

    def run(self, function, wave, first, weight, *rest, **options):
        return function(first, weight, *wave.tables, *rest, **(options or self.OPTIONS))

    def part(self, rows: slice, width: int, first, weight, *rest):
        """The arguments of some rows, for a sub-model that keeps `width` units."""
        raise NotImplementedError

    def test_a_row_does_not_depend_on_the_wave(self, device):
        """Bit for bit: which sub-models share the wave must not matter."""
        sizes, kernel = [3, 2, 4, 1], kernel_of(self.op)
        wave, *arguments = self.make(sizes, *self.WIDE, device=device)
        together = self.run(kernel, wave, *arguments)
        for group, whole in enumerate(together.split(sizes)):
            begin = sum(sizes[:group])
            keep = wave.keep[group : group + 1].cpu()
            alone = Wave.of(keep, [len(whole)], multiple=self.multiple, device=device)
            rows = slice(begin, begin + len(whole))
            out = self.run(kernel, alone, *self.part(rows, alone.kept.width, *arguments))
            assert torch.equal(whole[:, : out.shape[1]], out)


class InputProjectionTests(ProjectionTests):
    """Of ops that read whole hidden states and write kept units: x [T, H] -> [T, slots, ...]."""

    def part(self, rows, width, first, weight, *rest):
        return first[rows], weight, *rest

    def options(self, num_rows: int, device: torch.device) -> dict[str, Any]:
        """Options that exercise everything the op does."""
        return self.OPTIONS

    def weight_rows(self, units: Tensor) -> Tensor:
        """bool [N] of units -> bool [rows of the weight]."""
        raise NotImplementedError

    def test_nan_stays_in_its_rows(self, function, device):
        """Rows of one tile share loads, and the last row stands in for those past the end."""
        wave, x, *rest = self.make([3, 2, 2, 2], *self.SMALL, device=device)
        x[2], x[5] = math.nan, math.inf
        out = self.run(function, wave, x, *rest, **self.options(9, device))
        finite = out.isfinite().flatten(1).all(dim=1)
        assert finite.tolist() == [row not in (2, 5) for row in range(9)]

    def test_removed_units_may_hold_anything(self, function, device):
        wave, x, weight, *rest = self.make([3, 2], *self.SMALL, device=device)
        removed = ~wave.keep.any(dim=0)
        assert removed.any() and wave.keep.any()
        weight[self.weight_rows(removed)] = math.nan
        out = self.run(function, wave, x, weight, *rest, **self.options(5, device))
        assert out.isfinite().all() and out[:3].ne(0).any() and out[3:].eq(0).all()

    def test_takes_strided_rows(self, function, device):
        wave, x, weight, *rest = self.make([3, 2, 4], *self.SMALL, device=device)
        expected = self.run(function, wave, x, weight, *rest)
        actual = self.run(function, wave, strided(x), strided(weight), *rest)
        # The CPU's matrix product depends on strides in its last bits.
        torch.testing.assert_close(actual, expected)

    def test_nothing_to_do(self, function, device):
        """No rows, then no units."""
        wave, x, *rest = self.make([0, 0], *self.SMALL, device=device)
        out = self.run(function, wave, x, *rest)
        assert out.shape[:2] == (0, wave.kept.width) and out.shape[1] > 0
        nothing = torch.zeros(1, wave.keep.shape[1], dtype=torch.bool)
        wave = Wave.of(nothing, [3], multiple=self.multiple, device=device)
        out = self.run(function, wave, torch.ones(3, x.shape[1], device=device), *rest)
        assert out.shape[:2] == (3, 0)


class OutputProjectionTests(ProjectionTests):
    """Of ops that read kept units and write to the residual stream: a [T, slots, ...] -> [T, N].

    Attributes that a subclass sets:
        reference: of the op.
    """

    OPTIONS: dict[str, Any] = {}  # noqa: RUF012
    reference: Callable[..., Tensor]

    def part(self, rows, width, first, weight, bias, residual):
        return first[rows, :width], weight, bias, residual[rows]

    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("has_residual", [False, True])
    def test_bias_and_residual_are_optional(self, has_bias, has_residual, function, device):
        wave, a, weight, bias, residual = self.make([3, 2, 4, 1], *self.SMALL, device=device)
        optional = bias if has_bias else None, residual if has_residual else None
        expected = self.reference(a, weight, wave.keep, wave.rows.row_group, *optional)
        torch.testing.assert_close(self.run(function, wave, a, weight, *optional), expected)

    def test_a_submodel_that_keeps_nothing_passes_the_residual_on(self, function, device):
        wave, a, weight, _, residual = self.make([3, 5], *self.SMALL, device=device)
        assert wave.kept.count[1] == 0
        out = self.run(function, wave, a, weight, None, residual)
        assert torch.equal(out[3:], residual[3:]) and not torch.equal(out[:3], residual[:3])
        keep = torch.zeros_like(wave.keep, device="cpu")
        nothing = Wave.of(keep, [3, 5], multiple=self.multiple, device=device)
        out = self.run(function, nothing, a[:, :0], weight, None, residual)
        assert torch.equal(out, residual)

    def test_nan_stays_in_its_rows(self, function, device):
        wave, a, *rest, residual = self.make([3, 2, 2, 2], *self.SMALL, device=device)
        a[2, 0].fill_(math.nan)
        residual[6] = math.inf
        out = self.run(function, wave, a, *rest, residual)
        finite = out.isfinite().all(dim=1)
        assert finite.tolist() == [row not in (2, 6) for row in range(9)]

    def test_takes_strided_rows(self, function, device):
        wave, a, weight, _, residual = self.make([3, 2, 4], *self.SMALL, device=device)
        expected = self.run(function, wave, a, weight, None, residual)
        views = strided(a), strided(weight), None, strided(residual)
        actual = self.run(function, wave, *views)
        # The CPU's matrix product depends on strides in its last bits.
        torch.testing.assert_close(actual, expected)

    def test_opcheck(self, device):
        wave, a, weight, *optional = self.make([3, 2, 1, 4], *self.SMALL, device=device)
        a = a.nan_to_num()
        opcheck(self.op, (a, weight, *wave.tables, *optional))
        opcheck(self.op, (a, weight, *wave.tables))
