"""`python -m bonsai_fast.compare MODEL --methods a,b,c --sparsity 0.2,0.35,0.5`: methods compared.

Every method reads the same calibration text and is evaluated on the same other text; those that
search spend the same number of forward tokens. METHOD:paper takes a method's published setting,
METHOD:OPTION=VALUE another value of one of its options. Writes comparison.csv, .json and .svg; the
last line of stdout is JSON. The same command resumes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, cast

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.compare.comparison import SHARED, Comparison, as_table
from bonsai_fast.console import INTERRUPTED, OneLineParser, Reporter, fail, silence_transformers
from bonsai_fast.methods import configure
from bonsai_fast.methods.configure import all_options
from bonsai_fast.runs.ledger import LedgerError

METHODS = "random,magnitude-l1,wanda-sp,flap,bonsai"


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class CompareOptions(LoadingOptions):
    """What is compared; the options that methods share are those of `bonsai_fast.prune`."""

    methods: str = _option(
        METHODS, "Methods, separated by commas; METHOD[:paper][:OPTION=VALUE]..."
    )
    sparsity: str = _option("0.2", "Sparsities, separated by commas.")
    output: str | None = _option(None, "Directory of the comparison.")
    search_tokens: int | None = _option(
        None, "Forward tokens for each search. Default: what Bonsai's default plans."
    )

    def cells(self) -> list[tuple[str, float]]:
        """(method, sparsity) in the order in which they are run.

        Raises:
            ValueError: a sparsity is no number, or nothing is asked for.
        """
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        try:
            sparsities = [float(text) for text in self.sparsity.split(",") if text.strip()]
        except ValueError as error:
            raise ValueError(
                f"sparsity: expected fractions separated by commas, got {self.sparsity!r}"
            ) from error
        if not names or not sparsities:
            raise ValueError("methods, sparsity: expected at least one of each")
        return [(name, sparsity) for sparsity in sparsities for name in names]


def _shared_flags() -> type:
    """A field for every option that methods share; None means that it is not given."""
    options = all_options()
    return make_dataclass(
        "SharedFlags",
        [
            (name, option.hint | None, field(default=None, metadata={"help": option.help}))
            for name, option in options.items()
            if name in SHARED
        ],
        kw_only=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(
        cast(Any, (CompareOptions, _shared_flags())),
        prog="python -m bonsai_fast.compare",
        description=__doc__,
    )
    parser.add_argument(
        "model", nargs="?", help=f"Hub name or directory of the model; {NAME} if left out."
    )
    options, shared, rest = parser.parse(arguments)
    reporter = Reporter()
    silence_transformers()
    output = Path(options.output or f"runs/compare-{Path(rest.model or NAME).name}")
    try:
        wanted = options.cells()
        with reporter.busy(f"loading {rest.model or NAME} and its text"):
            model, tokenizer = load_parent(rest.model, options)
            comparison = Comparison(
                model, tokenizer, configure(**vars(shared)), output,
                search_tokens=options.search_tokens, reporter=reporter,
            )  # fmt: skip
        # all that can be refused is refused before any work is done
        tasks = [(name, comparison.task_of(name, sparsity)) for name, sparsity in wanted]
        for name, task in tasks:
            comparison.run(name, task)
            comparison.write()
    except (ValueError, OSError, LedgerError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {output}", file=sys.stderr)
        return INTERRUPTED
    reporter.table(as_table(comparison.cells, comparison.dense()))
    reporter.note(f"written to {output}: comparison.csv, comparison.json, comparison.svg")
    print(json.dumps(json.loads((output / "comparison.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
