"""Prefill and decode, end to end: a dense model, smaller ones, and ones with half the weights zero.

As in table 2 of the Bonsai paper, chunks of an evaluation text pass through the whole model. Here
the LM head reads only the last position of each chunk, as in generation, and decoding follows. All
variants of a model are timed alternately, in wall-clock and in processor time: on a shared machine
only processor time is reliable. If they do not fit into memory together, each is timed alternately
with the dense model.

Published, for comparison only (A6000, LLaMA-2 7B, 50 %): 1.58x structurally pruned, 1.14x for 2:4,
0.75x for 2:4 with LoRA beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
)
from variants import Variant, decoder_linears, missing_kernels, variants

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.evaluation.text import evaluation_sequences
from bonsai_fast.latency.semi_structured import stored_bytes
from bonsai_fast.latency.timing import Rounds, Workload, measure_rounds, random_prompt
from bonsai_fast.testing.cases import MODEL_SHAPES, synchronized_timer

SMOKE, REAL = "smoke", "SmolLM2-135M"
BATCHES = (1, 8, 32, 128)
ROUNDS = {"cpu": 3, "cuda": 5}
CHECKED_TOKENS = 32
# the whole of a model's sequence length where a pass of so many tokens allows it
CUDA_TOKENS_PER_PASS, CUDA_NEW = 16384, 64
# a CPU reads tokens a thousand times slower, and a batch's rate settles within a few hundred
CPU_WORK = {1: (512, 12), 8: (64, 8), 32: (16, 4), 128: (4, 3)}
# dense, pruned, and room for caches and activations, in multiples of the dense weights
ROOM = 3.0


@dataclass(frozen=True)
class Parent:
    """A dense model and how its text is made."""

    model: PreTrainedModel
    tokens: Callable[[int, int], torch.Tensor]  # (batch, length) -> int64 [batch, length]


def random_config(name: str) -> LlamaConfig | PhiConfig:
    """The published sizes."""
    if name == SMOKE:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
        return LlamaConfig(vocab_size=211, hidden_size=64, intermediate_size=1024, **heads)
    shape = next(shape for shape in MODEL_SHAPES if shape.name == name)
    kind, positions = (PhiConfig, 2048) if name.startswith("Phi") else (LlamaConfig, 4096)
    names = ("vocab_size", "hidden_size", "intermediate_size")
    heads = ("num_attention_heads", "num_key_value_heads")
    sizes = {size: getattr(shape, size) for size in (*names, *heads)}
    return kind(**sizes, num_hidden_layers=32, max_position_embeddings=positions)


def make_parent(name: str, device: torch.device) -> Parent:
    """Load or draw a model; skip one that does not fit on the device."""
    if name == REAL:
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(embedded_model())

        def english(batch: int, length: int) -> torch.Tensor:
            text = evaluation_sequences(
                "builtin", tokenizer, max_tokens=batch * length, length=length, calibration=None
            )
            return text.input_ids.repeat(-(-batch // len(text.input_ids)), 1)[:batch]

        return Parent(model.to(device).eval(), english)
    config = random_config(name)
    dtype = torch.float32 if name == SMOKE else torch.bfloat16
    if name != SMOKE:
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config, dtype=dtype).num_parameters()
        needed = ROOM * size * dtype.itemsize
        room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        if room < needed:
            pytest.skip(f"{name}: {needed / 1e9:.0f} GB of CUDA memory are needed")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def random(batch: int, length: int) -> torch.Tensor:
        return random_prompt({name: model}, Workload(batch=batch, prompt=length))

    return Parent(model, random)


def work_of(name: str, batch: int, device: torch.device, longest: int) -> Workload:
    """The work of one round."""
    if name == SMOKE:
        return Workload(batch=batch, prompt=4, new=2)
    if device.type == "cpu":
        prompt, new = CPU_WORK[batch]
        return Workload(batch=batch, prompt=prompt, new=new)
    prompt = min(longest - CUDA_NEW, CUDA_TOKENS_PER_PASS // batch)
    return Workload(batch=batch, prompt=prompt, new=CUDA_NEW)


class Bench:
    """A parent, and its variants while they are needed."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.parent = make_parent(name, device)
        dtype = self.parent.model.dtype
        self.missing = missing_kernels(device, dtype)
        self.variants = list(variants(device, dtype))
        size = stored_bytes(self.parent.model)
        self.together = device.type == "cpu" or size * (len(self.variants) + 2) < 0.5 * (
            torch.cuda.get_device_properties(device).total_memory
        )
        self.built: dict[str, PreTrainedModel] = {}
        self.checked: set[str] = set()

    def groups(self) -> Iterator[dict[str, PreTrainedModel]]:
        """Models that are timed alternately, the dense one first."""
        dense = {"dense": self.parent.model}
        if self.together:
            for variant in self.variants:
                if variant.name not in self.built:
                    self.built[variant.name] = variant.build(self.parent.model)
            yield {**dense, **self.built}
            return
        for variant in self.variants:
            yield {**dense, variant.name: variant.build(self.parent.model)}

    def check(self, models: dict[str, PreTrainedModel]) -> None:
        """Assert, once, that each variant computes the right numbers."""
        input_ids = self.parent.tokens(1, CHECKED_TOKENS)
        for variant in self.variants:
            if variant.name in models and variant.name not in self.checked:
                self._check(variant, models[variant.name], input_ids)

    def _check(self, variant: Variant, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
        variant.check(self.parent.model, model, input_ids)
        self.checked.add(variant.name)


@pytest.fixture(scope="module")
def benches(device: torch.device) -> Iterator[Callable[[str], Bench]]:
    """Name -> bench; one model's at a time."""
    current: list[Bench] = []

    def get(name: str) -> Bench:
        if not current or current[0].name != name:
            current.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            current.append(Bench(name, device))
        return current[0]

    yield get
    current.clear()


def describe(
    model: PreTrainedModel,
    rounds: Rounds,
    dense: Rounds,
    work: Workload,
    stream_gb_per_s: float,
    gemm_gflop_per_s: float,
) -> dict[str, float | int | None]:
    """Results of one model, for the JSON."""
    linears = sum(linear.weight.numel() for linear in decoder_linears(model).values())
    head = model.get_output_embeddings().weight.numel()
    flops = 2 * work.batch * (work.prompt * linears + head)
    size = stored_bytes(model)
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": size,
        "work_bytes": rounds.work_bytes,
        "prefill_tokens_per_s": work.batch * work.prompt / rounds.prefill.median,
        "decode_tokens_per_s": work.batch * work.new / rounds.decode.median,
        "prefill_spread": rounds.prefill.spread,
        "decode_spread": rounds.decode.spread,
        "prefill_speedup": rounds.prefill.speedup_over(dense.prefill),
        "decode_speedup": rounds.decode.speedup_over(dense.decode),
        "prefill_processor_speedup": rounds.prefill.speedup_over(dense.prefill, processor=True),
        "decode_processor_speedup": rounds.decode.speedup_over(dense.decode, processor=True),
        # of the products with weights; attention's come on top
        "prefill_flops": flops,
        "prefill_percent_of_gemm": 100 * flops / rounds.prefill.median / 1e9 / gemm_gflop_per_s,
        "decode_bytes": size * work.new,
        "decode_percent_of_stream": 100
        * (size * work.new / rounds.decode.median / 1e9 / stream_gb_per_s),
    }


CASES = [
    pytest.param(SMOKE, 2, id="smoke"),
    *(
        pytest.param(name, batch, id=f"{name}-{batch}")
        for name in (REAL, "Phi-2", "Llama-2-7B", "Llama-3-8B")
        for batch in BATCHES
    ),
]


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize(("name", "batch"), CASES)
def bench_latency(
    benchmark, benches, summarize, stream_gb_per_s, gemm_gflop_per_s, device, name, batch
):
    bench = benches(name)
    longest = bench.parent.model.config.max_position_embeddings
    work = work_of(name, batch, device, longest)
    rounds = 1 if name == SMOKE else ROUNDS[device.type]
    input_ids = bench.parent.tokens(work.batch, work.prompt)
    peak = gemm_gflop_per_s(bench.parent.model.dtype)
    rows: dict[str, dict[str, float | int | None]] = {}

    def all_in_turns() -> None:
        for models in bench.groups():
            try:
                measured = measure_rounds(models, work, input_ids=input_ids, rounds=rounds)
            except torch.OutOfMemoryError:
                left_out.extend(model for model in models if model != "dense")
                continue
            for model, times in measured.items():
                found = describe(
                    models[model], times, measured["dense"], work, stream_gb_per_s, peak
                )
                rows.setdefault(model, found)
            bench.check(models)

    left_out: list[str] = []
    benchmark.group = f"latency {name} batch {batch}, all variants in turns"
    benchmark.pedantic(all_in_turns, rounds=1)
    benchmark.extra_info |= {
        "baseline": "dense",
        "batch": batch,
        "prompt": work.prompt,
        "new": work.new,
        "rounds": rounds,
        "dtype": str(bench.parent.model.dtype),
        "variants": rows,
        "missing": bench.missing,
        "out_of_memory": left_out,
    }
    for phase in ("prefill", "decode"):
        table = f"{name}, {phase}: times dense by the clock (by processor time)"
        column = f"batch {batch}"
        for model, row in rows.items():
            text = f"{row[f'{phase}_speedup']:.2f} ({row[f'{phase}_processor_speedup']:.2f})"
            summarize(table, model, column, text)
        for model in left_out:
            summarize(table, model, column, "no memory")
        if rows:
            fastest = max(rows, key=lambda model: rows[model][f"{phase}_speedup"])
            summarize(table, "fastest", column, fastest)
        for line in bench.missing:
            summarize(table, f"({line})", column, "")
    assert left_out or len(rows) == len(bench.variants) + 1
