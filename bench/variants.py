"""Ways to remove half of a model, and a check that each computes the right numbers.

The speed does not depend on which weights are removed: units are ranked at random, weights by
magnitude. Widths and heads are those that `bonsai_fast.prune` makes of such ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.latency.semi_structured import (
    BACKENDS,
    two_of_four_linears,
    use_semi_structured,
    why_not,
)
from bonsai_fast.methods.allocation import Target, finish, plan_mask
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import wanda_keep
from bonsai_fast.scoring import MaskScorer, SequenceNLL
from bonsai_fast.surgery import remove_units

# as the Bonsai paper fine-tunes Wanda's 2:4 models (appendix A.2): these projections, this rank
ADAPTED, RANK = ("q_proj", "v_proj"), 64
SPARSITIES = (0.2, 0.35, 0.5)
# of the largest output of an adapted projection
LORA_ERROR = 0.02
# share of a loss that is rounding; half a model without retraining is far from sure of anything
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


@dataclass(frozen=True)
class Variant:
    """A smaller or emptier model.

    Attributes:
        name: as tables show it.
        build: parent -> the model; the parent stays as it is.
        check: (parent, model, int64 [B, T]) -> None; asserts that the model's losses are right.
    """

    name: str
    build: Callable[[PreTrainedModel], PreTrainedModel]
    check: Callable[[PreTrainedModel, PreTrainedModel, torch.Tensor], None]


def variants(device: torch.device, dtype: torch.dtype) -> Iterator[Variant]:
    """All variants that this machine can run."""
    for sparsity in SPARSITIES:
        yield Variant(f"pruned {sparsity:.0%}", *_pruned(sparsity, sublayers=False))
    yield Variant("sub-layers pruned 50%", *_pruned(0.5, sublayers=True))
    yield Variant("half zeros, stored densely", _half_zeros, _check_zeros)
    backends = [name for name in BACKENDS if why_not(name, device, dtype) is None]
    for backend in backends or [None]:
        how = f"2:4 by {backend}" if backend else "2:4 zeros, stored densely"
        yield Variant(how, lambda parent, b=backend: two_of_four(parent, b), _check_two_of_four)
        yield Variant(
            f"{how}, with LoRA",
            lambda parent, b=backend: with_lora(two_of_four(parent, b)),
            _check_lora,
        )


def missing_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why 2:4 backends are left out, one line each."""
    found = {name: why_not(name, device, dtype) for name in BACKENDS}
    return [f"no 2:4 by {name}: {reason}" for name, reason in found.items() if reason is not None]


# Units away ---------------------------------------------------------------------------------------


def keep_mask(layout: Layout, sparsity: float) -> torch.Tensor:
    """Equal shares of all sub-layers, or whole sub-layers, at random, made round: bool [P]."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(len(layout), generator=generator, dtype=torch.float64)
    relevance = draws * layout.num_parameters_per_unit
    if layout.sublayers:
        counts = [0] * len(layout.groups)
        budget = int(sparsity * layout.num_decoder_parameters)
        # from behind the first layer on, whole layers; the rest of the budget is channels
        for number, group in enumerate(layout.groups):
            size = group.num_parameters
            if group.kind in ("attention", "mlp") and group.layer > 0 and size <= budget:
                counts[number], budget = 1, budget - size
    else:
        counts = [int(sparsity * len(group)) for group in layout.groups]
    keep = plan_mask(layout, relevance, counts)
    return finish(layout, keep, relevance, Target(sparsity=sparsity).removal_budget(layout))[0]


def _layout(parent: PreTrainedModel, sublayers: bool) -> Layout:
    return Layout.of(parent, attention="kv-group", sublayers=sublayers)


def _pruned(sparsity: float, *, sublayers: bool):
    def build(parent: PreTrainedModel) -> PreTrainedModel:
        layout = _layout(parent, sublayers)
        return remove_units(parent, layout, keep_mask(layout, sparsity))

    def check(parent: PreTrainedModel, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
        layout = _layout(parent, sublayers)
        keep = keep_mask(layout, sparsity)
        removed = layout.num_removed_parameters(keep)
        assert parent.num_parameters() - model.num_parameters() == removed
        share = removed / layout.num_decoder_parameters
        assert sparsity - 0.01 < share <= sparsity, f"{share:.2%} of the decoder went"
        masked = MaskScorer(parent, layout=layout, engine="hooks").score(keep[None], input_ids)[0]
        _close(model, input_ids, masked)

    return build, check


# Zeros --------------------------------------------------------------------------------------------


def decoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by name, without the LM head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def two_of_four(parent: PreTrainedModel, backend: str | None) -> PreTrainedModel:
    """Keep the two largest of four neighbours in a row; compressed, if there is a backend."""
    model = _with_zeros(parent, lambda weight: _keep(weight, n=2, m=4))
    if backend is not None:
        use_semi_structured(model, backend)
    return model


def _half_zeros(parent: PreTrainedModel) -> PreTrainedModel:
    """Keep the larger half of each row."""
    return _with_zeros(parent, lambda weight: _keep(weight, n=weight.shape[1] // 2))


def _keep(weight: torch.Tensor, *, n: int, m: int | None = None) -> torch.Tensor:
    scale = torch.ones(weight.shape[1], device=weight.device)
    return wanda_keep(weight, scale, n=n, m=m or weight.shape[1])


@torch.no_grad()
def _with_zeros(
    parent: PreTrainedModel, keep: Callable[[torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    model = copy.deepcopy(parent)
    for linear in decoder_linears(model).values():
        linear.weight.mul_(keep(linear.weight))
    return model


def _check_zeros(parent: PreTrainedModel, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    zeros = [int((linear.weight == 0).sum()) for linear in decoder_linears(model).values()]
    total = sum(linear.weight.numel() for linear in decoder_linears(model).values())
    assert abs(sum(zeros) / total - 0.5) < 0.01
    assert bool(SequenceNLL(model)(input_ids.to(model.device)).isfinite().all())


def _check_two_of_four(
    parent: PreTrainedModel, model: PreTrainedModel, input_ids: torch.Tensor
) -> None:
    """Compressed or not, it computes the same as zeros in the dense weights."""
    dense = two_of_four(parent, None)
    assert two_of_four_linears(dense) == list(decoder_linears(dense))
    _close(model, input_ids, SequenceNLL(dense)(input_ids.to(dense.device)))


# LoRA ---------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A projection with a low-rank update that cannot be merged: x W^T + (x A^T) B^T."""

    def __init__(self, base: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        out, columns = base.weight.shape
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.Parameter(
            (torch.randn(RANK, columns, generator=generator) * columns**-0.5).to(**like)
        )
        self.b = nn.Parameter((torch.randn(out, RANK, generator=generator) * RANK**-0.5).to(**like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return self.base(x) + update


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    """Add random unmerged updates to the projections of queries and values, in place."""
    generator = torch.Generator().manual_seed(0)
    for name in decoder_linears(model):
        parent, _, child = name.rpartition(".")
        if child in ADAPTED:
            owner = model.get_submodule(parent)
            setattr(owner, child, Adapted(getattr(owner, child), generator))
    return model


@torch.no_grad()
def _check_lora(parent: PreTrainedModel, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Each adapted projection computes the same as merged dense weights."""
    merged = decoder_linears(two_of_four(parent, None))
    adapted = {name: module for name, module in model.named_modules() if type(module) is Adapted}
    assert len(adapted) == len(ADAPTED) * model.config.num_hidden_layers
    for name, module in adapted.items():
        weight = merged[name].weight.float()
        x = module.a[:RANK]
        update = x.float() @ (module.b.float() @ module.a.float()).T
        expected = x.float() @ weight.T + update
        assert float(update.abs().max()) > 10 * LORA_ERROR * float(expected.abs().max())
        error = (module(x).float() - expected).abs().max()
        assert float(error) <= LORA_ERROR * float(expected.abs().max())
    assert bool(SequenceNLL(model)(input_ids.to(model.device)).isfinite().all())


def _close(model: PreTrainedModel, input_ids: torch.Tensor, expected: torch.Tensor) -> None:
    losses = SequenceNLL(model)(input_ids.to(model.device)).cpu()
    torch.testing.assert_close(losses, expected.cpu(), rtol=TOLERANCE[model.dtype], atol=0)
