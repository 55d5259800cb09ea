"""Method "policy-gradient": keep probabilities of all units, learned from losses alone.

Every step scores N_s sub-models, drawn from the current probabilities, on one batch of text. The
published setting (`--preset paper`) draws two, compares them with a moving average and learns a
probability for every unit. As the scorer computes many sub-models in one batch, it is better to
draw more and to compare each with the others of its step. And with fewer steps than a GPU computes
in hours, it is better to learn less: the fraction of each group to remove, while the prior decides
which units (`shares`).

Source: policy-gradient pruning with Bernoulli masks: sections 3 and 4.1, appendices A.1, A.11,
A.12. Decided here, where the paper leaves it open: the metric is normalised inside each (layer,
kind); the budget counts parameters; text is read again when it is used up; a sub-model that
overflows counts as the worst of its step; the metric ranks equal probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bonsai_fast.methods.allocation import equal_shares
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.layerwise import SEQUENCES, layer_losses, layer_of_unit
from bonsai_fast.methods.units.one_shot import cut
from bonsai_fast.methods.units.policy_gradient.bernoulli import (
    Array,
    BernoulliDescent,
    score_const,
    sigmoid_budget,
    sigmoid_norm,
)
from bonsai_fast.methods.units.policy_gradient.policy_options import (
    POLICY_GRADIENT_PRESETS,
    PolicyGradientOptions,
)
from bonsai_fast.methods.units.policy_gradient.shares import ShareDescent, ranks
from bonsai_fast.methods.units.variables import BLOCKS, Variables
from bonsai_fast.models.layout import ATTENTION

# random-progressive: the target grows in steps of this fraction of the decoder (appendix A.12)
PROGRESS = 0.05
# how much steeper than the paper's sigmoid ours starts: most units are nearly decided
SHARPNESS = 4.0
# shares of attention start this much below those of channels: one unit is a large part of
# attention, and removing it in many layers at once breaks a model before anything is learned
ATTENTION_LAG = 1.0
# weight of what ranks units of equal probability; far below any learned difference
TIE = 1e-9


class PolicyGradient:
    """Descent on keep probabilities; keeps the units of the highest probability."""

    presets = POLICY_GRADIENT_PRESETS

    def plan(self, task: Task[PolicyGradientOptions]) -> Plan:
        """Sub-models of all steps, and the work before the first step."""
        options = task.options
        sequences, length = task.calibration.input_ids.shape
        submodels = options.rounds * options.submodels_per_round
        tokens = submodels * _batch_size(task) * length
        if _needs_prior(task):
            tokens += sequences * length
        if options.initial == "layerwise-ppl":
            layers = task.layout.decoder.num_layers
            submodels += layers
            tokens += layers * min(SEQUENCES, sequences) * length
        return Plan(options.rounds, submodels, tokens)

    def find(self, search: Search[PolicyGradientOptions]) -> torch.Tensor:
        """The units to keep, bool [P]; a re-targeted run ranks by the recorded probabilities."""
        task, layout = search.task, search.task.layout
        if search.recorded_only:
            return cut(search, search.recorded_relevance(), task.budget)
        everything = torch.ones(len(layout), dtype=torch.bool)
        prior = torch.zeros(len(layout), dtype=torch.float64)
        if _needs_prior(task):
            prior = search.prior(
                task.options.prior, "parent", everything, task.calibration.input_ids
            )
        variables = Variables.of(layout, task.options.granularity, prior)
        levels = self._descend(search, variables, self.first(search, variables, prior))
        inside = equal_shares(layout, prior) / layout.num_parameters_per_unit
        level = torch.from_numpy(levels - levels.min())[variables.of_unit] + TIE * inside
        relevance = level * layout.num_parameters_per_unit
        search.record_relevance(relevance)
        return cut(search, relevance, task.budget)

    def first(
        self, search: Search[PolicyGradientOptions], variables: Variables, prior: torch.Tensor
    ) -> BernoulliDescent:
        """The descent before its first step."""
        task, options = search.task, search.task.options
        metric = self._metric(search, variables, prior)
        common: dict[str, Any] = {
            "count": options.submodels_per_round,
            "learning_rate": options.learning_rate,
            "baseline": options.baseline,
            "seed": task.config.seed,
        }
        budget = budgets(task, variables)[0]
        if options.granularity != "shares":
            start = self._start(options, variables, metric, budget)
            return BernoulliDescent(start, variables.costs, **common)
        attention = [group.kind in ATTENTION for group in task.layout.groups]
        return ShareDescent(
            ranks(metric, variables.groups),
            variables.groups,
            variables.costs,
            budget,
            start=np.where(attention, -ATTENTION_LAG, 0.0),
            steps=options.rounds,
            **common,
        )

    def _metric(
        self, search: Search[PolicyGradientOptions], variables: Variables, prior: torch.Tensor
    ) -> Array:
        """Rank of the variables before the first step, as a metric: [n]."""
        task, initial = search.task, search.task.options.initial
        if initial == "layerwise-ppl":
            losses = layer_losses(search)
            worst = losses[losses.isfinite()].max() if losses.isfinite().any() else 0.0
            losses = losses.nan_to_num(posinf=float(worst))
            return variables.mean(losses[layer_of_unit(task.layout)])
        if initial == "wanda-sp":
            return variables.mean(prior)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((task.config.seed, 0, 1))))
        return rng.standard_normal(len(variables.costs))

    def _start(
        self, options: PolicyGradientOptions, variables: Variables, metric: Array, budget: float
    ) -> Array:
        """Probabilities before the first step (appendices A.11 and A.12)."""
        groups = variables.groups
        if options.initial == "layerwise-ppl":
            groups = np.zeros_like(groups)
        if options.projection == "sigmoid-norm":
            return sigmoid_norm(metric, groups)
        if options.projection == "score-const":
            order = np.argsort(-sigmoid_norm(metric, groups), kind="stable")
            kept = np.zeros(len(metric), dtype=np.bool_)
            kept[order] = np.cumsum(variables.costs[order]) <= budget
            return score_const(kept)
        return sigmoid_budget(metric, groups, variables.costs, budget, sharpness=SHARPNESS)

    def _descend(
        self, search: Search[PolicyGradientOptions], variables: Variables, descent: BernoulliDescent
    ) -> Array:
        """Levels after the last step, [n]; see `BernoulliDescent.levels`."""
        task, rounds = search.task, search.task.options.rounds
        allowed = budgets(task, variables)
        with search.reporter.bar("steps", total=rounds) as advance:
            for step in range(rounds):
                masks = descent.masks()
                keep = torch.from_numpy(masks)[:, variables.of_unit]
                losses = search.losses(
                    f"step-{step:05d}", keep, _batch(task, step), silent=True
                ).mean(dim=1, dtype=torch.float64)
                budget = allowed[step * len(allowed) // rounds]
                descent.update(masks, losses.numpy(), budget)
                advance(1)
        s = descent.probabilities
        search.reporter.note(
            f"{np.mean((s > 0.1) & (s < 0.9)):.0%} of {len(s):,} variables are undecided "
            f"(probability between 0.1 and 0.9)"
        )
        return descent.levels


def _needs_prior(task: Task[PolicyGradientOptions]) -> bool:
    return task.options.initial == "wanda-sp" or task.options.granularity in BLOCKS


def _batch_size(task: Task[PolicyGradientOptions]) -> int:
    return min(task.options.batch_size, len(task.calibration.input_ids))


def _batch(task: Task[PolicyGradientOptions], step: int) -> torch.Tensor:
    """Sequences of one step, int64 [B, T]: each epoch reads the text in a new random order."""
    input_ids, size = task.calibration.input_ids, _batch_size(task)
    per_epoch = len(input_ids) // size
    epoch, place = divmod(step, per_epoch)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((task.config.seed, epoch, 2))))
    order = torch.from_numpy(rng.permutation(len(input_ids)))
    return input_ids[order[place * size : (place + 1) * size]]


def budgets(task: Task[PolicyGradientOptions], variables: Variables) -> list[float]:
    """Parameters to keep on average, by stage; one stage unless progressive."""
    removal, decoder = task.budget, task.layout.num_decoder_parameters
    stages = 1
    if task.options.initial == "random-progressive":
        stages = max(1, math.ceil(round(removal / (PROGRESS * decoder), 6)))
    total = float(variables.costs.sum())
    removals = [min(removal, PROGRESS * decoder * number) for number in range(1, stages)]
    return [total - gone for gone in (*removals, removal)]
