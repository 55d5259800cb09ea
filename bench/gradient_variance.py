"""How noisy the policy gradient is, for each way to estimate it, at equal forward tokens.

    python bench/gradient_variance.py [MODEL] --calibration FILE.txt --output DIR

Sub-models are drawn as in the first step of `policy-gradient` and scored, on batches of one
sequence each; the published estimator and others are then made from the same losses, of the shares
that the default learns and of the probabilities of all blocks. What counts is the variance of an
estimate, summed over coordinates, times the sub-models behind it: twice as many of them should
halve the variance. It is given relative to the published estimator (two sub-models, a moving
average). The signal is the squared length of the gradient over that product, for one sub-model.
The last line of stdout is JSON. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from bonsai_fast.config import PruneConfig
from bonsai_fast.methods import Search
from bonsai_fast.methods.bernoulli import WINDOW, Array, Masks, gradient, leave_out, sample
from bonsai_fast.methods.policy_gradient import PolicyGradient
from bonsai_fast.methods.shares import share_gradient
from bonsai_fast.methods.variables import Variables
from bonsai_fast.pipeline import prepare
from bonsai_fast.progress import Reporter
from bonsai_fast.prune import CommandOptions, load_parent
from bonsai_fast.run_directory import open_run

# sub-models scored on each batch, twice: independent, and in antithetic pairs
DRAWN = 64
# baseline and N_s
ESTIMATORS = [
    ("none", 2),
    ("moving-average", 2),
    *(("leave-one-out", count) for count in (2, 16, 64)),
    *(("antithetic", count) for count in (4, 16, 64)),
]
PUBLISHED = ("moving-average", 2)


def estimates(baseline: str, count: int, masks: Masks, losses: Array, estimate) -> Array:  # type: ignore[no-untyped-def]
    """One estimate of each `count` sub-models that follow each other.

    Args:
        masks: bool [batches, DRAWN, n].
        losses: [batches, DRAWN].
        estimate: (masks [count, n], advantage [count]) -> [coordinates].
    Returns:
        [estimates, coordinates].
    """
    average, found = float(losses.mean()), []
    # in turns over the batches, as steps are
    for first in range(0, losses.shape[1], count):
        for drawn, own in zip(masks, losses[:, first : first + count], strict=True):
            if baseline == "none":
                advantage = own
            elif baseline == "moving-average":
                average += (float(own.mean()) - average) / WINDOW
                advantage = own - average
            else:
                advantage = own - leave_out(own, 2 if baseline == "antithetic" else 1)
            found.append(estimate(drawn[first : first + count], advantage))
    return np.array(found)


def signal(found: Array) -> float:
    """Squared length of what independent estimates have in common: [estimates, coordinates]."""
    count = len(found)
    total = found.sum(axis=0)
    return float((total @ total - np.sum(found**2)) / (count * (count - 1)))


def measure(search: Search, batches: int) -> list[dict[str, float | str]]:
    """Score the sub-models, and compare the estimators."""
    task = search.task
    everything = torch.ones(len(task.layout), dtype=torch.bool)
    prior = search.prior("parent", everything, task.calibration.input_ids)
    variables = Variables.of(task.layout, "shares", prior)
    probabilities = PolicyGradient().first(search, variables, prior).probabilities
    drawn: dict[bool, tuple[Masks, Array]] = {}
    for antithetic in (False, True):
        masks, losses = [], []
        for batch in range(batches):
            seed = (task.config.seed, batch, int(antithetic))
            masks.append(sample(probabilities, DRAWN, antithetic=antithetic, seed=seed))
            keep = torch.from_numpy(masks[-1])[:, variables.of_unit]
            text = task.calibration.input_ids[batch : batch + 1]
            losses.append(search.losses(f"batch-{batch}", keep, text)[:, 0].double().numpy())
        drawn[antithetic] = np.array(masks), np.array(losses)

    def of_shares(masks: Masks, advantage: Array) -> Array:
        return share_gradient(masks, advantage, probabilities, variables.groups)

    def of_blocks(masks: Masks, advantage: Array) -> Array:
        return gradient(masks, advantage, probabilities)

    rows: list[dict[str, float | str]] = []
    for unknowns, estimate in (("shares", of_shares), ("blocks", of_blocks)):
        noise: dict[tuple[str, int], float] = {}
        length = signal(estimates("leave-one-out", 16, *drawn[False], estimate))
        for baseline, count in ESTIMATORS:
            found = estimates(baseline, count, *drawn[baseline == "antithetic"], estimate)
            noise[baseline, count] = float(found.var(axis=0, ddof=1).sum()) * count
        rows += [
            {
                "unknowns": unknowns,
                "baseline": baseline,
                "submodels_per_step": count,
                "relative_variance": noise[baseline, count] / noise[PUBLISHED],
                "signal": length / noise[baseline, count],
            }
            for baseline, count in ESTIMATORS
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--num-sequences", type=int)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, tokenizer = load_parent(options.model, CommandOptions())
    config = PruneConfig(
        method="policy-gradient",
        sparsity=options.sparsity,
        calibration=options.calibration,
        num_sequences=options.num_sequences,
        sequence_length=options.sequence_length,
        evaluation_tokens=256,
        seed=options.seed,
    )
    task, _ = prepare(model, tokenizer, config)
    run = open_run(options.output, task.config, task.layout, model, task.calibration.sha256)
    print(json.dumps(measure(Search(task, run, Reporter()), options.batches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
