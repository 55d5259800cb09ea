"""From a recipe to the parameters of a model that are trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.recovery.distill.lora_adapters import LoraAdapters, adapted_layers
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.distill.trained_part import TrainedPart, TrainedParts, WholeWeights
from bonsai_fast.recovery.distill.zero_masks import ZeroMasks


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the LM head's weight is that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def whole_weights(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Parameters that are trained themselves, by name; none of embeddings.

    A tied LM head stays frozen: it is the embeddings.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = model.get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings or not parameter.is_floating_point():
            continue
        if id(parameter) in of_head:
            wanted = recipe.head and not has_tied_head(model)
        else:
            wanted = recipe.weights == "all" or (recipe.weights == "norms" and parameter.dim() == 1)
        if wanted:
            found[name] = parameter
    return found


def choose_trained(
    model: PreTrainedModel, recipe: Recipe, zeros: ZeroMasks | None, *, autocast: bool
) -> TrainedParts:
    """Make what a recipe trains trainable, and freeze everything else.

    Args:
        model: changed in place until `TrainedParts.finish`.
        recipe: what is trained.
        zeros: of a sparse model.
        autocast: whether the model is run in autocast.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    whole = whole_weights(model, recipe)
    for parameter, _ in required:
        parameter.requires_grad_(False)
    parts: list[TrainedPart] = []
    if recipe.weights == "lora":
        parts.append(
            LoraAdapters(
                model,
                adapted_layers(model, recipe.adapted),
                rank=recipe.rank,
                scale=recipe.scale,
                dropout=recipe.dropout,
                zeros=zeros,
                autocast=autocast,
            )
        )
    if whole:
        parts.append(WholeWeights(whole, zeros))
    return TrainedParts(model, parts, required)


def num_trained(model: PreTrainedModel, recipe: Recipe) -> int:
    """Number of parameters that a recipe trains."""
    count = sum(parameter.numel() for parameter in whole_weights(model, recipe).values())
    if recipe.weights == "lora":
        for name in adapted_layers(model, recipe.adapted):
            count += recipe.rank * sum(model.get_parameter(f"{name}.weight").shape)
    return count
