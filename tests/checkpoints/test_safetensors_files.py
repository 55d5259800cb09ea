"""Tensors written and read block by block make the files that safetensors makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from surgery_cases import bytes_of

from bonsai_fast.checkpoints.safetensors_reader import DTYPES, open_checkpoint
from bonsai_fast.checkpoints.safetensors_writer import write_safetensors


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_files_are_those_of_safetensors(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    names = data.draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6))
    names = [name for name in names if name != "__metadata__" and name.isprintable()]
    tensors = {}
    for name in names:
        dtype = data.draw(st.sampled_from(list(DTYPES.values())))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        count = int(torch.tensor(shape).prod()) if shape else 1
        raw = torch.arange(count * dtype.itemsize).remainder(2).to(torch.uint8)
        tensors[name] = raw.view(dtype).view(shape)
    step = data.draw(st.integers(1, 3))

    def blocks(name: str) -> Iterator[torch.Tensor]:
        tensor = tensors[name]
        yield from tensor.split(step) if tensor.dim() and len(tensor) else [tensor]

    write_safetensors(path, tensors, blocks, {"format": "pt"})
    assert path.read_bytes() == save(tensors, {"format": "pt"})
    path.rename(path.with_name("model.safetensors"))
    stored = open_checkpoint(path.parent).tensors
    for name, tensor in tensors.items():
        size = data.draw(st.integers(1, 20))
        read = [block.clone() for _, block in stored[name].blocks(size)]
        again = torch.cat(read) if tensor.dim() else read[0]
        assert again.shape == tensor.shape and again.dtype == tensor.dtype
        assert bytes_of(again) == bytes_of(tensor)
