"""Write the HTML page of a run again.

A finished run has its page, RUN/report.html. This command writes one for an interrupted run, or
again with other prompts or the timings of `bonsai-fast latency`. The page is one file.
Notes are written to stderr; the last line of stdout is JSON.

    bonsai-fast report runs/mine --prompt "Once upon a time"
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import DTYPES, DeviceOptions, LoadingOptions, load_parent
from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config
from bonsai_fast.config.options import OUTPUT, option
from bonsai_fast.console import INTERRUPTED, Reporter, fail, silence_transformers
from bonsai_fast.evaluation.completions import PROMPTS, complete, save_completions
from bonsai_fast.report import RunRecord, write_report
from bonsai_fast.report.recovered_page import write_recovered_report
from bonsai_fast.runs.identity import RECOVER_MANIFEST, fingerprint

CONTENT = "What to show"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(DeviceOptions):
    """What the page shows besides the record of the run, and where it is written."""

    output: str | None = option(
        None, "File of the page.", group=OUTPUT, shown="RUN/report.html", value="FILE"
    )
    prompt: list[str] | None = option(
        None, "Prompts that both models complete.", group=CONTENT, shown="three built-in ones"
    )
    no_samples: bool = option(
        False, "Do not load the models; show the completions that are on record.", group=CONTENT
    )
    latency: str | None = option(
        None,
        "File with the output of bonsai-fast latency, to be shown too.",
        group=CONTENT,
        value="FILE",
    )

    def __post_init__(self) -> None:
        if self.no_samples and self.prompt is not None:
            raise ValueError("give prompt or no_samples, not both")


COMMAND = Command(
    "report",
    __doc__,
    (argument("run", str, "Directory of a run, finished or not, or of a recovery."),),
    (*entries_of(ReportOptions), *FILES),
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given, save_to = COMMAND.parse(arguments)
    directory = Path(given.pop("run"))
    reporter = Reporter()
    silence_transformers()
    try:
        options = ReportOptions(**given)
        save_config(save_to, run=str(directory), **asdict(options))
        if (directory / RECOVER_MANIFEST).is_file():
            return _recovered(directory, options, reporter)
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


def _recovered(directory: Path, options: ReportOptions, reporter: Reporter) -> int:
    """Write the page of what `bonsai-fast recover` made."""
    if options.prompt or options.latency:
        raise ValueError("prompt, latency: the page of a recovery shows neither")
    page = write_recovered_report(directory, Path(options.output) if options.output else None)
    reporter.note(f"written to {page}")
    print(json.dumps({"report": str(page), "run": str(directory), "finished": True}))
    return 0


def _sample(run: RunRecord, options: ReportOptions, reporter: Reporter) -> None:
    """Record completions of both models; only warn if a model cannot be loaded.

    Raises:
        ValueError: prompts were given and a model cannot be loaded.
    """
    parent = run.manifest["parent"]
    name, dtype = parent["name"], parent["dtype"]
    loading = LoadingOptions(
        device=options.device,
        dtype=dtype if dtype in DTYPES else "auto",
        trust_remote_code=options.trust_remote_code,
    )
    try:
        with reporter.busy(f"loading {name} and the pruned model"):
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
    with reporter.busy("completing the prompts"):
        save_completions(run.path, complete(dense, pruned, tokenizer, prompts))


if __name__ == "__main__":
    sys.exit(main())
