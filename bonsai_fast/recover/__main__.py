"""Make a pruned model better, with its parent as the teacher.

MODEL is a run, a model that bonsai_fast pruned, or another pruned model with its parent's
tokenizer. What is known about a run is taken from it: parent, text, seed. The result is a new
directory with the model and a report. --method NAME --help shows all options of a method. The last
line of stdout is JSON. The same command resumes an interrupted start.

    bonsai-fast recover runs/mine --method distill --output runs/better

On several GPUs: accelerate launch -m bonsai_fast.recover runs/mine --method distill
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import DTYPES, find_device, load_config, load_model, open_parent
from bonsai_fast.checkpoints.memory import local_directory
from bonsai_fast.checkpoints.streaming import open_streamed, stream_of
from bonsai_fast.command_line import save_config, taken
from bonsai_fast.config.recover_config import RecoverConfig
from bonsai_fast.console import (
    USAGE_ERROR,
    Reporter,
    fail,
    silence_transformers,
)
from bonsai_fast.delivery.run_job import nothing_written, run_job
from bonsai_fast.recover.pruned_source import PrunedSource, find_pruned
from bonsai_fast.recover.recover_command import CommandOptions, command
from bonsai_fast.recover.recover_job import RecoverJob, recover_job
from bonsai_fast.recover.student_checks import check_quantised
from bonsai_fast.recovery.helper_processes import choose_gpu, helpers_until_the_end, is_helper
from bonsai_fast.recovery.tiers import BY_LAYER
from bonsai_fast.runs.identity import fingerprint

COMMAND = command(__doc__)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    given, save_to = command(__doc__, words).parse(words)
    name = given.pop("model")
    reporter = Reporter(quiet=is_helper())
    silence_transformers()
    choose_gpu()
    try:
        options = taken(CommandOptions, given)
        source = find_pruned(name)
        config = RecoverConfig(**{**source.options, **given, "recover": options.method})
        values = {key: value for key, value in config.values_read().items() if key != "recover"}
        if not is_helper():
            save_config(save_to, model=name, **asdict(options), **values)
        with reporter.busy(f"loading {name} and its parent"):
            job = _job(source, options, config, reporter)
        output = Path(options.output or f"{name.rstrip('/')}-{options.method}")
        if options.plan:
            shown = job.plan(output, reporter)
            if not is_helper():
                print(json.dumps(shown))
            return 0
    except (ValueError, OSError) as error:
        return USAGE_ERROR if is_helper() else fail(error)
    except KeyboardInterrupt:
        return nothing_written()
    if is_helper():
        job.help_out(output)
        return 0
    with helpers_until_the_end(job.student.device):
        return run_job(job, output, reporter)


def _job(
    source: PrunedSource, options: CommandOptions, config: RecoverConfig, reporter: Reporter
) -> RecoverJob:
    """Load both models and check the request."""
    if options.dtype == "auto" and source.dtype is not None:
        options = replace(options, dtype=source.dtype)
    parent = options.teacher or source.parent
    if parent is None:
        raise ValueError(
            f"{source.name} does not say what it was pruned from: name its parent with --teacher"
        )
    name = None if parent == NAME else parent
    # before loading, which dequantises some formats
    for each in (source.name, name):
        check_quantised(load_config(each, options), each or NAME)
    teacher, tokenizer = open_parent(
        name,
        options,
        reporter,
        memory_budget=config.memory_budget,
        stream=options.stream,
    )
    if options.teacher is None and source.fingerprint not in (None, fingerprint(teacher)):
        raise ValueError(
            f"{parent} is not the model that {source.name} was pruned from: its weights differ; "
            "name the parent with --teacher"
        )
    by_layer = options.method in BY_LAYER and stream_of(teacher) is not None
    return recover_job(
        _student(source, options, stream=by_layer),
        teacher,
        tokenizer,
        config,
        student_tokenizer=_tokenizer(source, options),
        report=source.report,
        reporter=reporter,
    )


def _student(source: PrunedSource, options: CommandOptions, *, stream: bool) -> PreTrainedModel:
    if not stream:
        return load_model(source.name, options)
    model = open_streamed(
        local_directory(source.name, download=True),
        device=find_device(options.device),
        dtype=DTYPES.get(options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    model.config.name_or_path = source.name
    return model


def _tokenizer(source: PrunedSource, options: CommandOptions) -> PreTrainedTokenizerBase | None:
    """The pruned model's tokenizer; None if it was saved without one."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return None
    return found


if __name__ == "__main__":
    sys.exit(main())
