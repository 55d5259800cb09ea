"""Compares a description of a model with the model itself, layer by layer, on a few tokens."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.parent import Structure, UnsupportedStructureError
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.sublayer_step import run_sublayer
from bonsai_fast.scoring.fused.wave import Wave

NUM_TOKENS = 6
# largest difference, relative to the largest change that the layer makes
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@torch.inference_mode()
def check_structure(model: PreTrainedModel, layout: Layout, structure: Structure) -> None:
    """Run model and description side by side; every layer starts from the model's own states.

    Raises:
        UnsupportedStructureError: the embedding, a layer or the final norm differs.
    """
    backbone, weight = model.base_model, structure.like
    tokens = torch.arange(NUM_TOKENS, device=weight.device)[None] % len(weight)
    everything = torch.ones(1, len(layout), dtype=torch.bool)
    wave = Wave(
        structure=structure,
        tree=MaskTree(layout, structure.blocks, everything),
        leaves=range(1),
        positions=Positions(structure, NUM_TOKENS),
        chunk_rows=1,
        route="dense",
        arithmetic=Arithmetic(weight),
    )
    states = wave.embed(tokens)
    ends: list[Tensor] = []

    # in a hook, because the weights of a streamed layer are in memory only while it runs
    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        number, start = len(ends), args[0] if args else kwargs["hidden_states"]
        ends.append(output[0] if isinstance(output, tuple) else output)
        if number == 0:
            _compare("the embedding", states[0], start, None)
        if 2 * number < len(structure.sublayers):
            states[0] = start
            run_sublayer(wave, 2 * number, states)
            run_sublayer(wave, 2 * number + 1, states)
            _compare(f"layer {number}", states[0], ends[-1], start)

    with ExitStack() as stack:
        for layer in model.get_submodule(layout.decoder.path).children():
            handle = layer.register_forward_hook(compare, with_kwargs=True)
            stack.callback(handle.remove)
        expected = backbone(input_ids=tokens, use_cache=False).last_hidden_state
    if len(ends) * 2 != len(structure.sublayers):
        raise UnsupportedStructureError(
            f"expected {len(structure.sublayers) // 2} layers to run, but {len(ends)} ran"
        )
    last = wave.arithmetic.normalize(structure.norm, ends[-1])
    _compare("the final norm", last, expected, None)


def _compare(what: str, actual: Tensor, expected: Tensor, start: Tensor | None) -> None:
    change = expected if start is None else expected - start
    scale = float(change.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
    if not torch.allclose(
        actual.float(),
        expected.float(),
        rtol=4 * torch.finfo(expected.dtype).eps,
        atol=TOLERANCE[expected.dtype] * scale,
        equal_nan=True,
    ):
        largest = float((actual - expected).abs().max())
        raise UnsupportedStructureError(
            f"{what} computes something else than expected from its modules "
            f"(largest difference {largest:.3g})"
        )
