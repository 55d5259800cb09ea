"""Which sub-layers are packed in a call, and which of their parts."""

from __future__ import annotations

import torch

from bonsai_fast.config.choices import Route
from bonsai_fast.models import AttentionBlock
from bonsai_fast.scoring.fused.choose_route import packing_pays
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.operands.packed import Pack
from bonsai_fast.scoring.fused.parent import Structure

PACKING: tuple[Route, ...] = ("auto", "pack", "tail", "split")
# on route "split", fixed channels are a multiple of this number: widths that suit a GPU
FIXED_MULTIPLE = 64


def choose_packs(
    tree: MaskTree, structure: Structure, route: Route, *, tokens: int, waves: int
) -> dict[int, Pack]:
    """Packs of the sub-layers for which packing pays, by depth; see `packing_pays`.

    Args:
        tree: of the call's sub-models.
        structure: the model.
        route: of the call.
        tokens: of all sequences together.
        waves: number of waves; every wave packs again.
    """
    packs = {}
    for depth, block in enumerate(structure.blocks):
        if block is None or route not in PACKING:
            continue
        groups = [
            tree.kept(depth, [child.mask for child in node.children]).any(dim=0)
            for node in tree.nodes(depth, range(tree.num_leaves))
        ]
        kept = torch.stack(groups)
        used, common = kept.any(dim=0), tree.kept_by_all(depth)
        sizes = kept.sum(dim=1).tolist()
        shares = [size / kept.shape[1] for size in sizes]
        is_attention = isinstance(block, AttentionBlock)
        fixed = 0 if is_attention else int(common.sum())
        used_share, fixed_share = int(used.sum()) / kept.shape[1], fixed / kept.shape[1]
        if not packing_pays(route, shares, used_share, fixed_share, tokens, waves):
            continue
        if is_attention:
            packs[depth] = Pack(used.nonzero().flatten(), 0)
        else:
            multiple = FIXED_MULTIPLE if route == "split" else 1
            packs[depth] = Pack.of_channels(used, common, multiple)
    return packs
