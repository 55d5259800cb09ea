"""Measure everything on a GPU, in one command of at most ten minutes.

    python bench/gpu.py
    python bench/gpu.py --sections ratios,scoring --minutes 5
    python bench/gpu.py --small --device cpu --output gpu.json

Sections: correctness of all kernels; speed of each kernel beside the vendor's product, of copies,
of attention and of losses; correctness of all routes; sub-models per second on the shapes of
Llama-2-7B and Llama-3-8B with random weights. Prints a table and writes JSON to
bench/results/<machine>/ after every result. If a section fails, the others still run, and the exit
code is 1. If time runs out, the remaining cases are left out, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gpu_correctness
import gpu_kernels
import gpu_scoring
import torch
from gpu_report import OutOfTimeError, Report
from machine import machine_name

from bonsai_fast.testing.cases import MODEL_SHAPES, ModelShape

RESULTS = Path(__file__).with_name("results")
LLAMAS = tuple(shape for shape in MODEL_SHAPES if shape.name.startswith("Llama"))
TINY = ModelShape(
    name="tiny", hidden_size=64, intermediate_size=160, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=211,
)  # fmt: skip
MASKED = (0.0, 0.3, 0.5)

FULL = gpu_kernels.Scale(LLAMAS, 16384, 16, (2048, 4096), 8192, MASKED, torch.bfloat16)
SMALL = gpu_kernels.Scale((TINY,), 64, 4, (16, 32), 48, MASKED, torch.float32)
# Numbers of tokens that have goals come first.
FULL_LOAD = gpu_scoring.Load(
    LLAMAS, None, {4096: 8, 128: 64, 1024: 16, 32768: 2}, 4096, 1 << 30, 16384,
    (0.05, 0.3, 0.5), torch.bfloat16,
)  # fmt: skip
SMALL_LOAD = gpu_scoring.Load(
    (TINY,), 2, {16: 4, 64: 2}, 32, 1 << 16, 64, (0.05, 0.5), torch.float32
)

Section = Callable[[Report, torch.device], None]


def sections(small: bool, layers: int | None) -> dict[str, Section]:
    """All sections, in the order in which they run."""
    scale, load = (SMALL, SMALL_LOAD) if small else (FULL, FULL_LOAD)
    if layers is not None:
        load = gpu_scoring.Load(**{**vars(load), "layers": layers})
    return {
        "kernels": gpu_correctness.kernels,
        "ratios": partial(gpu_kernels.ratios, scale=scale),
        "copies": partial(gpu_kernels.copies, scale=scale),
        "attention": partial(gpu_kernels.attention, scale=scale),
        "losses": partial(gpu_kernels.losses, scale=scale),
        "engines": gpu_correctness.engines,
        "scoring": partial(gpu_scoring.scoring, load=load),
    }


def run(report: Report, device: torch.device, chosen: dict[str, Section]) -> None:
    """Run the chosen sections."""
    for name, section in chosen.items():
        try:
            section(report, device)
        except OutOfTimeError as error:
            report.cut(name, error)
        except Exception as error:  # the other sections still run
            traceback.print_exc()
            report.fail(name, error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.finish()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    names = list(sections(small=True, layers=None))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="device to measure; default cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit; default 10")
    parser.add_argument("--sections", default=",".join(names), help=f"default {','.join(names)}")
    parser.add_argument("--layers", type=int, help="layers per model; default: as many as fit")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--output", type=Path, help="JSON file; default bench/results/MACHINE/DATE")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections.split(",") if name not in names]
    if unknown:
        parser.error(f"--sections: expected some of {', '.join(names)}, got {unknown[0]!r}")
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    if options.layers is not None and options.layers < 2:
        parser.error(f"--layers: expected at least 2, got {options.layers}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device here; try --small --device cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a section failed."""
    options = parse(arguments)
    device = torch.device(options.device)
    date = time.strftime("%Y-%m-%d-%H%M%S")
    path = options.output or RESULTS / machine_name(device) / f"{date}.json"
    asked = {name: getattr(options, name) for name in ("minutes", "sections", "layers", "small")}
    report = Report(path, options.minutes, device, asked)
    available = sections(options.small, options.layers)
    run(report, device, {name: available[name] for name in options.sections.split(",")})
    print(f"\nwritten to {path}")
    for name, failure in report.failures.items():
        print(f"FAILED: {name}: {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
