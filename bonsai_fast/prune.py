"""`python -m bonsai_fast.prune MODEL --sparsity 0.5 --output DIR`: prune with forward passes only.

Progress and tables go to stderr; the last line of stdout is JSON. A request that cannot be met ends
with one line and exit code 2. The same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from bonsai_fast.config import PruneConfig
from bonsai_fast.embedded import NAME, embedded_model
from bonsai_fast.jobs import Result, job_of, prune, table_of
from bonsai_fast.layer_major import UnusableInputsError
from bonsai_fast.ledger import LedgerError
from bonsai_fast.methods import NotRecordedError
from bonsai_fast.progress import Reporter
from bonsai_fast.scoring import default_budget, parse_bytes
from bonsai_fast.streaming import (
    device_memory,
    local_directory,
    open_streamed,
    weight_bytes,
)

USAGE_ERROR = 2
INTERRUPTED = 130
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What only the command line needs: where the model comes from and where the result goes."""

    output: str | None = field(
        default=None,
        metadata={"help": "Directory of the run; the model is saved in its folder 'model'."},
    )
    device: str = field(
        default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda or cuda:N."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Precision of the model; auto keeps that of the checkpoint."},
    )
    plan: bool = field(default=False, metadata={"help": "Print what would be done, and stop."})
    stream: bool = field(
        default=False,
        metadata={
            "help": "Read the layers from disk in turns instead of loading the model; done by "
            "itself if the weights and --memory-budget exceed the device's memory."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that a checkpoint carries."}
    )


class OneLineParser(HfArgumentParser):
    """Argument errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}\n")


def parse(arguments: list[str]) -> tuple[str | None, PruneConfig, CommandOptions]:
    """Command line -> model, configuration, options; a bad one exits with code 2 and one line."""
    parser = OneLineParser(
        cast(Any, (PruneConfig, CommandOptions)),
        prog="python -m bonsai_fast.prune",
        description=__doc__,
    )
    parser.add_argument(
        "model", nargs="?", help=f"Hub name or directory of the model; {NAME} if left out."
    )
    try:
        config, options, rest = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    return rest.model, config, options


def load_parent(
    name: str | None, options: CommandOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the parent and its tokenizer.

    Raises:
        ValueError, OSError: no such model, unknown model type, or no such device.
    """
    with _loading(name):
        # first, because it has the clearest errors
        AutoConfig.from_pretrained(_path(name), trust_remote_code=options.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            _path(name), trust_remote_code=options.trust_remote_code
        )
    return load_model(name, options), tokenizer


def load_model(name: str | None, options: CommandOptions) -> PreTrainedModel:
    """Load a model alone; arguments and errors as in `load_parent`."""
    device = _device(options.device)
    trust = options.trust_remote_code
    with _loading(name):
        AutoConfig.from_pretrained(_path(name), trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(
            _path(name), dtype=DTYPES.get(options.dtype, "auto"), trust_remote_code=trust
        )
    if name is None:
        model.config.name_or_path = NAME  # the same wherever the cache lies
    return cast(PreTrainedModel, cast(Any, model).to(device).eval())


def _path(name: str | None) -> str:
    return str(embedded_model()) if name is None else name


@contextmanager
def _loading(name: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name or NAME} cannot be loaded: {error}") from error


def open_parent(
    name: str | None, config: PruneConfig, options: CommandOptions, reporter: Reporter
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the parent, or stream it if that is asked for or it does not fit.

    Raises:
        ValueError, OSError: as `load_parent`.
    """
    directory = _streamed_from(name, config, options)
    if directory is None:
        return load_parent(name, options)
    trust = options.trust_remote_code
    with _loading(name):
        AutoConfig.from_pretrained(directory, trust_remote_code=trust)  # has the clearest errors
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    model = open_streamed(
        directory,
        device=_device(options.device),
        dtype=DTYPES.get(options.dtype),
        trust_remote_code=trust,
    )
    # the run is the same as that of the loaded model
    model.config.name_or_path = NAME if name is None else name
    if not options.stream:
        reporter.note(f"{name or NAME} does not fit into memory: its layers are streamed from disk")
    return model, tokenizer


def _streamed_from(name: str | None, config: PruneConfig, options: CommandOptions) -> Path | None:
    """The directory that a parent is to be streamed from; None if it is to be loaded."""
    path, device = _path(name), _device(options.device)
    if config.prunes_weights:
        if options.stream:
            raise ValueError(f"stream: method {config.method} needs the model in the host's memory")
        return None
    if options.stream:
        return local_directory(path, download=True)
    asked = config.memory_budget
    budget = default_budget(device) if asked is None else parse_bytes(asked)
    try:
        directory = local_directory(path, download=False)
        needed = weight_bytes(directory, DTYPES.get(options.dtype)) + budget
    except (OSError, ValueError, SafetensorError):
        return None  # loading says what is wrong, or knows other formats
    return directory if needed > device_memory(device) else None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    name, config, options = parse(sys.argv[1:] if arguments is None else arguments)
    reporter = Reporter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = _device(options.device)
        # where layers take turns on the device, the model waits outside
        loading = replace(options, device="cpu") if config.prunes_weights else options
        with reporter.busy(f"loading {name or NAME} and its text"):
            model, tokenizer = open_parent(name, config, loading, reporter)
            job = job_of(model, tokenizer, config, device)
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
        print(f"interrupted; the same command goes on from {output}", file=sys.stderr)
        return INTERRUPTED
    _print_result(result, reporter)
    return 0


def _print_result(result: Result, reporter: Reporter) -> None:
    reporter.table(table_of(result))
    reporter.note(
        f"saved to {result.output}: AutoModelForCausalLM.from_pretrained({result.output!r})"
    )
    print(json.dumps(asdict(result)))


def fail(error: Exception) -> int:
    """Print an error in one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return USAGE_ERROR


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device: {name} was asked for, "
            f"but PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


class _CallableModule(ModuleType):
    """`bonsai_fast.prune` is a function and this module: importing one must not hide the other."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return prune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
