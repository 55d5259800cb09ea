"""Prune a model by several methods and tabulate what each costs and loses.

All methods read the same calibration text and are evaluated on the same other text; methods that
search spend the same number of forward tokens. METHOD:paper is a method with its published
settings, METHOD:OPTION=VALUE sets one option of one method. --route and --precision, which
bonsai-fast prune --method bonsai --help explains, are for all. Writes comparison.csv, .json and
.svg; the last line of stdout is JSON. The same command resumes an interrupted run.

    bonsai-fast compare MODEL --methods wanda-sp,flap,bonsai --sparsity 0.2,0.5
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config, taken
from bonsai_fast.compare.cell_tables import as_table
from bonsai_fast.compare.comparison import SHARED, Comparison
from bonsai_fast.config.options import OUTPUT, REMOVED, SEARCH, check_values, option
from bonsai_fast.console import INTERRUPTED, Reporter, fail, silence_transformers
from bonsai_fast.methods import configure
from bonsai_fast.methods.configure import resolve
from bonsai_fast.prune.prune_options import ELSEWHERE, preset_entry
from bonsai_fast.runs.ledger import LedgerError

# explained by the help of prune
UNLISTED = ("route", "precision", *ELSEWHERE)
METHODS = "random,magnitude-l1,wanda-sp,flap,bonsai"


@dataclass(frozen=True, kw_only=True)
class CompareOptions(LoadingOptions):
    """What is compared; the options that methods share are those of `bonsai_fast.prune`."""

    methods: str = option(
        METHODS,
        "Separated by commas; each is METHOD, METHOD:paper or METHOD:OPTION=VALUE.",
        group=REMOVED,
        value="NAMES",
    )
    sparsity: str = option(
        "0.2",
        "Fractions of the decoder to remove, such as 0.2,0.5.",
        group=REMOVED,
        value="X,X...",
    )
    search_tokens: int | None = option(
        None,
        "Forward tokens of each search.",
        group=SEARCH,
        minimum=1,
        shown="as many as bonsai plans",
    )
    output: str | None = option(
        None, "Directory of the comparison.", group=OUTPUT, shown="runs/compare-MODEL", value="DIR"
    )

    def __post_init__(self) -> None:
        check_values(self)

    def cells(self) -> list[tuple[str, float]]:
        """Pairs (method, sparsity) in the order of the runs.

        Raises:
            ValueError: a sparsity is not a number, or a list is empty.
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


COMMAND = Command(
    "compare",
    __doc__,
    (argument("model", str | None, "Hub name or directory of the model.", NAME),),
    (
        *entries_of(CompareOptions),
        *(
            preset_entry(name, "bonsai", ("default",), listed=name not in UNLISTED)
            for name in SHARED
        ),
        *FILES,
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given, save_to = COMMAND.parse(arguments)
    name = given.pop("model", None)
    reporter = Reporter()
    silence_transformers()
    try:
        options = taken(CompareOptions, given)
        base = configure(**given)
        shared = {item: value for item, value in resolve(base).values().items() if item in SHARED}
        save_config(save_to, model=name, **asdict(options), **shared)
        output = Path(options.output or f"runs/compare-{Path(name or NAME).name}")
        wanted = options.cells()
        with reporter.busy(f"loading {name or NAME} and its text"):
            model, tokenizer = load_parent(name, options)
            comparison = Comparison(
                model, tokenizer, base, output,
                search_tokens=options.search_tokens, reporter=reporter,
            )  # fmt: skip
        # refuse what cannot be done before any work is done
        tasks = [(method, comparison.task_of(method, sparsity)) for method, sparsity in wanted]
        for method, task in tasks:
            comparison.run(method, task)
            comparison.write()
    except (ValueError, OSError, LedgerError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to resume from {output}", file=sys.stderr)
        return INTERRUPTED
    reporter.table(as_table(comparison.cells, comparison.dense()))
    reporter.note(f"written to {output}: comparison.csv, comparison.json, comparison.svg")
    print(json.dumps(json.loads((output / "comparison.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
