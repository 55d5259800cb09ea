"""Tier "compensate": output projections refitted in closed form, with forward passes alone.

The closed form is OBS's (Hassibi and Stork, 1993) with a ridge toward the weights that are there;
sequential passes on the pruned model's states are used by SliceGPT, OSSCAR (Meng et al.,
arXiv:2403.12983) and others. Here the target also corrects the error of earlier layers.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.files import write_json
from bonsai_fast.layerwise import Sweep, check_memory, sweep_losses
from bonsai_fast.models import find_decoder
from bonsai_fast.recovery.closed_form.output_grams import check_projections
from bonsai_fast.recovery.closed_form.sequential import Refit, SequentialRefit, cut_blocks
from bonsai_fast.recovery.recovery_task import RecoveryPlan, RecoveryTask, TierRecord
from bonsai_fast.runs.layer_record import LayerRecord

# one held-out sequence chooses for this many that are fitted
CHOOSING = 4


class Compensate:
    """Refits the output projection of every sub-layer that lost parts; experts keep theirs."""

    name = "compensate"

    def text(self, options: RecoverOptions) -> None:
        """None: it reads the calibration sequences."""

    def check(self, task: RecoveryTask) -> None:
        """Refuse models that cannot be compared layer by layer.

        Raises:
            ValueError: projections that are no nn.Linear, another number of layers or another
                hidden size, texts of different length,
                or a memory budget that is too small.
        """
        dense, pruned = find_decoder(task.teacher), find_decoder(task.student)
        check_projections(task.teacher)
        if dense.num_layers != pruned.num_layers:
            raise ValueError(
                f"compensate: expected a parent with as many layers as the pruned model, "
                f"{pruned.num_layers}, got {dense.num_layers}"
            )
        models = (task.teacher, task.student)
        sizes = [hidden_size(model) for model in models]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"compensate: expected a parent of hidden size {sizes[1]}, got {sizes[0]}"
            )
        lengths = [text.input_ids.shape[1] for text in (task.text, task.held_out)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"compensate: expected held-out sequences of {lengths[0]} tokens, got {lengths[1]}"
            )
        for model in models:
            check_memory(model, lengths[0], memory_budget=task.memory_budget)

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        """Two passes of the parent's layers at most, and three of the pruned model's."""
        return RecoveryPlan(task.text.input_ids.numel() + _chosen_on(task).numel(), 0)

    def run(self, task: RecoveryTask) -> TierRecord:
        """Refit layer by layer; weights that make the held-out loss worse are not used.

        Raises:
            UnusableInputsError: a model gives NaN or Inf.
            OSError: a file cannot be written.
        """
        started = time.perf_counter()
        with PeakMemory(task.student.device) as peak:
            before = float(_held_out_losses(task).double().mean())
            after, refits = self._refit_all(task)
        notes = [
            f"{refit.name} keeps its weights: no refit helped on held-out text"
            for refit in refits
            if refit.ridge is None
        ]
        if find_decoder(task.student).experts:
            notes.append("experts keep their weights: only single output projections are refitted")
        record = LayerRecord(task.folder / "layers")
        if after > before:
            notes.append(
                f"all weights were kept: refitted, the loss on held-out text is {after:.4f} "
                f"instead of {before:.4f}"
            )
            record.drop()
            after = before
        elif stream_of(task.student) is None:
            _put(task.student, record)
        chosen = sorted(refit.ridge for refit in refits if refit.ridge is not None)
        return TierRecord(
            name=self.name,
            tokens=task.text.input_ids.numel(),
            seconds=time.perf_counter() - started,
            held_out_before=before,
            held_out_after=after,
            peak_bytes=peak.bytes,
            settings={
                "projections": len(refits),
                "refitted": len(chosen),
                "ridge, median": chosen[len(chosen) // 2] if chosen else 0.0,
                "residual error before, mean": _mean([refit.error_before for refit in refits]),
                "residual error after, mean": _mean([refit.error_after for refit in refits]),
            },
            notes=notes,
        )

    def _refit_all(self, task: RecoveryTask) -> tuple[float, list[Refit]]:
        """Record new weights of all layers; returns the held-out loss with them, too."""
        record = LayerRecord(task.folder / "layers")
        told = task.folder / "refits.json"
        refits = json.loads(told.read_text()) if told.is_file() else {}
        teacher, student = _side_by_side(task)
        num_fitted = len(task.text.input_ids)
        blocks = cut_blocks(task.teacher, task.student)
        both = SequentialRefit(teacher, student, blocks, num_fitted)
        with task.reporter.bar("compensation, layers", total=len(blocks)) as advance:
            for number in range(len(blocks)):
                recorded = record.find(number)
                weights = both.pass_layer(number, recorded)
                if recorded is None:
                    refits[str(number)] = [asdict(refit) for refit in both.refits]
                    write_json(told, refits)
                    record.save(number, weights)
                both.refits.clear()
                advance(1)
        found = [Refit(**values) for layer in refits.values() for values in layer]
        return float(student.losses(slice(num_fitted, None)).double().mean()), found


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return int(cast(nn.Embedding, model.get_input_embeddings()).weight.shape[1])


def _side_by_side(task: RecoveryTask) -> tuple[Sweep, Sweep]:
    """Sweeps of parent and pruned model over the text and then the held-out text, in the same
    batches."""
    text = torch.cat([task.text.input_ids, _chosen_on(task)])
    rows = None
    while True:
        teacher, student = (
            Sweep(model, text, memory_budget=task.memory_budget, folder=task.folder, most_rows=rows)
            for model in (task.teacher, task.student)
        )
        if teacher.batches == student.batches:
            return teacher, student
        rows = min(sweep.batches[0].stop for sweep in (teacher, student))


def _chosen_on(task: RecoveryTask) -> Tensor:
    """Held-out sequences that choose ridges: a few are enough."""
    return task.held_out.input_ids[: max(1, len(task.text.input_ids) // CHOOSING)]


def _held_out_losses(task: RecoveryTask) -> Tensor:
    return sweep_losses(
        task.student,
        _chosen_on(task),
        memory_budget=task.memory_budget,
        folder=task.folder,
    )


@torch.no_grad()
def _put(model: PreTrainedModel, record: LayerRecord) -> None:
    """Give a model in memory its new weights."""
    for number in range(find_decoder(model).num_layers):
        for name, new in record[number].items():
            model.get_parameter(name).copy_(new)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
