"""Sub-models scored with their own output projections, against the smaller models that have them.

    physical   every sub-model's smaller model, cut out and filled with its output projections
               before, in a forward pass of its own; not timed: cutting it
    plain      MaskScorer.score without output projections: what these cost
    own        MaskScorer.score with them, as a function that has them ready

All are timed alternately on the same masks and tokens, in wall-clock and in processor time. On a
shared machine only processor time is reliable.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from bench_scoring import Case
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, OutputProjection, SequenceNLL
from bonsai_fast.surgery import remove_units
from bonsai_fast.testing.cases import synchronized_timer

ROUNDS = 3
CASES = [
    pytest.param(Case("smoke", 3, 2, 16, 0.8), id="smoke"),
    pytest.param(Case("SmolLM2-135M", 16, 2, 256, 0.8), id="random"),
    pytest.param(Case("SmolLM2-135M", 16, 2, 256, 0.8, probes=True), id="probes"),
]


class Scaled:
    """The parent's kept columns, times a factor for each mask: stands for a refit that is ready."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._made: dict[tuple[str, bytes], OutputProjection] = {}

    @torch.no_grad()
    def __call__(self, block: Block, keep_parts: Tensor) -> OutputProjection:
        key = block.output, keep_parts.numpy().tobytes()
        if key not in self._made:
            weight = self._model.get_submodule(block.output).weight
            columns = keep_parts.repeat_interleave(block.part_width).to(weight.device)
            factor = 1 + 0.2 * float(keep_parts.float().mean())
            self._made[key] = OutputProjection(factor * weight[:, columns])
        return self._made[key]

    @torch.no_grad()
    def smaller(self, layout: Layout, keep: Tensor) -> PreTrainedModel:
        """The model of one sub-model."""
        parent = copy.deepcopy(self._model)
        for block, kept in layout.keep_by_block(keep):
            if not bool(kept.all()):
                weight = parent.get_submodule(block.output).weight
                columns = kept.repeat_interleave(block.part_width).to(weight.device)
                weight[:, columns] = self(block, kept).weight
        return remove_units(parent, layout, keep)


@pytest.fixture(scope="module")
def parents(device: torch.device) -> Callable[[str], PreTrainedModel]:
    """Models by name."""

    def load(name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        if name == "smoke":
            sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=211, **sizes, **heads))
        else:
            model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
        return model.to(device).eval()

    return load


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("case", CASES)
def bench_compensated(benchmark, summarize, parents, device, case):
    model = parents(case.model)
    layout = Layout.of(model, attention="kv-group")
    keep = case.masks(layout)
    generator = torch.Generator().manual_seed(1)
    shape = (case.num_sequences, case.length)
    input_ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
    scorer, weights = MaskScorer(model, layout=layout), Scaled(model)
    clock: dict[str, list[float]] = {name: [] for name in ("physical", "plain", "own")}
    processor: dict[str, list[float]] = {name: [] for name in clock}
    losses: dict[str, Tensor] = {}

    def timed(name: str, score: Callable[[], Tensor]) -> Tensor:
        start, busy = synchronized_timer(), time.process_time()
        found = score()
        clock[name][-1] += synchronized_timer() - start
        processor[name][-1] += time.process_time() - busy
        return found

    def others() -> None:
        for times in (*clock.values(), *processor.values()):
            times.append(0.0)
        smaller = (SequenceNLL(weights.smaller(layout, row)) for row in keep)
        passes = [timed("physical", lambda nll=nll: nll(input_ids).cpu()) for nll in smaller]
        losses["physical"] = torch.stack(passes)
        timed("plain", lambda: scorer.score(keep, input_ids))

    def own() -> None:
        losses["own"] = timed("own", lambda: scorer.score(keep, input_ids, output_weights=weights))

    scorer.score(keep[:1], input_ids[:1, :16])  # code is loaded, threads are started
    benchmark.group = f"compensated {case.num_submodels} x {shape} tokens, {case}"
    benchmark.pedantic(own, setup=others, rounds=1 if case.model == "smoke" else ROUNDS)
    for name in ("physical", "plain"):
        texts = []
        for times in (clock, processor):
            ratios = [a / b for a, b in zip(times[name], times["own"], strict=True)]
            texts.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        benchmark.extra_info[f"own over {name}"] = f"clock {texts[0]}, processor {texts[1]}"
        table = "compensated: speed over others, clock | processor"
        summarize(table, str(case), name, " | ".join(texts))
    benchmark.extra_info["seconds"] = {"clock": clock, "processor": processor}
    # in bfloat16, as in bench_scoring
    torch.testing.assert_close(losses["own"], losses["physical"], rtol=0.03, atol=0.05)
