"""How wide each layer should be, by SciPy's differential evolution.

    python examples/layer_widths.py MODEL --text FILE --sparsity 0.2

One variable for each layer's heads and one for its channels say how much of them is kept; what is
kept is what Wanda's prior puts first, and the whole meets the budget. A generation is scored in one
call. The best mask is written for `python -m bonsai_fast.surgery`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import OptimizeResult, differential_evolution
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonsai_fast as bf
from bonsai_fast.methods.importance.prior import unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.runs.mask_files import save_mask


class Widths:
    """Variables in [0, 1], one a group of units, to keep masks that meet a budget.

    Args:
        layout: the units.
        prior: importance of each, [P]; ranks the units of a group.
        sparsity: fraction of the decoder's parameters that goes, at least.
    """

    def __init__(self, layout: bf.Layout, prior: np.ndarray, sparsity: float) -> None:
        self.groups = layout.groups
        self.costs = layout.num_parameters_per_unit.numpy().astype(np.float64)
        self.budget = sparsity * layout.num_decoder_parameters
        # each unit's place in its group from the least important on, in (0, 1)
        self.place = np.empty(len(layout))
        for group in self.groups:
            order = np.argsort(prior[group.start : group.stop])
            self.place[group.start + order] = (np.arange(len(group)) + 0.5) / len(group)

    def masks(self, variables: np.ndarray) -> np.ndarray:
        """float [G, S] -> bool [S, P]: large variables keep much; the same shift for all of one."""
        sizes = [len(group) for group in self.groups]
        # a unit goes before another if its group's variable and its own place add up to less
        merit = np.repeat(variables.T, sizes, axis=1) + self.place
        order = np.argsort(merit, axis=1, kind="stable")
        gone = np.cumsum(self.costs[order], axis=1) - self.costs[order] < self.budget
        keep = np.ones(merit.shape, dtype=bool)
        np.put_along_axis(keep, order, ~gone, axis=1)
        return keep


def search(
    scorer: bf.MaskScorer,
    input_ids: torch.Tensor,
    *,
    sparsity: float,
    generations: int = 10,
    population: int = 2,
    seed: int = 0,
) -> tuple[np.ndarray, OptimizeResult]:
    """The best keep mask that was found, bool [P], and what SciPy says of the search.

    Args:
        scorer: of the model.
        input_ids: int64 [B, T].
        sparsity: fraction of the decoder's parameters that goes.
        generations: each scores as many sub-models as the first population has.
        population: sub-models in it, as a multiple of the number of variables.
        seed: of the search.
    """
    everything = torch.ones(len(scorer.layout), dtype=torch.bool)
    statistics = collect_statistics(scorer, everything, input_ids)
    prior = unit_prior("wanda", scorer.model, scorer.layout, statistics).numpy()
    widths = Widths(scorer.layout, prior, sparsity)
    loss = scorer.as_function(input_ids)

    def losses(variables: np.ndarray) -> np.ndarray:
        return loss(widths.masks(np.atleast_2d(variables.T).T))

    count = len(widths.groups)
    found = differential_evolution(
        losses,
        bounds=[(0.0, 1.0)] * count,
        x0=np.full(count, 0.5),  # all groups alike
        maxiter=generations,
        popsize=population,
        rng=seed,
        polish=False,
        tol=0.0,  # all generations that were asked for
        vectorized=True,
        updating="deferred",
    )
    return widths.masks(found.x[:, None])[0], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub name or directory")
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("widths.safetensors"))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    input_ids = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids
    scorer = bf.MaskScorer(model, layout=bf.Layout.of(model, attention="kv-group"))
    mask, found = search(
        scorer,
        input_ids[:, : arguments.tokens],
        sparsity=arguments.sparsity,
        generations=arguments.generations,
    )
    for group in scorer.layout.groups:
        kept = int(mask[group.start : group.stop].sum())
        print(f"layer {group.layer:2d} {group.kind}: {kept} of {len(group)}")
    save_mask(arguments.output, scorer.layout, torch.from_numpy(mask))
    scored = found.nfev * len(found.population)  # SciPy counts calls, one a generation
    print(f"{found.fun:.4f} nats per token after {scored} sub-models; {arguments.output}")


if __name__ == "__main__":
    main()
