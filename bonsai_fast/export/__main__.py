"""`python -m bonsai_fast.export RUN_OR_MODEL_DIR --format gguf`: a saved model for another engine.

Progress and notes go to stderr; the last line of stdout is JSON. A request that cannot be met ends
with one line and exit code 2 before anything is written; a result that an engine does not run as it
should, with one line and exit code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from bonsai_fast.checkpoints.saved_model import model_directory
from bonsai_fast.console import (
    INTERRUPTED,
    WRONG_RESULT,
    OneLineParser,
    Reporter,
    fail,
    silence_transformers,
)
from bonsai_fast.export import (
    TOLERANCE,
    Agreement,
    CheckError,
    Exported,
    check_llama_cpp,
    check_transformers,
    check_vllm,
    reference_of,
    to_decilm,
    to_gguf,
    to_gguf_from_parent,
    to_padded,
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, in which form, and where to."""

    format: Literal["gguf", "padded", "decilm"] = field(
        default="gguf",
        metadata={
            "help": "gguf: one file for llama.cpp and all that builds on it. padded: a checkpoint "
            "of the parent's own class, every layer as wide as the widest. decilm: the layout of "
            "Nemotron-NAS, if no query heads were pruned."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "File or directory; by default beside the model."}
    )
    gguf_parent: str | None = field(
        default=None,
        metadata={
            "help": "The dense model's GGUF as F32, F16 or BF16: the result is cut out of it, and "
            "its tokenizer and metadata are taken over."
        },
    )
    precision: Literal["f32", "f16", "bf16", "q8_0"] = field(
        default="f16", metadata={"help": "gguf: how matrices are stored."}
    )
    pad_channels_to: int = field(
        default=32,
        metadata={
            "help": "gguf: MLP widths are padded with zeros to a multiple of this; 256 if the file "
            "is to be quantized to a K-quant."
        },
    )
    check: bool = field(
        default=False,
        metadata={"help": "Run the result in its engine and compare it with the model."},
    )

    def __post_init__(self) -> None:
        if self.pad_channels_to < 1:
            raise ValueError(f"pad_channels_to: expected at least 1, got {self.pad_channels_to}")
        if self.gguf_parent is not None and self.format != "gguf":
            raise ValueError("gguf_parent is for --format gguf only")


def parse(arguments: list[str] | None) -> tuple[str, ExportOptions]:
    """Command line -> model, options; a bad one exits with code 2 and one line."""
    parser = OneLineParser(
        cast(Any, (ExportOptions,)),
        prog="python -m bonsai_fast.export",
        description=__doc__,
    )
    parser.add_argument("model", help="A run's directory, or a saved model's.")
    options, rest = parser.parse(arguments)
    return rest.model, options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    model, options = parse(arguments)
    reporter = Reporter()
    silence_transformers()
    try:
        with reporter.busy(f"exporting {model}"):
            result = export(model, options)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    for note in result.notes:
        reporter.note(note)
    reporter.note(f"wrote {result.output}: {result.kind}, {result.size_bytes / 1e6:.1f} MB")
    agreement = None
    if options.check:
        try:
            with reporter.busy(f"running {result.output}"):
                agreement = check(model, result, options)
            reporter.note(str(agreement))
        except ModuleNotFoundError as error:
            reporter.warn(f"not checked: {error}")
        except CheckError as error:
            return fail(error, WRONG_RESULT)
    print(json.dumps({**asdict(result), "check": agreement and asdict(agreement)}))
    return 0


def export(model: str, options: ExportOptions) -> Exported:
    """Write the export that the options ask for.

    Raises:
        ValueError, OSError: it cannot be; nothing is left behind.
    """
    output = options.output or default_output(model_directory(model), options)
    if options.format == "padded":
        return to_padded(model, output)
    if options.format == "decilm":
        return to_decilm(model, output)
    how = {"precision": options.precision, "pad_channels_to": options.pad_channels_to}
    if options.gguf_parent is not None:
        return to_gguf_from_parent(model, options.gguf_parent, output, **cast(Any, how))
    return to_gguf(model, output, **cast(Any, how))


def check(model: str, result: Exported, options: ExportOptions) -> Agreement:
    """Run an export in its engine and compare it with the model in transformers.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        CheckError: it does not run it, or computes something else.
    """
    reference = reference_of(model)
    if options.format == "padded":
        return check_transformers(result.output, reference)
    if options.format == "decilm":
        return check_vllm(result.output, reference)
    return check_llama_cpp(result.output, reference, tolerance=TOLERANCE[options.precision])


def default_output(directory: Path, options: ExportOptions) -> Path:
    """Beside the model: model-f16.gguf, model-padded."""
    directory = directory.resolve()
    suffix = f"{options.precision}.gguf" if options.format == "gguf" else options.format
    return directory.with_name(f"{directory.name}-{suffix}")


if __name__ == "__main__":
    sys.exit(main())
