"""What each op accepts, checked alike by its launcher and its CPU path. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of one tile, which every kernel over grouped rows shares: plans are made without Triton.
BLOCK_ROWS = 128
# What kernels may read past a list of kept units: a tile's worth, which they fetch ahead.
INDEX_PADDING = 128

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def check_token_nll(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless logits [N, V] and labels [N] are what `token_nll` takes."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got {list(logits.shape)}")
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be float16, bfloat16 or float32, got {logits.dtype}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous along V, got strides {logits.stride()}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must be [{logits.shape[0]}], one a row of logits, got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the device of logits, {logits.device}, got {labels.device}"
        )


def check_glu_mask(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, activation: str, gated: bool
) -> None:
    """Raise ValueError unless the arguments are what `glu_mask` takes."""
    _check_activation(activation)
    _check_floats("gate_up", gate_up, "T", "2I" if gated else "I")
    num_channels = gate_up.shape[1] // 2 if gated else gate_up.shape[1]
    if gated and gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I], gate then up, got {list(gate_up.shape)}")
    _check("keep", keep, torch.bool, gate_up, None, num_channels)
    _check("row_group", row_group, torch.int32, gate_up, len(gate_up))


def check_kept_up_proj(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
) -> None:
    """Raise ValueError unless the arguments are what `kept_up_proj` takes."""
    _check_activation(activation)
    _check_floats("x", x, "T", "H")
    _check_weight("weight", weight, x, None, x.shape[1])
    if gated and len(weight) % 2:
        raise ValueError(f"weight must be [2I, H], gate then up, got {list(weight.shape)}")
    _check_plan(x, index, count, tiles, multiple=INDEX_PADDING)
    if bias is not None:
        _check("bias", bias, x.dtype, x, len(weight))


def check_kept_down_proj(
    a: Tensor,
    weight_t: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are what `kept_down_proj` takes."""
    _check_floats("a", a, "T", "width")
    _check_weight("weight_t", weight_t, a, None, None)
    _check_plan(a, index, count, tiles, multiple=INDEX_PADDING)
    if index.shape[1] - INDEX_PADDING != a.shape[1]:
        raise ValueError(
            f"a must have the index's {index.shape[1] - INDEX_PADDING} slots, got {a.shape[1]}"
        )
    _check_outputs(a, weight_t.shape[1], bias, residual)


def check_lm_head_nll(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """Raise ValueError unless the arguments are what `lm_head_nll` takes."""
    _check_floats("x", x, "T", "H")
    _check("weight", weight, x.dtype, x, None, x.shape[1])
    if len(weight) == 0:
        raise ValueError(f"weight must be [V, H] with V >= 1, got {list(weight.shape)}")
    _check("labels", labels, torch.int64, x, len(x))
    if bias is not None:
        _check("bias", bias, x.dtype, x, len(weight))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def check_kept_head_proj(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    head_dim: int,
) -> None:
    """Raise ValueError unless the arguments are what `kept_head_proj` takes."""
    _check_floats("x", x, "T", "H")
    _check_weight("weight", weight, x, None, x.shape[1])
    if head_dim < 2 or head_dim % 2 or len(weight) % head_dim:
        raise ValueError(
            f"head_dim must be even and divide the {len(weight)} rows of weight, got {head_dim}"
        )
    _check_plan(x, index, count, tiles, multiple=1)
    if bias is not None:
        _check("bias", bias, x.dtype, x, len(weight))
    if norm_weight is not None:
        _check("norm_weight", norm_weight, x.dtype, x, head_dim)
    if cos is None and sin is None and positions is None:
        return
    if cos is None or sin is None or positions is None:
        raise ValueError("cos, sin and positions must come together")
    _check("cos", cos, torch.float32, x, None, None)
    if not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(f"cos must be [P, R / 2] with R in 2..{head_dim}, got {list(cos.shape)}")
    _check("sin", sin, torch.float32, x, *cos.shape)
    if sin.stride(0) != cos.stride(0):
        raise ValueError(f"sin must have the strides of cos, got {sin.stride()}")
    _check("positions", positions, torch.int64, x, len(x))


def check_grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    q_to_kv: Tensor,
    tiles: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> None:
    """Raise ValueError unless the arguments are what `grouped_attention` takes."""
    _check_floats("q", q, "T", "slots", "D")
    num_rows, num_slots, head_dim = q.shape
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim must be in 1..256, got {head_dim}")
    _check("k", k, q.dtype, q, num_rows, None, head_dim)
    _check("v", v, q.dtype, q, *k.shape)
    _check("count", count, torch.int32, q, None)
    _check("q_to_kv", q_to_kv, torch.int32, q, len(count), num_slots)
    _check_tiles(tiles, q, 4)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be positive, and attention causal, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def check_kept_o_proj(
    a: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are what `kept_o_proj` takes."""
    _check_floats("a", a, "T", "slots", "D")
    head_dim = a.shape[2]
    if a.shape[1] > 1 and a.stride(1) != head_dim:
        raise ValueError(f"a must have its slots side by side, got strides {a.stride()}")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    _check_weight("weight", weight, a, None, None)
    if weight.shape[1] % head_dim:
        raise ValueError(f"weight must have whole heads of {head_dim}, got {list(weight.shape)}")
    _check_plan(a, index, count, tiles, multiple=1)
    if index.shape[1] - INDEX_PADDING != a.shape[1]:
        raise ValueError(
            f"a must have the index's {index.shape[1] - INDEX_PADDING} slots, got {a.shape[1]}"
        )
    _check_outputs(a, len(weight), bias, residual)


def check_column_moments(x: Tensor) -> None:
    """Raise ValueError unless `x` is what `column_moments` takes."""
    _check_floats("x", x, "T", "C")


def check_compact(source: Tensor, index: Tensor, out: Tensor, dim: int) -> None:
    """Raise ValueError unless the arguments are what `compact_rows` or `compact_columns` takes."""
    _check_floats("source", source, "R", "C")
    _check("index", index, torch.int32, source, None)
    shape = [None if axis == dim else size for axis, size in enumerate(source.shape)]
    _check("out", out, source.dtype, source, *shape)
    if out.shape[dim] < len(index):
        raise ValueError(f"out must have at least {len(index)} places, got {out.shape[dim]}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_floats(name: str, tensor: Tensor, *dims: str) -> None:
    """A float tensor whose last dim is contiguous: the one that sets dtype and device."""
    if tensor.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}], got {list(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    _check_last_dim(name, tensor)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, *shape: int | None) -> None:
    """A tensor of this dtype and shape (None: any size), on the device of `like`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    sizes = [
        actual if size is None else size for size, actual in zip(shape, tensor.shape, strict=False)
    ]
    if tensor.dim() != len(shape) or list(tensor.shape) != sizes:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    _check_last_dim(name, tensor)


def _check_last_dim(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous along its last dim, got strides {tensor.stride()}"
        )


def _check_weight(name: str, weight: Tensor, x: Tensor, *shape: int | None) -> None:
    """Kernels address weights by 32-bit offsets."""
    _check(name, weight, x.dtype, x, *shape)
    if weight.shape[0] * weight.stride(0) >= 1 << 31:
        raise ValueError(f"{name} must span fewer than 2^31 elements, got {list(weight.shape)}")


def _check_plan(x: Tensor, index: Tensor, count: Tensor, tiles: Tensor, *, multiple: int) -> None:
    """Tables as `KeptLists` and `RowPlan` make them; what they hold is trusted."""
    _check("index", index, torch.int32, x, None, None)
    width = index.shape[1] - INDEX_PADDING
    if width < 0 or width % multiple:
        raise ValueError(
            f"index must be [K, width + {INDEX_PADDING}], width a multiple of {multiple}, "
            f"got {list(index.shape)}"
        )
    _check("count", count, torch.int32, x, len(index))
    _check_tiles(tiles, x, 3)


def _check_tiles(tiles: Tensor, x: Tensor, num_columns: int) -> None:
    _check("tiles", tiles, torch.int32, x, None, num_columns)
    if not tiles.is_contiguous():
        raise ValueError(f"tiles must be contiguous, got strides {tiles.stride()}")


def _check_outputs(
    x: Tensor, num_outputs: int, bias: Tensor | None, residual: Tensor | None
) -> None:
    if bias is not None:
        _check("bias", bias, x.dtype, x, num_outputs)
    if residual is not None:
        _check("residual", residual, x.dtype, x, len(x), num_outputs)
