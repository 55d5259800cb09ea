"""Section of gpu.py about whole models: sub-models per second.

eager     one forward pass of the model per sub-model and sequence: eager attention, masks
          multiplied in by hooks, all logits in float32
batched   several sub-models in a batch: PyTorch's attention, masks multiplied row by row, all
          logits in float32
sliced    a copy of the model without a sub-model's units: its forward passes in batches; making
          the copy is timed separately, as "cutting"
dense, slice, gather, auto    MaskScorer(engine="fused") by each route, and by the route it chooses
round dense, pack, tail, split    the same on masks of a later round of pruning: some units are
          removed from all sub-models, most are kept by all, the others are candidates. Only for the
          smallest masked share, as a share of the units that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from baselines import multiplied, token_losses
from gpu_goals import Depths, Seconds, compare
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


@dataclass(frozen=True)
class Load:
    """Models and text.

    Attributes:
        shapes: of the models.
        layers: of each; None: as many as fit.
        tokens: tokens per sub-model -> number of sub-models, most important first.
        max_length: of a sequence.
        batch_logits, batch_tokens: bounds of one batch of `batched` and `sliced`: elements of its
            logits, and its tokens.
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


# Published depths; any other model is a tiny one.
LAYERS = {"Llama-2-7B": 32, "Llama-3-8B": 32}
SMALL_LAYERS = 4


def scoring(report: Report, device: torch.device, load: Load) -> None:
    """Milliseconds per sub-model, for each shape, number of tokens and masked share."""
    report.begin("scoring", "milliseconds per sub-model")
    for shape in load.shapes:
        total = LAYERS.get(shape.name, SMALL_LAYERS)
        layers = layers_that_fit(shape, total, device) if load.layers is None else load.layers
        shallow: dict[int, Seconds] = {}
        if layers < total:
            print(f"  {shape}: {layers} of {total} layers; times of all are extrapolated from two")
            shallow = _at_depth(report, device, load, shape, layers // 2, None)
        _at_depth(report, device, load, shape, layers, Depths(layers, total, shallow))


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
                compare(report, shape, tokens, depths, found)
    del model
    _free(device)
    return times


class _Cases:
    """All ways to score with one model and one number of tokens."""

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
        # one sub-model even if it exceeds the bounds
        self._together = max(1, min(count, load.batch(shape) // tokens))
        self._rows = max(1, load.batch(shape) // length)

    def run(self) -> None:
        """The two baselines that any mask costs the same, then the others for each masked share."""
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
        """Time the second of two calls. A failure is reported and left out."""
        with self._report.case("scoring"):
            work()  # compiles kernels and fills caches
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
            # as many rows of the one sub-model as all sub-models have in `batched`
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
