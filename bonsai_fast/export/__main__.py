"""Convert a pruned model for llama.cpp, vLLM or plain transformers.

MODEL is the directory of a run or of a saved model. Progress and notes are written to stderr; the
last line of stdout is JSON. The exit code is 1 if --check finds that the engine computes something
else than the model.

    bonsai-fast export runs/mine --format gguf --check
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bonsai_fast.checkpoints.saved_model import model_directory
from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config
from bonsai_fast.config.choices import GGUFPrecision
from bonsai_fast.config.options import OUTPUT, check_values, option
from bonsai_fast.console import (
    INTERRUPTED,
    WRONG_RESULT,
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

FORM = "Format"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which format is written, and where."""

    format: Literal["gguf", "padded", "decilm"] = option(
        "gguf",
        "gguf: one file for llama.cpp and programs that build on it. padded: a checkpoint of the "
        "unpruned model's class, all layers padded with zeros to the widest. decilm: a checkpoint "
        "for vLLM in the layout of Nemotron-NAS; only if no query heads were pruned.",
        group=FORM,
    )
    gguf_parent: str | None = option(
        None,
        "gguf: GGUF file of the unpruned model, as F32, F16 or BF16. The result takes its "
        "weights, tokenizer and metadata from it.",
        group=FORM,
        value="FILE",
    )
    precision: GGUFPrecision | None = option(
        None, "gguf: number format of the weight matrices.", group=FORM, shown="f16"
    )
    pad_channels_to: int | None = option(
        None,
        "gguf: pad the number of MLP channels with zeros to a multiple of N. llama.cpp's "
        "quantizer needs 256 for its K formats, such as Q4_K_M.",
        group=FORM,
        minimum=1,
        shown="32",
    )
    output: str | None = option(
        None,
        "File or directory to write.",
        group=OUTPUT,
        shown="beside the model, such as model-f16.gguf",
        value="PATH",
    )
    check: bool = option(
        False,
        "Run the result in its engine and compare its answers with the model's.",
        group=OUTPUT,
    )

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("gguf_parent", "precision", "pad_channels_to"):
            if self.format != "gguf" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for --format gguf only, got --format {self.format}")

    @property
    def stored(self) -> GGUFPrecision:
        """Number format of a GGUF's matrices."""
        return self.precision or "f16"


COMMAND = Command(
    "export",
    __doc__,
    (argument("model", str, "Directory of a run or of a saved model."),),
    (*entries_of(ExportOptions), *FILES),
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given, save_to = COMMAND.parse(arguments)
    model = given.pop("model")
    reporter = Reporter()
    silence_transformers()
    try:
        options = ExportOptions(**given)
        save_config(save_to, model=model, **asdict(options))
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
    """Write the export that the options describe.

    Raises:
        ValueError, OSError: it cannot be written; nothing is left behind.
    """
    output = options.output or default_output(model_directory(model), options)
    if options.format == "padded":
        return to_padded(model, output)
    if options.format == "decilm":
        return to_decilm(model, output)
    padding = 32 if options.pad_channels_to is None else options.pad_channels_to
    if options.gguf_parent is not None:
        return to_gguf_from_parent(
            model, options.gguf_parent, output, precision=options.stored, pad_channels_to=padding
        )
    return to_gguf(model, output, precision=options.stored, pad_channels_to=padding)


def check(model: str, result: Exported, options: ExportOptions) -> Agreement:
    """Run an export in its engine and compare it with the model in transformers.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        CheckError: the engine cannot run the export, or computes something else.
    """
    reference = reference_of(model)
    if options.format == "padded":
        return check_transformers(result.output, reference)
    if options.format == "decilm":
        return check_vllm(result.output, reference)
    return check_llama_cpp(result.output, reference, tolerance=TOLERANCE[options.stored])


def default_output(directory: Path, options: ExportOptions) -> Path:
    """A name beside the model: model-f16.gguf, model-padded."""
    directory = directory.resolve()
    suffix = f"{options.stored}.gguf" if options.format == "gguf" else options.format
    return directory.with_name(f"{directory.name}-{suffix}")


if __name__ == "__main__":
    sys.exit(main())
