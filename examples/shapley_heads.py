"""Shapley values of a model's attention heads, by the shap package.

    python examples/shapley_heads.py MODEL --text FILE

A head's value is what it saves in nats per token, averaged over the orders in which heads could be
taken away. The values of all heads add up to what all heads save together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import shap
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonsai_fast as bf


def shapley_values(
    scorer: bf.MaskScorer, input_ids: torch.Tensor, *, permutations: int = 4, seed: int = 0
) -> dict[int, float]:
    """Shapley values of all heads, everything else kept.

    Args:
        scorer: of the model.
        input_ids: int64 [B, T].
        permutations: random orders of the heads; each costs 2 * (heads + 1) sub-models.
        seed: of the orders.
    Returns:
        nats per token by the head's position in the layout; larger is more useful.
    """
    heads = [place for place, unit in enumerate(scorer.layout) if unit.kind == "head"]
    loss = scorer.as_function(input_ids)

    def saved(kept_heads: np.ndarray) -> np.ndarray:
        keep = np.ones((len(kept_heads), len(scorer.layout)), dtype=bool)
        keep[:, heads] = kept_heads.astype(bool)
        return -loss(keep)

    nothing, everything = np.zeros((1, len(heads))), np.ones((1, len(heads)))
    masker = shap.maskers.Independent(nothing, max_samples=1)
    explainer = shap.PermutationExplainer(saved, masker, seed=seed)
    evaluations = permutations * (2 * len(heads) + 1)
    explained = explainer(everything, max_evals=evaluations, silent=True)
    return dict(zip(heads, explained.values[0].tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name or directory")
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--permutations", type=int, default=4)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    input_ids = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids
    scorer = bf.MaskScorer(model)
    values = shapley_values(
        scorer, input_ids[:, : arguments.tokens], permutations=arguments.permutations
    )
    for place in sorted(values, key=values.__getitem__, reverse=True):
        unit = scorer.layout[place]
        print(f"layer {unit.layer:2d} head {unit.index:2d}: {values[place]:+.4f} nats per token")


if __name__ == "__main__":
    main()
