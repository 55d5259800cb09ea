"""Routers that may not choose some of their experts, and whether that equals removing these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# where routers of transformers keep the number of experts, and how many of them a token passes
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "moe_k")
GROUPS = ("num_group", "n_group", "num_expert_group")

_PRODUCTS = frozenset({F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})
_CHOICES = frozenset({torch.topk, torch.Tensor.topk})
PROBE_TOKENS = 32


class RouterMask(TorchFunctionMode):
    """While active, a router's logits of removed experts are -inf, and it chooses others first.

    The second matters where a bias is added to the scores before the choice (DeepSeek-V3).

    Args:
        removed: bool [R, E]; the router's tokens are R rows of equally many.
    Attributes:
        applied: whether logits were found.
    """

    def __init__(self, removed: Tensor) -> None:
        super().__init__()
        self._removed = removed
        self.applied = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CHOICES and self._is_by_expert(args[0]):
            values = args[0]
            chosen = func(self._filled(values), *args[1:], **(kwargs or {})).indices
            # where too few are left, a removed expert is chosen too, with its own weight of zero
            return torch.return_types.topk((values.gather(-1, chosen), chosen))
        found = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and self._is_by_expert(found):
            self.applied = True
            return self._filled(found)
        return found

    def _is_by_expert(self, values: Tensor) -> bool:
        rows, experts = self._removed.shape
        return values.shape[-1] == experts and values.numel() % (rows * experts) == 0

    def _filled(self, values: Tensor) -> Tensor:
        rows, experts = self._removed.shape
        by_row = values.reshape(rows, -1, experts)
        removed = self._removed[:, None].to(values.device)
        return by_row.masked_fill(removed, float("-inf")).view(values.shape)


@contextmanager
def router_masked(router: nn.Module, removed: Tensor) -> Iterator[None]:
    """Inside, the router chooses among the experts that each row keeps.

    Args:
        router: the module that chooses experts.
        removed: bool [R, E] on its device, at least one expert kept in each row. The router is then
            called with the tokens of R rows, equally many of each.
    """
    own = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with RouterMask(removed) as mask:
            found = own(*args, **kwargs)
        assert mask.applied, "a router without logits was not refused"
        return found

    router.forward = forward
    try:
        yield
    finally:
        del router.forward


class UnfitRouterError(ValueError):
    """Masked experts of this router are not the same as removed ones; the message says why."""


def probe_router(router: nn.Module, num_experts: int, width: int, given: Sequence[str] = ()) -> int:
    """Check, with random weights, that a router chooses among the rest as if there were no others.

    Args:
        router: on any device; it is not changed.
        num_experts: E.
        width: D of the hidden states.
        given: names of arguments, beside hidden states, that bring a number for each expert.
    Returns:
        the smallest number of experts with which it works, 1 or 2.
    Raises:
        UnfitRouterError: masked and removed experts are not the same.
    """
    if any((getattr(router, name, None) or 1) > 1 for name in GROUPS):
        raise UnfitRouterError(
            "its router chooses groups of experts first, and these must stay equally large"
        )
    top_k = chosen_by(router)
    if top_k is None:
        raise UnfitRouterError("its router does not say how many experts a token passes")
    generator = torch.Generator().manual_seed(0)
    parent = _random_copy(router, generator)
    states = torch.randn(PROBE_TOKENS, width, generator=generator)
    biases = {name: torch.randn(num_experts, generator=generator) for name in given}
    order = torch.randperm(num_experts, generator=generator)
    fewest = 1
    for count in sorted({1, 2, top_k, top_k + 1, num_experts - 1}):
        if not fewest <= count < num_experts:
            continue
        kept = order[:count].sort().values
        try:
            smaller = _without_others(parent, num_experts, kept)
            own = {name: bias[kept] for name, bias in biases.items()}
            wanted = _weights(smaller, states, own, count)
        except RuntimeError as error:
            if count == 1:  # such as the sum of the two best
                fewest = 2
                continue
            raise UnfitRouterError(f"its router fails with {count} experts: {error}") from error
        removed = torch.ones(1, num_experts, dtype=torch.bool)
        removed[0, kept] = False
        with router_masked(parent, removed):
            found = _weights(parent, states, biases, num_experts)
        expected = torch.zeros_like(found)
        expected[:, kept] = wanted
        if not torch.allclose(found, expected, rtol=0, atol=1e-5):
            raise UnfitRouterError(
                "its router weighs experts otherwise when some are masked than when they are absent"
            )
    return fewest


def chosen_by(router: nn.Module) -> int | None:
    """How many experts a token passes, if the router says it."""
    values = (getattr(router, name, None) for name in CHOSEN)
    return next((value for value in values if isinstance(value, int)), None)


def set_num_experts(module: nn.Module, count: int) -> None:
    """Change the numbers that a router or its experts keep; a token passes at most `count`."""
    for part in module.modules():
        for name in COUNTS:
            if isinstance(vars(part).get(name), int):
                setattr(part, name, count)
        for name in CHOSEN:
            if isinstance(value := vars(part).get(name), int):
                setattr(part, name, min(value, count))


def _random_copy(router: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same module on the CPU, without hooks, with other weights."""
    found = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    for part in found.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    with torch.no_grad():
        for tensor in (*found.parameters(), *found.buffers()):
            if tensor.is_floating_point():
                scale = 2 * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return found


def _without_others(router: nn.Module, num_experts: int, kept: Tensor) -> nn.Module:
    """A copy in which the rows of other experts do not exist."""
    found = copy.deepcopy(router)
    for part in found.modules():
        named = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        for name, tensor in named:
            dim = expert_dim(tensor, num_experts)
            if dim is not None:
                cut = tensor.detach().index_select(dim, kept)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(cut) if is_parameter else cut)
    set_num_experts(found, len(kept))
    return found


def expert_dim(tensor: Tensor, num_experts: int) -> int | None:
    """The first dimension of a tensor that has an index for each expert; None if there is none."""
    return next((dim for dim, size in enumerate(tensor.shape) if size == num_experts), None)


@torch.no_grad()
def _weights(
    router: nn.Module, states: Tensor, biases: Mapping[str, Tensor], num_experts: int
) -> Tensor:
    """With what weight every token passes every expert: float32 [tokens, E]."""
    try:
        try:
            found = router(states, **biases)
        except ValueError:  # it wants [batch, tokens, D]
            found = router(states[None], **biases)
    except TypeError as error:
        raise UnfitRouterError("its router reads more than hidden states") from error
    is_known = (
        isinstance(found, tuple)
        and len(found) == 3
        and found[2].dtype == torch.int64
        and found[1].shape == found[2].shape == (len(states), found[2].shape[-1])
    )
    if not is_known:
        raise UnfitRouterError("its router does not return logits, weights and indices of experts")
    dense = torch.zeros(len(states), num_experts)
    return dense.scatter_add(1, found[2], found[1].float())
