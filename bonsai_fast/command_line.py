"""What all commands share: arguments and errors in one line, exit codes, no chatter."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.utils import logging

WRONG_RESULT = 1
USAGE_ERROR = 2
INTERRUPTED = 130


class OneLineParser(HfArgumentParser):
    """Options by dataclasses; what is wrong with a command line is said in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(USAGE_ERROR, f"error: {message}\n")

    def parse(self, arguments: list[str] | None) -> tuple[Any, ...]:
        """The dataclasses in their order, then a namespace with the rest.

        Args:
            arguments: of the command; those that the process was started with if None.
        """
        try:
            parsed: tuple[Any, ...] = self.parse_args_into_dataclasses(
                sys.argv[1:] if arguments is None else arguments
            )
        except ValueError as error:
            self.error(str(error))
        return parsed


def silence_transformers() -> None:
    """Keep its notes and progress bars from between ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def fail(error: Exception, code: int = USAGE_ERROR) -> int:
    """Print an error in one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
