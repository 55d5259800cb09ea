"""One start of a run: methods ask it for losses, which are scored once and then recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from safetensors.torch import load_file, save

from bonsai_fast.config.choices import PriorName
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import ledger_key
from bonsai_fast.files import write_atomically
from bonsai_fast.methods.allocation import finish
from bonsai_fast.methods.importance.prior import unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics, unreached_experts
from bonsai_fast.methods.importance.surgeon_prior import surgeon_prior
from bonsai_fast.methods.regression import Regression, save_regression
from bonsai_fast.methods.task import O_co, Task
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.directory import UnitRun
from bonsai_fast.scoring import Chunk, OutputWeights, ScoringSession


def _ignore(count: int) -> None:
    """No progress bar."""


# what to do where a finished run lacks something
NEW_RUN = "this target needs a new run, in another directory"


class NotRecordedError(ValueError):
    """A re-targeted run asked for an evaluation that its ledger does not hold."""


@dataclass
class Search(Generic[O_co]):
    """One start of one run.

    Attributes:
        task: the request.
        run: where evaluations are recorded.
        reporter: shows progress.
        submodels_scored, tokens_scored: work of this start, without recorded evaluations.
    """

    task: Task[O_co]
    run: UnitRun
    reporter: Reporter
    submodels_scored: int = field(default=0, init=False)
    tokens_scored: int = field(default=0, init=False)
    _damage_session: ScoringSession | None = field(default=None, init=False)
    _damage_outputs: OutputWeights | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """A resumed run chooses routes by the speeds that were measured when it began."""
        write = self.run.start in ("new", "resume")
        self.task.scorer.record_rates(self.run.path / "rates.json", write=write)

    @property
    def recorded_only(self) -> bool:
        """Whether only recorded evaluations may be used."""
        return self.run.start == "retarget"

    def losses(
        self,
        stage: str,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        *,
        output_weights: OutputWeights | None = None,
        compensation: str = "compensated",
        silent: bool = False,
    ) -> torch.Tensor:
        """Losses of sub-models: recorded ones if the ledger has them, else scored and recorded.

        Args:
            stage: what the evaluations are for; recorded and shown.
            keep: bool [S, P].
            input_ids: int64 [B, T].
            output_weights: the sub-models' own output projections; see `MaskScorer.score`.
            compensation: name of `output_weights`, under which their losses are recorded apart
                from others. One name must mean the same weights throughout a run.
            silent: show no progress bar, because the caller does.
        Returns:
            float32 [S, B], nats per predicted token.
        Raises:
            NotRecordedError: the run is only re-targeted and these are not recorded.
        """
        session = self.task.scorer.session(input_ids, output_weights=output_weights)
        measure = "" if output_weights is None else f"{compensation} "
        return self.evaluations(measure, Chunk.losses, stage, keep, session, silent=silent)

    def damage(
        self,
        stage: str,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        *,
        output_weights: OutputWeights | None = None,
    ) -> torch.Tensor:
        """Divergence of sub-models from the parent, recorded too; see `MaskScorer.divergence`.

        Arguments as for `losses`.
        """
        session = self._damage_session
        is_same = self._damage_outputs is output_weights
        if session is None or session.input_ids is not input_ids or not is_same:
            # kept: it holds what the parent predicts for this text
            session = self.task.scorer.session(input_ids, output_weights=output_weights)
            self._damage_session, self._damage_outputs = session, output_weights
        measure = "divergence " if output_weights is None else "compensated divergence "
        return self.evaluations(measure, Chunk.divergence, stage, keep, session)

    def evaluations(
        self,
        measure: str,
        evaluate: Callable[[Chunk], torch.Tensor],
        stage: str,
        keep: torch.Tensor,
        session: ScoringSession,
        *,
        silent: bool = False,
    ) -> torch.Tensor:
        """Any measurement of sub-models on text, recorded like losses.

        Sub-models are measured in chunks of a fixed size, one call each, and a chunk is recorded as
        a whole: a resumed run has the same batches, and so the same bits, as an uninterrupted one.

        Args:
            measure: name of the quantity and a space, or "" for the loss of plain sub-models; one
                name must mean the same function throughout a run.
            evaluate: chunk of n sub-models -> float32 [n, B].
            stage, keep, silent: as for `losses`.
            session: of the scorer, on the text.
        """
        text = measure + ledger_key(session.input_ids)
        found: list[torch.Tensor] = []
        bar = nullcontext(_ignore) if silent else self.reporter.bar(stage, total=len(keep))
        with bar as advance:
            for chunk in session.chunks(keep):
                losses = self.run.ledger.find(text, chunk.keep)
                if losses is None and self.recorded_only:
                    losses = self.run.ledger.find_each(text, chunk.keep)
                if losses is None:
                    if self.recorded_only:
                        raise NotRecordedError(f"{stage}: its scores are not recorded; {NEW_RUN}")
                    losses = evaluate(chunk)
                    self.run.ledger.append(stage, text, chunk.keep, losses)
                    self.submodels_scored += len(chunk.keep)
                    self.tokens_scored += losses.numel() * session.input_ids.shape[1]
                found.append(losses)
                advance(len(chunk.keep))
        return torch.cat(found)

    def prior(
        self, name: PriorName, stage: str, keep: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Prior of every unit from one pass over the text under `keep`: float64 [P]; recorded too.

        Args:
            name: which one; auto: wanda.
            stage, keep, input_ids: as `losses`.
        Raises:
            NotRecordedError: the run is only re-targeted and this is not recorded.
        """

        def prior() -> torch.Tensor:
            task = self.task
            if name == "obs":
                return surgeon_prior(
                    task.model,
                    task.layout,
                    keep,
                    input_ids,
                    self.run.path / "grams",
                    memory_budget=task.config.memory_budget,
                )
            statistics = collect_statistics(task.scorer, keep, input_ids)
            for note in unreached_experts(task.layout, keep, statistics):
                self.reporter.warn(note)
            return unit_prior(name, task.model, task.layout, statistics)

        return self.importance(stage, prior, input_ids.numel())

    def importance(
        self, stage: str, measure: Callable[[], torch.Tensor], tokens: int
    ) -> torch.Tensor:
        """One value for every unit, float64 [P], measured once; see `measured`."""
        return self.measured(stage, lambda: {"prior": measure()}, tokens)["prior"]

    def measured(
        self, stage: str, measure: Callable[[], dict[str, torch.Tensor]], tokens: int
    ) -> dict[str, torch.Tensor]:
        """What a method measures before it scores sub-models: measured once, then recorded.

        Args:
            stage: what it is for; names the record.
            measure: finds it; not called if it is recorded.
            tokens: how many tokens `measure` reads.
        Raises:
            NotRecordedError: the run is only re-targeted and this is not recorded.
        """
        path = self.run.prior_path(stage)
        if path.is_file():
            return load_file(path)
        if self.recorded_only:
            raise NotRecordedError(f"{stage}: its statistics are not recorded; {NEW_RUN}")
        if tokens:
            self.reporter.note(f"{stage}: statistics over {tokens:,} tokens")
        found = {name: tensor.contiguous() for name, tensor in measure().items()}
        write_atomically(path, save(found))
        self.tokens_scored += tokens
        return found

    def record_regression(
        self, stage: str, regression: Regression, utility: torch.Tensor, quantity: str
    ) -> None:
        """Record the regression of a round, for the report.

        Args:
            stage: the round.
            regression: fitted to `utility`.
            utility: float64 [S].
            quantity: name of the utility, with its unit.
        """
        folder = self.run.path / "regressions"
        folder.mkdir(exist_ok=True)
        save_regression(folder / f"{stage}.safetensors", regression, utility, quantity)

    def record_relevance(self, relevance: torch.Tensor) -> None:
        """Record the final relevance, float64 [P], for other targets."""
        path = self.run.path / "relevance.safetensors"
        write_atomically(path, save({"relevance": relevance.contiguous()}))

    def recorded_relevance(self) -> torch.Tensor:
        """The recorded final relevance, float64 [P].

        Raises:
            NotRecordedError: there is none.
        """
        path = self.run.path / "relevance.safetensors"
        if not path.is_file():
            raise NotRecordedError(f"{path} is missing; {NEW_RUN}")
        return load_file(path)["relevance"]

    def has_recorded(self, stage: str) -> bool:
        """Whether the ledger holds evaluations of a stage."""
        return any(entry.stage == stage for entry in self.run.ledger.entries)

    def recorded(self, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All recorded evaluations of a stage: masks bool [S, P] and losses float32 [S, B].

        Raises:
            NotRecordedError: there are none.
        """
        entries = [entry for entry in self.run.ledger.entries if entry.stage == stage]
        if not entries:
            raise NotRecordedError(f"{stage}: its scores are not recorded; {NEW_RUN}")
        return torch.cat([entry.keep for entry in entries]), torch.cat(
            [entry.losses for entry in entries]
        )


def finished(
    search: Search[Any], keep: torch.Tensor, relevance: torch.Tensor, budget: int
) -> torch.Tensor:
    """The last step of every method: see `allocation.finish`."""
    task = search.task
    options: UnitOptions = task.options
    return finish(
        task.layout,
        keep,
        relevance,
        budget,
        head_layout=options.head_layout,
        round_to=options.width_multiple,
        uniform=options.uniform,
    )[0]


def group_of_unit(layout: Layout) -> torch.Tensor:
    """Number of each unit's group in `layout.groups`, int64 [P]."""
    return torch.arange(len(layout.groups)).repeat_interleave(
        torch.tensor([len(group) for group in layout.groups])
    )
