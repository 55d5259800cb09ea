"""Reads what a decoder computes from the modules of a loaded model.

Every parameter of a layer must be accounted for, and `self_check` then compares with the model
itself, so an unknown part is refused and never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import LayerStream, stream_of
from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.parent import (
    Attention,
    Removed,
    Structure,
    SubLayer,
    UnsupportedStructureError,
)
from bonsai_fast.scoring.fused.read_layer import LayerParts, read_layer
from bonsai_fast.scoring.fused.read_norm import read_norm
from bonsai_fast.scoring.fused.read_rotary import takes_kind

FINAL_NORMS = ("norm", "final_layernorm")


class _Reader:
    """Reads the layers of one model."""

    def __init__(self, model: PreTrainedModel, layout: Layout, *, rotary_kinds: bool) -> None:
        self._layers = model.get_submodule(layout.decoder.path)
        self._layout, self._kinds = layout, rotary_kinds
        self._config = model.config.get_text_config(decoder=True)

    def __call__(self, index: int) -> LayerParts:
        layer = self._layers.get_submodule(str(index))
        return read_layer(layer, self._layout, index, self._config, rotary_kinds=self._kinds)


class _StreamedSublayers(Sequence[SubLayer]):
    """Sub-layers of a streamed model; reading one brings its layer's weights into memory."""

    def __init__(self, reader: _Reader, stream: LayerStream) -> None:
        self._reader, self._stream = reader, stream

    def __len__(self) -> int:
        return 2 * self._stream.num_layers

    def __getitem__(self, depth):  # type: ignore[no-untyped-def]
        layer, place = divmod(depth, 2)
        self._stream.bring_in(layer)
        return self._reader(layer)[place]


def read_structure(model: PreTrainedModel, layout: Layout) -> Structure:
    """Describe a loaded model. Cheap: tensors are not copied.

    Raises:
        UnsupportedStructureError: the model is not a decoder as in `parent`.
    """
    path, _, name = layout.decoder.path.rpartition(".")
    # of a model that reads images, too, the part that reads text
    backbone = model.get_submodule(path)
    if name != "layers":
        raise UnsupportedStructureError(
            f"expected the layers in {type(backbone).__name__}.layers, found {name}"
        )
    stream = stream_of(model)
    _check_devices(model, stream)
    rotary = getattr(backbone, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise UnsupportedStructureError(f"{type(backbone).__name__} has no rotary_emb")
    rotary_kinds = takes_kind(rotary)
    reader = _Reader(model, layout, rotary_kinds=rotary_kinds)
    layers = [reader(index) for index in range(layout.decoder.num_layers)]
    sublayers: list[SubLayer] = [each for layer in layers for each in layer[:2]]
    blocks: list[Block | None] = [
        None if isinstance(each, Removed) else each.block for each in sublayers
    ]
    final_norm = next((each for each in FINAL_NORMS if hasattr(backbone, each)), None)
    if final_norm is None:
        raise UnsupportedStructureError(f"{type(backbone).__name__} has none of {FINAL_NORMS}")
    found: Sequence[SubLayer] = tuple(sublayers)
    if stream is not None:
        found = _StreamedSublayers(reader, stream)
    embedding = model.get_input_embeddings()
    return Structure(
        embedding=embedding,
        embedding_factor=float(getattr(backbone, "embedding_multiplier", 1.0)),
        rotary=rotary,
        rotary_kinds=rotary_kinds,
        sublayers=found,
        blocks=blocks,
        parallel=any(layer.parallel for layer in layers),
        capped=any(isinstance(each, Attention) and each.softcap is not None for each in sublayers),
        norm=read_norm(backbone.get_submodule(final_norm), final_norm),
        like=next(embedding.parameters()),
    )


def _check_devices(model: PreTrainedModel, stream: LayerStream | None) -> None:
    streamed = "" if stream is None else f"{stream.path}."
    devices = {
        parameter.device
        for name, parameter in model.named_parameters()
        if not (streamed and name.startswith(streamed))
    }
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UnsupportedStructureError(
            f"expected all parameters on one device, found {sorted(map(str, devices))}"
        )
