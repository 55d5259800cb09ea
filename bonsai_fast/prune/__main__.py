"""`python -m bonsai_fast.prune MODEL --sparsity 0.5 --output DIR`: prune with forward passes only.

Progress and tables go to stderr; the last line of stdout is JSON. A request that cannot be met ends
with one line and exit code 2. The same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, cast

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import LoadingOptions, open_parent
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import INTERRUPTED, OneLineParser, Reporter, fail, silence_transformers
from bonsai_fast.methods import WEIGHT_METHODS, NotRecordedError, configure
from bonsai_fast.methods.configure import all_options, preset_values
from bonsai_fast.methods.weights import UnusableInputsError
from bonsai_fast.prune.job import Result, job_of
from bonsai_fast.prune.tables import result_table
from bonsai_fast.runs.ledger import LedgerError
from bonsai_fast.surgery.loading_code import loading_code


@dataclass(frozen=True, kw_only=True)
class CommandOptions(LoadingOptions):
    """What only the command line needs: where the model comes from and where the result goes."""

    output: str | None = field(
        default=None,
        metadata={"help": "Directory of the run; the model is saved in its folder 'model'."},
    )
    plan: bool = field(default=False, metadata={"help": "Print what would be done, and stop."})
    stream: bool = field(
        default=False,
        metadata={
            "help": "Read the layers from disk in turns instead of loading the model; done by "
            "itself if the weights and --memory-budget exceed the device's memory."
        },
    )


def _flags() -> type:
    """A field for every option of every method; None means that it is not given."""
    rows = []
    for option in all_options().values():
        is_switch = bool(option.methods) and all(
            preset_values(method)[option.name] is False for method in option.methods
        )
        hint = option.hint if is_switch else option.hint | None
        default = False if is_switch else None
        rows.append((option.name, hint, field(default=default, metadata={"help": option.help})))
    return make_dataclass("Flags", rows, kw_only=True)


def parse(arguments: list[str] | None) -> tuple[str | None, PruneConfig, CommandOptions]:
    """Command line -> model, configuration, options; a bad one exits with code 2 and one line."""
    parser = OneLineParser(
        cast(Any, (_flags(), CommandOptions)),
        prog="python -m bonsai_fast.prune",
        description=__doc__,
    )
    parser.add_argument(
        "model", nargs="?", help=f"Hub name or directory of the model; {NAME} if left out."
    )
    flags, options, rest = parser.parse(arguments)
    left = {item.name: item.default for item in fields(flags)}
    given = {name: value for name, value in vars(flags).items() if value is not left[name]}
    try:
        config = configure(**given)
    except ValueError as error:
        parser.error(str(error))
    return rest.model, config, options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    name, config, options = parse(arguments)
    reporter = Reporter()
    silence_transformers()
    try:
        with reporter.busy(f"loading {name or NAME} and its text"):
            model, tokenizer = open_parent(
                name,
                options,
                reporter,
                memory_budget=config.memory_budget,
                by_layer=config.method in WEIGHT_METHODS,
                stream=options.stream,
            )
            job = job_of(model, tokenizer, config)
        if options.plan:
            print(json.dumps(job.plan(reporter)))
            return 0
        output = Path(options.output or f"runs/{Path(name or NAME).name}-{job.name}")
        execute = job.open(output, reporter)
    except (ValueError, OSError) as error:
        return fail(error)
    try:
        result = execute()
    except (OSError, LedgerError, NotRecordedError, UnusableInputsError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to resume {output}", file=sys.stderr)
        return INTERRUPTED
    _print_result(result, reporter)
    return 0


def _print_result(result: Result, reporter: Reporter) -> None:
    reporter.table(result_table(result))
    reporter.note(f"saved to {result.output}; load it with")
    reporter.note(loading_code(Path(result.output), result.output))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    sys.exit(main())
