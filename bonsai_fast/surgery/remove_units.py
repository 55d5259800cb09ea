"""Remove units from a model in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import take
from bonsai_fast.surgery.kept import Kept, kept_by
from bonsai_fast.surgery.save import check_unquantized
from bonsai_fast.surgery.skeleton import build_structure


@torch.no_grad()
def remove_units(
    model: PreTrainedModel, layout: Layout, keep_mask: torch.Tensor
) -> PreTrainedModel:
    """Build the smaller model that a keep mask describes.

    It computes what the parent computes if the removed units contribute zero to the input of the
    output projection. A removed sub-layer leaves the bias of that projection, if there is one. The
    parent is not changed and shares no memory with the result; at the peak both are in memory.

    The result has the parent's dtype, device, mode, attention implementation and generation
    configuration. It has the parent's own class if that can express it (all layers equal, no
    sub-layer removed, and the configuration allows it), else the bonsai_* class made from it, which
    `save_pretrained` saves with the code it needs.

    Args:
        model: a causal language model, dense or pruned.
        layout: `Layout.of(model)`, of any granularity.
        keep_mask: bool [P], True = kept, on any device.
    Returns:
        the new model.
    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask is not [P], the layout is another model's, the model is quantized,
            offloaded or spread over devices, or its family has no class for such a result.
    """
    layout.check_mask(keep_mask, dims=1)
    check_removable(model, layout)
    kept = kept_by(model, layout, keep_mask.cpu())
    child = build_structure(model, layout.decoder, kept)
    move_in(child, model, kept)
    child.train(model.training)
    if model.can_generate():
        child.generation_config = copy.deepcopy(model.generation_config)
    return child


def check_removable(model: PreTrainedModel, layout: Layout) -> None:
    """Refuse a model that units cannot be removed from.

    Raises:
        ValueError: the model is quantized, offloaded or spread over devices, or `layout` is another
            model's.
    """
    check_unquantized(model)
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        raise ValueError(
            "expected a model on one device, neither offloaded nor streamed; "
            f"its parameters are on {sorted(map(str, devices))}"
        )
    parameters = dict(model.named_parameters())
    fits = sum(map(torch.Tensor.numel, parameters.values())) == layout.num_model_parameters and all(
        cut.parameter in parameters and parameters[cut.parameter].shape[cut.dim] == len(cut.owner)
        for block in layout.decoder.blocks()
        for cut in block.cuts
    )
    if not fits:
        raise ValueError("the layout was made from another model: expected Layout.of(model)")


def move_in(child: PreTrainedModel, parent: PreTrainedModel, kept: Kept) -> None:
    """Copy the kept parts of the parent's tensors into the child; ties are kept.

    From a parent on the meta device the child gets only shapes, dtypes and ties.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, _ in list(child.named_parameters(remove_duplicate=False)):
        source = parent.get_parameter(name)
        if id(source) not in copies:
            if name in kept.slices:
                dim, index = kept.slices[name]
                data = take(source, index, dim)
            else:
                data = source.clone()
            copies[id(source)] = nn.Parameter(data, requires_grad=source.requires_grad)
        module, _, attribute = name.rpartition(".")
        setattr(child.get_submodule(module), attribute, copies[id(source)])
    for name, _ in list(child.named_buffers()):
        module, _, attribute = name.rpartition(".")
        owner, source_owner = child.get_submodule(module), parent.get_submodule(module)
        buffer = source_owner.get_buffer(attribute)
        if name in kept.slices:
            dim, index = kept.slices[name]
            buffer = take(buffer, index, dim)
        setattr(owner, attribute, buffer.clone())
        # A rotary embedding keeps the length here that its buffers have grown to.
        if hasattr(source_owner, "max_seq_len_cached"):
            owner.max_seq_len_cached = source_owner.max_seq_len_cached
