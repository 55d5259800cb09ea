"""How noisy the policy gradient is, for each way to estimate it, at equal forward tokens.

    python bench/gradient_variance.py RUN [MODEL]

RUN is the directory of a `policy-gradient` run of `bonsai_fast.prune`, or a cell of
`bonsai_fast.compare`. Each recorded step is split into smaller ones: estimates from two sub-models
against a moving average, as published, or from 2, 4, ... sub-models against each other. Nothing is
scored. Reported is the variance of an estimate around the others of its step, summed over
coordinates, times the number of its sub-models (twice as many should halve the variance), relative
to the published estimator. The signal is the squared length of the gradient, without the part that
noise adds, divided by that product: the information of one sub-model. Both are computed for the
shares that the run learned, if it did, and for the probabilities of its blocks or units. The last
line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods import Search, Task
from bonsai_fast.methods.allocation import Target
from bonsai_fast.methods.configure import config_of_record
from bonsai_fast.methods.units.policy_gradient.bernoulli import (
    WINDOW,
    Array,
    Masks,
    gradient,
    leave_out,
)
from bonsai_fast.methods.units.policy_gradient.policy_gradient import PolicyGradient, budgets
from bonsai_fast.methods.units.policy_gradient.shares import share_gradient
from bonsai_fast.methods.units.variables import Variables
from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.directory import UnitRun
from bonsai_fast.runs.ledger import Ledger
from bonsai_fast.scoring import MaskScorer

# masks bool [N_s, n], losses [N_s], probabilities [n]
Step = tuple[Masks, Array, Array]
Estimate = Callable[[Masks, Array, Array], Array]
PUBLISHED = ("moving-average", 2)


def recorded_steps(run: Path, model: str | None) -> tuple[list[Step], Variables]:
    """The steps of a run, from its record."""
    parent, tokenizer = load_parent(model, LoadingOptions())
    state = json.loads((run / "run.json").read_text())
    config = config_of_record({**state["config"], "target": state["request"]["target"]})
    options = config.options
    layout = Layout.of(parent, attention=options.attention)
    ledger = Ledger(run / "ledger", len(layout))
    nothing = Sequences(torch.zeros(1, 2, dtype=torch.int64), "", "")
    scorer = MaskScorer(parent, layout=layout)
    budget = Target.parse(config.target_text).removal_budget(layout)
    method = PolicyGradient()
    task = Task(parent, tokenizer, scorer, nothing, nothing, config, method, budget)
    directory = UnitRun(run, {}, {}, "retarget", ledger, layout)
    search = Search(task, directory, Reporter(quiet=True))
    everything = torch.ones(len(layout), dtype=torch.bool)
    prior = search.prior(options.prior, "parent", everything, nothing.input_ids)
    variables = Variables.of(layout, options.granularity, prior)
    descent, allowed = method.first(search, variables, prior), budgets(task, variables)
    steps = []
    for number in range(options.rounds):
        if not search.has_recorded(f"step-{number:05d}"):
            break
        masks = descent.masks()
        keep, losses = search.recorded(f"step-{number:05d}")
        assert torch.equal(keep, torch.from_numpy(masks)[:, variables.of_unit])
        mean = losses.mean(dim=1, dtype=torch.float64).numpy()
        steps.append((masks, mean, descent.probabilities))
        descent.update(masks, mean, allowed[number * len(allowed) // options.rounds])
    return steps, variables


def estimates(steps: list[Step], baseline: str, count: int, estimate: Estimate) -> Array:
    """The estimates from each `count` sub-models of a step.

    Returns:
        [steps, estimates of a step, coordinates].
    """
    parts = len(steps[0][1]) // count
    averages, found = np.zeros(parts), []
    for number, (masks, losses, probabilities) in enumerate(steps):
        row = []
        for part in range(parts):
            inside = slice(part * count, (part + 1) * count)
            own = losses[inside]
            if baseline == "moving-average":
                # begins with the first loss rather than at zero
                weight = 1.0 / WINDOW if number else 1.0
                averages[part] += weight * (own.mean() - averages[part])
                own = own - averages[part]
            elif baseline == "leave-one-out":
                own = own - leave_out(own, 1)
            row.append(estimate(masks[inside], own, probabilities))
        found.append(row)
    return np.array(found)[WINDOW:]


def noise(found: Array) -> float:
    """Variance of one estimate, summed over coordinates."""
    return float(found.var(axis=1, ddof=1).sum(axis=1).mean())


def signal(found: Array) -> float:
    """Squared length of the part that the estimates of a step have in common."""
    count = found.shape[1]
    total = found.sum(axis=1)
    crossed = (total**2).sum(axis=1) - (found**2).sum(axis=(1, 2))
    return float(crossed.mean() / (count * (count - 1)))


def compare(steps: list[Step], variables: Variables) -> list[dict[str, float | str]]:
    """Each estimator on each kind of unknowns.

    Raises:
        ValueError: the run has too few steps, or of too few sub-models.
    """
    drawn = len(steps[0][1]) if steps else 0
    if len(steps) <= WINDOW or drawn < 4:
        raise ValueError(
            f"expected a run of more than {WINDOW} steps of at least 4 sub-models, "
            f"got {len(steps)} of {drawn}"
        )

    def of_shares(masks: Masks, advantage: Array, probabilities: Array) -> Array:
        return share_gradient(masks, advantage, probabilities, variables.groups)

    rows: list[dict[str, float | str]] = []
    kinds: dict[str, Estimate] = {"shares": of_shares, "probabilities": gradient}
    for unknowns, estimate in kinds.items():
        published = 2 * noise(estimates(steps, *PUBLISHED, estimate))
        for baseline, count in [
            ("none", 2), PUBLISHED,
            *(("leave-one-out", 2**power) for power in range(1, int(np.log2(drawn)))),
        ]:  # fmt: skip
            found = estimates(steps, baseline, count, estimate)
            cost = count * noise(found)
            rows.append(
                {
                    "unknowns": unknowns,
                    "baseline": baseline,
                    "submodels_per_step": count,
                    "relative_variance": cost / published,
                    "signal": signal(found) / cost,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("model", nargs="?")
    options = parser.parse_args(arguments)
    print(json.dumps(compare(*recorded_steps(options.run, options.model))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
