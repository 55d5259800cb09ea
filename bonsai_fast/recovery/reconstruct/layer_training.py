"""Trains one decoder layer of a student to give its teacher's residual."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast.recovery.reconstruct.prefixes import Prefixes

# share of the training in which the learning rate rises
WARM_UP = 0.05
BETAS = (0.9, 0.95)
# a tensor of zeros, such as a new bias, is trained as one of this root mean square
LEAST_SCALE = 1e-2
# inputs of the layers on which the learning rate was chosen
MEASURED_WIDTH = 576


@dataclass(frozen=True)
class LayerTraining:
    """How a layer is trained.

    Attributes:
        steps: number of updates.
        batch: sequences in a step.
        learning_rate: at its highest, as a share of a tensor's root mean square; less where
            layers are wide.
        checks: how often the held-out text is looked at.
        held_out: number of held-out sequences that are looked at.
        seed: of the order of sequences; with the number of the layer.
    """

    steps: int
    batch: int
    learning_rate: float
    checks: int
    held_out: int
    seed: int


@dataclass(frozen=True)
class LayerOutcome:
    """What the training of a layer came to.

    Attributes:
        layer: its number.
        before, after: relative squared error of its output on held-out text.
        loss: mean relative squared error of the training batches; None without a step.
        steps: updates that were made.
        is_trainable: whether the layer has weights; one without sub-layers may have none.
    """

    layer: int
    before: float
    after: float
    loss: float | None
    steps: int
    is_trainable: bool = True

    @property
    def is_better(self) -> bool:
        return self.after < self.before


def train_layer(
    text: Prefixes,
    held_out: Prefixes,
    number: int,
    weights: Mapping[str, Tensor],
    how: LayerTraining,
    *,
    deadline: float = math.inf,
) -> tuple[dict[str, Tensor], LayerOutcome]:
    """Train all weights of a layer, in float32; neither the model nor `weights` are changed.

    Weights that are exactly zero in a matrix stay zero: they were pruned.

    Args:
        text, held_out: before the layer in the student, after it in the teacher.
        number: of the layer.
        weights: of the student's layer, by their names in it.
        how: steps, learning rate and the like.
        deadline: of `time.perf_counter()`; the learning rate is down by then.
    Returns:
        the weights that were best on held-out text, in their own dtype; none if none were better
        than before. And how it went.
    """
    if not weights:
        error = held_out.mean_error(number, {}, how.held_out, how.batch)
        return {}, LayerOutcome(number, error, error, None, 0, is_trainable=False)

    # leaves of their own: what the model holds gets no gradient
    masters = {
        name: x.detach().to(torch.float32, copy=True).requires_grad_()
        for name, x in weights.items()
    }
    masks = {name: x != 0 for name, x in masters.items() if x.dim() > 1 and bool((x == 0).any())}

    def deployed() -> dict[str, Tensor]:
        return {name: master.to(weights[name].dtype) for name, master in masters.items()}

    def check() -> float:
        return held_out.mean_error(number, deployed(), how.held_out, how.batch)

    groups = [{"params": [x], "scale": _scale(x.detach())} for x in masters.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
    before = best = check()
    kept: dict[str, Tensor] = {}
    losses: list[float] = []
    started, checks = time.perf_counter(), 0
    draws = _draws(text.num_sequences, how, number)

    def progress() -> float:
        """From 0 to 1, by steps or by time."""
        passed = time.perf_counter() - started
        return max(len(losses) / how.steps, passed / max(deadline - started, 1e-9))

    done = progress()
    while done < 1:
        rate = how.learning_rate * _schedule(done, how.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.enable_grad():
            loss = text.error(number, deployed(), next(draws))
            loss.backward()
        for name, mask in masks.items():
            gradient = masters[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        done = progress()
        if done * how.checks >= checks + 1:
            checks = int(done * how.checks)
            found = check()
            if found < best:
                best, kept = found, {name: x.detach().clone() for name, x in deployed().items()}
    mean = sum(losses) / len(losses) if losses else None
    return kept, LayerOutcome(number, before, best, mean, len(losses))


def _scale(weights: Tensor) -> float:
    """Root mean square, and less for wider layers (muP, Yang et al. 2022, arXiv:2203.03466).

    A step of Adam is of one size for all weights, and those of a row add up.
    """
    size = max(float(weights.square().mean().sqrt()), LEAST_SCALE)
    width = weights.shape[-1] if weights.dim() > 1 else MEASURED_WIDTH
    return size * min(1.0, math.sqrt(MEASURED_WIDTH / width))


def _schedule(done: float, steps: int) -> float:
    """Share of the learning rate: it rises, then falls to 0 as a cosine.

    Args:
        done: share of the training that is done, from 0 to 1.
        steps: in all.
    """
    return min(1.0, (done + 1 / steps) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))


def _draws(sequences: int, how: LayerTraining, number: int) -> Iterator[Tensor]:
    """Batches of sequences, int64 [batch], each sequence once before one comes again."""
    generator = torch.Generator().manual_seed(how.seed * 100_003 + number)
    batch = min(how.batch, sequences)
    while True:
        order = torch.randperm(sequences, generator=generator)
        yield from order[: sequences // batch * batch].view(-1, batch)
