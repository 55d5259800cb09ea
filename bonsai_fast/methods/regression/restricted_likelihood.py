"""Gaussian regression with variance components, by restricted maximum likelihood in the dual.

    y = X b + e,    e ~ N(0, sigma^2 (I + gamma K_w)),    K_w = w A / tr A + (1 - w) B / tr B

The fixed effects b have a flat prior and are integrated out; gamma and w are chosen by evidence,
sigma^2 in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# signal-to-noise ratios of the random effects, in steps that the evidence can barely tell apart
RATIOS = np.concatenate([[0.0], np.logspace(-5, 5, 101)])
MIXTURES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)
SMALLEST_NOISE = 1e-100  # utilities may all be equal


@dataclass(frozen=True, eq=False)
class Evidence:
    """A fitted model.

    Attributes:
        log_likelihood: restricted log-likelihood at the optimum, up to a constant that X fixes.
        noise: sigma^2.
        variances: prior variance of the effects behind each kernel.
        precision: [S, S], V^-1 with the fixed effects projected out (the P of REML, so that P X =
            0), V = cov(y).
        fixed: [q, S], the linear map from y to the estimate of b.
        fixed_covariance: [q, q].
    """

    log_likelihood: float
    noise: float
    variances: tuple[float, ...]
    precision: np.ndarray
    fixed: np.ndarray
    fixed_covariance: np.ndarray


def maximise_evidence(y: np.ndarray, x: np.ndarray, kernels: list[np.ndarray]) -> Evidence:
    """Fit one or two variance components.

    Args:
        y: float64 [S].
        x: float64 [S, q], of full rank q < S.
        kernels: float64 [S, S] each, positive semi-definite.
    Closed form but for a grid: one eigendecomposition a mixture, every ratio from it; O(S^3).
    Source: Patterson and Thompson (1971), for the likelihood; Kang et al. (2008), for its
        evaluation on one spectrum.
    """
    basis = np.linalg.qr(x, mode="complete")[0][:, x.shape[1] :]
    projected = [basis.T @ kernel @ basis for kernel in kernels]
    # a kernel that the fixed effects explain entirely has nothing left to scale
    scales = [
        len(inner) / trace if (trace := np.trace(inner)) > 1e-12 * np.trace(kernel) else 0.0
        for inner, kernel in zip(projected, kernels, strict=True)
    ]
    z = basis.T @ y
    weights = [(1.0,)] if len(kernels) == 1 else [(w, 1 - w) for w in MIXTURES]
    best = None
    for weight in weights:
        mixed = sum(w * s * kernel for w, s, kernel in zip(weight, scales, projected, strict=True))
        values, vectors = np.linalg.eigh(mixed)
        spectrum = 1 + RATIOS[:, None] * np.maximum(values, 0)
        noise = np.maximum((vectors.T @ z) ** 2 @ (1 / spectrum).T / len(z), SMALLEST_NOISE)
        score = -0.5 * (len(z) * np.log(noise) + np.log(spectrum).sum(axis=1))
        top = int(score.argmax())
        if best is None or score[top] > best[0]:
            best = (
                float(score[top]),
                float(noise[top]),
                weight,
                top,
                spectrum[top],
                basis @ vectors,
            )
    assert best is not None
    score, noise, weight, top, spectrum, rotated = best
    variances = tuple(
        float(noise * RATIOS[top] * w * s) for w, s in zip(weight, scales, strict=True)
    )
    precision = (rotated / (noise * spectrum)) @ rotated.T
    covariance = noise * np.eye(len(y)) + sum(
        v * kernel for v, kernel in zip(variances, kernels, strict=True)
    )
    fixed = np.linalg.pinv(x) @ (np.eye(len(y)) - covariance @ precision)
    return Evidence(score, noise, variances, precision, fixed, fixed @ covariance @ fixed.T)


def held_out_errors(precision: np.ndarray, y: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Error of predicting each block of rows from all others, variances held: float64 [S].

    In closed form: the block's part of P y, divided by its part of P.
    Source: Dubrule (1983), cross-validation of kriging in a unique neighbourhood.
    """
    weighted, errors = precision @ y, np.empty_like(y)
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        errors[rows] = np.linalg.lstsq(precision[np.ix_(rows, rows)], weighted[rows], rcond=None)[0]
    return errors
