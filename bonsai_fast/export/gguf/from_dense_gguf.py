"""Write a pruned model's GGUF file from the dense model's GGUF file.

The tokenizer and all other metadata are copied from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bonsai_fast.checkpoints.saved_model import SavedModel, open_saved
from bonsai_fast.config.choices import GGUFPrecision
from bonsai_fast.export.exported import Exported
from bonsai_fast.export.gguf.architecture import check_model, choose
from bonsai_fast.export.gguf.dense_gguf import PARENTS, DenseGGUF, KeptLayer
from bonsai_fast.export.gguf.metadata import layer_fields, prefixed
from bonsai_fast.export.gguf.names import SavedTensors, tensor_names
from bonsai_fast.export.gguf.tensors import pair_order, tensor_specs
from bonsai_fast.export.gguf.write import write_gguf

# largest accepted difference of a tensor from the model's, as a share of its norm: rounding
SAME_WEIGHTS = 0.02
LEAVE_OUT = "leave out --gguf-parent to export from the model directory"


def slice_gguf(
    dense: DenseGGUF,
    kept: Sequence[KeptLayer],
    output: str | os.PathLike[str],
    *,
    precision: GGUFPrecision = "f16",
    pad_channels_to: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the kept heads and channels of a dense model's file; only these are read.

    Args:
        dense: the file, F32, F16 or BF16, as llama.cpp's own converter writes it.
        kept: heads and channels of every layer.
        output, precision, pad_channels_to, advance: as in `to_gguf`.
    Raises:
        ValueError: `kept` does not fit the model, or llama.cpp cannot run the result.
        FileExistsError, OSError: as in `to_gguf`.
    """
    dense.keep(kept)
    plan = choose(
        dense.shapes(),
        family=PARENTS[dense.architecture],
        is_tied=dense.is_tied,
        keeps_biases=dense.has_output_biases,
        pad_channels_to=pad_channels_to,
    )
    name = plan.architecture.name
    fields = dense.fields(name) | prefixed(layer_fields(plan, dense.head_dim), name)
    size = write_gguf(Path(output), name, fields, tensor_specs(plan, dense), precision, advance)
    return Exported(str(output), "gguf", name, size, plan.notes)


def to_gguf_from_parent(
    model: str | os.PathLike[str],
    parent: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: GGUFPrecision = "f16",
    pad_channels_to: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> Exported:
    """Write a saved model as GGUF from its dense parent's GGUF file.

    `bonsai_report.json` says which heads and channels are kept. The parent's weights for them are
    compared with the model's before anything is written.

    Args:
        model: a run or model directory.
        parent: the dense model's GGUF file.
        output, precision, pad_channels_to, advance: as in `to_gguf`.
    Raises:
        ValueError: there is no report, the parent cannot be cut or is of another model, the model's
            weights have changed since it was pruned, or llama.cpp cannot run such a model.
        FileExistsError, OSError: as in `to_gguf`.
    """
    saved = open_saved(model)
    check_model(saved)
    dense = DenseGGUF(parent)
    if saved.has_output_biases and not dense.has_output_biases:
        raise ValueError(f"{saved.directory} has biases that {parent} does not have; {LEAVE_OUT}")
    kept = kept_layers(saved)
    dense.keep(kept)
    if tuple(dense.shapes()) != saved.shapes:
        raise ValueError(
            f"{parent} and the report of {saved.directory} give other widths than the model has; "
            f"{LEAVE_OUT}"
        )
    _compare(saved, dense)
    return slice_gguf(
        dense,
        kept,
        output,
        precision=precision,
        pad_channels_to=pad_channels_to,
        advance=advance,
    )


def kept_layers(saved: SavedModel) -> list[KeptLayer]:
    """The heads and channels that a model keeps of its parent, by its report.

    Raises:
        ValueError: there is no such report.
    """
    entries = saved.report.get("kept")
    if not isinstance(entries, dict):
        raise ValueError(
            f"{saved.directory} has no bonsai_report.json that says what is kept; {LEAVE_OUT}"
        )
    layers = [entries.get(str(index), {}) for index in range(len(saved.shapes))]
    return [
        KeptLayer(tuple(layer.get("heads", ())), tuple(layer.get("channels", ())))
        for layer in layers
    ]


def _compare(saved: SavedModel, dense: DenseGGUF) -> None:
    """Check that the kept part of the dense file is the model."""
    own = SavedTensors(saved)
    own.check_complete()
    for name in tensor_names(dense.num_layers):
        if own.has(name) != dense.has(name):
            raise ValueError(f"{dense.path} is of another model: only one of the two has {name}")
        if not own.has(name):
            continue
        wanted, found = own.get(name).float(), dense.get(name).float()
        if dense.rotates_pairs and (".attn_q." in name or ".attn_k." in name):
            wanted = pair_order(wanted, dense.head_dim)
        if wanted.shape != found.shape:
            raise ValueError(
                f"{dense.path} is of another model: the kept part of {name} has shape "
                f"{tuple(found.shape)}, in the model {tuple(wanted.shape)}"
            )
        difference = float((wanted - found).norm() / wanted.norm().clamp(min=1e-30))
        if not difference <= SAME_WEIGHTS:
            raise ValueError(
                f"{dense.path} is of another model, or the model's weights have changed since it "
                f"was pruned: {name} differs by {difference:.1%}; {LEAVE_OUT}"
            )
