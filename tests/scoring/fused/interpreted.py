"""Scores tiny models by every route on the kernels themselves, in Triton's interpreter.

A process of its own: from here on CPU tensors get the kernels that CUDA tensors would get. Prints,
as JSON, how far each model's losses are from those of the hooks engine by each route, and how often
each op was called.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from op_paths import kernel_of
from scored_families import gemma2
from scoring_cases import related_masks, scorer_on_ops, wide_heads
from surgery_cases import tokens
from test_dispatch import ALL

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.operands import choose_packs


def use_kernels(calls: Counter[str]) -> None:
    """Register every op's CUDA path for CPU tensors."""

    def counted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return launch(*args, **kwargs)

        return call

    for name, op in ALL.items():
        op.register_kernel("cpu")(counted(name, kernel_of(op)))


def main() -> None:
    torch.set_num_threads(1)
    # the interpreter computes with NumPy, which warns of infinities
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    # or nothing would be left of the fixed part of so narrow MLPs
    choose_packs.FIXED_MULTIPLE = 8
    calls: Counter[str] = Counter()
    differences: dict[str, float] = {}
    models = {family: wide_heads(family) for family in ("llama", "qwen2")}
    models["gemma2"] = gemma2(num_hidden_layers=1, layer_types=["sliding_attention"])
    for family, model in models.items():
        layout = Layout.of(model)
        masks = related_masks(layout)[:3]
        input_ids = tokens(2, 7)
        hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
        # Gemma 2 differs by its attention: capped scores
        for route in ("dense", "slice", "gather", "split") if family != "gemma2" else ("gather",):
            scorer = scorer_on_ops(model, layout, route)
            if not calls:
                use_kernels(calls)
            scored = scorer.score(masks, input_ids)
            differences[f"{family} {route}"] = float((scored - hooks).abs().max())
    print(json.dumps({"differences": differences, "calls": calls}))


if __name__ == "__main__":
    main()
