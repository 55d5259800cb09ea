"""Time models side by side: prompt processing, decoding, memory.

Models are timed alternately, so that background load affects all of them equally; the numbers are
medians over rounds, and speed-ups are relative to the first model. The table and, as the last line,
JSON are written to stdout, progress to stderr.

    bonsai-fast latency PARENT runs/mine --batch 1,8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.checkpoints.load import LoadingOptions, load_model
from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config
from bonsai_fast.config.options import DEVICE, check_values, option
from bonsai_fast.console import INTERRUPTED, Reporter, fail, silence_transformers
from bonsai_fast.latency.semi_structured import (
    BACKENDS,
    stored_bytes,
    two_of_four_linears,
    use_semi_structured,
    why_not,
)
from bonsai_fast.latency.timing import PROMPT, ROUNDS, Latency, Workload, measure_latency

# of the table where stdout is no terminal
WIDTH = 120
WORK = "What to time"


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(LoadingOptions):
    """What the models do while they are timed, and on what."""

    batch: str = option(
        "1", "Sequences at once; 1,8 times both 1 and 8.", group=WORK, value="N,N..."
    )
    prompt: int | None = option(
        None,
        "Tokens of the prompt.",
        group=WORK,
        minimum=1,
        shown=f"{PROMPT}, or fewer if a model has fewer positions",
    )
    new: int = option(32, "Tokens that are decoded after the first one.", group=WORK, minimum=1)
    rounds: int = option(
        ROUNDS, "Rounds that are timed, after one that is not.", group=WORK, minimum=1
    )
    threads: int | None = option(
        None, "CPU threads.", group=DEVICE, minimum=1, shown="as PyTorch chooses"
    )
    semi_structured: Literal["auto", "off", "cusparselt", "cutlass"] = option(
        "auto",
        "GPU kernels for models with 2:4 zeros. auto: the first that works here.",
        group=DEVICE,
    )

    def __post_init__(self) -> None:
        check_values(self)
        self.batches  # noqa: B018, refuses what is no list of numbers

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes in the order given."""
        try:
            sizes = tuple(int(text) for text in self.batch.split(","))
        except ValueError:
            sizes = (0,)
        if min(sizes) < 1:
            raise ValueError(
                f"batch: expected positive numbers separated by commas, got {self.batch!r}"
            )
        return sizes


COMMAND = Command(
    "latency",
    __doc__,
    (
        argument(
            "models",
            list[str],
            f"Model directories, run directories or hub names; {NAME} is the embedded model.",
        ),
    ),
    (*entries_of(LatencyOptions), *FILES),
)


@dataclass(frozen=True)
class Measured:
    """One model on one batch size.

    Attributes:
        model: as it was named on the command line.
        parameters: number of parameters of the whole model.
        weight_bytes: size of the stored weights, bytes.
        storage: "dense", "2:4 stored densely", or "2:4 by" the name of the kernels.
        latency: the measured times.
    """

    model: str
    parameters: int
    weight_bytes: int
    storage: str
    latency: Latency

    @property
    def peak_bytes(self) -> int | None:
        """Bytes of the weights and of the memory that a round uses besides."""
        work = self.latency.work_bytes
        return None if work is None else self.weight_bytes + work


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given, save_to = COMMAND.parse(arguments)
    names = given.pop("models")
    reporter = Reporter()
    silence_transformers()
    threads = torch.get_num_threads()
    try:
        options = LatencyOptions(**given)
        save_config(save_to, models=names, **asdict(options))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with reporter.busy(f"loading {', '.join(names)}"):
            models = load_all(names, options)
            storage = {name: store(model, options) for name, model in models.items()}
        results = measure(models, storage, options, reporter)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
    first = next(iter(models.values()))
    protocol = {
        "device": _device_name(first.device),
        "dtype": {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()},
        "threads": options.threads or threads,
        "rounds": options.rounds,
    }
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(as_table(results, protocol))
    print(json.dumps({**protocol, "results": [as_json(result) for result in results]}))
    return 0


def load_all(names: list[str], options: LoadingOptions) -> dict[str, PreTrainedModel]:
    """Load models by the names that were typed; a name that is repeated gets a number.

    Raises:
        ValueError, OSError: as `load_model`.
    """
    models: dict[str, PreTrainedModel] = {}
    for name in names:
        in_run = Path(name) / "model"
        path = str(in_run) if (in_run / "config.json").is_file() else name
        embedded = name == NAME and not Path(name).exists()
        key, number = name, 1
        while key in models:
            number += 1
            key = f"{name} ({number})"
        models[key] = load_model(None if embedded else path, options)
    return models


def store(model: PreTrainedModel, options: LatencyOptions) -> str:
    """Store a 2:4 model as the options say; returns `Measured.storage`.

    Raises:
        ValueError: kernels were asked for by name and do not work here.
    """
    if not two_of_four_linears(model):
        return "dense"
    wanted = options.semi_structured
    if wanted == "auto":
        runs = [name for name in BACKENDS if why_not(name, model.device, model.dtype) is None]
        wanted = cast(Any, runs[0] if runs else "off")
    if wanted == "off":
        return "2:4 stored densely"
    use_semi_structured(model, wanted)
    return f"2:4 by {wanted}"


def measure(
    models: Mapping[str, PreTrainedModel],
    storage: Mapping[str, str],
    options: LatencyOptions,
    reporter: Reporter,
) -> list[Measured]:
    """Time all models on all batch sizes.

    Raises:
        ValueError: the work does not fit a model, or the device's memory.
    """
    work = {
        batch: Workload.fitting(models, batch=batch, new=options.new)
        if options.prompt is None
        else Workload(batch=batch, prompt=options.prompt, new=options.new)
        for batch in options.batches
    }
    for name, model in models.items():
        work[options.batches[0]].check_fits(name, model)
    results = []
    steps = len(models) * len(work) * (options.rounds + 1)
    with reporter.bar("timing", steps) as advance:
        for batch, task in work.items():
            try:
                latency = measure_latency(models, task, rounds=options.rounds, advance=advance)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"batch {batch}: not enough memory: {error}") from error
            results += [
                Measured(
                    model=name,
                    parameters=model.num_parameters(),
                    weight_bytes=stored_bytes(model),
                    storage=storage[name],
                    latency=latency[name],
                )
                for name, model in models.items()
            ]
    return results


def as_table(results: list[Measured], protocol: Mapping[str, Any]) -> Table:
    """The table for people; a section for each batch size."""
    table = Table(title="latency")
    table.add_column("model", overflow="fold")
    with_storage = any(result.storage != "dense" for result in results)
    for column in (
        *(["stored"] if with_storage else []),
        *("batch", "parameters", "prefill\ntokens/s", "", "first token\nms"),
        *("decode\ntokens/s", "", "memory\nMB"),
    ):
        table.add_column(column, justify="right")
    for before, result in zip([None, *results], results, strict=False):
        latency = result.latency
        if before is not None and before.latency.batch != latency.batch:
            table.add_section()
        table.add_row(
            result.model,
            *([result.storage] if with_storage else []),
            str(latency.batch),
            f"{result.parameters:,}",
            f"{latency.prefill_tokens_per_s:,.1f} ±{latency.prefill_spread:.0%}",
            f"x{latency.prefill_speedup:.2f}",
            f"{1e3 * latency.time_to_first_token_s:,.1f}",
            f"{latency.decode_tokens_per_s:,.1f} ±{latency.decode_spread:.0%}",
            f"x{latency.decode_speedup:.2f}",
            "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f}",
        )
    latency = results[0].latency
    table.caption = (
        f"{protocol['device']}, {protocol['threads']} threads, prompt {latency.prefill_tokens}, "
        f"{latency.decode_tokens} new tokens; medians of {protocol['rounds']} rounds, "
        "models timed alternately, ± interquartile range; "
        "x: speed-up over the first model, in the same round"
    )
    return table


def as_json(result: Measured) -> dict[str, Any]:
    """One model on one batch size, flat."""
    plain = asdict(result)
    latency = plain.pop("latency")
    return {**plain, **latency, "peak_bytes": result.peak_bytes}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    sys.exit(main())
