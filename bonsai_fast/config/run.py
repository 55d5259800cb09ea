"""What a run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic

from bonsai_fast.config.choices import MethodName, PresetName
from bonsai_fast.config.input_options import InputOptions
from bonsai_fast.config.options import (
    REMOVED,
    SEARCH,
    TEXT,
    MethodOptions,
    check_values,
    option,
    unread_options,
)
from bonsai_fast.config.presets import O_co
from bonsai_fast.config.recover_options import RecoverOptions


@dataclass(frozen=True, kw_only=True)
class CommonOptions(InputOptions):
    """Options of all methods that mean the same before and after presets are filled in."""

    sparsity: float | None = option(
        None,
        "Fraction of the decoder's parameters to remove or, for methods that zero weights, of "
        "each matrix.",
        group=REMOVED,
        shown="0.2; for those methods 0.5",
        value="X",
    )
    target: str | None = option(
        None,
        "Instead of --sparsity: sparsity=0.2, or params=1.1B for the whole model.",
        group=REMOVED,
        value="TARGET",
    )
    method: MethodName = option("bonsai", "One of the methods above.", group=SEARCH, value="METHOD")
    preset: PresetName = option(
        "default",
        "Values of options not given; paper: as published.",
        group=SEARCH,
    )
    tasks: str | None = option(
        None,
        "Zero-shot tasks for lm-evaluation-harness, separated by commas.",
        group=TEXT,
        value="NAMES",
    )

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.target is not None:
            raise ValueError("give sparsity or target, not both")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction in (0, 1), got {self.sparsity}")
        check_values(self)

    @property
    def target_text(self) -> str:
        """The target in the form that `Target.parse` reads."""
        if self.target is not None:
            return self.target
        return f"sparsity={0.2 if self.sparsity is None else self.sparsity}"

    @property
    def task_names(self) -> list[str]:
        """The names in `tasks`."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class PruneConfig(RecoverOptions, CommonOptions):
    """What a user asks for; what is None is left to the preset (see `methods.resolve`).

    Attributes:
        options: of the method, such as `BonsaiOptions`. `bonsai_fast.configure` takes them by
            name, beside the others.
    Raises:
        ValueError: a value is not allowed.
    """

    num_sequences: int | None = option(None, "Calibration sequences.", group=TEXT, minimum=1)
    sequence_length: int | None = option(
        None,
        "Tokens in each calibration sequence.",
        group=TEXT,
        minimum=2,
        shown="as many as the model takes",
    )
    options: MethodOptions | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RecoverOptions, CommonOptions, Generic[O_co]):
    """The same with the preset filled in and every option checked; made by `methods.resolve`.

    Attributes:
        recover: not None any more.
        sequence_length: None: the longest window that the model takes.
        options: of the method.
    """

    num_sequences: int
    sequence_length: int | None
    options: O_co

    def values(self) -> dict[str, Any]:
        """All options by name, those of the method beside the others: plain values, for JSON."""
        flat = {item.name: getattr(self, item.name) for item in fields(self)}
        own = flat.pop("options")
        return flat | {item.name: getattr(own, item.name) for item in fields(own)}

    def values_read(self) -> dict[str, Any]:
        """The same without options that have no effect at the values of the others."""
        unread = self.options.unread() | unread_options(self.recovery)
        return {name: value for name, value in self.values().items() if name not in unread}
