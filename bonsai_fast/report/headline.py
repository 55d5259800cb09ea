"""The head of the page: title, summary, comparison table, and cost of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bonsai_fast.report.number_format import (
    DTYPE_BYTES,
    change,
    count,
    decimal,
    duration,
    less,
    percent,
    significant,
    size,
    times,
)
from bonsai_fast.report.reproduce import recorded_config
from bonsai_fast.report.run_record import RunRecord, read_json
from bonsai_fast.report.speed import memory

PHASES = {"prefill": "reads a prompt", "decode": "writes"}


@dataclass(frozen=True)
class Row:
    """One quantity of both models, as it is written."""

    label: str
    dense: str
    pruned: str
    change: str


def parent_name(run: RunRecord) -> str:
    """The parent, without the folders above it."""
    return PurePath(str(run.manifest["parent"]["name"])).name or "a model"


def title(run: RunRecord) -> str:
    """Title of the page."""
    name, result = parent_name(run), run.result
    if not result:
        goal = recorded_config(run.manifest).target_text.replace("=", " ")
        return f"{name}, to be pruned to {goal}"
    if "zeros" in result:
        return f"{name} with {percent(result['sparsity'])} of its decoder's weights zero"
    return f"{name} without {percent(result['sparsity'])} of its decoder"


def lead(run: RunRecord) -> list[str]:
    """The summary, one sentence per item."""
    result = run.result
    if not result:
        return _unfinished(run)
    if "zeros" in result:
        what = (
            f"{count(result['zeros'])} of {count(result['weights'])} weights of the decoder's "
            f"linear layers are zero ({result['pattern']}); the model has its parent's shapes."
        )
    else:
        what = (
            f"The pruned model has {count(result['parameters'])} of "
            f"{count(result['parameters_dense'])} parameters: {percent(result['sparsity'])} of the "
            f"decoder and {percent(result['sparsity_total'])} of the whole model are removed."
        )
    dense, pruned = result["dense_perplexity"], result["pruned_perplexity"]
    sentences = [
        what,
        f"Its perplexity on text that was not used for calibration is {decimal(pruned)},  "
        f"the parent's is {decimal(dense)} ({times(pruned / dense)}).",
    ]
    if recovery := result.get("recovery"):
        before = decimal(recovery["perplexity_before"])
        sentences.append(f"It was {before} before recovery ({recovery['recover']}).")
    if ratios := speed_ratios(result):
        speeds = " and ".join(f"{PHASES[name]} {times(ratio)}" for name, ratio in ratios.items())
        doubt = ", but the timings vary more than that" if _within_spread(result) else ""
        sentences.append(f"It {speeds} as fast as the parent{doubt}.")
    return sentences


def speed_ratios(result: dict[str, Any]) -> dict[str, float]:
    """Gain of the pruned model over the parent for "prefill" and "decode", as measured."""
    pruned = result.get("latency", {}).get("pruned", {})
    return {name: pruned[f"{name}_speedup"] for name in PHASES if f"{name}_speedup" in pruned}


def rows(run: RunRecord) -> list[Row]:
    """The comparison of a finished run."""
    result = run.result
    if not result:
        return []
    dense, pruned = result["dense_perplexity"], result["pruned_perplexity"]
    found = [Row("perplexity", decimal(dense), decimal(pruned), times(pruned / dense))]
    if recovery := result.get("recovery"):
        value = recovery["perplexity_before"]
        found.append(Row("before recovery", "", decimal(value), times(value / dense)))
    if "zeros" in result:
        zeros = (count(result["zeros_dense"]), count(result["zeros"]))
        return [*found, Row("zero weights", *zeros, percent(result["sparsity"]))]
    before, after = result["parameters_dense"], result["parameters"]
    found.append(Row("parameters", count(before), count(after), less(result["sparsity_total"])))
    if run.layout is not None:
        decoder = run.layout.num_decoder_parameters
        left = decoder - (before - after)
        found.append(Row("of the decoder", count(decoder), count(left), less(result["sparsity"])))
    for phase, ratio in speed_ratios(result).items():
        slow, fast = (
            decimal(result["latency"][name][f"{phase}_tokens_per_s"], 1)
            for name in ("dense", "pruned")
        )
        found.append(Row(f"{phase}, tokens/s", slow, fast, times(ratio)))
    dtype, on_disk = run.manifest["parent"]["dtype"], run.weight_bytes
    if on_disk is not None and dtype in DTYPE_BYTES:
        found.append(_sizes(f"on disk, {dtype}", before * DTYPE_BYTES[dtype], on_disk))
    peaks = memory(run, "dense"), memory(run, "pruned")
    if peaks[0] is not None and peaks[1] is not None:
        found.append(_sizes("memory to run it", peaks[0], peaks[1]))
    return found


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Cost of the run, and whether the saved model was checked."""
    result = run.result
    if not result:
        return []
    submodels, tokens = result.get("submodels_scored", 0), result.get("tokens_scored")
    tokens = result.get("tokens", 0) if tokens is None else tokens
    if submodels:
        work = f"{count(submodels)} sub-models, {count(tokens)} forward tokens since the last start"
    elif tokens:
        work = f"{count(tokens)} forward tokens, no sub-model since the last start"
    else:
        work = "none: selected from recorded scores, or from the weights alone"
    found = [("Search", work)]
    if "peak_bytes" in result:
        peak = result["peak_bytes"]
        words = "not measured" if peak is None else f"{size(peak)} beside the weights"
        found.append(("Memory of the search", words))
    if recovery := result.get("recovery"):
        seconds = sum(tier["seconds"] for tier in recovery["tiers"])
        names = " and ".join(tier["name"] for tier in recovery["tiers"])
        found.append(("Recovery", f"{names}, {duration(seconds)}"))
    found.append(("Time", f"{duration(result['seconds'])} since the last start, in total"))
    check, difference = "gives the same logits", result["max_logit_difference"]
    check += f"within {significant(difference, 2)}" if difference else ""
    found.append(("Saved model", f"{check} when loaded in a fresh process"))
    return found


def _sizes(label: str, dense: int, pruned: int) -> Row:
    return Row(label, size(dense), size(pruned), change(pruned / dense - 1))


def _within_spread(result: dict[str, Any]) -> bool:
    """Whether a gain is smaller than the spread of one model's timings."""
    speeds = result["latency"].values()
    return any(
        abs(ratio - 1) < max(speed.get(f"{phase}_spread", 0.0) for speed in speeds)
        for phase, ratio in speed_ratios(result).items()
    )


def _unfinished(run: RunRecord) -> list[str]:
    cell = run.path / "cell.json"
    if cell.is_file():
        found = read_json(cell)
        recovered = found.get("recovered")
        how = found.get("recovery", {}).get("recover")
        after = [] if recovered is None else [f"After {how} it is {decimal(recovered)}."]
        return [
            "This is a cell of a comparison: it was searched and measured; no model was saved.",
            f"Its perplexity is {decimal(found['perplexity'])} at a sparsity of "
            f"{percent(found['sparsity'])}.",
            *after,
        ]
    evaluations = sum(len(stage.keep) for stage in run.stages.values())
    return [
        "This run is not finished: it was interrupted or is still running.",
        f"Recorded so far: {count(evaluations)} scored sub-models, {len(run.round_names)} of the "
        "rounds. The page shows what is recorded.",
        "Run the same command again to resume.",
    ]
