"""Sections of gpu.py about whole models: the engine's answers, then sub-models per second.

eager     (a) one forward pass of the model a sub-model and sequence, eager attention, masks
          multiplied in by hooks, all logits in float32
batched   (b) several sub-models in a batch, PyTorch's attention, masks multiplied row by row,
          all logits in float32
sliced    (c) a copy of the model from which a sub-model's units are cut; its forward passes
          alone, in batches, and the cutting apart from that
dense, slice, gather, auto    MaskScorer(engine="fused") by each route, and by that of its policy
round dense, pack, tail, split    the same on masks as a later round of pruning has them: some units
          gone from all sub-models, most kept by all, the others candidates; for the smallest masked
          share alone, of what is not gone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from baselines import multiplied, token_losses
from gpu_models import layers_that_fit, random_masks, random_model, round_masks
from gpu_report import Report
from transformers import PreTrainedModel

from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused import FusedEngine
from bonsai_fast.surgery import remove_units
from bonsai_fast.testing.cases import ModelShape, synchronized_timer

ROUTES = ("dense", "slice", "gather", "auto")
ROUND_ROUTES = ("dense", "pack", "tail", "split")
# most of what an engine may err in float32, and how much more than the hooks in bfloat16
FLOAT32_TOLERANCE, BFLOAT16_FACTOR = 1e-3, 2.0
# (what it is compared with, tokens, masked share) -> how many times as fast the engine is to be
GOALS = {
    ("batched", 4096, 0.05): 1.25,
    ("batched", 4096, 0.3): 1.6,
    ("batched", 4096, 0.5): 2.2,
    ("eager", 128, 0.05): 9.0,
    ("eager", 4096, 0.05): 2.6,
    ("eager", 4096, 0.3): 3.4,
    ("eager", 4096, 0.5): 4.6,
    # of the time that the vendor's library needs for what is kept
    ("sliced", 4096, 0.05): 0.9,
    ("sliced", 4096, 0.3): 0.9,
    ("sliced", 4096, 0.5): 0.9,
}


@dataclass(frozen=True)
class Load:
    """Models and text.

    Attributes:
        shapes: of the models.
        layers: of each; None: all, where they fit.
        tokens: of every sub-model, most important first, with how many sub-models are scored.
        max_length: of a sequence.
        batch_logits: elements of the logits of one batch of (b) and (c), at most.
        batch_tokens: tokens of it, at most.
        masked: shares of units that are removed.
        dtype: of the weights.
    """

    shapes: tuple[ModelShape, ...]
    layers: int | None
    tokens: dict[int, int]
    max_length: int
    batch_logits: int
    batch_tokens: int
    masked: tuple[float, ...]
    dtype: torch.dtype

    def batch(self, shape: ModelShape) -> int:
        """Tokens of a batch."""
        return min(self.batch_tokens, self.batch_logits // shape.vocab_size)


# published depths; the model of no other name is a tiny one
LAYERS = {"Llama-2-7B": 32, "Llama-3-8B": 32}
SMALL_LAYERS = 4


def engines(report: Report, device: torch.device) -> None:
    """The engine against hooks on a tiny model."""
    report.begin("engines", "routes of the engine against hooks, a tiny model")
    shape = ModelShape(
        name="tiny", hidden_size=192, intermediate_size=320, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, vocab_size=1000,
    )  # fmt: skip
    model = random_model(shape, 3, torch.float32, device)
    layout = Layout.of(model, attention="head", sublayers=True)
    drawn = torch.rand(12, len(layout), generator=torch.Generator().manual_seed(1)) < 0.8
    # some routes score the first half, those of later rounds the other
    keep = torch.cat([drawn, round_masks(layout, 12, 0.1)])
    tokens = torch.arange(3 * 150).view(3, 150) * 7 % 1000
    exact = MaskScorer(model, layout=layout, engine="hooks").score(keep, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        hooks = MaskScorer(model, layout=layout, engine="hooks").score(keep, tokens)
        for route in (*ROUTES, *ROUND_ROUTES[1:]):
            report.need(5, f"{route} in {dtype}")
            rows = slice(None, 12) if route in ROUTES else slice(12, None)
            budget = FLOAT32_TOLERANCE
            if dtype == torch.bfloat16:
                budget += BFLOAT16_FACTOR * float((hooks[rows] - exact[rows]).abs().max())
            with report.case("engines"):
                scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
                error = float((scorer.score(keep[rows], tokens) - exact[rows]).abs().max())
                if not error <= budget:
                    raise AssertionError(f"{route}, {dtype}: errs by {error:.3g}, not {budget:.3g}")
                report.add(
                    "engines",
                    f"{route:8} {dtype!s:15} errs by {error:.2g} of {budget:.2g} nats",
                    route=route, dtype=str(dtype), error=error, budget=budget,
                )  # fmt: skip


def scoring(report: Report, device: torch.device, load: Load) -> None:
    """Milliseconds a sub-model, for every shape, number of tokens and masked share."""
    report.begin("scoring", "milliseconds a sub-model")
    for shape in load.shapes:
        total = LAYERS.get(shape.name, SMALL_LAYERS)
        layers = layers_that_fit(shape, total, device) if load.layers is None else load.layers
        shallow: dict[int, Seconds] = {}
        if layers < total:
            print(f"  {shape}: {layers} of {total} layers; times of all are extrapolated from two")
            shallow = _at_depth(report, device, load, shape, layers // 2, None)
        _at_depth(report, device, load, shape, layers, Depths(layers, total, shallow))


# of a sub-model, by way and masked share; baselines that masks do not change have None
Seconds = dict[tuple[str, float | None], float]


@dataclass(frozen=True)
class Depths:
    """How times of some layers become times of all.

    Attributes:
        layers, total: measured, and of the model.
        shallow: times with half of those that were measured, by tokens.
    """

    layers: int
    total: int
    shallow: dict[int, Seconds]

    def of_all(self, tokens: int, found: Seconds) -> Seconds:
        """Times of the whole depth: every further layer costs what the last measured ones did."""
        if self.layers == self.total:
            return dict(found)
        fewer = self.shallow.get(tokens, {})
        further = (self.total - self.layers) / (self.layers - self.layers // 2)
        return {
            key: seconds + (seconds - fewer[key]) * further
            for key, seconds in found.items()
            if key in fewer
        }


def _at_depth(
    report: Report,
    device: torch.device,
    load: Load,
    shape: ModelShape,
    layers: int,
    depths: Depths | None,
) -> dict[int, Seconds]:
    report.need(20, f"{shape}, {layers} layers")
    model = random_model(shape, layers, load.dtype, device)
    times: dict[int, Seconds] = {}
    for tokens, count in load.tokens.items():
        found = times.setdefault(tokens, {})
        try:
            _Cases(report, load, shape, model, tokens, count, found).run()
        finally:
            if depths is not None:
                _compare(report, shape, tokens, depths, found)
    del model
    _free(device)
    return times


def _compare(
    report: Report, shape: ModelShape, tokens: int, depths: Depths, found: Seconds
) -> None:
    """Goals beside what was reached, with all layers."""
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


class _Cases:
    """One model, one number of tokens."""

    def __init__(
        self,
        report: Report,
        load: Load,
        shape: ModelShape,
        model: PreTrainedModel,
        tokens: int,
        count: int,
        found: Seconds,
    ) -> None:
        self._report, self._load, self._shape, self._model = report, load, shape, model
        self._tokens, self._count, self._found = tokens, count, found
        self._device = model.device
        length = min(tokens, load.max_length)
        generator = torch.Generator().manual_seed(1)
        self._text = torch.randint(
            shape.vocab_size, (tokens // length, length), generator=generator
        ).to(self._device)
        self._layout = Layout.of(model, attention="head")
        # at least one sub-model, whatever it takes
        self._together = max(1, min(count, load.batch(shape) // tokens))
        self._rows = max(1, load.batch(shape) // length)

    def run(self) -> None:
        """Both baselines that masks do not change, then everything that they do."""
        what = f"{self._shape} {self._tokens} tokens"
        keep = random_masks(self._layout, self._count, self._load.masked[0])
        self._report.need(10, f"eager {what}")
        self._attempt("eager", lambda: self._eager(keep[:1]), 1)
        self._report.need(10, f"batched {what}")
        self._attempt("batched", lambda: self._batched(keep[: self._together]), self._together)
        for masked in self._load.masked:
            keep = random_masks(self._layout, self._count, masked)
            self._report.need(10, f"{what} {masked:.0%}")
            self._sliced(keep[0], masked)
            for route in ROUTES:
                self._report.need(10, f"{route} {what} {masked:.0%}")
                self._fused(route, route, keep, masked)
        masked = min(self._load.masked)
        keep = round_masks(self._layout, self._count, masked)
        for route in ROUND_ROUTES:
            self._report.need(10, f"round {route} {what} {masked:.0%}")
            self._fused(f"round {route}", route, keep, masked)

    def _attempt(
        self,
        way: str,
        work: Callable[[], object],
        submodels: int,
        masked: float | None = None,
        **more: object,
    ) -> None:
        """Time the second of two calls; one that goes wrong is reported, and left out."""
        with self._report.case("scoring"):
            work()  # compiles, and fills caches
            with PeakMemory(self._device) as peak:
                start = synchronized_timer()
                work()
                seconds = (synchronized_timer() - start) / submodels
            self._found[way, masked] = seconds
            memory = "" if peak.bytes is None else f"  +{peak.bytes / 2**30:6.2f} GiB"
            self._row(way, masked, seconds, memory, peak_bytes=peak.bytes, **more)
        _free(self._device)

    def _row(
        self, way: str, masked: float | None, seconds: float, note: str = "", **more: object
    ) -> None:
        share = "any" if masked is None else f"{masked:.0%}"
        self._report.add(
            "scoring",
            f"{self._shape.name:12} {self._tokens:6} tokens {share:>4} masked  {way:11} "
            f"{1e3 * seconds:10.3f} ms{note}",
            shape=self._shape.name, tokens=self._tokens, masked=masked, way=way, seconds=seconds,
            submodels_per_second=1 / seconds, layers=len(self._model.model.layers), **more,
        )  # fmt: skip

    def _eager(self, keep: torch.Tensor) -> None:
        self._model.set_attn_implementation("eager")
        try:
            for row in keep:
                with multiplied(self._model, self._layout, row[None]):
                    for sequence in self._text:
                        token_losses(self._model, sequence[None])
        finally:
            self._model.set_attn_implementation("sdpa")

    def _batched(self, keep: torch.Tensor) -> None:
        with multiplied(self._model, self._layout, keep):
            for rows in self._text.split(self._rows):
                token_losses(self._model, rows.repeat(len(keep), 1))

    def _sliced(self, keep: torch.Tensor, masked: float) -> None:
        with self._report.case("scoring"):
            start = synchronized_timer()
            smaller = remove_units(self._model, self._layout, keep)
            self._row("cutting", masked, synchronized_timer() - start)
            # of the one sub-model as many rows as the others have together
            text = self._text.repeat(self._together, 1)
            self._attempt(
                "sliced",
                lambda: [token_losses(smaller, rows) for rows in text.split(self._rows)],
                self._together,
                masked,
            )
        smaller = None
        _free(self._device)

    def _fused(self, way: str, route: str, keep: torch.Tensor, masked: float) -> None:
        scorer = MaskScorer(self._model, layout=self._layout, engine="fused", route=route)
        assert isinstance(scorer.engine, FusedEngine)
        rates = scorer.engine.rates
        self._attempt(
            *(way, lambda: scorer.score(keep, self._text), len(keep), masked),
            memory_budget=scorer.memory_budget,
            rates=None if rates is None else asdict(rates),
        )


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
