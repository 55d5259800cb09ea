"""Speeds of a GPU by which routes are chosen: measured once, kept in the user's cache."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.files import cache_directory, write_json

FILE_NAME = "rates-v1.json"
# enough rows for a large GPU, in groups that each keep this share of the channels
ROWS, NUM_GROUPS, KEPT_SHARE = 8192, 16, 0.7
REPEATS, MIN_SECONDS = 5, 0.02


@dataclass(frozen=True)
class Rates:
    """Speeds by which a route is chosen.

    Attributes:
        matmul_tflops: matrix products of the vendor's library, 10^12 operations per second.
        copy_gb_per_s: copies of kept rows, 10^9 bytes per second, reads and writes together.
        gather_ratio: operations per second of the kernel that gathers kept weights, relative to
            the vendor's library.
        nll_ratio: time for losses from chunks of logits, relative to the op without logits.
    """

    matmul_tflops: float
    copy_gb_per_s: float
    gather_ratio: float
    nll_ratio: float

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"rates: expected a positive {item.name}, got {value!r}")

    @classmethod
    def read(cls, content: object) -> Rates:
        """Rates from JSON.

        Raises:
            ValueError: fields are missing, unknown or not positive numbers.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise ValueError(f"rates: expected {', '.join(sorted(names))}, got {content!r}")
        return cls(**content)


def rates_of(head: Tensor, num_channels: int, logit_rows: int) -> Rates:
    """Rates of a GPU, from the user's cache; measured in about two seconds if not there.

    Args:
        head: as for `measure`, on CUDA.
        num_channels, logit_rows: as for `measure`.
    """
    key = ", ".join(
        [
            torch.cuda.get_device_name(head.device),
            *(f"{name} {_version(name)}" for name in ("torch", "triton")),
            f"{' x '.join(map(str, head.shape))} x {num_channels}, {logit_rows}",
            str(head.dtype).removeprefix("torch."),
        ]
    )
    path = cache_directory() / FILE_NAME
    return cached(path, key, lambda: measure(head, num_channels, logit_rows))


def cached(path: Path, key: str, measured: Callable[[], Rates]) -> Rates:
    """Rates from a file; measured and added to it if not there. A damaged file is replaced.

    Args:
        path: JSON, rates by key.
        key: device, versions and sizes that the rates are valid for.
        measured: measures them.
    """
    known = _known(path)
    with suppress(ValueError):
        return Rates.read(known.get(key))
    found = measured()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _known(path) | {key: asdict(found)})
    return found


@torch.inference_mode()
def measure(head: Tensor, num_channels: int, logit_rows: int, *, rows: int = ROWS) -> Rates:
    """Measure rates on the device of `head`, in its dtype.

    Args:
        head: [V, D], the model's LM head.
        num_channels: width of the model's widest MLP.
        logit_rows: number of tokens whose logits are held at once.
        rows: of the matrix products; a multiple of NUM_GROUPS.
    """
    width, device = head.shape[1], head.device
    x = _random(rows, width, like=head)
    dense, gather, copying, copied_bytes = _projections(x, num_channels)
    labels = torch.randint(len(head), (rows,), device=device)
    chunks = best_seconds(device, lambda: _by_chunks(x, head, labels, logit_rows))
    without = best_seconds(device, lambda: ops.lm_head_nll(x, head, labels))
    return Rates(
        matmul_tflops=4 * rows * width * num_channels / dense / 1e12,
        copy_gb_per_s=2 * copied_bytes / copying / 1e9,
        gather_ratio=KEPT_SHARE * dense / gather,
        nll_ratio=chunks / without,
    )


def _projections(x: Tensor, channels: int) -> tuple[float, float, float, int]:
    """Seconds for a whole up projection, a gathered one and a copy; size of the copy, bytes."""
    (rows, width), device = x.shape, x.device
    bank = _random(2 * channels, width, like=x)
    draws = torch.rand(NUM_GROUPS, channels, generator=torch.Generator().manual_seed(0))
    # the same number in every group: exactly KEPT_SHARE
    keep = draws.argsort(dim=1) < max(1, round(KEPT_SHARE * channels))
    lists = ops.KeptLists.of(keep, multiple=128, device=device)
    tiles = ops.RowPlan.of([rows // NUM_GROUPS] * NUM_GROUPS, device=device).tiles
    index = lists.index[0, : int(keep[0].sum())]
    copy = x.new_empty(len(index), width)
    tables = (lists.index, lists.count, tiles)
    options = {"activation": "silu", "gated": True}
    return (
        best_seconds(device, lambda: F.linear(x, bank)),
        best_seconds(device, lambda: ops.kept_up_proj(x, bank, *tables, **options)),
        best_seconds(device, lambda: ops.compact_rows(bank, index, copy)),
        copy.nbytes,
    )


def _random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype).mul_(shape[-1] ** -0.5)


def _by_chunks(x: Tensor, head: Tensor, labels: Tensor, logit_rows: int) -> None:
    for states, targets in zip(x.split(logit_rows), labels.split(logit_rows), strict=True):
        ops.token_nll(F.linear(states, head), targets)


def best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Shortest time of a call in REPEATS measurements of MIN_SECONDS each, after a first call."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize()
        return (time.perf_counter() - start) / count

    work()
    count = max(1, math.ceil(MIN_SECONDS / timed(1)))
    return min(timed(count) for _ in range(REPEATS))


def _known(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
