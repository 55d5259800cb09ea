"""One generator function becomes an op: what runs where, and the recipe in CONTRIBUTING.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from op_paths import kernel_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bonsai_fast.ops._register import register

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@register()
def shifted(x: Tensor, shift: Tensor | None = None, *, factor: float = 2.0) -> Iterator[Tensor]:
    """x * factor + shift."""
    if x.dim() != 1:
        raise ValueError(f"x must be [N], got {list(x.shape)}")
    out = x.new_empty(x.shape)
    yield out
    torch.mul(x, factor, out=out)
    if shift is not None:
        out += shift


@register(mutates=("out",))
def overwrite(x: Tensor, out: Tensor) -> Iterator[None]:
    yield
    out.copy_(x)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the launchers of both ops are called with."""
    caught: list[dict[str, Any]] = []
    kernels = ModuleType("kernels")
    for op in ("shifted", "overwrite"):
        setattr(kernels, f"{op}_triton", lambda **arguments: caught.append(arguments))
    monkeypatch.setitem(sys.modules, f"bonsai_fast.kernels.{__name__}", kernels)
    return caught


def test_the_cpu_runs_all_of_it():
    x = torch.arange(3.0)
    assert torch.equal(shifted(x), 2 * x)
    assert torch.equal(shifted(x, x, factor=3.0), 4 * x)
    out = torch.zeros(3)
    overwrite(x, out)
    assert torch.equal(out, x)
    assert shifted.__doc__ == "x * factor + shift."


def test_pytorch_accepts_both():
    x = torch.arange(3.0)
    torch.library.opcheck(shifted, (x, x), {"factor": 3.0})
    torch.library.opcheck(overwrite, (x, torch.zeros(3)))


def test_tracing_stops_at_the_yield():
    """For any device: there is no GPU here, and none is needed."""
    with FakeTensorMode():
        x = torch.empty(5, dtype=torch.float16, device="cuda")
        out = shifted(x, x)
        assert (out.shape, out.dtype, out.device.type) == ((5,), torch.float16, "cuda")
        with pytest.raises(ValueError, match=r"x must be \[N\], got \[5, 1\]"):
            shifted(torch.empty(5, 1))


def test_cuda_calls_the_launcher_by_name(launches):
    """Also with what PyTorch leaves out: arguments that are equal to their defaults."""
    x = torch.arange(3.0)
    out = kernel_of(shifted)(x)
    assert launches.pop() == {"x": x, "shift": None, "factor": 2.0, "out": out}
    out = kernel_of(shifted)(x, factor=3.0, shift=x)
    assert launches.pop() == {"x": x, "shift": x, "factor": 3.0, "out": out}
    assert kernel_of(overwrite)(x, out) is None
    assert launches.pop() == {"x": x, "out": out}


def test_cuda_checks_first_and_launches_nothing_for_an_empty_result(launches):
    assert kernel_of(shifted)(torch.empty(0)).shape == (0,)
    with pytest.raises(ValueError, match=r"x must be \[N\], got \[\]"):
        kernel_of(shifted)(torch.tensor(1.0))
    assert not launches


def test_the_recipe_for_contributors_works(capsys):
    text = CONTRIBUTING.read_text().partition("## A new op")[2].partition("\n## ")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ") or not line]
    program = "\n".join(lines)
    assert "@register()" in program and "opcheck(" in program
    # as a file of its own would: annotations are looked up in the module
    module = ModuleType("recipe")
    exec(program, module.__dict__)
    assert "[2., 2., 2.]" in capsys.readouterr().out
    assert torch.equal(module.double(torch.arange(4.0)[None]), 2 * torch.arange(4.0)[None])
