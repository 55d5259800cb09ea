"""Every kernel compiles for every architecture, without a GPU, to code that does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import SHARED_MEMORY
from aot_cases import CASES

import bonsai_fast

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

# Threads that an SM must hold: with 32 bytes in flight each, they cover the latency of HBM3.
RESIDENT_THREADS = 768
REGISTERS_PER_SM = 65536


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(bonsai_fast.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    "case, architecture",
    [(case, architecture) for case in CASES for architecture in case.architectures],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiles_well(compiled, case, architecture):
    kernels = [
        code
        for code in compiled.values()
        if (code["case"], code["architecture"]) == (case.name, architecture)
    ]
    assert kernels, "nothing was launched"
    for code in kernels:
        assert code["shared_memory"] <= SHARED_MEMORY[architecture]
        assert code["spills_in_loops"] == 0
    if case.matrix:
        code = kernels[0]
        assert code["matrix_loops"] > 0, "no loop multiplies on tensor cores"
        assert code["async_copies_in_loops"] > 0, "loads must not pass through registers"
        assert architecture != "sm_90" or code["wgmma"] > 0, "Hopper's own instruction is faster"
    else:
        for code in kernels:
            assert code["spills"] == 0
            assert code["wide_loads"] > 0 or case.scattered, (
                "full tiles must load 128 bits a thread"
            )
            assert code["registers"] * RESIDENT_THREADS <= REGISTERS_PER_SM
