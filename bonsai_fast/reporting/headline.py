"""What a run came to, in one sentence and one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bonsai_fast.reporting.record import RunRecord, read_json
from bonsai_fast.reporting.words import count, decimal, less, percent, size, times

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Row:
    """One quantity of both models, as it is written."""

    label: str
    dense: str
    pruned: str
    change: str


def parent_name(run: RunRecord) -> str:
    """The parent, without the folders above it."""
    name = str(run.manifest["parent"]["name"])
    return PurePath(name).name or "a model"


def title(run: RunRecord) -> str:
    """What the page is about."""
    if run.finished:
        return f"{parent_name(run)} without {percent(run.result['sparsity'])} of its decoder"
    return f"{parent_name(run)} toward {run.manifest['request']['target']}"


def lead(run: RunRecord) -> list[str]:
    """What a reader with ten seconds should know, a sentence each."""
    result = run.result
    if not result:
        return _unfinished(run)
    dense, pruned = result["dense_perplexity"], result["pruned_perplexity"]
    sentences = [
        f"The pruned model has {count(result['parameters'])} of "
        f"{count(result['parameters_dense'])} parameters: {percent(result['sparsity'])} of the "
        f"decoder and {percent(result['sparsity_total'])} of the whole model are gone.",
        f"On text that was not used for calibration its perplexity is {decimal(pruned)}, "
        f"the parent's is {decimal(dense)} ({times(pruned / dense)}).",
    ]
    ratios = speed_ratios(result)
    if ratios:
        words = {"prefill": "reads a prompt", "decode": "writes"}
        speeds = " and ".join(f"{words[name]} {times(ratio)}" for name, ratio in ratios.items())
        doubt = ", though the timings spread more than that" if _within_spread(result) else ""
        sentences.append(f"It {speeds} as fast as the parent{doubt}.")
    return sentences


def speed_ratios(result: dict[str, Any]) -> dict[str, float]:
    """Speed of the pruned model over the parent's, for "prefill" and "decode", as measured."""
    dense, pruned = (result.get("latency", {}).get(name, {}) for name in ("dense", "pruned"))
    found = {}
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_s"
        if dense.get(key) and pruned.get(key):
            found[phase] = pruned[key] / dense[key]
    return found


def _within_spread(result: dict[str, Any]) -> bool:
    """Whether some gain is smaller than what repeated timings of one model differ by."""
    return any(
        abs(ratio - 1)
        < max(model.get(f"{phase}_spread", 0.0) for model in result["latency"].values())
        for phase, ratio in speed_ratios(result).items()
    )


def rows(run: RunRecord) -> list[Row]:
    """The comparison of a finished run."""
    result = run.result
    if not result:
        return []
    dense, pruned = result["dense_perplexity"], result["pruned_perplexity"]
    before, after = result["parameters_dense"], result["parameters"]
    found = [
        Row("perplexity", decimal(dense), decimal(pruned), times(pruned / dense)),
        Row("parameters", count(before), count(after), less(result["sparsity_total"])),
    ]
    if run.layout is not None:
        decoder = run.layout.num_decoder_parameters
        left = decoder - (before - after)
        found.append(Row("of the decoder", count(decoder), count(left), less(result["sparsity"])))
    for phase, ratio in speed_ratios(result).items():
        key = f"{phase}_tokens_per_s"
        before_s, after_s = (result["latency"][name][key] for name in ("dense", "pruned"))
        found.append(
            Row(f"{phase}, tokens/s", decimal(before_s, 1), decimal(after_s, 1), times(ratio))
        )
    dtype, on_disk = run.manifest["parent"]["dtype"], run.weight_bytes
    if on_disk is not None and dtype in BYTES:
        dense_bytes = before * BYTES[dtype]
        change = less(1 - on_disk / dense_bytes)
        found.append(Row(f"weights as {dtype}", size(dense_bytes), size(on_disk), change))
    return found


def _unfinished(run: RunRecord) -> list[str]:
    cell = run.path / "cell.json"
    if cell.is_file():
        found = read_json(cell)
        return [
            "This is a cell of a comparison: it was searched and measured, and no model was saved.",
            f"Its perplexity is {decimal(found['perplexity'])} at a sparsity of "
            f"{percent(found['sparsity'])}.",
        ]
    evaluations = sum(len(stage.keep) for stage in run.stages.values())
    return [
        "This run is not finished: it was interrupted, or goes on while you read.",
        f"{count(evaluations)} scored sub-models and {len(run.round_names)} rounds are recorded; "
        "the page shows what there is of them.",
        "The same command goes on where it stopped.",
    ]
