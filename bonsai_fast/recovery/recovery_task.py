"""What a recovery tier is given, the work that it plans, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences


@dataclass(frozen=True, eq=False, kw_only=True)
class RecoveryTask:
    """A pruned model and its parent, and the text that they are compared on.

    Attributes:
        student: the pruned model, in memory or streamed. In memory it is changed in place. A
            streamed one is not changed: the new weights of its layers are recorded in
            `LayerRecord(folder / "layers")`.
        teacher: the parent, in memory or streamed, with the same tokenizer, the same number of
            layers and the same hidden size.
        tokenizer: of both.
        text: sequences that recovery reads.
        held_out: sequences that choose between candidates and say when to stop; never in `text`,
            and never those that results are measured on.
        options: what was asked for.
        seed: of all random numbers.
        folder: an empty directory, or that of an interrupted start of the same tier: for caches,
            checkpoints and new weights of layers.
        reporter: shows progress.
        memory_budget: bytes (or "2GiB") for hidden states and batches, as in `Sweep`.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: Sequences
    held_out: Sequences
    options: RecoverOptions
    seed: int
    folder: Path
    reporter: Reporter
    memory_budget: int | str | None = None


@dataclass(frozen=True)
class TextWanted:
    """Text that a tier trains on.

    Attributes:
        tokens: in all; a short text gives fewer.
        length: tokens in each sequence, if the model takes as many.
    """

    tokens: int
    length: int


@dataclass(frozen=True)
class RecoveryPlan:
    """Work of a tier: tokens that it reads or trains on, and bytes that it needs on the disk."""

    tokens: int
    disk_bytes: int


@dataclass(frozen=True)
class TrainingPoint:
    """A point of a training curve.

    Attributes:
        tokens: trained on so far.
        loss: mean training loss since the last point.
        held_out: next-token loss on the held-out text, nats; None where it was not measured.
    """

    tokens: int
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class TierRecord:
    """What a tier did; plain values, for run.json and the report.

    Attributes:
        name: of the tier.
        tokens: read or trained on.
        seconds: wall time, of all starts.
        held_out_before, held_out_after: next-token loss on the held-out text, nats per token.
        peak_bytes: memory beside both models; None where it cannot be measured.
        curve: of a tier that trains.
        settings: what the tier chose or was asked for, by name.
        notes: what a reader should know, such as layers that kept their weights.
    """

    name: str
    tokens: int
    seconds: float
    held_out_before: float
    held_out_after: float
    peak_bytes: int | None = None
    curve: list[TrainingPoint] = field(default_factory=list)
    settings: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
