"""`python -m bonsai_fast.report RUN_DIR`: a run as one page of HTML that needs nothing else.

A run writes its page itself when it ends; this writes it again, for a run that was interrupted too,
with other prompts, or with what `bonsai_fast.latency` printed. Notes go to stderr; the last line of
stdout is JSON. A request that cannot be met ends with one line and exit code 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import DTYPES, LoadingOptions, load_parent
from bonsai_fast.console import INTERRUPTED, OneLineParser, Reporter, fail, silence_transformers
from bonsai_fast.evaluation.completions import PROMPTS, complete, save_completions
from bonsai_fast.report import RunRecord, write_report
from bonsai_fast.runs.directory import fingerprint


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page shows beside what the run recorded, and where it goes."""

    output: str | None = field(
        default=None, metadata={"help": "File of the page; RUN_DIR/report.html by default."}
    )
    prompt: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that both models go on from, in the place of the usual ones."},
    )
    no_samples: bool = field(
        default=False, metadata={"help": "Load no model: show the completions that are recorded."}
    )
    latency: str | None = field(
        default=None,
        metadata={"help": "File with the JSON, or all output, of bonsai_fast.latency."},
    )
    device: str = field(
        default="auto", metadata={"help": "Where models run: auto, cpu, cuda or cuda:N."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that a checkpoint carries."}
    )

    def __post_init__(self) -> None:
        if self.no_samples and self.prompt is not None:
            raise ValueError("give prompt or no_samples, not both")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(
        cast(Any, ReportOptions), prog="python -m bonsai_fast.report", description=__doc__
    )
    parser.add_argument("run", metavar="RUN_DIR", help="A run's directory, finished or not.")
    options, rest = parser.parse(arguments)
    reporter = Reporter()
    silence_transformers()
    directory = Path(rest.run)
    try:
        run = RunRecord.read(directory)
        if options.prompt and not run.finished:
            raise ValueError(f"{directory} is not finished: there is no pruned model to prompt yet")
        if not options.no_samples and run.finished and (options.prompt or not run.completions):
            _sample(run, options, reporter)
        page = write_report(
            directory,
            output=Path(options.output) if options.output else None,
            latency=Path(options.latency) if options.latency else None,
        )
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    reporter.note(f"written to {page}")
    print(json.dumps({"report": str(page), "run": str(directory), "finished": run.finished}))
    return 0


def _sample(run: RunRecord, options: ReportOptions, reporter: Reporter) -> None:
    """Record what both models write; without a parent at hand, only say so.

    Raises:
        ValueError: prompts were given and the models are not at hand.
    """
    parent = run.manifest["parent"]
    name, dtype = parent["name"], parent["dtype"]
    loading = LoadingOptions(
        device=options.device,
        dtype=dtype if dtype in DTYPES else "auto",
        trust_remote_code=options.trust_remote_code,
    )
    try:
        with reporter.busy(f"loading {name} and what was made of it"):
            dense, tokenizer = load_parent(None if name == NAME else name, loading)
            if fingerprint(dense) != parent["fingerprint"]:
                raise ValueError(f"model {name} is not the one that was pruned: its weights differ")
            pruned = cast(
                Any, AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=dense.dtype)
            )
            pruned = pruned.to(dense.device).eval()
    except (ValueError, OSError) as error:
        if options.prompt is not None:
            raise
        reporter.warn(f"no completions: {error}")
        return
    prompts = PROMPTS if options.prompt is None else tuple(options.prompt)
    with reporter.busy("letting both models write"):
        save_completions(run.path, complete(dense, pruned, tokenizer, prompts))


if __name__ == "__main__":
    sys.exit(main())
