"""How fast a model is: prefill and decode, several models side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.scoring.sequence_nll import evaluation_mode

ROUNDS = 5
PROMPT = 512
# what is run before anything is measured: threads start, code is loaded, weights are read
WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every model does in a round: a prompt in one forward pass, then greedy decoding.

    Attributes:
        batch: sequences at once.
        prompt: tokens of each.
        new: tokens decoded one after another behind the first, which the prompt's pass gives.
    """

    batch: int = 1
    prompt: int = PROMPT
    new: int = 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @classmethod
    def fitting(
        cls, models: Mapping[str, PreTrainedModel], *, batch: int = 1, new: int = 24
    ) -> Workload:
        """The usual prompt, or the longest that all models have positions for."""
        limits = [limit for limit in map(max_positions, models.values()) if limit is not None]
        prompt = max(1, min([PROMPT, *(limit - new for limit in limits)]))
        return cls(batch=batch, prompt=prompt, new=new)

    def check_fits(self, name: str, model: PreTrainedModel) -> None:
        """Raise ValueError if the model has not as many positions."""
        longest = max_positions(model)
        if longest is not None and self.prompt + self.new > longest:
            raise ValueError(
                f"a prompt of {self.prompt} and {self.new} new tokens are more than the "
                f"{longest} positions of {name}"
            )


@dataclass
class PhaseTimes:
    """One entry a round.

    Attributes:
        seconds: by the clock, synchronised with the device.
        processor_seconds: of all threads of this process; other work on the machine hardly counts.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds by the clock."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the seconds by the clock, over their median; 0 for one round."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median

    def speedup_over(self, other: PhaseTimes, *, processor: bool = False) -> float:
        """Median over the rounds of other's seconds over ours in the same round."""
        theirs = other.processor_seconds if processor else other.seconds
        ours = self.processor_seconds if processor else self.seconds
        return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


@dataclass
class Rounds:
    """All that was measured of one model.

    Attributes:
        prefill: the prompt's pass up to the first token.
        decode: all further tokens.
        work_bytes: memory that a round takes at its peak beside the weights; None where it cannot
            be measured.
    """

    prefill: PhaseTimes = field(default_factory=PhaseTimes)
    decode: PhaseTimes = field(default_factory=PhaseTimes)
    work_bytes: int | None = None


@dataclass(frozen=True)
class Latency:
    """Speeds of one model: medians over rounds in which all models took turns.

    Attributes:
        prefill_tokens_per_s, decode_tokens_per_s: of all sequences together.
        time_to_first_token_s: seconds for the prompt's pass and the first token.
        prefill_spread, decode_spread: interquartile range of the seconds over their median.
        prefill_speedup, decode_speedup: over the first model; median of the ratios of rounds.
        work_bytes: memory that a round takes beside the weights; None where unknown.
        batch, prefill_tokens, decode_tokens: sequences; tokens of each that were timed.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    prefill_spread: float
    decode_spread: float
    prefill_speedup: float
    decode_speedup: float
    work_bytes: int | None
    batch: int
    prefill_tokens: int
    decode_tokens: int

    @classmethod
    def of(cls, rounds: Rounds, first: Rounds, work: Workload) -> Latency:
        """Summarise what was measured of a model beside the first one."""
        return cls(
            prefill_tokens_per_s=work.batch * work.prompt / rounds.prefill.median,
            decode_tokens_per_s=work.batch * work.new / rounds.decode.median,
            time_to_first_token_s=rounds.prefill.median,
            prefill_spread=rounds.prefill.spread,
            decode_spread=rounds.decode.spread,
            prefill_speedup=rounds.prefill.speedup_over(first.prefill),
            decode_speedup=rounds.decode.speedup_over(first.decode),
            work_bytes=rounds.work_bytes,
            batch=work.batch,
            prefill_tokens=work.prompt,
            decode_tokens=work.new,
        )


def measure_latency(
    models: Mapping[str, PreTrainedModel],
    work: Workload,
    *,
    input_ids: torch.Tensor | None = None,
    rounds: int = ROUNDS,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Latency]:
    """Time models alternately, so background load affects all equally.

    Args, Raises: as `measure_rounds`.
    """
    measured = measure_rounds(models, work, input_ids=input_ids, rounds=rounds, advance=advance)
    first = next(iter(measured.values()))
    return {name: Latency.of(times, first, work) for name, times in measured.items()}


def measure_rounds(
    models: Mapping[str, PreTrainedModel],
    work: Workload,
    *,
    input_ids: torch.Tensor | None = None,
    rounds: int = ROUNDS,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Rounds]:
    """The same with every round's times.

    Args:
        models: what to time, by name; the first is what the others are compared with.
        work: what each does in a round.
        input_ids: int64 [batch, prompt]; tokens drawn at random, which takes as long, if None.
        rounds: timed rounds, behind one that is not and in which memory is measured.
        advance: called with 1 behind every model in every round.
    Raises:
        ValueError: there is no model, the work is longer than a model's positions, or the tokens
            have another shape.
        torch.OutOfMemoryError: CUDA has not enough.
    """
    if not models:
        raise ValueError("expected at least one model")
    for name, model in models.items():
        work.check_fits(name, model)
    if input_ids is None:
        input_ids = random_prompt(models, work)
    if tuple(input_ids.shape) != (work.batch, work.prompt):
        raise ValueError(
            f"input_ids: expected {(work.batch, work.prompt)}, got {tuple(input_ids.shape)}"
        )
    results = {name: Rounds() for name in models}
    for name, model in models.items():
        _generate(model, input_ids[:, :WARM_UP_TOKENS], 1)
        with PeakMemory(model.device) as peak:
            _generate(model, input_ids, work.new)
        results[name].work_bytes = peak.bytes
        advance(1)
    for _ in range(rounds):
        for name, model in models.items():
            prefill, decode = _generate(model, input_ids, work.new)
            for phase, (seconds, processor_seconds) in (
                (results[name].prefill, prefill),
                (results[name].decode, decode),
            ):
                phase.seconds.append(seconds)
                phase.processor_seconds.append(processor_seconds)
            advance(1)
    return results


def random_prompt(models: Mapping[str, PreTrainedModel], work: Workload) -> torch.Tensor:
    """Tokens that all models know, int64 [batch, prompt]."""
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (work.batch, work.prompt), generator=generator)


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model's configuration allows, if it says so."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None else int(longest)


_Times = tuple[float, float]  # seconds by the clock and of the processor


@torch.inference_mode()
def _generate(model: PreTrainedModel, input_ids: torch.Tensor, new: int) -> tuple[_Times, _Times]:
    """One round: time for the first token, and for all further ones."""
    with evaluation_mode(model):
        prompt = input_ids.to(model.device)
        cache = DynamicCache(config=model.config)
        start = _now(model)
        # as generation does: the LM head reads the last position alone
        step = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = step.logits[:, -1:].argmax(dim=-1)
        middle = _now(model)
        for _ in range(new):
            step = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = step.logits[:, -1:].argmax(dim=-1)
        end = _now(model)
    return (middle[0] - start[0], middle[1] - start[1]), (end[0] - middle[0], end[1] - middle[1])


def _now(model: PreTrainedModel) -> _Times:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter(), time.process_time()
