"""A pruned model before it is saved: in memory, streamed from disk, or its parent with zeros."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.saved_model import REPORT_NAME
from bonsai_fast.checkpoints.streaming import (
    LayerWeights,
    Origin,
    exchanged_weights,
    open_streamed,
    stream_of,
)
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.perplexity import Perplexity, perplexity, perplexity_of
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.layerwise import sweep_losses
from bonsai_fast.models import find_decoder
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery.recover_model import Recovered
from bonsai_fast.scoring import masked
from bonsai_fast.surgery import compare_logits, save_pretrained, slice_checkpoint, verify_saved

# where a streamed model is while it is recovered, beside the saved one
CUT = "cut"


@dataclass(frozen=True, eq=False, repr=False)
class PrunedModel(ABC):
    """A pruned model and its parent.

    Attributes:
        parent: the dense model.
        tokenizer: saved with the pruned model.
        directory: where the pruned model is saved.
        reporter: shows progress.
        measures_speed: whether the pruned model may be faster, and both are in memory at once.
    """

    measures_speed: ClassVar[bool] = False

    parent: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    reporter: Reporter

    @abstractmethod
    def pruned(self) -> AbstractContextManager[PreTrainedModel]:
        """Inside, the pruned model can be run, and `parent` perhaps not."""

    @abstractmethod
    def student(self) -> PreTrainedModel:
        """The pruned model for recovery, which needs `parent` beside it.

        Raises:
            OSError: it cannot be written, if it is streamed.
        """

    @abstractmethod
    def recovered(self, student: PreTrainedModel, found: Recovered) -> PrunedModel:
        """The model with what recovery changed, to be saved in place of this one.

        Args:
            student: what `student` returned; recovery has run on it.
            found: its result.
        """

    def save(self, report: dict[str, Any]) -> None:
        """Write the model, its tokenizer and `report` (bonsai_report.json) to `directory`.

        Raises:
            OSError: the directory cannot be written; nothing is left behind.
        """
        with self.pruned() as model:
            save_pretrained(
                model, self.directory, tokenizer=self.tokenizer, report=report, overwrite=True
            )

    def logits(self, tokens: Tensor) -> Tensor:
        """What the saved model should compute: int64 [B, T] -> float32 [B, T, V] on the CPU."""
        with self.pruned() as model:
            return logits_of(model, tokens)

    def check(self, tokens: Tensor) -> float:
        """Load the saved model and compare its logits: in a fresh process, or here if streamed.

        Args:
            tokens: int64 [B, T].
        Returns:
            the largest difference.
        Raises:
            SavedModelError: the saved model does not load, or differs by more than rounding.
        """
        expected = self.logits(tokens)
        # the same weights, perhaps other kernels
        share = 1e-4 if self.parent.dtype == torch.float32 else 3e-2
        tolerance = share * float(expected.abs().max())
        if stream_of(self.parent) is None:
            return verify_saved(self.directory, tokens, expected, tolerance=tolerance)
        found = logits_of(self.saved, tokens)
        return compare_logits(self.directory, found, expected, tolerance=tolerance)

    @cached_property
    def saved(self) -> PreTrainedModel:
        """The saved model, opened as its parent is: streamed."""
        return self._open(self.directory)

    def _open(self, directory: Path) -> PreTrainedModel:
        stream = stream_of(self.parent)
        return open_streamed(
            directory,
            device=self.parent.device,
            dtype=self.parent.dtype,
            trust_remote_code=bool(stream and stream.origin and stream.origin.trust_remote_code),
        )

    def perplexity(self, model: PreTrainedModel, text: Sequences, name: str) -> Perplexity:
        """Perplexity of `parent`, or of the model inside `pruned()`.

        Args:
            model: one of these two.
            text: what is predicted.
            name: of the model, for a progress bar.
        """
        return perplexity(model, text)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(parent: {type(self.parent).__name__} with "
            f"{self.parent.num_parameters():,} parameters, saved in: {self.directory})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class SmallerModel(PrunedModel):
    """Units were removed, and both models are in memory."""

    measures_speed: ClassVar[bool] = True

    smaller: PreTrainedModel

    def pruned(self) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(self.smaller)

    def student(self) -> PreTrainedModel:
        return self.smaller

    def recovered(self, student: PreTrainedModel, found: Recovered) -> PrunedModel:
        return self


@dataclass(frozen=True, eq=False, repr=False)
class SlicedModel(PrunedModel):
    """Units are removed from directory to directory; neither model is ever in memory as a whole.

    Attributes:
        layout: the parent's units.
        keep: bool [P], the units that are kept.
        origin: where the parent is read from.
    """

    layout: Layout
    keep: Tensor
    origin: Origin

    def save(self, report: dict[str, Any]) -> None:
        self._save(self.directory, report)

    def student(self) -> PreTrainedModel:
        """The pruned model, saved beside `directory` and streamed from there."""
        directory = self.directory.with_name(CUT)
        key = {"mask": hashlib.sha256(self.keep.cpu().numpy().tobytes()).hexdigest()}
        report = directory / REPORT_NAME
        found = json.loads(report.read_text()) if report.is_file() else {}
        if found.get("mask") != key["mask"]:
            self._save(directory, key)
        return self._open(directory)

    def recovered(self, student: PreTrainedModel, found: Recovered) -> PrunedModel:
        common = (self.parent, self.tokenizer, self.directory, self.reporter)
        return StreamedStudent(*common, student, found.weights)

    def _save(self, directory: Path, report: dict[str, Any]) -> None:
        slice_checkpoint(
            self.origin.directory,
            self.keep,
            directory,
            attention=self.layout.attention,
            experts=self.layout.experts,
            sublayers=self.layout.sublayers,
            dtype=self.parent.dtype,
            trust_remote_code=self.origin.trust_remote_code,
            overwrite=True,
            report=report,
            reporter=self.reporter,
        )

    def pruned(self) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(self.saved)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the parent under the keep mask."""
        with masked(self.parent, self.layout, self.keep[None].to(self.parent.device)):
            return logits_of(self.parent, tokens)


@dataclass(frozen=True, eq=False, repr=False)
class StreamedStudent(PrunedModel):
    """A pruned model on disk, of which recovery recorded new weights.

    Attributes:
        cut: the model before recovery, streamed.
        weights: number of a layer -> its new weights by name.
    """

    cut: PreTrainedModel
    weights: LayerWeights

    @contextmanager
    def pruned(self) -> Iterator[PreTrainedModel]:
        with exchanged_weights(self.cut, self.weights):
            yield self.cut

    def student(self) -> PreTrainedModel:
        return self.cut

    def recovered(self, student: PreTrainedModel, found: Recovered) -> PrunedModel:
        return replace(self, weights=found.weights)


@dataclass(frozen=True, eq=False, repr=False)
class ZeroedModel(PrunedModel):
    """Weights are zeroed; the parent computes as the pruned model while it holds them.

    Attributes:
        weights: number of a layer -> its pruned weights by name.
        memory_budget: for perplexity, as in `Sweep`.
    """

    weights: LayerWeights
    memory_budget: str | None

    @contextmanager
    def pruned(self) -> Iterator[PreTrainedModel]:
        with exchanged_weights(self.parent, self.weights):
            yield self.parent

    @torch.no_grad()
    def student(self) -> PreTrainedModel:
        """A copy of the parent, with the pruned weights."""
        copied = copy.deepcopy(self.parent)
        for number in range(find_decoder(copied).num_layers):
            for name, pruned in (self.weights(number) or {}).items():
                copied.get_parameter(name).copy_(pruned)
        return copied

    def recovered(self, student: PreTrainedModel, found: Recovered) -> PrunedModel:
        common = (self.parent, self.tokenizer, self.directory, self.reporter)
        return Student(*common, student)

    def perplexity(self, model: PreTrainedModel, text: Sequences, name: str) -> Perplexity:
        layers = find_decoder(model).num_layers
        with self.reporter.bar(f"perplexity of the {name} model", total=layers) as advance:
            losses = sweep_losses(
                model,
                text.input_ids,
                memory_budget=self.memory_budget,
                folder=self.directory.parent,
                advance=advance,
            )
        return perplexity_of(losses, text)


@dataclass(frozen=True, eq=False, repr=False)
class Student(SmallerModel):
    """A model that was recovered and is no faster than before; both models are in memory."""

    measures_speed: ClassVar[bool] = False


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """int64 [B, T] -> float32 [B, T, V] on the CPU."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return found.float().cpu()
