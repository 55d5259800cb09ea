"""The MLP of many sub-models: activation under masks, projections of kept channels alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._checks import (
    INDEX_PADDING,
    check_glu_mask,
    check_kept_down_proj,
    check_kept_up_proj,
)
from bonsai_fast.ops._groups import add, group_rows

# Elements of an intermediate that one thread holds at a time: it stays in a core's cache.
BLOCK_ELEMENTS = 1 << 18


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the four activations that the kernels know."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.library.custom_op("bonsai_fast::glu_mask", mutates_args=())
def glu_mask(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    """Activation of an MLP and every row's channel mask, in one pass.

        out[t, i] = keep[row_group[t], i] ? act(gate[t, i]) * up[t, i] : 0

    A masked channel is selected away, not multiplied: NaN or Inf there gives 0.

    Args:
        gate_up: [T, 2I] float16, bfloat16 or float32, gate then up; [T, I] where `gated` is False,
            and then out is act of it. Contiguous along the last dim.
        keep: bool [K, I], True = kept.
        row_group: int32 [T] in 0..K-1 (`RowPlan.row_group`).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether the MLP has a gate.

    Returns:
        [T, I] in the dtype of `gate_up`, computed in float32.

    Raises:
        ValueError: an argument is none of these.
    """
    check_glu_mask(gate_up, keep, row_group, activation, gated)
    num_rows, num_channels = len(gate_up), keep.shape[1]
    out = gate_up.new_empty(num_rows, num_channels)
    num_block_rows = torch.get_num_threads() * max(1, BLOCK_ELEMENTS // max(1, num_channels))
    for begin in range(0, num_rows, num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        value = activate(gate_up[rows, :num_channels].float(), activation)
        if gated:
            value *= gate_up[rows, num_channels:]
        out[rows] = value.masked_fill_(~keep[row_group[rows].long()], 0.0)
    return out


@glu_mask.register_kernel("cuda")
def _glu_mask_cuda(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    from bonsai_fast.kernels.glu_mask import glu_mask_triton

    return glu_mask_triton(gate_up, keep, row_group, activation=activation, gated=gated)


@glu_mask.register_fake
def _glu_mask_fake(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    check_glu_mask(gate_up, keep, row_group, activation, gated)
    return gate_up.new_empty(gate_up.shape[0], keep.shape[1])


@torch.library.custom_op("bonsai_fast::kept_up_proj", mutates_args=())
def kept_up_proj(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    """Up projection and activation of the channels that every row's sub-model keeps.

        out[t, c] = act(x[t] . W[i] + b[i]) * (x[t] . W[I + i] + b[I + i])
        i = index[g, c] for c < count[g], g the sub-model of row t; beyond, out is exactly 0

    Args:
        x: [T, H] float16, bfloat16 or float32, rows grouped by sub-model.
        weight: [2I, H], gate rows then up rows, in the dtype of `x`; [I, H] where `gated` is False,
            and then out is act of the one projection. Fewer than 2^31 elements.
        index, count: `KeptLists` of the channels, with a multiple of 128: int32 [K, width + 128]
            and [K].
        tiles: `RowPlan.tiles`, int32 [num_tiles, 3], which cover all T rows.
        bias: [2I] or [I] in the dtype of `x`.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether the MLP has a gate.

    Returns:
        [T, width] in the dtype of `x`; kernels add up in float32.

    Raises:
        ValueError: an argument is none of these.
    """
    check_kept_up_proj(x, weight, index, count, tiles, bias, activation, gated)
    num_channels = len(weight) // (2 if gated else 1)
    out = x.new_zeros(len(x), index.shape[1] - INDEX_PADDING)
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()

        def project(rows: Tensor, x: Tensor = x[begin:end]) -> Tensor:
            return F.linear(x, weight[rows], None if bias is None else bias[rows]).float()

        value = activate(project(kept), activation)
        if gated:
            value *= project(num_channels + kept)
        out[begin:end, : len(kept)] = value
    return out


@kept_up_proj.register_kernel("cuda")
def _kept_up_proj_cuda(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    from bonsai_fast.kernels.kept_up_proj import kept_up_proj_triton

    return kept_up_proj_triton(
        x, weight, index, count, tiles, bias, activation=activation, gated=gated
    )


@kept_up_proj.register_fake
def _kept_up_proj_fake(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    check_kept_up_proj(x, weight, index, count, tiles, bias, activation, gated)
    return x.new_empty(x.shape[0], index.shape[1] - INDEX_PADDING)


@torch.library.custom_op("bonsai_fast::kept_down_proj", mutates_args=())
def kept_down_proj(
    a: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Down projection of kept channels, added to the residual stream.

        out[t, n] = residual[t, n] + bias[n] + sum_c a[t, c] * W[index[g, c], n],  c < count[g]

    Args:
        a: [T, width] from `kept_up_proj`: zero from count[g] to the next multiple of 128, unread
            beyond. float16, bfloat16 or float32.
        weight_t: [I, N], the transposed weight, contiguous along N, in the dtype of `a`; fewer than
            2^31 elements.
        index, count, tiles: as for `kept_up_proj`.
        bias: [N] in the dtype of `a`.
        residual: [T, N] in the dtype of `a`.

    Returns:
        [T, N] in the dtype of `a`; kernels add up in float32.

    Raises:
        ValueError: an argument is none of these.
    """
    check_kept_down_proj(a, weight_t, index, count, tiles, bias, residual)
    out = a.new_zeros(len(a), weight_t.shape[1])
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()
        out[begin:end] = a[begin:end, : len(kept)] @ weight_t[kept]
    return add(out, bias, residual)


@kept_down_proj.register_kernel("cuda")
def _kept_down_proj_cuda(
    a: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    from bonsai_fast.kernels.kept_down_proj import kept_down_proj_triton

    return kept_down_proj_triton(a, weight_t, index, count, tiles, bias, residual)


@kept_down_proj.register_fake
def _kept_down_proj_fake(
    a: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_kept_down_proj(a, weight_t, index, count, tiles, bias, residual)
    return a.new_empty(a.shape[0], weight_t.shape[1])
