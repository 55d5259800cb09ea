"""Tokens per second in llama.cpp: a model, and the same model with 30 % of the decoder removed.

Both files are timed alternately, in one process, on one thread, in processor time: other work on
the machine affects both equally. Prefill is a prompt of 128 tokens; decoding, 32 tokens after one
token. Only the widths matter for the speed: channels are removed in multiples of 32, and one KV
group of every third layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.export import to_gguf
from bonsai_fast.export.engines.run_llama_cpp import load
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained

pytest.importorskip("xllamacpp")

PROMPT, DECODED, CONTEXT = 128, 32, 256
SPARSITY, MULTIPLE = 0.3, 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second of processor time."""

    prefill: float
    decode: float


class Timed:
    """A file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self.server = load(str(path), CONTEXT, 1)
        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []

    def round(self, prompt: list[int]) -> None:
        """Time prefill and decoding once; no request reuses the cache of another."""
        self.prefill_seconds.append(self._seconds(prompt, 1))
        one = self._seconds(prompt[:1], 1)
        self.decode_seconds.append(self._seconds(prompt[:1], 1 + DECODED) - one)

    def speed(self) -> Speed:
        """The best of all rounds."""
        return Speed(PROMPT / min(self.prefill_seconds), DECODED / min(self.decode_seconds))

    def _seconds(self, prompt: list[int], count: int) -> float:
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        start = time.process_time()
        answer = self.server.handle_completions(request)
        seconds = time.process_time() - start
        assert answer["usage"]["completion_tokens"] == count, answer
        assert answer["usage"]["prompt_tokens"] == len(prompt), answer
        return seconds


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with at most 30 % of the decoder removed."""
    layout = Layout.of(model, attention="kv-group")
    keep = torch.ones(len(layout), dtype=torch.bool)
    channels = [group for group in layout.groups if layout[group.start].kind == "channel"]
    for group in layout.groups:
        if layout[group.start].kind != "channel" and group.layer % 3 == 1:
            keep[group.stop - 1] = False
    budget = SPARSITY * layout.num_decoder_parameters - layout.num_removed_parameters(keep)
    steps = int(budget / (MULTIPLE * layout[channels[0].start].num_parameters))
    # the first two and the last two layers keep their channels
    middle = channels[2:-2] or channels
    for step in range(steps):
        group, turn = middle[step % len(middle)], step // len(middle)
        assert group.start + (turn + 1) * MULTIPLE < group.stop, "too few channels in the middle"
        keep[group.start + turn * MULTIPLE : group.start + (turn + 1) * MULTIPLE] = False
    removed = layout.num_removed_parameters(keep) / layout.num_decoder_parameters
    assert removed <= SPARSITY
    return remove_units(model, layout, keep)


def tiny() -> tuple[PreTrainedModel, Any]:
    """A random model and a tokenizer of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["that this there then"] * 4, trainer)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes, **heads))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, precision) -> the dense and the pruned model as GGUF, written once."""
    root, written = tmp_path_factory.mktemp("llama_cpp"), {}

    def write(name: str, precision: str) -> dict[str, Path]:
        if (name, precision) in written:
            return written[name, precision]
        if precision == "q4_k_m":
            from k_quants import quantize_q4_k_m

            sources = write(name, "f16")
            found = {kind: root / f"{name}-{kind}-{precision}.gguf" for kind in sources}
            for kind, source in sources.items():
                quantize_q4_k_m(source, found[kind])
        else:
            found = {}
            for kind in ("dense", "pruned"):
                directory = root / f"{name}-{kind}"
                if not directory.is_dir():
                    _save(name, kind, directory)
                found[kind] = root / f"{name}-{kind}-{precision}.gguf"
                to_gguf(directory, found[kind], precision=precision)
        written[name, precision] = found
        return found

    return write


def _save(name: str, kind: str, directory: Path) -> None:
    if name == "smoke":
        model, tokenizer = tiny()
    else:
        source = embedded_model()
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    smaller = pruned(model) if kind == "pruned" else model
    save_pretrained(smaller, directory, tokenizer=tokenizer)


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize(
    ("name", "rounds"),
    [pytest.param("smoke", 1, id="smoke"), pytest.param("SmolLM2-135M", 5, id="SmolLM2-135M")],
)
def bench_llama_cpp(benchmark, summarize, files, name, rounds, precision):
    timed = {kind: Timed(path) for kind, path in files(name, precision).items()}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 256, (PROMPT,), generator=generator).tolist()
    benchmark.group = f"llama.cpp {name} {precision}, dense and pruned in turns"

    def all_in_turns() -> None:
        for one in timed.values():
            one.round(prompt)

    benchmark.pedantic(all_in_turns, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0)
    speed = {kind: one.speed() for kind, one in timed.items()}
    dense, smaller = speed["dense"], speed["pruned"]
    assert timed["pruned"].size < timed["dense"].size
    benchmark.extra_info |= {
        "baseline": "dense",
        "prefill_ratio": smaller.prefill / dense.prefill,
        "decode_ratio": smaller.decode / dense.decode,
        "size_ratio": timed["pruned"].size / timed["dense"].size,
        **{f"{kind}_prefill_tokens_per_s": value.prefill for kind, value in speed.items()},
        **{f"{kind}_decode_tokens_per_s": value.decode for kind, value in speed.items()},
        **{f"{kind}_megabytes": one.size / 1e6 for kind, one in timed.items()},
    }
    for phase in ("prefill", "decode"):
        ratio = f"{benchmark.extra_info[f'{phase}_ratio']:.2f}"
        summarize(f"llama.cpp, {name}, {SPARSITY:.0%} pruned: times dense", phase, precision, ratio)
    if name != "smoke":
        # the goal; processor time varies by some per cent
        assert smaller.prefill > dense.prefill and smaller.decode > dense.decode
