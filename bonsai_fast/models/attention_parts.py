"""Heads of an attention sub-layer: their widths, the KV head of each, and the weights of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bonsai_fast.models.blocks import Cut
from bonsai_fast.models.find_sublayers import (
    LATER_TOKENS,
    LayerTracer,
    SubLayerFound,
    Traced,
    rows_of_token,
)
from bonsai_fast.models.layer_runs import TOKENS
from bonsai_fast.models.parts import (
    SHARED,
    UNREAD,
    MixedPartsError,
    Names,
    matrix_cuts,
    parameter_cut,
)
from bonsai_fast.models.readers import ROUNDING, depends, influence

WIDTHS = ("v_head_dim", "head_dim", "head_size", "attention_head_size")
# Softmax ignores what is added to all keys alike: a bias of keys has gradients of rounding errors
# or, where rotary frequencies are low, of any small size.
PARAMETER_ROUNDING = 1e-4
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True, eq=False)
class HeadsFound:
    """The heads of one attention."""

    head_dim: int
    kv_of_head: tuple[int, ...]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, eq=False)
class _Readers:
    """Which heads read the elements of a tensor: directly, and also through other matrices.

    `direct` and `all` are bool [H, *shape].
    """

    direct: Tensor
    all: Tensor


def find_heads(tracer: LayerTracer, sublayer: SubLayerFound, names: Names) -> HeadsFound:
    """Find what belongs to each head.

    Raises:
        MixedPartsError: heads cannot be removed one by one; the message says why.
    """
    columns = tracer.matrices[sublayer.output].in_features
    heads = _num_heads(tracer.run.layer, tracer.run.path, sublayer, columns)
    alone, full = tracer.trace(alone=True), tracer.trace()
    projections = [path for path in sublayer.matrices[:-1] if path in alone.calls]
    others = _tensors_of(tracer, sublayer)
    readers = _readers(sublayer, heads, alone, full, projections, others)
    crossing = _read_by_later_tokens(alone, sublayer.output, projections)
    for path, name in _mixing_modules(tracer, sublayer, heads, alone):
        raise MixedPartsError(f"{name} ({path}) normalises all heads together")
    kv_of_head = _groups(heads, [readers[p].direct[:, crossing[p]] for p in projections])
    cuts: list[Cut] = []
    for path in projections:
        owner = _owners(readers[path], kv_of_head, crossing[path], path)
        _check_order(owner, kv_of_head, path)
        cuts += matrix_cuts(names, path, owner, transposed=tracer.matrices[path].transposed)
    for name in others:
        owner = _owners(readers[name], kv_of_head, None, name)
        cut = parameter_cut(names, name, owner, heads)
        cuts += [cut] if cut is not None else []
    output = torch.arange(heads).repeat_interleave(columns // heads)
    dim = 0 if tracer.matrices[sublayer.output].transposed else 1
    cuts.append(Cut(names.full(f"{sublayer.output}.weight"), dim, output))
    return HeadsFound(columns // heads, kv_of_head, tuple(cuts))


def _num_heads(layer: nn.Module, layer_path: str, sublayer: SubLayerFound, columns: int) -> int:
    """Number of heads, from what the attention module or one above it says of itself."""
    path = sublayer.module[len(layer_path) + 1 :]
    module = layer.get_submodule(path)
    for place in (module, getattr(module, "config", None)):
        for name in WIDTHS:
            width = getattr(place, name, None)
            if isinstance(width, int) and width > 0 and columns % width == 0:
                return columns // width
        for name in COUNTS:
            count = getattr(place, name, None)
            if isinstance(count, int) and count > 0 and columns % count == 0:
                return count
    raise MixedPartsError("its number of heads is unknown")


def _tensors_of(tracer: LayerTracer, sublayer: SubLayerFound) -> dict[str, Tensor]:
    """Parameters and buffers of the sub-layer's module that are not a matrix's."""
    return {
        name: tensor
        for name, tensor in tracer.tensors.items()
        if name.startswith(f"{sublayer.module}.")
    }


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _any_token(read: Tensor) -> Tensor:
    """bool [H, ..., N] -> bool [H, N]."""
    return read.reshape(len(read), -1, read.shape[-1]).any(dim=1)


def _head_columns(heads: int, columns: int) -> Iterator[Tensor]:
    head_of = torch.arange(heads).repeat_interleave(columns // heads)
    for head in range(heads):
        yield head_of == head


def _by_head(heads: int, outputs: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """For each source [H, *shape]: how much each head depends on it."""
    found = [
        influence(outputs, columns, sources) for columns in _head_columns(heads, outputs.shape[-1])
    ]
    return [torch.stack(of_source) for of_source in zip(*found, strict=True)]


def _readers(
    sublayer: SubLayerFound,
    heads: int,
    alone: Traced,
    full: Traced,
    projections: list[str],
    others: dict[str, Tensor],
) -> dict[str, _Readers]:
    sides = []
    for traced in (alone, full):
        outputs = _flat(traced.calls[sublayer.output][0])
        sources = [traced.calls[path][1] for path in projections] + list(others.values())
        found = _by_head(heads, outputs, sources)
        rows, rest = found[: len(projections)], found[len(projections) :]
        sides.append(
            [_any_token(read > ROUNDING) for read in rows]
            + [read > PARAMETER_ROUNDING for read in rest]
        )
    return {
        name: _Readers(direct, every)
        for name, direct, every in zip([*projections, *others], *sides, strict=True)
    }


def _read_by_later_tokens(traced: Traced, output: str, projections: list[str]) -> dict[str, Tensor]:
    """For each projection bool [rows]: whether later positions read it, as they do K and V."""
    given = traced.calls[output][0]
    every = torch.ones(given.shape[-1], dtype=torch.bool)
    sources = [traced.calls[path][1] for path in projections]
    result = {
        path: torch.zeros(source.shape[-1], dtype=torch.bool)
        for path, source in zip(projections, sources, strict=True)
    }
    for token in LATER_TOKENS:
        found = depends(rows_of_token(given, token), every, sources)
        for path, read in zip(projections, found, strict=True):
            before = _flat(read)[: token * (_flat(read).shape[0] // TOKENS)]
            result[path] |= before.any(dim=0)
    return result


def _mixing_modules(
    tracer: LayerTracer, sublayer: SubLayerFound, heads: int, traced: Traced
) -> Iterator[tuple[str, str]]:
    """Modules that read all heads for each index of their result, which single heads then read."""
    outputs = _flat(traced.calls[sublayer.output][0])
    inside = f"{sublayer.module}."
    passed = {
        path: pair
        for path, pair in traced.passed.items()
        if path.startswith(inside)
        and pair[0].shape == pair[1].shape
        and pair[0].requires_grad
        and pair[1].requires_grad
    }
    if heads == 1 or not passed:
        return
    pairs = [tensor for pair in passed.values() for tensor in pair]
    found = [_any_token(read > ROUNDING) for read in _by_head(heads, outputs, pairs)]
    for place, path in enumerate(passed):
        given, result = found[2 * place], found[2 * place + 1]
        if bool((given.all(dim=0) & ~result.all(dim=0)).any()):
            name = type(tracer.run.layer.get_submodule(path[len(tracer.run.path) + 1 :])).__name__
            yield path.rpartition(".")[2], name


def _groups(heads: int, key_readers: list[Tensor]) -> tuple[int, ...]:
    """The KV head of each query head, from the heads that read each row of K and V.

    Args:
        key_readers: bool [H, rows] of each projection.
    """
    sets = {tuple(column) for read in key_readers for column in read.T.tolist() if any(column)}
    smaller = sorted((s for s in sets if not all(s)), reverse=True)
    if not smaller:
        return (0,) * heads
    owner = [-1] * heads
    for group, members in enumerate(smaller):
        for head, reads in enumerate(members):
            if reads and owner[head] >= 0:
                raise MixedPartsError("heads share keys and values in groups that overlap")
            if reads:
                owner[head] = group
    if -1 in owner or owner != sorted(owner):
        raise MixedPartsError("the heads that share keys and values are not neighbours")
    return tuple(owner)


def _owners(
    readers: _Readers, kv_of_head: tuple[int, ...], crossing: Tensor | None, name: str
) -> Tensor:
    """int64 like the tensor: the part that owns each element, UNREAD or SHARED.

    Args:
        crossing: bool [rows] of a projection, whether other positions read them; None: not one.
    """
    heads, shape = len(kv_of_head), readers.direct.shape[1:]
    direct, every = readers.direct.reshape(heads, -1), readers.all.reshape(heads, -1)
    short = ".".join(name.split(".")[-2:])
    counts = direct.sum(dim=0)
    if crossing is None and heads > 1 and bool((counts == heads).any()):
        return torch.full(shape, SHARED, dtype=torch.int64)
    owned = (counts > 0) & (counts < heads)
    if bool((direct != every)[:, owned].any()):
        raise MixedPartsError(f"what {short} gives to one head also changes others")
    group_of = torch.tensor(kv_of_head)
    first = direct.long().argmax(dim=0)  # the first head that reads it
    group = group_of[first]
    is_group = (direct == (group_of[:, None] == group)).all(dim=0)
    owner = torch.full((direct.shape[1],), UNREAD, dtype=torch.int64)
    owner[counts == heads] = SHARED
    single = counts == 1
    owner[single] = first[single]
    keys = is_group & (counts > 0)
    if crossing is not None:
        keys = keys & crossing
        alone = (counts > 1) & (counts < heads) & ~crossing
        if bool(alone.any()):
            raise MixedPartsError(f"{short} serves several heads together")
        if heads > 1 and bool(((counts == heads) & ~crossing).any()):
            raise MixedPartsError(f"{short} mixes all heads")
    else:
        keys = keys & (counts > 1)
    if bool((owned & ~single & ~keys).any()):
        raise MixedPartsError(f"{short} serves several heads together")
    owner[keys] = heads + group[keys]
    return owner.view(shape)


def _check_order(owner: Tensor, kv_of_head: tuple[int, ...], path: str) -> None:
    """Refuse fused rows that are in an order of their own when some heads are removed.

    Allowed are all heads one after another, as often as there are kinds of rows; and the rows of
    one KV group after another.
    """
    if bool((owner < 0).any()):
        return
    order = torch.unique_consecutive(owner).tolist()
    heads = len(kv_of_head)
    group_of = [*kv_of_head, *range(max(kv_of_head) + 1)]
    groups = [group_of[part] for part in order]
    complete = [list(range(heads)), list(range(heads, len(group_of)))]
    stacked, place = True, 0
    while place < len(order) and stacked:
        segment = complete[0] if order[place] < heads else complete[1]
        stacked = order[place : place + len(segment)] == segment
        place += len(segment)
    if not stacked and groups != sorted(groups):
        raise MixedPartsError(f"{_last(path)} stores its heads in an order that fewer cannot keep")


def _last(path: str) -> str:
    return path.rpartition(".")[2]
