"""Make a model smaller: remove attention heads, channels, experts or single weights.

Methods that remove heads, channels and experts, which makes the model faster in every engine:
  bonsai, wanda-sp, magnitude-l1, magnitude-l2, random, layerwise-ppl, flap, taylor,
  policy-gradient, mini-llm, reap (experts alone)
Methods that set single weights to zero: magnitude, wanda, sparsegpt

--method NAME --help shows the options of one method. Progress and tables are written to stderr; the
last line of stdout is JSON. The same command resumes an interrupted run.

    bonsai-fast prune MODEL --sparsity 0.2 --output runs/mine
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import open_parent
from bonsai_fast.command_line import save_config, taken
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter, fail, silence_transformers
from bonsai_fast.delivery.run_job import nothing_written, run_job
from bonsai_fast.methods import WEIGHT_METHODS, configure
from bonsai_fast.methods.configure import resolve
from bonsai_fast.prune.job import job_of
from bonsai_fast.prune.prune_options import CommandOptions, command
from bonsai_fast.recovery.helper_processes import num_processes

COMMAND = command(__doc__)


def parse(arguments: list[str] | None) -> tuple[str | None, PruneConfig, CommandOptions]:
    """Model, configuration and options of a command line; writes the file of --save-config.

    Raises:
        SystemExit: code 2, after one line that says what is wrong; or code 0 after help.
    """
    words = sys.argv[1:] if arguments is None else arguments
    given, save_to = command(__doc__, words).parse(words)
    name = given.pop("model", None)
    options = taken(CommandOptions, given)
    try:
        config = configure(**given)
        used = resolve(config)
        values = used.values_read()
        if used.sparsity is None and used.target is None:
            values["target"] = used.target_text
        save_config(save_to, model=name, **values, **asdict(options))
    except (ValueError, OSError) as error:
        raise SystemExit(fail(error)) from None
    return name, config, options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    name, config, options = parse(arguments)
    reporter = Reporter()
    silence_transformers()
    try:
        if num_processes() > 1:
            raise ValueError(
                "prune runs in one process; prune first with --recover none, then train in several "
                "with: accelerate launch -m bonsai_fast.recover RUN --method distill"
            )
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
        output = Path(options.output or f"runs/{Path(name or NAME).name}-{job.name}")
        if options.plan:
            print(json.dumps(job.plan(output, reporter)))
            return 0
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return nothing_written()
    return run_job(job, output, reporter)


if __name__ == "__main__":
    sys.exit(main())
