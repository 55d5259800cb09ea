"""Models as commands name them: a hub name or a directory, a device, a precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bonsai_fast.checkpoints.embedded import NAME, embedded_model
from bonsai_fast.checkpoints.memory import (
    default_budget,
    device_memory,
    local_directory,
    parse_bytes,
    weight_bytes,
)
from bonsai_fast.checkpoints.streaming import open_streamed, stream_layers
from bonsai_fast.config.choices import ModelDtype
from bonsai_fast.config.options import DEVICE, option
from bonsai_fast.console import Reporter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TrustOptions:
    """Whether code that comes with a model is run."""

    trust_remote_code: bool = option(
        False, "Run code that comes with the model. Only if you trust it.", group=DEVICE
    )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(TrustOptions):
    """Where a model is put."""

    device: str = option(
        "auto", "cpu, cuda, cuda:N, or auto: cuda if there is one.", group=DEVICE, value="DEVICE"
    )


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(DeviceOptions):
    """Where a model is put, and how it is read."""

    dtype: ModelDtype = option(
        "auto", "Number format of the weights. auto: that of the checkpoint.", group=DEVICE
    )


def load_parent(
    name: str | None, options: LoadingOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the parent and its tokenizer.

    Raises:
        ValueError, OSError: no such model, unknown model type, or no such device.
    """
    with _loading(name):
        # first, because it has the clearest errors
        AutoConfig.from_pretrained(_path(name), trust_remote_code=options.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            _path(name), trust_remote_code=options.trust_remote_code
        )
    return load_model(name, options), tokenizer


def load_model(name: str | None, options: LoadingOptions) -> PreTrainedModel:
    """Load a model without its tokenizer; arguments and errors as in `load_parent`."""
    device = find_device(options.device)
    trust = options.trust_remote_code
    with _loading(name):
        AutoConfig.from_pretrained(_path(name), trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(
            _path(name), dtype=DTYPES.get(options.dtype, "auto"), trust_remote_code=trust
        )
    return _named(name, cast(Any, model).to(device).eval())


def load_config(name: str | None, options: TrustOptions) -> PreTrainedConfig:
    """Read the configuration of a model; errors as in `load_parent`."""
    with _loading(name):
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            _path(name), trust_remote_code=options.trust_remote_code
        )
    return found


def _path(name: str | None) -> str:
    return str(embedded_model()) if name is None else name


def _named(name: str | None, model: PreTrainedModel) -> PreTrainedModel:
    """Give a model the name that runs record: as the user wrote it, wherever its files are."""
    model.config.name_or_path = NAME if name is None else name
    return model


@contextmanager
def _loading(name: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name or NAME} cannot be loaded: {error}") from error


def open_parent(
    name: str | None,
    options: LoadingOptions,
    reporter: Reporter,
    *,
    memory_budget: str | None = None,
    by_layer: bool = False,
    stream: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the parent, or stream its layers if that is asked for or it does not fit.

    Args:
        name: hub name or directory; None for the embedded model.
        options: device, dtype, and whether code of the checkpoint may run.
        reporter: gets a note if layers are streamed automatically.
        memory_budget: memory to leave beside the weights; the device's default if None.
        by_layer: the caller computes one layer at a time, so that a model that is too large for the
            GPU may stay in the host's memory.
        stream: stream from disk, whether or not the model fits.
    Raises:
        ValueError, OSError: as `load_parent`.
    """
    directory = _streamed_from(name, memory_budget, options, stream)
    if directory is None and by_layer:
        return _load_or_stream_from_host(name, memory_budget, options, reporter)
    if directory is None:
        return load_parent(name, options)
    trust = options.trust_remote_code
    with _loading(name):
        AutoConfig.from_pretrained(directory, trust_remote_code=trust)  # has the clearest errors
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    model = open_streamed(
        directory,
        device=find_device(options.device),
        dtype=DTYPES.get(options.dtype),
        trust_remote_code=trust,
    )
    if not stream:
        reporter.note(f"{name or NAME} does not fit into memory: its layers are streamed from disk")
    return _named(name, model), tokenizer


def _load_or_stream_from_host(
    name: str | None, memory_budget: str | None, options: LoadingOptions, reporter: Reporter
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the parent on a GPU, or on the CPU if it is too large to be streamed to the GPU.

    Reached by models that fit, and by those that are not in safetensors, whatever their size.
    """
    device = find_device(options.device)
    model, tokenizer = load_parent(name, replace(options, device="cpu"))
    needed = sum(x.nbytes for x in model.parameters()) + _budget(memory_budget, device)
    if device.type != "cuda" or needed <= device_memory(device):
        return cast(PreTrainedModel, cast(Any, model).to(device)), tokenizer
    reporter.note(f"{name or NAME} does not fit on the GPU: its layers are streamed from memory")
    return stream_layers(model, device=device), tokenizer


def _budget(asked: str | None, device: torch.device) -> int:
    return default_budget(device) if asked is None else parse_bytes(asked)


def _streamed_from(
    name: str | None, memory_budget: str | None, options: LoadingOptions, stream: bool
) -> Path | None:
    """The directory to stream a parent from; None if it is to be loaded."""
    path, device = _path(name), find_device(options.device)
    if stream:
        return local_directory(path, download=True)
    budget = _budget(memory_budget, device)  # may be malformed
    try:
        directory = local_directory(path, download=False)
        needed = weight_bytes(directory, DTYPES.get(options.dtype)) + budget
    except (OSError, ValueError, SafetensorError):
        return None  # loading has clearer errors, and knows other formats
    return directory if needed > device_memory(device) else None


def find_device(name: str) -> torch.device:
    """The device of a command line.

    Raises:
        ValueError: unknown, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device: {name} was asked for, "
            f"but PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device
