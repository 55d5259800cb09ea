"""Query, key or value projection of kept heads, naively: all heads, then the masks select."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import pick_kept, wide


def kept_head_proj_reference(
    x: Tensor, weight: Tensor, keep: Tensor, row_group: Tensor,
    bias: Tensor | None = None, norm_weight: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None,
    *, num_slots: int, norm_eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The projection of all heads, normed and rotated, then each row's heads next to each other.

    Args:
        x: [T, H]; float64 stays float64.
        weight: [heads * D, H].
        keep: bool [K, heads].
        row_group: int [T].
        bias: [heads * D].
        norm_weight: [D].
        cos, sin: [P, R/2].
        positions: int64 [T] in 0..P-1.
        num_slots: heads of the result.

    Returns:
        [T, num_slots, D] in the dtype of `x`, zeros after a row's heads.
    """
    projected = x @ weight.T if bias is None else x @ weight.T + bias
    heads = wide(projected).view(len(x), keep.shape[1], -1)
    if norm_weight is not None:
        mean_square = heads.square().mean(dim=-1, keepdim=True)
        heads = heads / (mean_square + norm_eps).sqrt() * norm_weight
    if cos is not None and sin is not None:
        half = cos.shape[1]
        left, right = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
        cosine, sine = cos[positions][:, None], sin[positions][:, None]
        heads[..., :half] = left * cosine - right * sine
        heads[..., half : 2 * half] = right * cosine + left * sine
    return pick_kept(heads.to(x.dtype), keep, row_group, num_slots)
