"""Every kernel compiles for every architecture, without a GPU, to code that does not spill.

Triton kernels become interpreted functions where conftest.py sets TRITON_INTERPRET, so compilation
runs in a process of its own: this file, as a script.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bonsai_fast

pytest.importorskip("triton")

ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_90": 90}
DTYPES = ["fp32", "fp16", "bf16"]
# Triton compiles a kernel once for sizes and strides divisible by 16 and once for others.
VOCABULARIES = {"aligned": True, "odd": False}
# Threads that an SM must hold: with 32 bytes in flight each, they cover the latency of HBM3.
RESIDENT_THREADS = 768
REGISTERS_PER_SM = 65536


def compile_token_nll(architecture: str, dtype: str, vocabulary: str) -> dict[str, int]:
    """Count what matters in the machine code of the default configuration."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bonsai_fast.kernels.token_nll import _token_nll_kernel

    config = _token_nll_kernel.configs[0]
    aligned = ["logits_ptr", "labels_ptr", "nll_ptr"]
    if VOCABULARIES[vocabulary]:
        aligned += ["V", "stride_ln"]
    names = _token_nll_kernel.fn.arg_names
    source = ASTSource(
        _token_nll_kernel.fn,
        signature={
            "logits_ptr": f"*{dtype}",
            "labels_ptr": "*i64",
            "nll_ptr": "*fp32",
            "V": "i32",
            "stride_ln": "i32",
            **dict.fromkeys(config.kwargs, "constexpr"),
        },
        constexprs=config.kwargs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", ARCHITECTURES[architecture], 32),
        # Triton 3.9 warns unless the last one is given.
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )
    sass = compiled.asm["sass"]
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)),
        "registers": 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", sass)),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(bonsai_fast.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    process = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_nll(compiled, architecture, dtype, vocabulary):
    code = compiled[f"{architecture} {dtype} {vocabulary}"]
    assert code["spills"] == 0
    assert code["wide_loads"] > 0, "full tiles must load 128 bits a thread"
    assert code["registers"] * RESIDENT_THREADS <= REGISTERS_PER_SM


if __name__ == "__main__":
    variants = itertools.product(ARCHITECTURES, DTYPES, VOCABULARIES)
    print(json.dumps({" ".join(variant): compile_token_nll(*variant) for variant in variants}))
