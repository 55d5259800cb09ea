"""A cheap copy of a decoder that runs on random numbers, to see what depends on what.

Matrices are replaced by matrices of rank one, so that a 70B model takes milliseconds a layer and no
memory; everything else (norms, rotary embeddings, masks, the code of every module) is the model's
own. What a number depends on is the same as in the model, for almost every choice of the random
numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

# Larger parameters than this outside of projections are not filled with numbers of their own.
MAX_ELEMENTS = 4_000_000


class Mark(torch.autograd.Function):
    """Identity whose node in the autograd graph carries a module's path."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, path: str) -> Tensor:
        ctx.path = path
        return tensor.clone()  # not a view: some modules write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class Switches:
    """How the matrices of a stand-in behave; all of them read the same object.

    Attributes:
        alone: nothing behind a matrix depends on what is before it.
        ended: paths of matrices whose outputs nothing is traced through.
        silent: paths of matrices whose inputs are taken as zero.
    """

    generator: torch.Generator
    alone: bool = False
    ended: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()


class StandInMatrix(nn.Linear):
    """A linear map of rank one with noise, in the place of a projection or of all experts."""

    def __init__(
        self,
        path: str,
        columns: int,
        rows: int,
        switches: Switches,
        *,
        has_bias: bool,
        transposed: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.path, self.switches, self.transposed = path, switches, transposed
        self.in_features, self.out_features = self.nx, self.nf = columns, rows
        self.has_bias = has_bias
        self.read = torch.randn(columns, generator=switches.generator) / columns**0.5
        self.write, self.other = torch.randn(2, rows, generator=switches.generator)
        self.bias = None  # type: ignore[assignment]
        self.calls: list[tuple[Tensor, Tensor]] = []

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """For code that asks for its dtype or device, multiplies by it, or scales it (RWKV)."""
        found: Tensor = self.read.expand(self.out_features, self.in_features)
        return found.clone() if found.numel() <= MAX_ELEMENTS else found

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """[..., columns] -> [..., rows]."""
        switches, states = self.switches, input
        if switches.alone:
            states = states.detach()
        read = (states.float() @ self.read)[..., None]
        factor, noise = torch.randn((2, *read.shape), generator=switches.generator)
        made: Tensor = 0.5 * (factor * read * self.write + noise * self.other)
        if self.path in switches.silent:
            made = self.write.expand_as(made).clone() if self.has_bias else torch.zeros_like(made)
        if self.path in switches.ended:
            made = made.detach()
        elif switches.alone:
            made = made.detach().requires_grad_()
        if made.requires_grad:
            made = Mark.apply(made, self.path)  # type: ignore[no-untyped-call]
        self.calls.append((input, made))
        return made


@dataclass
class StandIn:
    """A copy of a decoder.

    Attributes:
        decoder: the copy.
        matrices: by their paths inside the decoder.
    """

    decoder: nn.Module
    switches: Switches
    matrices: dict[str, StandInMatrix] = field(default_factory=dict)


def make_stand_in(decoder: nn.Module) -> StandIn:
    """Copy a decoder, on whatever device it is, the meta device included; nothing is changed."""
    switches = Switches(torch.Generator().manual_seed(0))
    found = StandIn(decoder, switches)
    found.decoder = _Copier(found).copy(decoder, "")
    return found


class _Copier:
    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._generator = stand_in.switches.generator
        self._configs: dict[int, Any] = {}
        self._tensors: dict[int, Tensor] = {}

    def copy(self, module: nn.Module, path: str) -> nn.Module:
        matrix = self._matrix(module, path)
        return matrix if matrix is not None else self._like(module, path)

    def _matrix(self, module: nn.Module, path: str) -> StandInMatrix | None:
        if isinstance(module, nn.Linear) and _maps_rows(module):
            columns, rows = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            columns, rows = module.weight.shape
        elif (sizes := _expert_sizes(module, path)) is not None:
            columns, rows = sizes
        else:
            return None
        has_bias = getattr(module, "bias", None) is not None
        matrix = StandInMatrix(
            path,
            columns,
            rows,
            self._stand_in.switches,
            has_bias=has_bias,
            transposed=isinstance(module, Conv1D),
        )
        self._stand_in.matrices[path] = matrix
        return matrix

    def _like(self, module: nn.Module, path: str) -> nn.Module:
        twin = object.__new__(type(module))
        values = {name: self._value(value) for name, value in vars(module).items()}
        values.pop("forward", None)  # accelerate and others put their own there
        values["_compiled_call_impl"] = None
        twin.__dict__.update(values)
        for name in [name for name in values if name.endswith("_hooks")]:
            twin.__dict__[name] = type(values[name])()
        twin.__dict__["_forward_pre_hooks"].update(_own_hooks(module))
        twin.__dict__["_forward_pre_hooks_with_kwargs"].update(
            module._forward_pre_hooks_with_kwargs
        )
        twin.__dict__["training"] = False
        twin.__dict__["_parameters"] = {
            name: None if tensor is None else self._parameter(tensor, name)
            for name, tensor in module._parameters.items()
        }
        twin.__dict__["_buffers"] = {
            name: None if tensor is None else self._buffer(tensor)
            for name, tensor in module._buffers.items()
        }
        twin.__dict__["_modules"] = {
            name: None if child is None else self.copy(child, f"{path}.{name}" if path else name)
            for name, child in module._modules.items()
        }
        return twin

    def _value(self, value: Any) -> Any:
        if hasattr(value, "_attn_implementation") and not isinstance(value, nn.Module):
            if id(value) not in self._configs:
                twin = copy.copy(value)
                end = "_internal" if isinstance(value, PreTrainedConfig) else ""
                for name in ("_attn_implementation", "_experts_implementation"):
                    twin.__dict__[name + end] = "eager"
                self._configs[id(value)] = twin
            return self._configs[id(value)]
        return self._buffer(value) if isinstance(value, Tensor) else value

    def _parameter(self, tensor: Tensor, name: str) -> nn.Parameter:
        centre = 1.0 if tensor.dim() == 1 and name == "weight" else 0.0
        shape = tuple(tensor.shape)
        if tensor.numel() > MAX_ELEMENTS:
            line = torch.randn(shape[-1], generator=self._generator)
            return nn.Parameter((centre + 0.3 * line).expand(shape))
        return nn.Parameter(centre + 0.3 * torch.randn(shape, generator=self._generator))

    def _buffer(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = self._same_values(tensor)
        return self._tensors[id(tensor)]

    def _same_values(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            values = tensor.detach().to("cpu")
            return values.float() if values.is_floating_point() else values
        if tensor.is_floating_point():
            return 0.1 + torch.rand(tuple(tensor.shape), generator=self._generator)
        if tensor.dtype == torch.bool:
            ones = torch.ones(tuple(tensor.shape), dtype=torch.bool)
            return ones.tril() if tensor.dim() > 1 else ones
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype)


def _maps_rows(linear: nn.Linear) -> bool:
    """Whether a linear layer's result is one tensor as wide as its weight says: no router."""
    if type(linear).forward is nn.Linear.forward or not _is_of_family(linear):
        return True
    states = torch.empty(1, 2, linear.in_features, device="meta")
    weights = {
        name: torch.empty(tuple(tensor.shape), device="meta")
        for name, tensor in linear.named_parameters()
    }
    try:
        made = torch.func.functional_call(linear, weights, (states,))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return isinstance(made, Tensor) and made.shape == (1, 2, linear.out_features)


def _is_of_family(module: nn.Module) -> bool:
    """Whether a class belongs to one model family, not to a library of quantised layers."""
    return type(module).__module__.startswith(("transformers.models", "transformers_modules"))


def _expert_sizes(module: nn.Module, path: str) -> tuple[int, int] | None:
    """(columns, rows) of a module that holds the weights of many experts in one tensor."""
    is_list = isinstance(module, nn.ModuleList) or any(map(_stacks_experts, module.children()))
    if not _stacks_experts(module) and (is_list or not path.endswith(".experts")):
        return None
    config = getattr(module, "config", None)
    columns = getattr(module, "input_size", None) or getattr(module, "hidden_size", None)
    columns = columns or getattr(module, "hidden_dim", None) or getattr(config, "hidden_size", None)
    if columns is None:
        return None
    return int(columns), int(getattr(module, "output_size", None) or columns)


def _stacks_experts(module: nn.Module) -> bool:
    has_stack = any(parameter.dim() >= 3 for parameter in module.parameters(recurse=False))
    return has_stack and hasattr(module, "num_experts")


def _own_hooks(module: nn.Module) -> Iterable[tuple[int, Any]]:
    """Hooks that belong to what a pruned attention computes."""
    for number, hook in module._forward_pre_hooks.items():
        if (
            getattr(hook, "__module__", "")
            .rpartition(".")[2]
            .startswith(("heterogeneous_modeling", "modeling_bonsai"))
        ):
            yield number, hook
