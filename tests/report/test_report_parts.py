"""What pages are made of: axes, marks, words, and the command that does a run again."""

from __future__ import annotations

import math
import shlex
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from report_pages import value

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.methods import WEIGHT_METHODS, configure, resolve
from bonsai_fast.methods.regression import fit_paper, fit_ridge, kendall_tau
from bonsai_fast.prune.__main__ import parse
from bonsai_fast.report import number_format as words
from bonsai_fast.report.chart import DARK, LIGHT, Scale, document, element, numbers, text
from bonsai_fast.report.figures import LayerRow, by_layer, descent, head_cells, ranked
from bonsai_fast.report.reproduce import command_line, recorded_config
from bonsai_fast.report.search_data import Estimate, Step
from bonsai_fast.runs.identity import MEASURED, NOT_IDENTITY

SVG = "{http://www.w3.org/2000/svg}"


def manifest_of(
    config: ResolvedConfig[Any], name: str, dtype: str = "bfloat16"
) -> dict[str, object]:
    """What run.json holds of a configuration."""
    values, zeroes_weights = config.values(), config.method in WEIGHT_METHODS
    without = MEASURED if zeroes_weights else NOT_IDENTITY
    request = {name: values[name] for name in without if name not in ("sparsity", "target")}
    if not zeroes_weights:
        request["target"] = config.target_text
    return {
        "config": {n: item for n, item in config.values_read().items() if n not in without},
        "request": request,
        "parent": {"name": name, "dtype": dtype, "device": "cpu"},
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.35, "preset": "paper", "rounds": 3},
        {"method": "mini-llm", "preset": "paper", "perturbation": "gates", "directions": 5},
        {"method": "policy-gradient", "learning_rate": 0.125, "baseline": "antithetic"},
        {"target": "params=1.1B", "uniform": True, "sublayers": True, "round_to": "64"},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "sparsegpt", "weight_update": False},
        {"method": "wanda", "sparsity": 0.6, "preset": "paper", "compare_within": "layer"},
        {"calibration": "a file; rm -rf.txt", "evaluation": "c4", "seed": 3, "tasks": "a,b"},
    ],
    ids=str,
)
def test_the_command_of_a_run_asks_for_the_same(options: dict[str, object]) -> None:
    config = resolve(configure(**options))
    for name in ("SmolLM2-135M-Instruct", "my models/it's"):
        typed = shlex.split(" ".join(command_line(manifest_of(config, name))))
        assert typed[:2] == ["bonsai-fast", "prune"]
        assert not [word for word in typed if word.startswith("--") and "_" in word]
        model, asked, how = parse(typed[2:])
        assert model == (None if name.startswith("Smol") else name)
        assert how.dtype == "bfloat16" and how.device == "cpu"
        found = resolve(asked)
        same = {**found.values(), "sparsity": config.sparsity, "target": config.target}
        assert same == config.values() and found.target_text == config.target_text
    assert recorded_config(manifest_of(config, "x")).target_text == config.target_text


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ends", [(0.013, 0.9), (1.0, 2.0), (15.0, 22.5), (0.2, 9e5), (5.0, 5.0)])
def test_ticks_are_round_distinct_and_inside(ends: tuple[float, float], log: bool) -> None:
    scale = Scale.of(ends, 10.0, 110.0, log=log)
    assert scale is not None
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks))
    assert len(set(numbers(ticks))) == len(ticks)
    low, high = (10.0**end if log else end for end in (scale.low, scale.high))
    for tick in ticks:
        assert low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)
        assert float(f"{tick:.3g}") == tick
    places = [scale(tick) for tick in (*ends, *ticks)]
    assert all(10.0 <= place <= 110.0 for place in places)
    inner = math.log10(ticks[0]) if log else ticks[0]
    share = (inner - scale.low) / (scale.high - scale.low)
    assert places[2] == pytest.approx(10 + 100 * share)


def test_close_ticks_are_told_apart() -> None:
    assert numbers([5.5881, 5.5882, 5.5883]) == ["5.5881", "5.5882", "5.5883"]
    assert numbers([0.0, 0.5, 1.0]) == ["0", "0.5", "1"]
    assert Scale.of([math.inf, math.nan, -1.0], 0, 1, log=True) is None
    scale = Scale.of([1.0, 10.0], 0.0, 1.0)
    assert scale is not None and scale(1e9) == 1.0 and not scale.shows(math.inf)


def test_nothing_in_a_picture_escapes_into_markup() -> None:
    parts = [text(1, 2, 'a <b> & "c"'), element("rect", x=-0.01, class_='x" onload="y', y=None)]
    root = ElementTree.fromstring(document(parts, 9, 9, name="n", label="<l>", description="a & b"))
    words_found, rect = root.find(f"{SVG}text"), root.find(f"{SVG}rect")
    assert words_found is not None and words_found.text == 'a <b> & "c"'
    assert rect is not None and rect.attrib == {"x": "0", "class": 'x" onload="y'}
    assert [found.text for found in root][:2] == ["<l>", "a & b"]
    assert root.get("aria-labelledby") == "n-title n-desc"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_ground(theme) -> None:  # type: ignore[no-untyped-def]
    """WCAG 2: 4.5 for words, 3 for marks (the last but one is in no figure of ours)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(colour: str) -> float:
        low, high = sorted((luminance(colour), luminance(theme.paper)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink) >= 7 and contrast(theme.muted) >= 4.5
    assert contrast(theme.axis) >= 3 and min(map(contrast, theme.colours[:2])) >= 3


@pytest.mark.parametrize("count", [1, 5, 120, 121, 5000])
def test_every_unit_has_a_share_of_a_mark(count: int) -> None:
    rng = np.random.default_rng(0)
    relevance, error = rng.normal(size=count + 1), rng.random(count + 1)
    relevance[0] = np.inf  # never varied
    kept = rng.random(count + 1) < 0.5
    figure = ranked(relevance, error, kept, name="n", heading="h", y_label="y")
    assert figure is not None
    root = ElementTree.fromstring(figure)
    dots = list(root.iter(f"{SVG}circle"))
    assert len(dots) == min(count, 120)
    heights = [float(dot.get("cy", "")) for dot in dots]
    assert heights == sorted(heights)  # the most relevant first, on top
    titles = [dot.findtext(f"{SVG}title") or "" for dot in dots]
    if count > 120:
        single = {"kept": "1 of 1", "removed": "0 of 1"}
        said = [title.split(": ")[1] for title in titles]
        pairs = [single.get(words, words).replace(",", "").split() for words in said]
        assert sum(int(pair[0]) for pair in pairs) == int(kept[1:].sum())
        assert sum(int(pair[2]) for pair in pairs) == count
    else:
        assert sum(said.endswith("kept") for said in titles) == int(kept[1:].sum())
    assert ranked(np.full(3, np.inf), np.ones(3), np.ones(3, bool), name="n", heading="h",
                  y_label="y") is None  # fmt: skip


def test_error_bars_reach_one_standard_error() -> None:
    values = [(0, Estimate(2.0, 0.5)), (1, Estimate(3.0, math.nan)), (2, Estimate(math.inf, 1.0))]
    figure = by_layer(values, name="n", heading="h", y_label="y")
    assert figure is not None
    root = ElementTree.fromstring(figure)
    dots = list(root.iter(f"{SVG}circle"))
    (bar,) = (line for line in root.iter(f"{SVG}line") if "error" in line.get("class", ""))
    assert len(dots) == 2
    pixels = (float(dots[0].get("cy", "")) - float(dots[1].get("cy", ""))) / 1.0
    assert float(bar.get("y1", "")) - float(bar.get("y2", "")) == pytest.approx(pixels, abs=0.3)
    middle = (float(bar.get("y1", "")) + float(bar.get("y2", ""))) / 2
    assert middle == pytest.approx(float(dots[0].get("cy", "")), abs=0.2)


def test_long_descents_share_marks_and_lose_no_extreme() -> None:
    steps = [Step(n, 1.0 if n != 777 else 0.0, 2.0, 3.0 if n != 901 else 9.0) for n in range(1500)]
    figure = descent(steps)
    assert figure is not None
    root = ElementTree.fromstring(figure)
    bars = [line for line in root.iter(f"{SVG}line") if "error" in line.get("class", "")]
    assert len(bars) == len(list(root.iter(f"{SVG}circle"))) == 200
    tops, bottoms = ({float(bar.get(end, "")) for bar in bars} for end in ("y2", "y1"))
    assert len(tops) == len(bottoms) == 2


def test_cells_stand_by_their_kv_head() -> None:
    row = LayerRow(0, (True, False, False, False), (0, 0, 1, 1), 0, 0)
    assert (row.heads_kept, row.kv_groups, row.kv_groups_kept) == (1, 2, 1)
    cells = list(ElementTree.fromstring(head_cells(row)).iter(f"{SVG}rect"))
    gaps = np.diff([float(cell.get("x", "")) for cell in cells])
    assert gaps[1] > gaps[0] == gaps[2]
    wide = LayerRow(0, (True,) * 128, tuple(range(128)), 0, 0)
    assert float(ElementTree.fromstring(head_cells(wide)).get("width", "")) < 900


def test_words() -> None:
    assert words.percent(-0.2) == "\N{MINUS SIGN}20.0\N{NO-BREAK SPACE}%"
    assert words.less(0.1579) == "\N{MINUS SIGN}15.8\N{NO-BREAK SPACE}%"
    assert [words.size(n) for n in (12, 1536, 3 * 2**20, 250 * 2**30)] == [
        text.replace(" ", words.GAP) for text in ("12 B", "1.5 KiB", "3 MiB", "250 GiB")
    ]
    assert (
        words.times(1.448) == "\N{MULTIPLICATION SIGN}1.45" and words.times(math.nan) == words.DASH
    )
    for number in (0.0, -1.5, 123.4, 2.6e-5, -7.12e8):
        assert value(words.significant(number)) == pytest.approx(number, rel=5e-3)
    assert words.decimal(math.inf) == "∞" and words.decimal(math.nan) == "not a number"
    assert [words.duration(s) for s in (3.21, 600, 9000)] == [
        text.replace(" ", words.GAP) for text in ("3.21 s", "10 min", "2.5 h")
    ]


def scored(rows: int, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(rows, units, generator=generator) < 0.8
    worth = torch.rand(units, generator=generator)
    utility = -(~masks).double() @ worth.double()
    return masks, utility + 0.1 * torch.randn(rows, generator=generator)


def test_held_out_predictions_of_the_paper_give_its_tau_and_r2() -> None:
    masks, utility = scored(41, 12)
    utility[7] = -torch.inf
    fit = fit_paper(masks, utility, seed=3)
    assert fit.held_out.shape == (41,) and torch.isnan(fit.held_out).nonzero().tolist() == [[7]]
    usable = utility.isfinite()
    held_out, target = fit.held_out[usable].numpy(), utility[usable].numpy()
    parts = np.array_split(np.random.Generator(np.random.PCG64(3)).permutation(40), 5)
    taus = [kendall_tau(held_out[part], target[part]) for part in parts]
    assert fit.kendall_tau == pytest.approx(np.mean(taus))
    total = sum(np.square(target[part] - np.delete(target, part).mean()).sum() for part in parts)
    assert fit.r2 == pytest.approx(1 - np.square(target - held_out).sum() / total)


def test_held_out_predictions_of_ridge_give_its_r2() -> None:
    masks, utility = scored(60, 30)  # all rows differ: each is a block of its own
    utility[0] = torch.nan
    fit = fit_ridge(masks, utility)
    assert torch.isnan(fit.held_out).nonzero().tolist() == [[0]]
    held_out, target = fit.held_out[1:].numpy(), utility[1:].numpy()
    count = len(target)
    # every other row: the mean that a row is compared with
    around = (target - target.mean()) * count / (count - 1)
    assert fit.r2 == pytest.approx(1 - np.square(target - held_out).sum() / (around @ around))
    assert np.corrcoef(held_out, target)[0, 1] > 0.7
