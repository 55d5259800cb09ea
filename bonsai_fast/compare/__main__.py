"""`python -m bonsai_fast.compare MODEL --methods a,b,c --sparsity 0.2,0.35,0.5`: methods compared.

Every method reads the same calibration text and is evaluated on the same other text; those that
search spend the same number of forward tokens. METHOD:paper takes a method's published setting,
METHOD:OPTION=VALUE another value of one of its options. Writes comparison.csv, .json and .svg; the
last line of stdout is JSON. The same command resumes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.compare.comparison import Comparison, as_table
from bonsai_fast.config import PruneConfig
from bonsai_fast.config.choices import AttentionGranularity, HeadLayout
from bonsai_fast.console import INTERRUPTED, OneLineParser, Reporter, fail, silence_transformers
from bonsai_fast.runs.ledger import LedgerError

METHODS = "random,magnitude-l1,wanda-sp,flap,bonsai"


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and on what; names are those of `bonsai_fast.prune`."""

    methods: str = _option(
        METHODS, "Methods, separated by commas; METHOD[:paper][:OPTION=VALUE]..."
    )
    sparsity: str = _option("0.2", "Sparsities, separated by commas.")
    output: str | None = _option(None, "Directory of the comparison.")
    search_tokens: int | None = _option(
        None, "Forward tokens for each search. Default: what Bonsai's default plans."
    )
    calibration: str = _option("builtin", "Calibration text.")
    evaluation: str | None = _option(None, "Text for perplexity.")
    evaluation_tokens: int = _option(8192, "How many tokens of it are read.")
    num_sequences: int | None = _option(None, "Calibration sequences.")
    sequence_length: int | None = _option(None, "Tokens in each of them.")
    attention: AttentionGranularity | None = _option(None, "Query heads, or KV groups.")
    head_layout: HeadLayout | None = _option(None, "'rectangular' or 'free'.")
    round_to: str | None = _option(None, "MLP widths become multiples of this.")
    seed: int = _option(0, "Seed of everything that is drawn.")
    memory_budget: str | None = _option(None, "Memory for scoring beside the weights.")
    tasks: str | None = _option(None, "Zero-shot tasks, separated by commas.")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option("auto", "Precision.")
    trust_remote_code: bool = _option(False, "Run model code that a checkpoint carries.")

    def base(self) -> PruneConfig:
        """What all methods share."""
        return PruneConfig(
            calibration=self.calibration,
            evaluation=self.evaluation,
            evaluation_tokens=self.evaluation_tokens,
            num_sequences=self.num_sequences,
            sequence_length=self.sequence_length,
            attention=self.attention,
            head_layout=self.head_layout,
            round_to=self.round_to,
            seed=self.seed,
            memory_budget=self.memory_budget,
            tasks=self.tasks,
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


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(
        cast(Any, CompareOptions),
        prog="python -m bonsai_fast.compare",
        description=__doc__,
    )
    parser.add_argument(
        "model", nargs="?", help=f"Hub name or directory of the model; {NAME} if left out."
    )
    options, rest = parser.parse(arguments)
    reporter = Reporter()
    silence_transformers()
    output = Path(options.output or f"runs/compare-{Path(rest.model or NAME).name}")
    loading = LoadingOptions(
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        wanted = options.cells()
        with reporter.busy(f"loading {rest.model or NAME} and its text"):
            model, tokenizer = load_parent(rest.model, loading)
            comparison = Comparison(
                model, tokenizer, options.base(), output,
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
