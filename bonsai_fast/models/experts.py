"""Mixtures of experts, found by their weights: one 3-D tensor for all experts of a layer."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from bonsai_fast.models.blocks import Cut, ExpertsBlock
from bonsai_fast.models.router_mask import UnfitRouterError, chosen_by, expert_dim, probe_router

# channels inside experts come in multiples of this: `torch.nn.functional.grouped_mm`, by which
# transformers runs experts, takes rows of 16, 32, 48, ... bytes alone
CHANNEL_MULTIPLE = 8
# input columns of a gate that are tried, to see which channel each belongs to
PROBED_COLUMNS, LEAST_CHANGE = 8, 1e-4
OUTPUT, INPUTS = "down_proj", ("gate_up_proj", "up_proj")

# what `probe_router` said of routers that are alike
Verdicts = dict[Hashable, int | str]


def find_experts(
    layer: nn.Module, path: str, index: int, norms: tuple[str, ...], verdicts: Verdicts
) -> ExpertsBlock | None:
    """The mixture of experts of a decoder layer, if it has one.

    Args:
        layer: the decoder layer.
        path: its path in the model.
        index: its number.
        norms: paths of the norms that are removed with the mixture.
        verdicts: of the layers before; extended.
    Raises:
        ValueError: there are experts, but no module that holds them and their router alone.
    """
    name = next((name for name, module in layer.named_modules() if holds_experts(module)), None)
    if name is None:
        return None
    owner, _, _ = name.rpartition(".")
    experts, mixture = layer.get_submodule(name), layer.get_submodule(owner)
    if not owner:
        raise ValueError(f"{path}.{name}: expected the experts inside a module of their own")
    down = experts.get_parameter(OUTPUT)
    transposed = bool(getattr(experts, "is_transposed", False))
    num_channels = down.shape[1 if transposed else 2]
    num_experts = len(down)
    prefix = f"{path}.{owner}"
    router = next(
        (
            child
            for child, module in mixture.named_children()
            if module is not experts and _is_router(module, num_experts)
        ),
        None,
    )
    inside = name[len(owner) + 1 :]
    by_expert: list[Cut] = []
    buffers: list[Cut] = []
    fewest, top_k = 1, 1
    no_experts, no_channels = None, None
    given = () if router is None else _given(mixture, mixture.get_submodule(router))
    by_channel = tuple(_channel_cuts(experts, f"{path}.{name}", num_channels))
    if not hasattr(experts, "has_gate"):
        no_channels = "its experts do not run by the interface that transformers has for experts"
    elif not _gates_as(experts, by_channel, num_channels):
        no_channels = "its experts mix channels in an unknown order"
    if router is None:
        no_experts = "no module with a row for each expert was found beside the experts"
    elif no_channels is not None and not hasattr(experts, "has_gate"):
        no_experts = no_channels
    elif stray := _stray(mixture, router, inside, num_experts, given):
        no_experts = (
            f"{stray} has an index for each expert and belongs neither to them nor the router"
        )
    else:
        found = _probe(mixture.get_submodule(router), num_experts, given, verdicts)
        if isinstance(found, str):
            no_experts = found
        else:
            fewest = found
            for child in (router, inside):
                module, where = mixture.get_submodule(child), f"{prefix}.{child}"
                by_expert += _expert_cuts(module.named_parameters(), where, num_experts)
                buffers += _expert_cuts(module.named_buffers(), where, num_experts)
            for own, cuts in (
                (mixture.named_parameters(recurse=False), by_expert),
                (mixture.named_buffers(recurse=False), buffers),
            ):
                taken = ((name, tensor) for name, tensor in own if name in given)
                cuts += _expert_cuts(taken, prefix, num_experts)
    if router is not None:
        top_k = chosen_by(mixture.get_submodule(router)) or 1
    return ExpertsBlock(
        layer=index,
        module=prefix,
        router=f"{prefix}.{router}",
        experts=f"{path}.{name}",
        num_experts=num_experts,
        num_channels=num_channels,
        transposed=transposed,
        top_k=top_k,
        fewest_experts=fewest,
        by_expert=tuple(by_expert),
        by_channel=by_channel,
        buffers=tuple(buffers),
        norms=norms,
        experts_refused=no_experts,
        channels_refused=no_channels,
    )


def holds_experts(module: nn.Module) -> bool:
    """Whether a module itself holds the 3-D weights of experts."""
    names = (OUTPUT, next((name for name in INPUTS if hasattr(module, name)), ""))
    tensors = [getattr(module, name, None) for name in names]
    return all(isinstance(tensor, nn.Parameter) and tensor.dim() == 3 for tensor in tensors)


def _is_router(module: nn.Module, num_experts: int) -> bool:
    return not _is_mlp(module) and any(
        parameter.dim() == 2 and len(parameter) == num_experts for parameter in module.parameters()
    )


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module has projections of its own, as shared experts do."""
    return sum(isinstance(child, nn.Linear) for child in module.children()) > 1


def _given(mixture: nn.Module, router: nn.Module) -> tuple[str, ...]:
    """Tensors of the mixture that its router takes as arguments, such as correction biases."""
    arguments = inspect.signature(router.forward).parameters
    own = (*mixture.named_parameters(recurse=False), *mixture.named_buffers(recurse=False))
    return tuple(name for name, tensor in own if name in arguments and tensor.dim() == 1)


def _stray(
    mixture: nn.Module, router: str, experts: str, num_experts: int, given: tuple[str, ...]
) -> str | None:
    """Another tensor of the mixture that counts experts: an unknown part of its routing."""
    for name, tensor in (*mixture.named_parameters(), *mixture.named_buffers()):
        child, _, rest = name.partition(".")
        if child in (router, experts, *given):
            continue
        if rest and _is_mlp(mixture.get_submodule(child)):
            continue
        if expert_dim(tensor, num_experts) is not None:
            return name
    return None


def _probe(
    router: nn.Module, num_experts: int, given: tuple[str, ...], verdicts: Verdicts
) -> int | str:
    """The fewest experts that it works with, or why it is refused."""
    plain = {
        name: value
        for name, value in vars(router).items()
        if isinstance(value, int | float | str) and name != "training"
    }
    shapes = [(name, tuple(tensor.shape)) for name, tensor in router.named_parameters()]
    key = (type(router), num_experts, tuple(sorted(plain.items())), tuple(shapes), given)
    if key not in verdicts:
        weight = next(p for p in router.parameters() if p.dim() == 2 and len(p) == num_experts)
        try:
            verdicts[key] = probe_router(router, num_experts, weight.shape[1], given)
        except UnfitRouterError as error:
            verdicts[key] = str(error)
    return verdicts[key]


def _expert_cuts(
    tensors: Iterator[tuple[str, torch.Tensor]], path: str, num_experts: int
) -> list[Cut]:
    owner = torch.arange(num_experts)
    return [
        Cut(f"{path}.{name}", dim, owner)
        for name, tensor in tensors
        if (dim := expert_dim(tensor, num_experts)) is not None
    ]


def _channel_cuts(experts: nn.Module, path: str, channels: int) -> Iterator[Cut]:
    """Cuts of the dimension that counts channels; fused gates own two indices of each."""
    owner = torch.arange(channels)
    if getattr(experts, "is_concatenated", True):
        fused = torch.cat([owner, owner])
    else:
        fused = owner.repeat_interleave(2)
    inputs = {"gate_up_proj": fused, "up_proj": owner}
    transposed = getattr(experts, "is_transposed", False)
    for name, parameter in experts.named_parameters():
        weight = name.removesuffix("_bias")
        if weight in inputs:
            last = transposed or weight != name
            yield Cut(f"{path}.{name}", parameter.dim() - 1 if last else 1, inputs[weight])
        elif name == OUTPUT:
            yield Cut(f"{path}.{name}", 1 if transposed else 2, owner)


def _gates_as(experts: Any, cuts: tuple[Cut, ...], channels: int) -> bool:
    """Whether a gate's input c changes no other channel than the owner of c."""
    owner = next(cut.owner for cut in cuts if cut.parameter.rpartition(".")[2] in INPUTS)
    generator = torch.Generator().manual_seed(0)
    width = len(owner)
    changed = torch.randperm(width, generator=generator)[:PROBED_COLUMNS]
    states = torch.rand(1, width, generator=generator).repeat(len(changed) + 1, 1) + 0.5
    states[torch.arange(len(changed)), changed] += 0.25
    found = experts._apply_gate(states) if experts.has_gate else experts.act_fn(states)
    if found.shape != (len(states), channels):
        return False
    # not what only rounds otherwise in another place
    places = ((found[:-1] - found[-1:]).abs() > LEAST_CHANGE).nonzero().tolist()
    wanted = [[row, int(owner[column])] for row, column in enumerate(changed)]
    return bool(places == wanted)
