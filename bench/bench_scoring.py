"""Sub-models scored per second: both engines against the loops that one would write without them.

    one_by_one   one sub-model at a time: hooks multiply its masks in, HF computes logits and loss
    batched      several sub-models in one batch: hooks multiply masks row by row, HF computes all
                 logits, one loss
    hooks        MaskScorer(engine="hooks")
    fused        MaskScorer(engine="fused")

All are timed alternately on the same masks and tokens, in wall-clock and in processor time. On a
shared machine only processor time is reliable.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from baselines import multiplied, token_losses
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.testing.cases import synchronized_timer

Score = Callable[[PreTrainedModel, Layout, torch.Tensor, torch.Tensor], torch.Tensor]

ROUNDS = 3
# Tokens in one batch of `batched`; its logits take 4096 * 49152 * (2 + 4) bytes = 1.2 GB
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """Sub-models and text.

    `kept` is the share of units that each sub-model keeps at random. The sub-models of `probes`
    differ from a common base in one group of units only, as those of the default method do.
    """

    model: str
    num_submodels: int
    num_sequences: int
    length: int
    kept: float
    probes: bool = False

    def __str__(self) -> str:
        kind = "probes of" if self.probes else "random"
        return f"{self.model} {kind} {self.kept:.0%} kept"

    def masks(self, layout: Layout) -> torch.Tensor:
        """Keep masks, bool [S, P]."""
        generator = torch.Generator().manual_seed(0)
        if not self.probes:
            return torch.rand(self.num_submodels, len(layout), generator=generator) < self.kept
        base = torch.rand(len(layout), generator=generator) < self.kept
        masks = base.repeat(self.num_submodels, 1)
        step = max(1, len(layout.groups) // self.num_submodels)
        for keep, group in zip(masks, layout.groups[::step], strict=False):
            keep[group.start : group.stop] &= torch.rand(len(group), generator=generator) < 0.8
        return masks


CASES = [
    pytest.param(Case("smoke", 3, 2, 16, 0.9), id="smoke"),
    pytest.param(Case("SmolLM2-135M", 2, 4, 256, 0.9), id="10% masked"),
    pytest.param(Case("SmolLM2-135M", 2, 4, 256, 0.5), id="50% masked"),
    pytest.param(Case("SmolLM2-135M", 8, 1, 256, 0.9, probes=True), id="probes"),
]
# (sub-models, tokens of one sequence); the others are compared with the first.
CURVE = ((2, 128), (4, 128), (8, 128), (2, 256), (2, 512))


def _chunk(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    with multiplied(model, layout, keep):
        losses = token_losses(model, input_ids.repeat(len(keep), 1))
    return losses.mean(dim=1).view(len(keep), len(input_ids)).cpu()


def one_by_one(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return torch.cat([_chunk(model, layout, row[None], input_ids) for row in keep])


def batched(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    count = max(1, BATCH_TOKENS // input_ids.numel())
    return torch.cat([_chunk(model, layout, rows, input_ids) for rows in keep.split(count)])


def hooks(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return MaskScorer(model, layout=layout, engine="hooks").score(keep, input_ids)


def fused(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return MaskScorer(model, layout=layout, engine="fused").score(keep, input_ids)


BASELINES: dict[str, Score] = {"one_by_one": one_by_one, "batched": batched, "hooks": hooks}


@pytest.fixture(scope="module")
def parents(device: torch.device) -> Callable[[str], PreTrainedModel]:
    """Models by name, loaded once."""
    loaded: dict[str, PreTrainedModel] = {}

    def load(name: str) -> PreTrainedModel:
        if name not in loaded:
            torch.manual_seed(0)
            if name == "smoke":
                sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
                heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
                model = LlamaForCausalLM(LlamaConfig(vocab_size=211, **sizes, **heads))
            else:
                model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
            loaded[name] = model.to(device).eval()
        return loaded[name]

    return load


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("case", CASES)
def bench_scoring(benchmark, summarize, parents, device, case):
    model = parents(case.model)
    layout = Layout.of(model)
    keep = case.masks(layout)
    input_ids = torch.randint(
        0,
        model.config.vocab_size,
        (case.num_sequences, case.length),
        generator=torch.Generator().manual_seed(1),
    ).to(device)
    arguments = (model, layout, keep, input_ids)
    clock: dict[str, list[float]] = {name: [] for name in (*BASELINES, "fused")}
    processor: dict[str, list[float]] = {name: [] for name in clock}
    losses: dict[str, torch.Tensor] = {}

    def timed(name: str, score: Score) -> None:
        start, busy = synchronized_timer(), time.process_time()
        losses[name] = score(*arguments)
        clock[name].append(synchronized_timer() - start)
        processor[name].append(time.process_time() - busy)

    def baselines() -> None:
        for name, score in BASELINES.items():
            timed(name, score)

    fused(model, layout, keep[:1], input_ids[:1, :16])  # code is loaded, threads are started
    benchmark.group = f"score {case.num_submodels} x {tuple(input_ids.shape)} tokens, {case}"
    benchmark.pedantic(timed, args=("fused", fused), setup=baselines, rounds=ROUNDS)
    for name, seconds in clock.items():
        benchmark.extra_info[name] = {"seconds": seconds, "processor_seconds": processor[name]}
    for name in BASELINES:
        ratios = [a / b for a, b in zip(processor[name], processor["fused"], strict=True)]
        walls = [a / b for a, b in zip(clock[name], clock["fused"], strict=True)]
        benchmark.extra_info[f"fused over {name}"] = (
            f"processor {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"clock {statistics.median(walls):.2f}x ({min(walls):.2f} to {max(walls):.2f})"
        )
        text = f"{statistics.median(walls):.2f} ({statistics.median(ratios):.2f})"
        summarize("scoring: fused over others, clock (processor)", str(case), name, text)
    for name in clock:
        # bfloat16 errs by up to 0.2 of 20 nats in each of them, on random tokens and half a model
        torch.testing.assert_close(losses[name], losses["one_by_one"], rtol=0.03, atol=0.05)


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("name", ["smoke", "SmolLM2-135M"])
def bench_scoring_curve(benchmark, summarize, parents, device, name):
    """Time against sub-models and tokens; 1.0 is linear, less is better than that."""
    model = parents(name)
    layout = Layout.of(model)
    points = ((2, 8), (4, 8)) if name == "smoke" else CURVE
    most, longest = (max(numbers) for numbers in zip(*points, strict=True))
    keep = Case(name, most, 1, longest, 0.9).masks(layout)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    input_ids = torch.randint(0, vocabulary, (1, longest), generator=generator).to(device)
    scorer = MaskScorer(model, layout=layout)
    clock: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    processor: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    losses: dict[tuple[int, int], torch.Tensor] = {}

    def all_in_turns() -> None:
        for submodels, length in points:
            start, busy = synchronized_timer(), time.process_time()
            point = submodels, length
            losses[point] = scorer.score(keep[:submodels], input_ids[:, :length])
            clock[point].append(synchronized_timer() - start)
            processor[point].append(time.process_time() - busy)

    benchmark.group = f"score {name}, sub-models x tokens in turns"
    all_in_turns()
    for times in (*clock.values(), *processor.values()):
        times.clear()
    benchmark.pedantic(all_in_turns, rounds=1 if name == "smoke" else ROUNDS)
    first = points[0]
    for point in points:
        work = point[0] * point[1] / (first[0] * first[1])
        texts = []
        for times in (clock, processor):
            ratios = [a / b for a, b in zip(times[point], times[first], strict=True)]
            texts.append(f"{statistics.median(ratios) / work:.2f}")
        benchmark.extra_info[f"{point[0]} sub-models x {point[1]} tokens"] = {
            "seconds": clock[point],
            "processor_seconds": processor[point],
            "times_work": work,
        }
        row = f"{point[0]} sub-models x {point[1]} tokens"
        table = f"scoring {name}: time over that of the first for as many tokens"
        summarize(table, row, "clock (processor)", f"{texts[0]} ({texts[1]})")
    # fewer sub-models in the batch, the same losses
    for submodels, length in points:
        if length == first[1]:
            torch.testing.assert_close(
                losses[submodels, length][: first[0]], losses[first], rtol=0.03, atol=0.05
            )
