"""What the command `recover` is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bonsai_fast.config.input_options import InputOptions
from bonsai_fast.config.options import TEXT, check_values, option, refuse_unread, unread_options
from bonsai_fast.config.recover_options import RecoverOptions


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(RecoverOptions, InputOptions):
    """Recovery of a saved model; `recover` is what the command calls --method.

    Raises:
        ValueError: a value is not allowed, or an option has no effect.
    """

    num_sequences: int = option(64, "Calibration sequences.", group=TEXT, minimum=2)
    sequence_length: int = option(
        256, "Tokens in each calibration sequence.", group=TEXT, minimum=2
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.recover in (None, "none"):
            raise ValueError("method: expected what to do, such as compensate; got none")
        refuse_unread(self.recovery, RecoverOptions(recover=self.recover))

    def values_read(self) -> dict[str, Any]:
        """All options by name, without those that have no effect at the value of `recover`."""
        unread = unread_options(self.recovery)
        return {name: value for name, value in asdict(self).items() if name not in unread}
