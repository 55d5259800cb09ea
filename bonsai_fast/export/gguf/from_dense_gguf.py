"""A GGUF file cut out of the dense model's, by what of each layer is kept.

Tokenizer and all other metadata are taken over, so that nothing here knows tokenizers.
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

# how far the parent's rounding may be from the model's: a share of a tensor's norm
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
    """Cut what is kept out of a dense model's file; nothing else is read.

    Args:
        dense: the file, F32, F16 or BF16, as llama.cpp's own converter makes it.
        kept: of every layer.
        output, precision, pad_channels_to, advance: as in `to_gguf`.
    Raises:
        ValueError: `kept` is not of such a model, or llama.cpp cannot run the result.
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
    """Write a saved model as GGUF by cutting it out of its dense parent's file.

    `bonsai_report.json` says what is kept. What is cut out is compared with the model's own
    weights before anything is written.

    Raises:
        ValueError: no report, a parent that cannot be cut or is another model's, weights that have
            changed since they were cut, or llama.cpp cannot run such a model.
        FileExistsError, OSError: as in `to_gguf`.
    """
    saved = open_saved(model)
    check_model(saved)
    dense = DenseGGUF(parent)
    if saved.has_output_biases and not dense.has_output_biases:
        raise ValueError(f"{saved.directory} has biases that {parent} has not; {LEAVE_OUT}")
    kept = kept_layers(saved)
    dense.keep(kept)
    if tuple(dense.shapes()) != saved.shapes:
        raise ValueError(f"{parent} cut by {saved.directory}'s report has other widths than it")
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
    """What a model's report says that it keeps of its parent.

    Raises:
        ValueError: it does not say.
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
    """Make sure that what is cut out is the model."""
    own = SavedTensors(saved)
    own.check_complete()
    for name in tensor_names(dense.num_layers):
        if own.has(name) != dense.has(name):
            raise ValueError(f"{dense.path} is of another model: only one of them has {name}")
        if not own.has(name):
            continue
        wanted, found = own.get(name).float(), dense.get(name).float()
        if dense.rotates_pairs and (".attn_q." in name or ".attn_k." in name):
            wanted = pair_order(wanted, dense.head_dim)
        if wanted.shape != found.shape:
            raise ValueError(
                f"{dense.path} is of another model: {name} cut out of it is "
                f"{tuple(found.shape)}, the model's {tuple(wanted.shape)}"
            )
        difference = float((wanted - found).norm() / wanted.norm().clamp(min=1e-30))
        if not difference <= SAME_WEIGHTS:
            raise ValueError(
                f"{dense.path} is of another model, or the model's weights have changed since it "
                f"was cut: {name} is off by {difference:.1%}; {LEAVE_OUT}"
            )
