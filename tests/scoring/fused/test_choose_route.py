"""Routes on a GPU: chosen from a few rates, one a regression, the same when a run goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from scoring_cases import wide_heads
from searches import new_search
from surgery_cases import tokens
from tiny import byte_tokenizer, tiny_llama

from bonsai_fast.methods import configure
from bonsai_fast.models.layout import Layout
from bonsai_fast.prune.units import prepare
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused import routing
from bonsai_fast.scoring.fused.choose_route import cheapest, masked_kept_share, without_logits
from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.gpu_rates import Rates, cached, measure

# invented GPUs: what a copy costs in tokens is element * tflops / copy rate, 363 and 354 here
FAST = Rates(matmul_tflops=780.0, copy_gb_per_s=4300.0, gather_ratio=0.75, nll_ratio=1.0)
SLOW = Rates(matmul_tflops=115.0, copy_gb_per_s=650.0, gather_ratio=0.9, nll_ratio=0.9)


@pytest.mark.parametrize(
    ("rates", "masked", "size", "expected"),
    [
        # little is masked: nothing gets the few per cent back, but copies that cost nearly nothing
        *((FAST, 0.05, 128, "dense"), (FAST, 0.05, 1024, "dense"), (SLOW, 0.05, 4096, "slice")),
        # few tokens: a copy is more work than what it saves
        *((FAST, 0.3, 128, "gather"), (SLOW, 0.3, 128, "gather"), (FAST, 0.5, 128, "gather")),
        # many: the vendor's products are the fastest
        *((FAST, 0.3, 4096, "slice"), (FAST, 0.5, 4096, "slice"), (SLOW, 0.5, 32768, "slice")),
        # a slow kernel that does not make up for its slowness
        (replace(FAST, gather_ratio=0.65), 0.3, 128, "dense"),
        (FAST, 0.0, 4096, "dense"),
    ],
)
def test_cheapest(rates: Rates, masked: float, size: int, expected: str) -> None:
    assert cheapest(rates, kept_share=1 - masked, tokens=size, element_size=2) == expected


def test_what_cannot_be_gathered_is_not() -> None:
    options = {"kept_share": 0.7, "tokens": 128, "element_size": 2}
    assert cheapest(FAST, **options) == "gather" != cheapest(FAST, **options, gathers=False)


def test_a_tie_of_losses_goes_to_the_one_that_needs_no_logits() -> None:
    assert without_logits(FAST) and without_logits(replace(FAST, nll_ratio=0.96))
    assert not without_logits(SLOW)


def test_kept_share_counts_weights_of_masked_sublayers() -> None:
    """Half of layer 0's channels, a sixth of its heads; the rest is whole or gone."""
    layout = Layout.of(tiny_llama(), attention="head")
    keep = torch.ones(2, len(layout), dtype=torch.bool)
    heads, channels = layout.groups[:2]
    keep[0, channels.start : channels.start + len(channels) // 2] = False
    keep[1, heads.start] = False
    keep[1, layout.groups[3].start : layout.groups[3].stop] = False
    mlp, attention = 3 * len(channels), 2 * len(heads) * 8
    expected = (mlp / 2 + attention * 5 / 6) / (mlp + attention)
    assert masked_kept_share(layout, keep) == pytest.approx(expected)
    assert masked_kept_share(layout, torch.ones_like(keep)) == 1.0


def test_rates_are_measured() -> None:
    """On whatever there is; not how fast it is, but that every number is one."""
    head = torch.randn(64, 32)
    found = measure(head, num_channels=48, logit_rows=16, rows=64)
    assert all(0 < value < 1e9 for value in asdict(found).values())


def test_rates_are_measured_once(tmp_path: Path) -> None:
    path, calls = tmp_path / "cache" / "rates.json", Counter()

    def measured(rates: Rates) -> Rates:
        calls["measured"] += 1
        return rates

    assert cached(path, "a", lambda: measured(FAST)) == FAST
    assert cached(path, "b", lambda: measured(SLOW)) == SLOW
    assert cached(path, "a", lambda: measured(SLOW)) == FAST
    assert calls["measured"] == 2
    assert json.loads(path.read_text()).keys() == {"a", "b"}
    assert [item.name for item in path.parent.iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 3}', '{"a": {"matmul_tflops": 1}}', "\x00", '{"a": {"matmul_tflops": "x"}}'],
)
def test_a_damaged_cache_is_measured_again(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    assert cached(path, "a", lambda: FAST) == FAST
    assert cached(path, "a", lambda: SLOW) == FAST


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file" / "rates.json", "a", lambda: FAST) == FAST


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None, True])
def test_rates_must_be_rates(value: object) -> None:
    with pytest.raises(ValueError, match="rates: expected"):
        Rates.read(asdict(FAST) | {"gather_ratio": value})
    with pytest.raises(ValueError, match="rates: expected"):
        Rates.read({"gather_ratio": 0.5})


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each route was taken for a masked sub-layer."""
    taken: Counter[str] = Counter()
    choose = routing.choose

    def counting(*arguments, **options):
        route = choose(*arguments, **options)
        taken[route] += 1
        return route

    monkeypatch.setattr(routing, "choose", counting)
    return taken


def with_rates(rates: Rates | None) -> MaskScorer:
    """A scorer that decides as on a GPU with such rates."""
    scorer = MaskScorer(wide_heads("llama3"), engine="fused")
    assert isinstance(scorer.engine, FusedEngine) and scorer.engine.rates is None
    if rates is not None:
        scorer.engine.rates = rates
    return scorer


def draw(scorer: MaskScorer, kept: float, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, len(scorer.layout), generator=generator) < kept


@pytest.mark.parametrize(("kept", "route"), [(0.97, "dense"), (0.5, "gather")])
def test_rates_decide_for_all_sublayers_at_once(kept: float, route: str, routes) -> None:
    scorer = with_rates(FAST)
    keep = draw(scorer, kept)
    scored = scorer.score(keep, tokens())
    assert routes.keys() == {route}
    expected = MaskScorer(scorer.model, engine="hooks").score(keep, tokens())
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-4)
    assert scorer.engine.rates == FAST


def test_one_route_for_what_is_compared(routes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that would be scored differently are not where all of them decide together."""
    scorer = with_rates(FAST)
    keep = torch.cat([draw(scorer, 0.5), draw(scorer, 0.97, 1)])
    chunks = keep.split([4, 1])
    for chunk in chunks:
        scorer.score(chunk, tokens())
    assert routes.keys() == {"dense", "gather"}
    routes.clear()
    session = scorer.session(tokens())
    monkeypatch.setattr(session, "submodels_per_chunk", 4)
    compared = session.chunks(keep)
    for chunk in compared:
        chunk.losses()
    assert [len(chunk.keep) for chunk in compared] == [4, 1] and routes.keys() == {"gather"}
    scorer.score(chunks[1], tokens())
    assert routes.keys() == {"dense", "gather"}, "another call chooses its own route"


def test_without_rates_a_table_decides(routes) -> None:
    """On a CPU: a run must go on with the bits that it began with."""
    scorer = with_rates(None)
    (chunk,) = scorer.session(tokens()).chunks(draw(scorer, 0.5))
    assert chunk.route == "auto"
    scorer.score(draw(scorer, 0.5), tokens())
    assert "gather" not in routes


def test_a_run_keeps_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start, on a machine that measures something else, takes those of the first."""
    monkeypatch.setattr(MaskScorer, "_make_engine", _measuring(FAST, MaskScorer._make_engine))
    search = new_search(tiny_llama(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "rates.json").read_text()) == asdict(FAST)
    monkeypatch.setattr(MaskScorer, "_make_engine", _measuring(SLOW, MaskScorer._make_engine))
    again = new_search(tiny_llama(), tmp_path / "run")
    assert search.task.scorer.engine.rates == again.task.scorer.engine.rates == FAST


def _measuring(rates: Rates, make):
    def made(self, engine, route):
        found = make(self, engine, route)
        found.rates = rates
        return found

    return made


def test_a_run_on_a_cpu_has_no_rates(tmp_path: Path) -> None:
    new_search(tiny_llama(), tmp_path / "run")
    assert not (tmp_path / "run" / "rates.json").exists()


def test_a_run_is_scored_by_the_route_that_was_asked_for(tmp_path: Path, routes) -> None:
    search = new_search(tiny_llama(head_dim=16), tmp_path / "run", route="gather")
    keep = torch.rand(3, len(search.task.layout)) < 0.6
    search.losses("some", keep, tokens())
    assert routes.keys() == {"gather"}
    assert search.run.identity["config"]["route"] == "gather"
    with pytest.raises(ValueError, match=r"another run.*route: 'gather' there, 'dense' here"):
        new_search(tiny_llama(head_dim=16), tmp_path / "run", route="dense")


def test_a_route_for_a_model_without_routes_is_refused(tmp_path: Path) -> None:
    config = configure(route="gather", num_sequences=2, sequence_length=16, evaluation_tokens=64)
    with pytest.raises(
        ValueError,
        match="routes exist only in the fused engine, which does not support OPTForCausalLM",
    ) as caught:
        prepare(FAMILIES["opt"](), byte_tokenizer(), config)
    assert "\n" not in str(caught.value)
