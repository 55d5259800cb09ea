"""A saved model that is not loaded: its structure on the meta device, its tensors in files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bonsai_fast.checkpoints.joined_tensor import JoinedTensor
from bonsai_fast.checkpoints.safetensors_reader import Checkpoint, StoredTensor, open_checkpoint
from bonsai_fast.checkpoints.saved_names import SavedFrom, saved_names
from bonsai_fast.hub import register

# buffers that old versions of transformers saved; new ones compute them
OUTDATED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
COMPARED_BYTES = 1 << 24

AnyStored = StoredTensor | JoinedTensor


@dataclass(frozen=True, eq=False)
class ParentOnDisk:
    """A saved model that has not been loaded.

    Attributes:
        model: on the meta device, with the dtypes, ties and generation configuration of the loaded
            model.
        checkpoint: its files.
        tensors: the stored tensor of each entry of the model's state; tied entries share one.
        unknown: names of stored tensors that do not belong to the model.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    tensors: dict[str, AnyStored]
    unknown: tuple[str, ...]


def open_parent(
    directory: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> ParentOnDisk:
    """Open a saved model.

    Args:
        directory: of the model.
        dtype: of the model; if None, that of its configuration, or else of its files.
        trust_remote_code: build the model from code in its directory.
    Raises:
        ValueError: no such model, quantized, not in safetensors, damaged, or tensors are missing or
            have other shapes than the configuration gives.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected the directory of a saved model")
    register()
    try:
        checkpoint = open_checkpoint(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"model {directory} cannot be opened: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{directory} is quantized: prune the model before quantization")
    dtype = dtype or config.dtype or _first_float(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if model._get_dtype_plan(dtype):
        raise ValueError(
            f"{type(model).__name__} keeps some weights in float32: load the model and use "
            "remove_units"
        )
    if model.can_generate():
        model.generation_config = _generation_config(directory)
    tensors, used = _locate(model, checkpoint, directory)
    outdated = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *OUTDATED]))
    unknown = tuple(
        name for name in checkpoint.tensors if name not in used and not outdated.search(name)
    )
    return ParentOnDisk(model, checkpoint, tensors, unknown)


def _locate(
    model: PreTrainedModel, checkpoint: Checkpoint, directory: Path
) -> tuple[dict[str, AnyStored], set[str]]:
    """The stored tensors of the model's state, and the stored names that are used."""
    state = model.state_dict()
    parts: dict[str, dict[str, SavedFrom]] = {name: {} for name in state}
    for stored, part in saved_names(model, state).items():
        parts[part.name][stored] = part
    found: dict[str, AnyStored] = {}
    used: set[str] = set()
    for name in state:
        own = _stored(model, checkpoint, parts[name], name)
        if own is not None:
            found[name] = own[0]
            used |= own[1]
    tensors: dict[str, AnyStored] = {}
    for names in _tied(model, state):
        present = [name for name in names if name in found]
        if not present:
            raise ValueError(
                f"{directory}: expected a tensor {next(iter(parts[names[0]]))}, found none"
            )
        source = found[present[0]]
        for name in names:
            tensors[name] = source
        # like loading: entries with different values in the checkpoint are not tied
        for name in present[1:]:
            other = found[name]
            if not _equal(source, other):
                tensors[name] = other
                _untie(model, name)
    for name, source in tensors.items():
        if source.shape != tuple(state[name].shape):
            raise ValueError(
                f"{directory}: {next(iter(parts[name]))} has shape {source.shape}, expected "
                f"{tuple(state[name].shape)} by the configuration"
            )
    return tensors, used


def _stored(
    model: PreTrainedModel, checkpoint: Checkpoint, parts: dict[str, SavedFrom], name: str
) -> tuple[AnyStored, set[str]] | None:
    """The stored tensor of an entry of the state, or its parts joined, and the names of these."""

    def spelled(*names: str) -> str | None:
        return next((n for n in _spellings(model, *names) if n in checkpoint.tensors), None)

    whole = [stored for stored, part in parts.items() if part.expert is None]
    if (single := spelled(*whole, name)) is not None:
        return checkpoint.tensors[single], {single}
    by_expert: dict[int, list[tuple[int, str]]] = {}
    for stored, part in parts.items():
        spelling = spelled(stored)
        if spelling is None:
            return None
        by_expert.setdefault(part.expert or 0, []).append((part.first_row, spelling))
    experts = [[spelling for _, spelling in sorted(by_expert[e])] for e in sorted(by_expert)]
    joined = JoinedTensor(tuple(tuple(checkpoint.tensors[n] for n in each) for each in experts))
    return joined, {spelling for each in experts for spelling in each}


def _spellings(model: PreTrainedModel, *names: str) -> Iterator[str]:
    """Names that loading accepts: with and without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    for name in names:
        yield name
        yield name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names in a model's state, grouped by tensor."""
    groups: dict[int, list[str]] = {}
    for name in state:
        groups.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    return list(groups.values())


def _untie(model: PreTrainedModel, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    tensor = torch.empty_like(model.get_parameter(name))
    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))


def _equal(one: AnyStored, other: AnyStored) -> bool:
    if one.shape != other.shape:
        return False
    pairs = zip(one.blocks(COMPARED_BYTES), other.blocks(COMPARED_BYTES), strict=False)
    return one.dtype == other.dtype and all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def _first_float(checkpoint: Checkpoint) -> torch.dtype:
    dtypes = (tensor.dtype for tensor in checkpoint.tensors.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _generation_config(directory: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:  # none was saved
        return GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True
        )
