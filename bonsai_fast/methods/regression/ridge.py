"""Bayesian ridge in closed form: the prior as its mean, and an error bar for every unit."""

from __future__ import annotations

import numpy as np
import torch

from bonsai_fast.methods.regression.design import Design
from bonsai_fast.methods.regression.estimate import Regression, scored_rows
from bonsai_fast.methods.regression.kendall import kendall_tau
from bonsai_fast.methods.regression.restricted_likelihood import (
    Evidence,
    held_out_errors,
    maximise_evidence,
)


def fit_ridge(
    masks: torch.Tensor,
    utility: torch.Tensor,
    *,
    prior: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> Regression:
    """Estimate relevance by Gaussian regression, everything in closed form.

        U_s = c - sum_i beta_i r_si + noise        r_si = 1 if sub-model s lacks unit i
        beta_i = (a + t_g(i)) rho_i + delta_i      t_g ~ N(0, v_t), delta_i ~ N(0, v_d s_i^2)

    with flat priors for c and a >= 0.

    rho is the prior divided by its sum over the group (over all units, without groups), so that a +
    t_g is the utility lost with the whole group, and priors need not be comparable between groups.
    t_g is there only with groups. s_i is rho_i, but at least a hundredth of its mean over the
    group: larger units deviate more. Without a prior all units of a group are alike; without groups
    either, a is zero: plain ridge.

    v_t, v_d and the noise maximise the restricted likelihood. Relevance is the posterior mean and
    its standard error the posterior standard deviation, given these. A unit that never varied has
    the mean and deviation that prior and group give it.

    `kendall_tau` and `r2` judge predictions of every utility from the other rows, rows of one block
    being left out together. They are taken relative to the mean of those other rows: without signal
    both are zero.

    Cost: O(S^2 C + S^3) for C units that vary; 8 S (S + G) bytes and 50 S KB beside the masks.

    Args:
        masks: bool [S, P], True = kept.
        utility: float [S], higher = better; rows whose utility is not finite are left out.
        prior: float [P], finite and >= 0.
        groups: int64 [P], the group of each unit.
        noise: float [S], > 0, standard deviation of each utility up to a common factor. None: all
            alike.
        blocks: int64 [S], the block of each row; give a sub-model and its complement the same one
            for an honest estimate on sub-models without theirs. None: a block is a set of identical
            rows.
    Raises:
        TypeError, ValueError: an argument is not as described, or fewer than four usable rows.
    Source: equation 3 of Dery et al., arXiv:2402.05406, with a prior for a penalty; best linear
        unbiased prediction, Henderson (1975).
    """
    keep, utilities, usable = scored_rows(masks, utility)
    sd = np.ones(len(utilities)) if noise is None else _vector("noise", noise, len(usable))[usable]
    if (sd <= 0).any():
        raise ValueError("noise: expected values > 0")
    rho = None if prior is None else _vector("prior", prior, keep.shape[1])
    if rho is not None and (rho < 0).any():
        raise ValueError("prior: expected values >= 0")
    group = None if groups is None else _vector("groups", groups, keep.shape[1])
    block = (
        _identical_rows(keep) if blocks is None else _vector("blocks", blocks, len(usable))[usable]
    )

    design, y = Design.of(keep, rho, group, sd), utilities / sd
    kernels = [design.kernel] if group is None else [design.kernel, design.mass @ design.mass.T]
    evidence = _fit(design, y, kernels, with_mean=rho is not None or group is not None)
    relevance, standard_error = _posterior(design, evidence, y)
    mean_removed = 1 - keep.mean(axis=0)  # also 1 for units removed in every row

    error = held_out_errors(evidence.precision, y, block) * sd
    nothing = maximise_evidence(y, 1 / sd[:, None], [np.zeros_like(design.kernel)])
    error_of_mean = held_out_errors(nothing.precision, y, block) * sd
    # rounded, so that predictions which differ by rounding errors alone are ties
    shift = np.round((error_of_mean - error) / max(float(utilities.std()), np.finfo(float).tiny), 9)
    held_out = np.full(len(usable), np.nan)
    held_out[usable] = utilities - error
    return Regression(
        relevance=torch.from_numpy(relevance),
        standard_error=torch.from_numpy(standard_error),
        intercept=float(evidence.fixed[0] @ y + mean_removed @ relevance),
        kendall_tau=kendall_tau(shift, utilities),
        r2=float(1 - error @ error / (error_of_mean @ error_of_mean))
        if np.ptp(utilities) > 0
        else 0.0,
        held_out=torch.from_numpy(held_out),
        hyperparameters={
            "prior_scale": float(evidence.fixed[1] @ y) if len(evidence.fixed) > 1 else 0.0,
            "unit_variance": evidence.variances[0],
            "group_variance": evidence.variances[1] if group is not None else 0.0,
            "noise_variance": evidence.noise,
            "log_evidence": evidence.log_likelihood,
        },
        num_rows=len(y),
        num_dropped=int((~usable).sum()),
    )


def _fit(design: Design, y: np.ndarray, kernels: list[np.ndarray], *, with_mean: bool) -> Evidence:
    intercept, mean = 1 / design.noise, design.mean_column
    rest = mean - intercept * (intercept @ mean) / (intercept @ intercept)
    # rows that all lack the same share of the prior say nothing about its scale
    if with_mean and len(y) > 3 and np.abs(rest * design.noise).max() > 1e-9 * design.weight.max():
        evidence = maximise_evidence(y, np.column_stack([intercept, mean]), kernels)
        if evidence.fixed[1] @ y > 0:  # a prior that points the wrong way is no prior
            return evidence
    return maximise_evidence(y, intercept[:, None], kernels)


def _posterior(design: Design, evidence: Evidence, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every coefficient, float64 [P] each, without a P x P matrix.

    With k_i = cov(beta_i, y) = v_d s_i^2 z_i + v_t rho_i M_g, z_i the unit's column, M_g its
    group's, and a = f . y:
        mean = a rho_i + k_i . P y
        variance = v_d s_i^2 + v_t rho_i^2 - k_i P k_i + rho_i^2 var(a) - 2 rho_i f . k_i
    """
    unit_variance, group_variance = (*evidence.variances, 0.0)[:2]
    a_map, a_variance = np.zeros(len(y)), 0.0
    if len(evidence.fixed) > 1:
        a_map, a_variance = evidence.fixed[1], float(evidence.fixed_covariance[1, 1])
    own, shared = unit_variance * design.deviation**2, group_variance * design.weight
    residual, projected_mass = evidence.precision @ y, evidence.precision @ design.mass

    # what every unit has through its group
    mean = design.weight * (a_map @ y) + shared * (residual @ design.mass)[design.groups]
    through_mass = (design.mass * projected_mass).sum(axis=0)[design.groups]
    variance = (
        own + shared * design.weight - shared**2 * through_mass + design.weight**2 * a_variance
    )
    variance -= 2 * design.weight * shared * (a_map @ design.mass)[design.groups]
    # what its own column adds
    for units, columns in design.chunks():
        mean[units] += own[units] * (residual @ columns)
        squared = np.einsum("sc,sc->c", columns, evidence.precision @ columns)
        crossed = np.einsum("sc,sc->c", columns, projected_mass[:, design.groups[units]])
        variance[units] -= own[units] ** 2 * squared + 2 * own[units] * shared[units] * crossed
        variance[units] -= 2 * design.weight[units] * own[units] * (a_map @ columns)
    return mean, np.sqrt(np.maximum(variance, 0))


def _identical_rows(keep: np.ndarray) -> np.ndarray:
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(row.tobytes(), len(seen)) for row in np.packbits(keep, axis=1)]
    )


def _vector(name: str, values: torch.Tensor, length: int) -> np.ndarray:
    """A finite vector of that length: float64, or int64 if it holds integers."""
    found = torch.as_tensor(values).detach().cpu()
    if found.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {tuple(found.shape)}")
    array: np.ndarray = (found.double() if found.is_floating_point() else found.long()).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values")
    return array
