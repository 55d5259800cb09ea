"""How fast a model is: prefill and decode, several models side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from bonsai_fast.scoring.nll import evaluation_mode

PREFILL_TOKENS = 512
DECODE_PROMPT_TOKENS = 64
DECODE_TOKENS = 24
REPEATS = 5


@dataclass(frozen=True)
class Latency:
    """Median speeds of one model at batch size 1.

    Attributes:
        prefill_tokens_per_s: a prompt of `prefill_tokens` in one forward pass.
        decode_tokens_per_s: greedy decoding with a KV cache, behind a prompt of 64 tokens.
        prefill_spread, decode_spread: (slowest - fastest) / median over the repeats.
        prefill_tokens, decode_tokens: how many tokens were timed.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_spread: float
    decode_spread: float
    prefill_tokens: int
    decode_tokens: int


def measure_latency(
    models: dict[str, PreTrainedModel], input_ids: torch.Tensor, *, repeats: int = REPEATS
) -> dict[str, Latency]:
    """Time models in turns, so that whatever else the machine does hits all of them alike.

    Args:
        models: what to time, by name.
        input_ids: int64 [B, T]; its first 512 tokens are the prompt (fewer if there are fewer).
        repeats: timed rounds, behind one that is not.
    """
    prompt = input_ids.flatten()[:PREFILL_TOKENS].view(1, -1)
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            seconds_prefill = _seconds(model, lambda m=model: _prefill(m, prompt))  # type: ignore[misc]
            seconds_decode = _decode_seconds(model, prompt[:, :DECODE_PROMPT_TOKENS])
            if repeat > 0:
                prefill[name].append(seconds_prefill)
                decode[name].append(seconds_decode)
    return {
        name: Latency(
            prefill_tokens_per_s=prompt.shape[1] / statistics.median(prefill[name]),
            decode_tokens_per_s=DECODE_TOKENS / statistics.median(decode[name]),
            prefill_spread=_spread(prefill[name]),
            decode_spread=_spread(decode[name]),
            prefill_tokens=prompt.shape[1],
            decode_tokens=DECODE_TOKENS,
        )
        for name in models
    }


def _spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _seconds(model: PreTrainedModel, run: Callable[[], object]) -> float:
    _synchronize(model)
    start = time.perf_counter()
    run()
    _synchronize(model)
    return time.perf_counter() - start


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@torch.inference_mode()
def _prefill(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    with evaluation_mode(model):
        model(input_ids=prompt.to(model.device), use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def _decode_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    with evaluation_mode(model):
        cache = DynamicCache(config=model.config)
        logits = model(
            input_ids=prompt.to(model.device), past_key_values=cache, use_cache=True
        ).logits

        def decode() -> None:
            token = logits[:, -1:].argmax(dim=-1)
            for _ in range(DECODE_TOKENS):
                step = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = step.logits[:, -1:].argmax(dim=-1)

        return _seconds(model, decode)
