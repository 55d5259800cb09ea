"""Every sub-model of a wave has one place in the plan of a sub-layer, by what it keeps."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from scoring_cases import wide_heads

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.row_masks import WHOLE
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.read_parent import read_structure
from bonsai_fast.scoring.fused.routing import Fork, RoutePlan, Router
from bonsai_fast.scoring.fused.wave import Wave

# the first MLP; attention is sub-layer 0
DEPTH = 1


def plan_of(model, route: str) -> RoutePlan:
    """Six sub-models before the first MLP. 0 and 1 share their states; the others do not.

    0 and 1 keep different channels, 2 all, 3 and 4 the same half, 5 none.
    """
    layout = Layout.of(model)
    heads, channels = layout.groups[:2]
    keep = torch.ones(6, len(layout), dtype=torch.bool)
    for number in range(1, 6):
        keep[number, heads.start + max(0, number - 2)] = number < 2
    keep[0, channels.start] = keep[1, channels.start + 1] = False
    keep[3:5, channels.start : channels.start + 20] = False
    keep[5, channels.start : channels.stop] = False
    structure = read_structure(model, layout)
    tree = MaskTree(layout, structure.blocks, keep)
    wave = Wave(
        structure=structure,
        tree=tree,
        leaves=range(tree.num_leaves),
        positions=Positions(structure, 8),
        chunk_rows=4,
        route=route,
        arithmetic=Arithmetic(model.lm_head.weight),
    )
    return Router(wave, DEPTH, structure.sublayers[DEPTH], 3, is_split=False).plan()


@pytest.mark.parametrize("route", ["dense", "slice", "gather"])
def test_each_submodel_has_one_place(route: str) -> None:
    plan = plan_of(wide_heads("llama3"), route)
    forks = [*plan.dense_forks, *plan.gathered_forks]
    branches = [*plan.dense, *plan.gathered, *plan.skipped]
    for _, use in plan.copied:
        if isinstance(use, Fork):
            forks.append(use)
        else:
            branches += use
    slots = [child.slot for fork in forks for child in fork.node.children]
    slots += [branch.slot for branch in branches]
    assert sorted(slots) == list(range(6))
    # whatever the route, nothing is computed for one that keeps nothing
    assert len(plan.skipped) == 1


def test_what_is_whole_runs_densely_on_every_route() -> None:
    for route in ("dense", "slice", "gather"):
        plan = plan_of(wide_heads("llama3"), route)
        assert [branch.mask for branch in plan.dense].count(WHOLE) == 1
        # together, the two children keep all channels
        assert [len(fork.node.children) for fork in plan.dense_forks] == [2]


def test_one_copy_for_all_submodels_of_a_mask() -> None:
    (copied,) = plan_of(wide_heads("llama3"), "slice").copied
    assert int(copied.parts.sum()) == 20
    assert len(copied.use) == 2 and len({branch.mask for branch in copied.use}) == 1


def test_rows_of_a_mask_are_neighbours_for_the_kernels() -> None:
    plan = plan_of(wide_heads("llama3"), "gather")
    assert len(plan.gathered) == 2 and len({branch.mask for branch in plan.gathered}) == 1


def test_what_no_kernel_computes_runs_densely() -> None:
    model = FAMILIES["llama3"]()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    plan = plan_of(model, "gather")
    assert not plan.gathered and len(plan.dense) == 3
