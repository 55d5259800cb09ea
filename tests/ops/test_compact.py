"""compact_rows and compact_columns: kept rows or columns side by side, zeros behind them."""

from __future__ import annotations

import math

import pytest
import torch
from op_paths import kernel_of

from bonsai_fast import ops
from bonsai_fast.testing.cases import KERNEL_DTYPES, random_tensor
from bonsai_fast.testing.reference import compact_columns_reference, compact_rows_reference

pytest.importorskip("triton")


pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

# function, reference, dim that shrinks
FUNCTIONS = [
    pytest.param(kernel_of(ops.compact_rows), compact_rows_reference, 0, id="rows-kernel"),
    pytest.param(ops.compact_rows, compact_rows_reference, 0, id="rows-op"),
    pytest.param(kernel_of(ops.compact_columns), compact_columns_reference, 1, id="columns-kernel"),
    pytest.param(ops.compact_columns, compact_columns_reference, 1, id="columns-op"),
]
SHAPES = [
    pytest.param((128, 256), 64, id="aligned"),
    pytest.param((37, 301), 64, id="ragged"),
    pytest.param((300, 5), 1, id="unpadded"),
    pytest.param((1, 1), 16, id="one"),
]


def workspace(source, dim, num_places):
    shape = list(source.shape)
    shape[dim] = num_places
    return torch.full(shape, math.nan, dtype=source.dtype, device=source.device)


def kept_of(size, *, device):
    """About 70 % of the positions, in order."""
    keep = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.7
    return keep.nonzero()[:, 0].to(device, torch.int32)


@pytest.mark.parametrize("function, reference, dim", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape, multiple", SHAPES)
def test_equals_the_reference(shape, multiple, dtype, function, reference, dim, device):
    source = random_tensor(*shape, dtype=dtype, device=device)
    index = kept_of(shape[dim], device=device)
    num_places = -(-len(index) // multiple) * multiple
    out = workspace(source, dim, num_places)
    function(source, index, out)
    assert torch.equal(out, reference(source, index, num_places))


@pytest.mark.parametrize("function, reference, dim", FUNCTIONS)
def test_none_all_and_any_order(function, reference, dim, device):
    source = random_tensor(20, 30, device=device)
    size = source.shape[dim]
    for index in (torch.arange(0), torch.arange(size), torch.tensor([7, 3, 3, 19])):
        index = index.to(device, torch.int32)
        out = workspace(source, dim, 40)
        function(source, index, out)
        assert torch.equal(out, reference(source, index, 40))


@pytest.mark.parametrize("function, reference, dim", FUNCTIONS)
def test_strided_views_and_nothing_beside_them(function, reference, dim, device):
    """The workspace may be part of a larger buffer, whose other elements stay."""
    values = random_tensor(20, 30, device=device)
    source = torch.full((40, 50), math.nan, device=device)[::2, 5:35].copy_(values)
    index = kept_of(source.shape[dim], device=device)
    buffer = torch.full((70, 70), 7.0, device=device)
    out = buffer[3:43, 4:34] if dim == 0 else buffer[3:23, 4:44]
    function(source, index, out)
    assert torch.equal(out, reference(values, index, out.shape[dim]))
    out.fill_(7.0)
    assert buffer.eq(7.0).all()


@pytest.mark.parametrize("function, reference, dim", FUNCTIONS)
def test_no_places(function, reference, dim, device):
    source = random_tensor(4, 5, device=device)
    function(source, kept_of(0, device=device), workspace(source, dim, 0))
    out = workspace(source, dim, 3)
    function(source, kept_of(0, device=device), out)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("op, dim", [(ops.compact_rows, 0), (ops.compact_columns, 1)])
def test_opcheck(op, dim, device):
    source = random_tensor(20, 30, device=device)
    index = kept_of(source.shape[dim], device=device)
    torch.library.opcheck(op, (source, index, torch.zeros_like(workspace(source, dim, 32))))


@pytest.mark.parametrize("function, reference, dim", FUNCTIONS)
def test_says_what_is_wrong(function, reference, dim):
    source, index = torch.ones(4, 4), torch.tensor([0, 2, 3], dtype=torch.int32)
    for arguments, message in [
        ((source[0], index, source), r"source must be \[R, C\], got \[4\]"),
        ((source.double(), index, source), "source must be float16"),
        ((source, index.long(), source), "index must be int32"),
        ((source, index, source.half()), "out must be float32, got torch.float16"),
        ((source, index, torch.ones(5, 5)), "out must be .* got .5, 5."),
        ((source, index, torch.ones(2, 4) if dim == 0 else torch.ones(4, 2)), "at least 3 places"),
        ((source.T, index, source), "source must be contiguous"),
        ((source, index, source.T), "out must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*arguments)
