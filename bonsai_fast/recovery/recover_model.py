"""Runs recovery tiers one after another on a pruned model; a killed start goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import exchanged_weights, stream_of
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.recovery_text import recovery_text, training_sequences
from bonsai_fast.evaluation.text import Sequences, longest_window
from bonsai_fast.evaluation.text_sources import HUB_DATASETS
from bonsai_fast.files import existing_folder
from bonsai_fast.layerwise import Sweep
from bonsai_fast.recovery.helper_processes import call_helpers, help_out
from bonsai_fast.recovery.recovery_progress import RecoveryProgress
from bonsai_fast.recovery.recovery_task import RecoveryPlan, RecoveryTask, TierRecord
from bonsai_fast.recovery.tier import RecoveryTier
from bonsai_fast.recovery.tiers import BY_LAYER, TRAINED, steps_of, tier_of
from bonsai_fast.recovery.weight_changes import restore_changes, save_changes, weight_marks
from bonsai_fast.runs.identity import fingerprint
from bonsai_fast.runs.layer_record import LayerRecord


@dataclass(frozen=True, eq=False)
class Recovered:
    """A model after recovery.

    Attributes:
        records: what each tier did, in the order in which they ran.
        layers: of a streamed model, where tiers recorded its new weights; later ones win. A model
            in memory was changed.
    """

    records: tuple[TierRecord, ...]
    layers: tuple[LayerRecord, ...] = ()

    def weights(self, number: int) -> Mapping[str, Tensor]:
        """New weights of a decoder layer by their names in the model; perhaps none.

        Raises:
            LedgerError: a record is damaged.
        """
        found: dict[str, Tensor] = {}
        for record in self.layers:
            found |= record.find(number) or {}
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Recovery:
    """A checked request: tiers with the text that each reads.

    Attributes:
        tiers: by name, in the order in which they run.
        texts: what each reads.
        held_out: what says whether they helped.
        teacher, tokenizer, options, seed, memory_budget: see `RecoveryTask`.
        notes: what the user should know about the text.
        is_optional: whether a model that a tier refuses is left as it is.
    """

    tiers: dict[Tier, RecoveryTier]
    texts: dict[Tier, Sequences]
    held_out: Sequences
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: RecoverOptions
    seed: int
    memory_budget: int | str | None
    notes: tuple[str, ...] = ()
    is_optional: bool = False

    def check(self, student: PreTrainedModel, folder: Path) -> None:
        """Refuse what a tier cannot do; before a model is pruned, its parent is the student.

        Args:
            student: see `RecoveryTask`.
            folder: where tiers will write; it need not exist.
        Raises:
            ValueError: a tier cannot do it, or the disk has no room.
        """
        place = existing_folder(folder)
        for name, tier in self.tiers.items():
            task = self._task(name, student, place, Reporter(quiet=True))
            if name in BY_LAYER:
                _check_layers(task)
            tier.check(task)
        needed = sum(plan.disk_bytes for plan in self.plans(student).values())
        needed += self.recorded_bytes(student)
        if needed > (free := shutil.disk_usage(place).free):
            raise ValueError(
                f"recover: {self.options.recover} needs {needed / 1e9:.1f} GB on the disk of "
                f"{folder}, {free / 1e9:.1f} GB are free"
            )

    def recorded_bytes(self, student: PreTrainedModel) -> int:
        """Size of the weights on record between tiers, at most, until the model is saved."""
        stream = stream_of(student)
        if stream is not None:  # the model before recovery, and new weights
            return 2 * stream.num_bytes
        return sum(parameter.nbytes for parameter in student.parameters())

    def plans(self, student: PreTrainedModel) -> dict[Tier, RecoveryPlan]:
        """Work of every tier."""
        quiet = Reporter(quiet=True)
        return {
            name: tier.plan(self._task(name, student, Path.cwd(), quiet))
            for name, tier in self.tiers.items()
        }

    def run(self, student: PreTrainedModel, folder: Path, reporter: Reporter) -> Recovered:
        """Run all tiers, or those that an interrupted start has not finished.

        Args:
            student: the pruned model. In memory it is changed; a streamed one is not.
            folder: where tiers write; empty, or that of an interrupted start.
            reporter: shows progress.
        Raises:
            ValueError: a tier refuses the student.
            OSError: a file cannot be written.
        """
        self.check(student, folder)
        for note in self.notes:
            reporter.note(note)
        streamed = stream_of(student) is not None
        progress = RecoveryProgress.open(folder, self._identity(student))
        layers: list[LayerRecord] = []
        with ExitStack() as stack:
            for place, (name, tier) in enumerate(self.tiers.items()):
                own = _folder_of(folder, place, name)
                record = LayerRecord(own / "layers" if streamed else folder / f"{own.name}-weights")
                if place < len(progress.records):
                    reporter.note(f"recovery by {name} is finished: its weights are on record")
                    if not streamed:
                        restore_changes(student, record)
                else:
                    own.mkdir(parents=True, exist_ok=True)
                    reporter.note(
                        f"recovering: {name}, {place + 1} of {len(self.tiers)}, on "
                        f"{self.texts[name].source} ({self.texts[name].description})"
                    )
                    marks = {} if streamed else weight_marks(student)
                    if name in TRAINED:
                        call_helpers(place, student)
                    done = tier.run(self._task(name, student, own, reporter))
                    if not streamed:
                        save_changes(student, marks, record)
                    progress.add(done)
                    if not streamed:
                        shutil.rmtree(own, ignore_errors=True)  # caches and checkpoints
                    _report(done, reporter)
                if streamed:
                    layers.append(record)
                    stack.enter_context(exchanged_weights(student, record.find))
        return Recovered(tuple(progress.records), tuple(layers))

    def help_out(self, student: PreTrainedModel, folder: Path) -> None:
        """Help another process to run the tiers; see `helper_processes`.

        Args:
            student: the pruned model, in memory; it is changed.
            folder: that of `run`.
        """
        names = list(self.tiers)

        def run(place: int) -> None:
            name = names[place]
            own = _folder_of(folder, place, name)
            self.tiers[name].run(self._task(name, student, own, Reporter(quiet=True)))

        help_out(student, run)

    def _task(
        self, name: Tier, student: PreTrainedModel, folder: Path, reporter: Reporter
    ) -> RecoveryTask:
        return RecoveryTask(
            student=student,
            teacher=self.teacher,
            tokenizer=self.tokenizer,
            text=self.texts[name],
            held_out=self.held_out,
            options=self.options,
            seed=self.seed,
            folder=folder,
            reporter=reporter,
            memory_budget=self.memory_budget,
        )

    def _identity(self, student: PreTrainedModel) -> dict[str, Any]:
        """What the new weights depend on."""
        return {
            "student": fingerprint(student),
            "texts": {name: text.sha256 for name, text in self.texts.items()},
            "held_out": self.held_out.sha256,
            "options": asdict(self.options),
            "seed": self.seed,
        }


def prepare_recovery(
    options: RecoverOptions,
    *,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequences,
    evaluation: Sequences,
    seed: int,
    memory_budget: int | str | None,
    zeros: bool = False,
    by_layer: bool = True,
) -> Recovery | None:
    """Choose the tiers and draw their text; None if nothing is to be done.

    Args:
        options: `recover` is not None.
        teacher, tokenizer: the parent.
        calibration: what `calibration_sequences` drew, with the same seed.
        evaluation: text that results are measured on.
        seed: of all random numbers.
        memory_budget: see `RecoveryTask`.
        zeros, by_layer: see `steps_of`.
    Raises:
        ValueError: this version does not have a tier, or a text is missing or too short, or is the
            one for evaluation.
    """
    assert options.recover is not None
    steps = steps_of(options.recover, zeros=zeros, by_layer=by_layer)
    tiers = {name: tier_of(name) for name in steps}
    if not tiers:
        return None
    source = options.recover_text or calibration.source
    if source == evaluation.source and source != calibration.source and source not in HUB_DATASETS:
        raise ValueError(
            f"recover_text: {source!r} is the text for evaluation; train on another one"
        )
    common = recovery_text(calibration, tokenizer, evaluation=evaluation, seed=seed, model=teacher)
    notes = []
    if not common.is_apart:
        notes.append(
            f"{calibration.source} is too short for other text to check recovery on: "
            f"{common.held_out.description} are held out from recovery"
        )
    texts: dict[Tier, Sequences] = {}
    for name, tier in tiers.items():
        wanted = tier.text(options)
        texts[name] = common.text
        if wanted is not None:
            length = min(wanted.length, longest_window(teacher))
            texts[name] = training_sequences(
                source, tokenizer, tokens=wanted.tokens, length=length, seed=seed,
                evaluation=evaluation, apart_from=common,
            )  # fmt: skip
            found = texts[name].input_ids.numel()
            if found < wanted.tokens - length:
                notes.append(f"{source} has {found:,} tokens for {name}, not {wanted.tokens:,}")
    return Recovery(
        tiers=tiers,
        texts=texts,
        held_out=common.held_out,
        teacher=teacher,
        tokenizer=tokenizer,
        options=options,
        seed=seed,
        memory_budget=memory_budget,
        notes=tuple(notes),
    )


def _check_layers(task: RecoveryTask) -> None:
    """Raise ValueError if a model's layers cannot be run one by one."""
    with TemporaryDirectory() as folder:
        for model in (task.student, task.teacher):
            budget = task.memory_budget
            Sweep(model, task.text.input_ids[:1], memory_budget=budget, folder=Path(folder))


def _report(done: TierRecord, reporter: Reporter) -> None:
    before, after = done.held_out_before, done.held_out_after
    words = f"{done.name}: loss on held-out text {before:.4f} -> {after:.4f} nats per token"
    if after < before:
        reporter.note(f"{words}, {done.seconds:.0f} s")
    else:
        reporter.warn(f"{words}: it did not help")
    for note in done.notes:
        reporter.note(f"{done.name}: {note}")


def _folder_of(folder: Path, place: int, name: Tier) -> Path:
    """Where a tier writes."""
    return folder / f"{place + 1}-{name}"
