"""Write a GGUF file from a model directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bonsai_fast.checkpoints.saved_model import open_saved
from bonsai_fast.config.choices import GGUFPrecision
from bonsai_fast.export.exported import Exported
from bonsai_fast.export.gguf.architecture import plan_gguf
from bonsai_fast.export.gguf.metadata import hyperparameters
from bonsai_fast.export.gguf.names import SavedTensors
from bonsai_fast.export.gguf.tensors import tensor_specs
from bonsai_fast.export.gguf.tokenizer import tokenizer_fields
from bonsai_fast.export.gguf.write import write_gguf


def to_gguf(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: GGUFPrecision = "f16",
    pad_channels_to: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> Exported:
    """Write a saved model as GGUF, which unmodified llama.cpp runs at the pruned model's cost.

    Args:
        model: a run or model directory.
        output: the file; it must not exist.
        precision: of matrices; norms and biases are always float32.
        pad_channels_to: MLP widths are padded with zero channels to a multiple of this: 256 if the
            file is to be quantized to a K-quant, whose blocks are that long.
        advance: called after each tensor.
    Raises:
        ValueError: llama.cpp cannot run such a model, or there is no tokenizer. Raised before any
            work.
        FileExistsError: `output` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    saved = open_saved(model)
    plan = plan_gguf(saved, pad_channels_to=pad_channels_to)
    fields = hyperparameters(saved, plan) | tokenizer_fields(saved)
    source = SavedTensors(saved)
    source.check_complete()
    tensors = tensor_specs(plan, source)
    name = plan.architecture.name
    size = write_gguf(Path(output), name, fields, tensors, precision, advance)
    return Exported(str(output), "gguf", name, size, plan.notes)
