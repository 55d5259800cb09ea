"""8-bit products: near the exact ones, sub-models ranked alike, refused where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from surgery_cases import tokens
from tiny import save_tiny_parent

from bonsai_fast.models.layout import Layout
from bonsai_fast.prune import precision as comparison
from bonsai_fast.prune.__main__ import main
from bonsai_fast.prune.precision import PrecisionCheck, check_precision
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.arithmetic import products as module
from bonsai_fast.scoring.fused.arithmetic.eight_bits import FP8, Weight, quantize
from bonsai_fast.scoring.fused.arithmetic.products import fp8, int8, products
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace

CPU = torch.device("cpu")


def matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(37, 48, generator=generator) * torch.logspace(-3, 3, 37)[:, None]
    b = torch.randn(48, 29, generator=generator) * torch.logspace(2, -2, 29)
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_quantized_rows_are_as_near_as_8_bits_are(dtype: torch.dtype) -> None:
    a, _ = matrices(torch.float32)
    a[3] = 0.0
    small, scale = quantize(a, torch.empty(a.shape, dtype=dtype), Workspace(a))
    assert small.dtype == dtype and small.is_contiguous() and scale.shape == (37, 1)
    error = (small.float() * scale - a).abs() / a.abs().amax(dim=1, keepdim=True).clamp_min(1e-9)
    assert float(error.max()) <= (0.5 / 127 if dtype == torch.int8 else 2**-4) + 1e-6
    assert torch.equal(small[3].float(), torch.zeros(48))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_products(dtype: torch.dtype) -> None:
    """Every row and column by its own scale: a common one would lose the small ones."""
    a, b = matrices(dtype)
    exact = a.double() @ b.double()
    for right in (b, b.t().contiguous().t()):
        out = torch.empty(37, 29, dtype=dtype)
        int8(a, [(Weight(right), out)], Workspace(a))
        error = (out.double() - exact).abs() / (
            a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)
        )
        assert 0 < float(error.max()) < 0.01


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(poison: float) -> None:
    a, b = matrices(torch.float32)
    clean, out = torch.empty(37, 29), torch.empty(37, 29)
    int8(a, [(Weight(b), clean)], Workspace(a))
    a[5, 7], b[3, 11] = poison, poison
    int8(a, [(Weight(b), out)], Workspace(a))
    assert not torch.isfinite(out[5]).any() and not torch.isfinite(out[:, 11]).any()
    rest = torch.ones(37, 29, dtype=torch.bool)
    rest[5], rest[:, 11] = False, False
    assert torch.equal(out[rest], clean[rest])


def test_fp8_products_are_handed_to_the_gpu_as_it_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row-major times column-major, scales of rows and columns in float32; computed here."""

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
        assert a.is_contiguous() and b.t().is_contiguous() and a.dtype == b.dtype == FP8
        assert scale_a.shape == (37, 1) and scale_b.shape == (1, 29)
        assert scale_a.dtype == scale_b.dtype == torch.float32
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    a, b = matrices(torch.float32)
    out = torch.empty(37, 29)
    fp8(a, [(Weight(b), out)], Workspace(a))
    error = (out - a @ b).abs() / (a.norm(dim=1)[:, None] * b.norm(dim=0))
    assert 0 < float(error.max()) < 0.05


def separated(layout: Layout) -> torch.Tensor:
    """From whole to a third: losses far apart."""
    draw = torch.rand(len(layout), generator=torch.Generator().manual_seed(1))
    return draw < torch.linspace(1.0, 0.3, 8)[:, None]


@pytest.mark.parametrize("route", ["dense", "slice", "tail", "split", "auto"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "phi3"])
def test_losses_are_near_and_ranked_alike(
    family: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # or nothing would be left of the fixed part of so narrow MLPs
    monkeypatch.setattr("bonsai_fast.scoring.fused.operands.choose_packs.FIXED_MULTIPLE", 4)
    model = FAMILIES[family]()
    scorer = MaskScorer(model, route=route, precision="int8")
    masks = separated(scorer.layout)
    exact = MaskScorer(model, engine="hooks").score(masks, tokens(4))
    found = scorer.score(masks, tokens(4))
    difference = (found - exact).abs()
    assert 0 < float(difference.max()) < 0.3
    check = check_precision(scorer, masks, tokens(4))
    assert check.tau > 0.8 and check.submodels == 8 and check.precision == "int8"
    assert check.error == pytest.approx(
        float((found.mean(1) - exact.mean(1)).square().mean().sqrt()), rel=1e-2
    )


def test_a_check_is_sound_where_the_order_is_kept() -> None:
    good, bad = (PrecisionCheck("int8", tau, 0.01, 0.5, 12) for tau in (0.95, 0.5))
    assert good.is_sound and not bad.is_sound
    assert "Kendall's tau 0.950" in str(good) and "12 sub-models" in str(good)
    scorer = MaskScorer(FAMILIES["llama3"](), precision="int8")
    masks = separated(scorer.layout)
    with pytest.raises(ValueError, match="at least 2 to rank, got 1"):
        check_precision(scorer, masks[:1], tokens())
    with pytest.raises(ValueError, match="got one in full precision"):
        check_precision(MaskScorer(scorer.model), masks, tokens())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama3", {"precision": "fp8"}, "needs a GPU of compute capability 8.9 or newer"),
        ("llama3", {"precision": "int4"}, "precision: expected one of"),
        ("llama3", {"precision": "int8", "engine": "hooks"}, "hooks supports precision full only"),
        ("llama3", {"precision": "int8", "route": "gather"}, "gather supports precision full only"),
        ("opt", {"precision": "int8"}, "the fused engine does not support OPTForCausalLM"),
    ],
)
def test_refusals(family: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MaskScorer(FAMILIES[family](), **options)
    assert "\n" not in str(caught.value)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, refused in (((7, 5), {"int8", "fp8"}), ((8, 6), {"fp8"}), ((9, 0), set())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for precision in ("int8", "fp8"):
            if precision in refused:
                with pytest.raises(ValueError, match=f"precision {precision}: needs a GPU"):
                    products(precision, torch.device("cuda"))
            else:
                products(precision, torch.device("cuda"))


def test_shapes_that_tensor_cores_refuse_are_left_alone() -> None:
    class Fake:
        device = torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def __len__(self) -> int:
            return self.shape[0]

    assert module._fits(Fake(17, 32), Fake(32, 48), FP8)
    assert not module._fits(Fake(16, 32), Fake(32, 48), FP8)
    assert not module._fits(Fake(17, 24), Fake(24, 48), FP8)
    assert module._fits(Fake(17, 24), Fake(24, 40), torch.int8)
    assert not module._fits(Fake(17, 24), Fake(24, 44), torch.int8)


@pytest.mark.parametrize(("tau", "word"), [(0.97, "Kendall's tau 0.97"), (0.3, "worse choices")])
def test_the_command_compares_first(
    tau: float,
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparison, "kendall_tau", lambda *_: tau)
    parent = save_tiny_parent(tmp_path / "model", num_hidden_layers=2)
    flags = "--num-sequences 2 --sequence-length 32 --evaluation-tokens 256 --method wanda-sp"
    run = ["--output", str(tmp_path / "run"), "--precision", "int8", "--device", "cpu"]
    assert main([str(parent), *run, *flags.split()]) == 0
    assert word in " ".join(capsys.readouterr().err.split())
