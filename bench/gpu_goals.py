"""Goals of gpu.py for whole models, and times of all layers from the times of some."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_report import Report

from bonsai_fast.testing.cases import ModelShape

# (baseline, tokens, masked share) -> required speed-up of the engine over the baseline
GOALS = {
    ("batched", 4096, 0.05): 1.25,
    ("batched", 4096, 0.3): 1.6,
    ("batched", 4096, 0.5): 2.2,
    ("eager", 128, 0.05): 9.0,
    ("eager", 4096, 0.05): 2.6,
    ("eager", 4096, 0.3): 3.4,
    ("eager", 4096, 0.5): 4.6,
    # the speed of the vendor's library on the kept weights alone
    ("sliced", 4096, 0.05): 0.9,
    ("sliced", 4096, 0.3): 0.9,
    ("sliced", 4096, 0.5): 0.9,
}

# Seconds per sub-model, by way and masked share; None: any share takes the same time.
Seconds = dict[tuple[str, float | None], float]


@dataclass(frozen=True)
class Depths:
    """From the times of some layers to the times of all.

    Attributes:
        layers, total: layers that were measured, and layers of the model.
        shallow: times with half of the measured layers, by tokens.
    """

    layers: int
    total: int
    shallow: dict[int, Seconds]

    def of_all(self, tokens: int, found: Seconds) -> Seconds:
        """Times of all layers: each further layer costs as much as the last measured ones."""
        if self.layers == self.total:
            return dict(found)
        fewer = self.shallow.get(tokens, {})
        further = (self.total - self.layers) / (self.layers - self.layers // 2)
        return {
            key: seconds + (seconds - fewer[key]) * further
            for key, seconds in found.items()
            if key in fewer
        }


def compare(report: Report, shape: ModelShape, tokens: int, depths: Depths, found: Seconds) -> None:
    """Report the goals and the speed-ups that were reached, with all layers."""
    seconds = depths.of_all(tokens, found)
    is_whole = depths.layers == depths.total
    for (other, at, masked), goal in GOALS.items():
        theirs = seconds.get((other, masked), seconds.get((other, None)))
        ours = seconds.get(("auto", masked))
        if at != tokens or theirs is None or ours is None:
            continue
        ratio = theirs / ours
        report.add(
            "scoring",
            f"{shape.name:12} {tokens:6} tokens {masked:4.0%} masked  {ratio:.2f}x {other}, "
            f"goal {goal}x: {'met' if ratio >= goal else 'NOT met'}"
            f"{'' if is_whole else ' (extrapolated)'}",
            shape=shape.name, tokens=tokens, masked=masked, compared_with=other, ratio=ratio,
            goal=goal, met=ratio >= goal, extrapolated=not is_whole, layers=depths.total,
            seconds=ours, submodels_per_second=1 / ours,
        )  # fmt: skip
