"""Recovery as a step of a run: after the cut, before saving."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.delivery.pruned_model import PrunedModel
from bonsai_fast.evaluation.perplexity import Perplexity
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.recovery.recover_model import Recovered, Recovery, prepare_recovery

FOLDER = "recovery"


@dataclass(frozen=True)
class RecoveryResult:
    """What recovery did to a model.

    Attributes:
        recover: its name.
        perplexity_before: of the pruned model before recovery, by the same protocol.
        held_out: the text that tiers were checked on, in words.
        tiers: the `TierRecord` of each, in order.
        texts: what each tier read, in words.
    """

    recover: str
    perplexity_before: float
    held_out: str
    tiers: list[dict[str, Any]]
    texts: dict[str, str]

    @property
    def seconds(self) -> float:
        """Wall time of all tiers."""
        return math.fsum(tier["seconds"] for tier in self.tiers)

    def for_card(self) -> dict[str, Any]:
        """What bonsai_report.json and the model card say."""
        names = ("name", "tokens", "held_out_before", "held_out_after")
        return {
            "recover": self.recover,
            "perplexity_before": self.perplexity_before,
            "tiers": [
                {**{name: tier[name] for name in names}, "text": self.texts[tier["name"]]}
                for tier in self.tiers
            ],
        }


def recovery_of(
    config: ResolvedConfig[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequences,
    evaluation: Sequences,
    *,
    zeros: bool = False,
) -> Recovery | None:
    """The recovery that a request asks for; None if it asks for none.

    Args:
        config: the request.
        model, tokenizer: the parent.
        calibration, evaluation: its texts.
        zeros: whether the method zeroes weights.
    Raises:
        ValueError: this version has no such tier, or a text is missing or too short; one line.
    """
    return prepare_recovery(
        config.recovery,
        teacher=model,
        tokenizer=tokenizer,
        calibration=calibration,
        evaluation=evaluation,
        seed=config.seed,
        memory_budget=config.memory_budget,
        zeros=zeros,
    )


def recover_pruned(
    model: PrunedModel, recovery: Recovery, evaluation: Sequences
) -> tuple[PrunedModel, RecoveryResult | None]:
    """Recover a model that is not saved yet.

    Args:
        model: the pruned model; changed if it is in memory.
        recovery: the tiers.
        evaluation: text for perplexity.
    Returns:
        the recovered model and what was done; None if nothing had to be and nothing could be.
    Raises:
        ValueError: a tier refuses the pruned model.
        OSError: a file cannot be written.
    """
    student, folder = model.student(), model.directory.parent / FOLDER
    try:
        recovery.check(student, folder)
    except ValueError as error:
        if not recovery.is_optional:
            raise
        model.reporter.warn(f"the pruned model is not recovered: {error}")
        return model, None
    model.reporter.note("measuring perplexity before recovery")
    before: Perplexity = model.perplexity(student, evaluation, "pruned")
    found = recovery.run(student, folder, model.reporter)
    return model.recovered(student, found), result_of(recovery, before, found)


def result_of(recovery: Recovery, before: Perplexity, found: Recovered) -> RecoveryResult:
    """The same as plain values."""
    return RecoveryResult(
        recover=str(recovery.options.recover),
        perplexity_before=before.value,
        held_out=f"{recovery.held_out.source}: {recovery.held_out.description}",
        tiers=[asdict(record) for record in found.records],
        texts={name: f"{text.source}: {text.description}" for name, text in recovery.texts.items()},
    )
