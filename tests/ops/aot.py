"""Compile what a launcher would launch, for a GPU that is not there, and count what matters.

Launchers run as they are, on tensors of the meta device in the shapes of real models; the launch
itself is caught. Triton kernels become interpreted functions where conftest.py sets
TRITON_INTERPRET, so that all this happens in a process of its own, `python aot.py`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_90": 90}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}


@dataclass
class Launch:
    """One caught launch: a kernel and what it was given."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def launches_of(call: Callable[[], Any], architecture: str) -> list[Launch]:
    """What `call` launches on tensors of the meta device, as if that were `architecture`."""
    from triton.runtime.jit import JITFunction

    from bonsai_fast.kernels import _configs

    caught: list[Launch] = []

    def catch(self, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages")}
        arguments |= {key: value for key, value in kwargs.items() if key in self.arg_names}
        size = grid(arguments) if callable(grid) else grid
        assert all(0 < extent < 1 << 31 for extent in size), f"{self.arg_names}: grid {size}"
        assert all(extent < 1 << 16 for extent in size[1:]), f"grid {size} is too high"
        caught.append(Launch(self, arguments, options))

    family = "hopper" if architecture == "sm_90" else "ampere"
    with (
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(_configs, "architecture", lambda device: family),
    ):
        call()
    return caught


def compile_for(launch: Launch, architecture: str) -> dict[str, Any]:
    """Counts of the machine code of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for param in launch.kernel.params:
        value = launch.arguments[param.name]
        if isinstance(value, torch.Tensor):
            signature[param.name] = f"*{TYPES[value.dtype]}"
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif (
            param.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not param.do_not_specialize)
        ):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        elif isinstance(value, float):
            signature[param.name], divisible = "fp32", False
        else:
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divisible = value % 16 == 0 and not param.do_not_specialize
        if divisible:
            attributes[(param.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", ARCHITECTURES[architecture], 32),
        # Triton 3.9 warns unless the last one is given.
        options=launch.options | {"enable_fp_fusion": True},
    )
    return {
        "shared_memory": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        **counts(compiled.asm["sass"]),
    }


def counts(sass: str) -> dict[str, int]:
    """Spills, matrix instructions and copies: in all, and in the loops that multiply matrices."""
    lines = sass.splitlines()
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"LBB\d+:", line)}
    loops = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA.*?(LBB\d+)", line)
        if target and labels[target[1]] <= at:
            body = "\n".join(lines[labels[target[1]] : at + 1])
            if re.search(r"\bH(?:G)?MMA\b", body):
                loops.append(body)
    inner = "\n".join(loops)
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "spills_in_loops": len(re.findall(r"\b(?:LDL|STL)\b", inner)),
        "matrix_loops": len(loops),
        "async_copies_in_loops": len(re.findall(r"\bLDGSTS\b", inner)),
        "matrix_instructions": len(re.findall(r"\bH(?:G)?MMA\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)),
        "registers": 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", sass)),
    }


if __name__ == "__main__":
    from aot_cases import CASES

    chosen = [case for case in CASES if not sys.argv[1:] or case.name in sys.argv[1:]]
    table = {}
    for case in chosen:
        for name in case.architectures:
            for launch in launches_of(case.call, name):
                key = f"{case.name} {launch.kernel.__name__} {name}"
                table[key] = compile_for(launch, name) | {"case": case.name, "architecture": name}
                print(key, table[key], file=sys.stderr, flush=True)
    print(json.dumps(table))
