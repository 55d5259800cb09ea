"""What a command does with a checked job: run it, show the result, turn errors into exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from bonsai_fast.console import INTERRUPTED, WRONG_RESULT, Reporter, fail
from bonsai_fast.delivery.model_result import RunResult
from bonsai_fast.delivery.result_table import result_table
from bonsai_fast.recovery import TrainingError
from bonsai_fast.surgery import SavedModelError
from bonsai_fast.surgery.loading_code import loading_code


class Job(Protocol):
    """A checked request."""

    def open(self, output: Path, reporter: Reporter) -> Callable[[], RunResult]:
        """Start or resume in a directory; the returned function does the work.

        Raises:
            ValueError, OSError: it cannot be done there; nothing was written.
        """


def nothing_written() -> int:
    """Say that an interrupted command wrote nothing; returns the exit code."""
    print("interrupted; nothing was written", file=sys.stderr)
    return INTERRUPTED


def run_job(job: Job, output: Path, reporter: Reporter) -> int:
    """Do the work and show its result, whose values are the last line of stdout.

    Returns:
        the exit code.
    """
    try:
        execute = job.open(output, reporter)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return nothing_written()
    try:
        result = execute()
    except (ValueError, OSError, TrainingError) as error:
        return fail(error)
    except SavedModelError as error:
        return fail(error, WRONG_RESULT)
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to resume from {output}", file=sys.stderr)
        return INTERRUPTED
    reporter.table(result_table(result))
    reporter.note(f"saved to {result.output}; load it with:")
    reporter.note(loading_code(Path(result.output), result.output))
    print(json.dumps(asdict(result)))
    return 0
