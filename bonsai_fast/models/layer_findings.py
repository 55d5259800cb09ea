"""What is found in one decoder layer: its sub-layers, and why it does not offer some units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bonsai_fast.models.blocks import AttentionBlock, Block, Cut, ExpertsBlock, MLPBlock
from bonsai_fast.models.parts import Names

KINDS = {"attention": ("head", "kv-group", "attention"), "mlp": ("channel", "mlp")}


@dataclass
class LayerParts:
    """What one layer holds.

    Attributes:
        reasons: kind of unit -> why the layer does not offer it.
        mixture_norms: names, in the layer, of the norms that only a mixture of experts reads; None
            if it has no experts.
        mixture_returns: length of the tuple that the mixture returns; None: a tensor.
    """

    attention: AttentionBlock | None
    mlp: MLPBlock | ExpertsBlock | None
    reasons: dict[str, str]
    mixture_norms: tuple[str, ...] | None = None
    mixture_returns: int | None = None

    def give_reasons(self, kind: str, reason: str) -> None:
        """Say why units of a sub-layer are not offered; `kind` is "attention" or "mlp"."""
        self.reasons |= dict.fromkeys(KINDS[kind], reason)

    def take_back(self, kind: str, reason: str) -> None:
        """Offer nothing of a sub-layer."""
        if kind == "attention":
            self.attention = None
        else:
            self.mlp = None
        self.give_reasons(kind, reason)


def moved_parts(example: LayerParts, names: Names, old: str, new: str, index: int) -> LayerParts:
    """The same parts in another layer."""
    before, after = names.full(old), names.full(new)

    def moved(path: str) -> str:
        return after + path[len(before) :]

    def cuts(block: Block) -> tuple[Cut, ...]:
        return tuple(Cut(moved(cut.parameter), cut.dim, cut.owner) for cut in block.cuts)

    attention, mlp = example.attention, example.mlp
    assert not isinstance(mlp, ExpertsBlock)  # these are added last
    if attention is not None:
        attention = replace(
            attention,
            layer=index,
            module=moved(attention.module),
            output=moved(attention.output),
            cuts=cuts(attention),
            norms=tuple(map(moved, attention.norms)),
        )
    if mlp is not None:
        mlp = replace(
            mlp,
            layer=index,
            modules=tuple(map(moved, mlp.modules)),
            output=moved(mlp.output),
            cuts=cuts(mlp),
            norms=tuple(map(moved, mlp.norms)),
        )
    return replace(example, attention=attention, mlp=mlp, reasons=dict(example.reasons))


def refused_kinds(layers: dict[int, LayerParts], blocks: Sequence[Block]) -> dict[str, str]:
    """For the kinds of units that no layer offers, the first reason."""
    offered: set[str] = set()
    for block in blocks:
        if isinstance(block, AttentionBlock):
            kinds = {"attention"} if block.whole else {"attention", "head", "kv-group"}
            offered |= kinds - layers[block.layer].reasons.keys()
        elif isinstance(block, MLPBlock):
            offered |= {"mlp"} if block.whole else {"mlp", "channel"}
        else:
            refused = {"expert": block.experts_refused, "channel": block.channels_refused}
            offered |= {"mlp", *(kind for kind, reason in refused.items() if reason is None)}
    reasons: dict[str, str] = {}
    for _, layer in sorted(layers.items()):
        for kind, reason in layer.reasons.items():
            if kind not in offered:
                reasons.setdefault(kind, reason)
    return reasons
