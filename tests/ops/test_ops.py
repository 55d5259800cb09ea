"""The ops as PyTorch sees them: dispatch, tracing, and the CPU path held to the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_paths import kernel_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bonsai_fast
from bonsai_fast import ops
from bonsai_fast.testing.cases import DTYPES, assert_within_baseline, random_logits, random_tensor
from bonsai_fast.testing.reference import token_nll_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [
    pytest.param((64, 32000), id="many-blocks"),
    pytest.param((5, 2 * ops.BLOCK_LOGITS + 1), id="a-row-beyond-a-block"),
    pytest.param((7, 41), id="small"),
    pytest.param((3, 1), id="one-token"),
    pytest.param((0, 41), id="no-rows"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_agrees_with_reference(shape, dtype):
    logits, labels = random_logits(*shape, dtype=dtype)
    assert_within_baseline(ops.token_nll(logits, labels), token_nll_reference, logits, labels)


def test_cpu_takes_strided_rows():
    """Rows cut out of a wider buffer whose other columns are NaN."""
    values, labels = random_logits(6, 300)
    logits = torch.full((12, 333), math.nan)[::2, 10:310].copy_(values)
    assert_within_baseline(ops.token_nll(logits, labels), token_nll_reference, values, labels)


def test_cpu_infinities_are_those_of_torch():
    logits, labels = random_logits(4, 41)
    logits[0, 0] = math.inf
    logits[1, :] = -math.inf
    logits[2, labels[2]] = -math.inf
    expected = F.cross_entropy(logits, labels, reduction="none")
    nll = ops.token_nll(logits, labels)
    torch.testing.assert_close(nll, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 41])
def test_cpu_names_a_label_out_of_range(bad):
    logits, labels = random_logits(4, 41)
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"labels must be in 0\.\.40, got .*{bad}"):
        ops.token_nll(logits, labels)


def test_cpu_makes_no_float_copy_of_the_logits():
    """The largest tensor that is made on the way stays a block, however many rows there are."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.numel = max(self.numel, result.numel())
            return result

    logits, labels = random_logits(64, 32000, dtype=torch.bfloat16)
    with Largest() as largest:
        ops.token_nll._init_fn(logits, labels)
    assert 0 < largest.numel <= torch.get_num_threads() * ops.BLOCK_LOGITS < logits.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype, device):
    logits, labels = random_logits(6, 300, dtype=dtype, device=device)
    torch.library.opcheck(ops.token_nll, (logits, labels))
    torch.library.opcheck(ops.token_nll, (logits[::2, 1:], labels[::2].clamp(max=298)))


def test_compiles_without_a_graph_break(device):
    """The op is opaque to the compiler, with any number of rows."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def mean_nll(logits, labels):
        return ops.token_nll(logits * 2, labels).mean()

    for num_rows in (6, 11):
        logits, labels = random_logits(num_rows, 300, device=device)
        expected = token_nll_reference(logits * 2, labels).mean()
        torch.testing.assert_close(mean_nll(logits, labels), expected)


def test_exports_with_any_number_of_rows(device):
    """Checks that read a size as a Python int would fix it to that of the example."""

    class Losses(torch.nn.Module):
        def forward(self, x, weight, labels):
            return ops.lm_head_nll(x, weight, labels) - ops.token_nll(x @ weight.T, labels)

    weight, rows = random_tensor(11, 8, device=device), torch.export.Dim("rows", min=2)
    cases = [
        (random_tensor(n, 8, device=device), weight, torch.arange(n).to(device)) for n in (6, 9)
    ]
    program = torch.export.export(Losses(), cases[0], dynamic_shapes=({0: rows}, None, {0: rows}))
    for case in cases:
        torch.testing.assert_close(program.module()(*case), Losses()(*case))


def test_inference_mode(device):
    logits, labels = random_logits(6, 300, device=device)
    with torch.inference_mode():
        nll = ops.token_nll(logits, labels)
    assert_within_baseline(nll, token_nll_reference, logits, labels)


@pytest.mark.gpu
def test_cuda_dispatches_to_triton(device):
    logits, labels = random_logits(6, 5003, dtype=torch.bfloat16, device=device)
    assert torch.equal(ops.token_nll(logits, labels), kernel_of(ops.token_nll)(logits, labels))


def test_works_without_triton():
    """An import of Triton at module level would break a CPU install."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from bonsai_fast import ops\n"
        "print(ops.token_nll(torch.zeros(1, 4), torch.tensor([2])).item())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bonsai_fast.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(math.log(4))


def test_tuning_is_off_unless_asked_for(monkeypatch):
    """With several configurations, results would depend on which one a machine finds fastest."""
    pytest.importorskip("triton")
    from bonsai_fast.kernels._configs import tunable

    monkeypatch.delenv("BONSAI_FAST_AUTOTUNE", raising=False)
    assert tunable("best", "other") == ["best"]
    monkeypatch.setenv("BONSAI_FAST_AUTOTUNE", "1")
    assert tunable("best", "other") == ["best", "other"]


@pytest.mark.parametrize(
    "capability, family",
    [((8, 0), "ampere"), ((8, 6), "ampere"), ((9, 0), "hopper"), ((12, 0), "ampere")],
)
def test_configurations_go_with_shared_memory(capability, family, monkeypatch):
    """Consumer GPUs after Hopper have as little shared memory as those before it."""
    pytest.importorskip("triton")
    from bonsai_fast.kernels import _configs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _configs.architecture(torch.device("cuda")) == family
    assert _configs.architecture(torch.device("cpu")) == "ampere"


def test_every_table_serves_every_architecture_and_element():
    pytest.importorskip("triton")
    from bonsai_fast.kernels import (
        grouped_attention,
        kept_down_proj,
        kept_head_proj,
        kept_o_proj,
        kept_up_proj,
        lm_head_nll,
    )

    modules = (kept_up_proj, kept_down_proj, kept_head_proj, kept_o_proj, lm_head_nll)
    tables = [module.CONFIGS for module in modules] + [*grouped_attention.CONFIGS.values()]
    places = {(family, size) for family in ("ampere", "hopper") for size in (2, 4)}
    assert all(set(table) == places for table in tables)
    # Kernels skip their mask on the last step when the depth divides these.
    for module in (kept_up_proj, kept_head_proj, lm_head_nll):
        depths = [c.kwargs["BLOCK_K"] for row in module.CONFIGS.values() for c in row]
        assert all(module.DEEPEST % depth == 0 for depth in depths)
    widths = [c.kwargs["BLOCK_N"] for row in kept_down_proj.CONFIGS.values() for c in row]
    assert all(kept_down_proj.WIDEST % width == 0 for width in widths)
