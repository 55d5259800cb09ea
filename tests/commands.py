"""Commands, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def run_command(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command's `main`."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # help, or a mistake
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
