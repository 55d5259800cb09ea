"""Find the decoder of a loaded Hugging Face model and everything in it that can be pruned."""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from bonsai_fast.models.attention_parts import HeadsFound, find_heads
from bonsai_fast.models.blocks import (
    AttentionBlock,
    Block,
    Cut,
    Decoder,
    ExpertsBlock,
    MLPBlock,
)
from bonsai_fast.models.experts import Verdicts, find_experts
from bonsai_fast.models.families import PREFIX
from bonsai_fast.models.find_sublayers import (
    LayerTracer,
    SubLayerFound,
    exclusive_norms,
    find_sublayers,
)
from bonsai_fast.models.graph_walk import origins
from bonsai_fast.models.layer_findings import KINDS, LayerParts, moved_parts, refused_kinds
from bonsai_fast.models.layer_runs import TOKENS, DecoderRun, LayerRun, traced
from bonsai_fast.models.mlp_parts import find_channels
from bonsai_fast.models.parts import MixedPartsError, Names
from bonsai_fast.models.text_decoder import UnsupportedModelError, refuse, run_text_decoder

__all__ = ["UnsupportedModelError", "find_decoder"]

# What was found in models that were asked about before, by all that it depends on.
_FOUND: OrderedDict[Hashable, Decoder] = OrderedDict()
_MAX_FOUND = 32


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder layers of a causal language model and the parts of every sub-layer.

    A cheap copy of the decoder runs on random numbers; what depends on what in it tells which
    weights belong to which head or channel. Weights are not looked at, so that the model may be on
    the meta device.

    Raises:
        UnsupportedModelError: no decoder, or nothing in it that can be pruned.
    """
    key = _key(model)
    if key not in _FOUND:
        # gradients tell, also inside the caller's inference mode
        with torch.inference_mode(False), torch.enable_grad():
            _FOUND[key] = _find(model)
        while len(_FOUND) > _MAX_FOUND:
            _FOUND.popitem(last=False)
    _FOUND.move_to_end(key)
    return _FOUND[key]


def _key(model: PreTrainedModel) -> Hashable:
    """All that the decoder of a model depends on: its code, configuration, shapes and ties."""
    places: dict[int, int] = {}
    tensors = [
        (name, tuple(tensor.shape), places.setdefault(id(tensor), len(places)))
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    ]
    modules = [(name, type(module)) for name, module in model.named_modules()]
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return tuple(modules), tuple(tensors), config


def _find(model: PreTrainedModel) -> Decoder:
    prefix, list_path, run = run_text_decoder(model)
    names = Names.of(model, prefix)
    runs = run.lists[list_path]
    with traced():
        layers = _layers(model, run, runs, names)
        _add_experts(model, names, runs, layers)
        _drop_shared(model, names, runs, layers)
    attention = {i: layer.attention for i, layer in layers.items() if layer.attention is not None}
    mlp = {i: layer.mlp for i, layer in layers.items() if isinstance(layer.mlp, MLPBlock)}
    experts = {i: layer.mlp for i, layer in layers.items() if isinstance(layer.mlp, ExpertsBlock)}
    blocks: list[Block] = [*attention.values(), *mlp.values(), *experts.values()]
    refused = refused_kinds(layers, blocks)
    is_new = not model.config.model_type.startswith(PREFIX)
    if is_new and not any(block.whole is None for block in blocks):
        reasons = "; ".join(dict.fromkeys(refused.values())) or "none were found"
        raise refuse(model, f"expected heads, channels or experts that can be removed: {reasons}")
    return Decoder(
        model.config.model_type,
        names.full(list_path),
        len(runs),
        attention,
        mlp,
        refused,
        experts=experts,
    )


def _add_experts(
    model: PreTrainedModel, names: Names, runs: dict[int, LayerRun], layers: dict[int, LayerParts]
) -> None:
    """Put mixtures of experts in the place of MLPs."""
    verdicts: Verdicts = {}
    for index, layer in layers.items():
        path = names.full(runs[index].path)
        if layer.mixture_norms is None:
            continue
        norms = tuple(path + norm for norm in layer.mixture_norms)
        try:
            found = find_experts(model.get_submodule(path), path, index, norms, verdicts)
        except ValueError as error:
            layer.give_reasons("mlp", str(error))
            continue
        if found is not None:
            layer.mlp = replace(found, returns=layer.mixture_returns)
            layer.reasons = {k: r for k, r in layer.reasons.items() if k not in KINDS["mlp"]}
            refused = {"expert": found.experts_refused, "channel": found.channels_refused}
            layer.reasons |= {kind: reason for kind, reason in refused.items() if reason}


def _is_causal(run: LayerRun) -> bool:
    assert run.output is not None
    if not run.output.requires_grad or any(buffer.dim() > 1 for buffer in run.layer.buffers()):
        return True  # a buffer may be a mask, whose values are unknown on the meta device
    given = (*run.arguments, *run.keywords.values())
    if not any(isinstance(value, torch.Tensor) and value.dim() == 4 for value in given):
        return True  # only eager attention, which the copy has, needs a mask to be causal
    (read,) = torch.autograd.grad(
        run.output[:, : TOKENS // 2].sum(), run.states, retain_graph=True, allow_unused=True
    )
    return read is None or not bool(read[:, TOKENS // 2 :].any())


def _layers(
    model: PreTrainedModel, run: DecoderRun, runs: dict[int, LayerRun], names: Names
) -> dict[int, LayerParts]:
    """Look into one layer of each sort."""
    found: dict[int, LayerParts] = {}
    examples: dict[Hashable, int] = {}
    for index, layer in sorted(runs.items()):
        tracer = LayerTracer(run.stand_in, layer)
        sort = _sort(tracer)
        if sort not in examples:
            if not _is_causal(layer):
                raise refuse(model, "its layers read later tokens; expected a causal decoder")
            examples[sort] = index
            found[index] = _look_into(tracer, index, names)
        else:
            example = examples[sort]
            found[index] = moved_parts(found[example], names, runs[example].path, layer.path, index)
    return found


def _sort(tracer: LayerTracer) -> Hashable:
    """Layers of one sort have the same modules and compute the same."""
    run = tracer.run
    assert run.output is not None
    start = len(run.path)
    matrices = [
        (p[start:], m.in_features, m.out_features, m.has_bias) for p, m in tracer.matrices.items()
    ]
    tensors = [(name[start:], tuple(tensor.shape)) for name, tensor in tracer.tensors.items()]
    modules = [type(module) for module in run.layer.modules()]
    operations = origins(run.output, through_matrices=True).operations
    return tuple(matrices), tuple(tensors), tuple(modules), tuple(operations)


def _look_into(tracer: LayerTracer, index: int, names: Names) -> LayerParts:
    sublayers = find_sublayers(tracer)
    if (mixture := _mixture(tracer)) is not None:  # it may put tokens into another order
        sublayers = [s for s in sublayers if not s.output.startswith(f"{mixture}.")]
    mixers = [s for s in sublayers if s.mixes_tokens]
    attentions = [s for s in mixers if s.has_softmax]
    mlps = [s for s in sublayers if not s.mixes_tokens]
    if len(mlps) > 1:  # Gemma 4 mixes in an embedding of each layer by projections of its own
        mlps = [s for s in mlps if s.module != tracer.run.path] or mlps
    layer = LayerParts(None, None, {})
    if len(attentions) == 1 or (not attentions and len(mixers) == 1):
        layer.attention = _attention(tracer, (attentions or mixers)[0], index, names, layer.reasons)
    elif mixers:
        layer.give_reasons("attention", "its layers hold several mixers of tokens")
    removed = getattr(tracer.run.layer, "removed_sublayers", ())
    for kind, found in (("attention", mixers), ("mlp", mlps)):
        if not found and kind not in removed:
            name = "attention" if kind == "attention" else "MLP"
            layer.give_reasons(kind, f"no {name} adds to the hidden states of its layers")
    if mixture is not None:
        layer.mixture_norms = _mixture_norms(tracer, mixture)
        layer.mixture_returns = tracer.base.returns.get(mixture)
        layer.give_reasons("mlp", "its experts are not stored as transformers stores experts")
    elif len(mlps) == 1:
        layer.mlp = _mlp(tracer, mlps[0], index, names, layer.reasons)
    elif mlps:
        layer.give_reasons("mlp", "its layers hold several MLPs")
    return layer


def _mixture(tracer: LayerTracer) -> str | None:
    """Path of the module that holds experts."""
    paths = (f"{path}.".partition(".experts.") for path in tracer.matrices)
    return next((owner for owner, found, _ in paths if found), None)


def _mixture_norms(tracer: LayerTracer, mixture: str) -> tuple[str, ...]:
    matrices = [path for path in tracer.matrices if path.startswith(f"{mixture}.")]
    found = exclusive_norms(tracer, matrices, mixture)
    return tuple(norm[len(tracer.run.path) :] for norm in found)


def _attention(
    tracer: LayerTracer, found: SubLayerFound, index: int, names: Names, reasons: dict[str, str]
) -> AttentionBlock | None:
    obstacle = found.obstacle
    if found.module == tracer.run.path:
        obstacle = "its attention has no module of its own"
    elif not found.has_softmax and _hands_on_its_state(_module(tracer, found.module)):
        obstacle = f"{type(_module(tracer, found.module)).__name__} keeps its state outside a cache"
    if obstacle is not None:
        reasons |= dict.fromkeys(KINDS["attention"], obstacle)
        return None
    whole = None
    heads = HeadsFound(tracer.matrices[found.output].in_features, (0,), ())
    if not found.has_softmax:
        name = type(_module(tracer, found.module)).__name__
        whole = f"{name} is no softmax attention"
    elif getattr(getattr(_module(tracer, found.module), "config", None), "alibi", False):
        whole = "ALiBi of all heads is put into the attention mask outside the layers"  # Falcon
    else:
        try:
            heads = find_heads(tracer, found, names)
        except MixedPartsError as error:
            whole = str(error)
    if whole is not None:
        reasons |= {"head": whole, "kv-group": whole}
    elif any(_is_in_groups(cut, len(heads.kv_of_head)) for cut in heads.cuts):
        reasons["head"] = "query heads are stored between those of their KV group, all alike"
    return AttentionBlock(
        index,
        names.full(found.module),
        names.full(found.output),
        heads.head_dim,
        heads.kv_of_head,
        heads.cuts,
        tuple(names.full(norm) for norm in found.norms),
        whole,
        tracer.base.returns.get(found.module),
    )


def _hands_on_its_state(mixer: torch.nn.Module) -> bool:
    """Whether the layer gives a mixer its state and keeps what it returns, as xLSTM does."""
    return "state" in inspect.signature(mixer.forward).parameters


def _is_in_groups(cut: Cut, num_heads: int) -> bool:
    """Whether several query heads lie before each KV head in one parameter, as in Falcon 40B."""
    of_query = (cut.owner < num_heads).int()
    starts = int((of_query.diff() == 1).sum()) + int(of_query[0])
    heads = len(cut.owner[of_query.bool()].unique())
    return 1 < starts < heads


def _mlp(
    tracer: LayerTracer, found: SubLayerFound, index: int, names: Names, reasons: dict[str, str]
) -> MLPBlock | None:
    if found.obstacle is not None:
        reasons |= dict.fromkeys(KINDS["mlp"], found.obstacle)
        return None
    whole, cuts = None, tuple[Cut, ...]()
    try:
        cuts = find_channels(tracer, found, names)
    except MixedPartsError as error:
        whole = str(error)
        reasons["channel"] = whole
    at_layer = found.module == tracer.run.path
    return MLPBlock(
        index,
        tuple(map(names.full, found.matrices if at_layer else (found.module,))),
        names.full(found.output),
        tracer.matrices[found.output].in_features,
        cuts,
        tuple(names.full(norm) for norm in found.norms),
        whole,
        None if at_layer else tracer.base.returns.get(found.module),
    )


def _module(tracer: LayerTracer, path: str) -> torch.nn.Module:
    return tracer.run.layer.get_submodule(path[len(tracer.run.path) + 1 :])


def _drop_shared(
    model: PreTrainedModel,
    names: Names,
    runs: dict[int, LayerRun],
    layers: dict[int, LayerParts],
) -> None:
    """Take back what other layers use too: shared weights, and keys and values read elsewhere."""
    users: dict[int, set[int]] = {}
    for index, run in runs.items():
        module = model.get_submodule(names.full(run.path))
        for parameter in module.parameters():
            users.setdefault(id(parameter), set()).add(index)
    for layer in layers.values():
        for kind in KINDS:
            block = layer.attention if kind == "attention" else layer.mlp
            if block is not None and any(
                len(users.get(id(parameter), ())) > 1
                for path in (block.modules)
                for parameter in model.get_submodule(path).parameters()
            ):
                layer.take_back(kind, "its weights are shared between layers")
    for index, run in runs.items():
        assert run.output is not None
        met = origins(run.output, through_matrices=True)
        others = {
            other
            for other, reached in runs.items()
            if other != index and any(mark.startswith(f"{reached.path}.") for mark in met.marks)
        }
        for other in (index, *others) if others else ():
            layers[other].take_back("attention", "layers share keys and values")
