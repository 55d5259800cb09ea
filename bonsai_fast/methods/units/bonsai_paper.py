"""Bonsai as published: rounds of sampling, scoring, regression and removal (algorithm 1)."""

from __future__ import annotations

import math

import torch

from bonsai_fast.methods.allocation import select_units
from bonsai_fast.methods.regression import Regression, fit_paper, fit_ridge
from bonsai_fast.methods.session import Search, finished, group_of_unit
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.bonsai_options import BonsaiOptions
from bonsai_fast.models.submodels import sample_submodels

# p_iter of table 9
STEP_SPARSITY = 0.05


class PaperBonsai:
    """Algorithm 1, by default with the values of tables 8 and 9.

    Differs: all rounds score the same sequences, drawn once; each round ends at a multiple of
    p_iter, so that runs with different targets share their first rounds.
    """

    def plan(self, task: Task[BonsaiOptions]) -> Plan:
        """Sub-models, and one pass for the prior, in every round."""
        rounds = len(_goals(task))
        submodels = rounds * task.options.submodels_per_round
        return Plan(rounds, submodels, (submodels + rounds) * task.calibration.input_ids.numel())

    def find(self, search: Search[BonsaiOptions]) -> torch.Tensor:
        """Run the rounds; a re-targeted run repeats the recorded ones."""
        task, layout = search.task, search.task.layout
        keep = torch.ones(len(layout), dtype=torch.bool)
        relevance = torch.zeros(len(layout), dtype=torch.float64)
        removed = 0
        for number, goal in enumerate(_goals(task), start=1):
            stage = f"round-{number:02d}"
            if search.recorded_only and not search.has_recorded(stage):
                search.reporter.warn(
                    f"the recorded rounds removed only {removed:,} parameters; the other units are "
                    "chosen by the recorded relevance"
                )
                break
            step = (goal - removed) / (layout.num_decoder_parameters - removed)
            masks, losses, prior = self._score(search, stage, number, keep, step)
            regression, utility, quantity = _regress(task, number, masks, losses, prior)
            search.record_regression(stage, regression, utility, quantity)
            search.reporter.note(
                f"{stage}: Kendall's tau {regression.kendall_tau:.2f} on held-out sub-models"
                + (f", {regression.num_dropped} not finite" if regression.num_dropped else "")
            )
            always_kept = masks.all(dim=0)  # the top 1 - 2p of every group
            keep = select_units(
                layout, regression.relevance, keep, budget=goal, protect=always_kept
            )
            removed = layout.num_removed_parameters(keep)
            known = regression.relevance.isfinite()
            relevance[known] = regression.relevance[known]
            # above all estimated values, by prior: the last step may remove some of them
            untouched = keep & always_kept
            relevance[untouched] = relevance.max() + prior[untouched] / prior.max()
            search.run.save_mask(stage, keep)
        keep = select_units(layout, relevance, keep, budget=task.budget)
        return finished(search, keep, relevance, task.budget)

    def _score(
        self,
        search: Search[BonsaiOptions],
        stage: str,
        number: int,
        keep: torch.Tensor,
        step: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        task = search.task
        input_ids, options = task.calibration.input_ids, task.options
        prior = search.prior(options.usual_prior(task.layout), stage, keep, input_ids)
        if search.recorded_only:
            return *search.recorded(stage), prior
        masks = sample_submodels(
            task.layout,
            prior,
            keep,
            step_sparsity=min(0.5, step),
            num_submodels=options.submodels_per_round,
            seed=(task.config.seed, number),
        )
        return masks, search.losses(stage, masks, input_ids), prior


def _goals(task: Task[BonsaiOptions]) -> list[int]:
    """Parameters removed after each round: multiples of p_iter, or equal steps."""
    budget, decoder = task.budget, task.layout.num_decoder_parameters
    if (rounds := task.options.rounds) is not None:
        return [budget * number // rounds for number in range(1, rounds + 1)]
    rounds = max(1, math.ceil(round(budget / (STEP_SPARSITY * decoder), 6)))
    return [*(int(number * STEP_SPARSITY * decoder) for number in range(1, rounds)), budget]


def _regress(
    task: Task[BonsaiOptions],
    number: int,
    masks: torch.Tensor,
    losses: torch.Tensor,
    prior: torch.Tensor,
) -> tuple[Regression, torch.Tensor, str]:
    """The regression, the utilities that it was fitted to, float64 [S], and their meaning."""
    mean_loss = losses.mean(dim=1, dtype=torch.float64)
    if task.options.regression == "paper":
        # the published utility; the fit leaves out sub-models whose perplexity overflows
        utility = -mean_loss.exp()
        fit = fit_paper(masks, utility, seed=task.config.seed + number)
        return fit, utility, "minus perplexity on the calibration text"
    pairs, utility = torch.arange(len(masks)) // 2, -mean_loss
    fit = fit_ridge(masks, utility, prior=prior, groups=group_of_unit(task.layout), blocks=pairs)
    return fit, utility, "log-likelihood of the calibration text, nats per token"
