"""Imports point one way, and the folder kernels/ never stands in for Hugging Face's `kernels`."""

import ast
import graphlib
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bonsai_fast"

# A module may import from its own storey and from those below it, without circles.
LAYERS: dict[str, set[str]] = {
    "tests and benches": {"testing"},
    "public API": {"__init__"},
    "comparison": {"compare"},
    "pruning, and recovery of saved models": {"prune", "recover"},
    "report": {"report"},
    "methods and saving": {"methods", "delivery"},
    "other commands": {"export", "latency", "surgery"},
    "recovery": {"recovery"},
    "evaluation and layers": {"evaluation", "layerwise"},
    "records and scores": {"runs", "scoring"},
    "checkpoints and command lines": {"checkpoints", "command_line"},
    "models": {"models"},
    "ops and options": {"config", "ops"},
    "ground": {"_C", "console", "files", "hub", "kernels"},
}
# No more than this may stand above one another.
MAX_STOREYS = 10

# These import, beside the standard library and their own folder, nothing else.
CLOSED: dict[str, set[str]] = {
    "hub": {"huggingface_hub", "torch", "transformers"},
    "kernels": {"torch", "triton"},
    "ops.native": {"bonsai_fast._C", "numpy", "torch"},
    "testing.reference": {"torch"},
    # vLLM calls it, at its start
    "export.vllm_plugin": {"bonsai_fast.hub", "torch", "vllm"},
}


def closed_part(module: str) -> str | None:
    """The entry of CLOSED that a module belongs to."""
    return next((part for part in CLOSED if f"{module}.".startswith(f"{part}.")), None)


def top_of(module: str) -> str:
    """'scoring.nll' -> 'scoring'."""
    return module.partition(".")[0]


def sources() -> dict[str, str]:
    """Every module's name inside the package, with its text."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    # rglob does not follow the link on every Python version.
    linked = (Path("kernels") / path.name for path in (ROOT / "kernels").glob("*.py"))
    return {
        ".".join(path.with_suffix("").parts): (PACKAGE / path).read_text()
        for path in {*paths, *linked}
    }


def imports_of(module: str, text: str) -> Iterator[str]:
    """Absolute names of all that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["bonsai_fast", *module.split(".")][: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            # What is imported from the package itself is a module, or else lives in its __init__.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def internal(name: str, known: set[str]) -> str | None:
    """The module of ours that `name` lies in: 'bonsai_fast.scoring.sequence_nll.f' -> 'scoring'."""
    package, _, rest = name.partition(".")
    if package != "bonsai_fast":
        return None
    return top_of(rest) if top_of(rest) in known else "__init__"


def arrows(texts: dict[str, str]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    known = {top_of(module) for module in texts} | {"_C"}
    graph: dict[str, set[str]] = {}
    for module, text in texts.items():
        targets = {internal(name, known) for name in imports_of(module, text)}
        graph.setdefault(top_of(module), set()).update(
            target for target in targets if target not in (None, top_of(module))
        )
    return graph


def problems(texts: dict[str, str]) -> list[str]:
    """Everything wrong with the imports of `texts`, a sentence each."""
    depth = {name: level for level, names in enumerate(LAYERS.values()) for name in names}
    layer = {name: title for title, names in LAYERS.items() for name in names}
    known = {top_of(module) for module in texts} | set(depth)
    found = [
        f"bonsai_fast/{name} has no place yet: add it to LAYERS in tests/test_imports.py, in the "
        "lowest layer whose upper neighbours are all that need it"
        for name in sorted(known - set(depth))
    ]
    graph: dict[str, set[str]] = {}
    for module, text in sorted(texts.items()):
        top = top_of(module)
        for name in imports_of(module, text):
            target = internal(name, known)
            part = closed_part(module)
            if part is not None:
                allowed = {*CLOSED[part], f"bonsai_fast.{part}", *sys.stdlib_module_names}
                if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
                    found.append(
                        f"{module} imports {name}, but {part} may import {CLOSED[part]} only"
                    )
            if target is None or target == top or not {top, target} <= set(depth):
                continue
            graph.setdefault(top, set()).add(target)
            if depth[target] < depth[top]:
                found.append(
                    f"{module} ({layer[top]}) imports {name}, which is above it ({layer[target]})"
                )
            if target == "testing":
                found.append(f"{module} imports bonsai_fast.testing, which is for tests alone")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"modules import each other: {' <- '.join(error.args[1])}")
    return found


def test_imports_point_one_way():
    assert not (found := problems(sources())), "\n" + "\n".join(found)


def test_only_the_plugin_and_a_script_import_vllm():
    """Importing any other module must not take a serving engine along."""
    guilty = {
        module
        for module, text in sources().items()
        if any(top_of(name) == "vllm" for name in imports_of(module, text))
    }
    scripts = {"export.engines.run_vllm", "export.engines.run_llama_cpp"}
    plugin = "export.vllm_plugin.__init__"
    assert guilty == {plugin, "export.vllm_plugin.llama", "export.engines.run_vllm"}
    at_the_top = {"vllm", "xllamacpp"}
    for module in (plugin, *sorted(scripts)):
        body = ast.parse(sources()[module]).body
        names = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {top_of(n) for node in names for n in imports_of("x", ast.unparse(node))}
        assert not found & at_the_top, module


def test_every_name_has_one_layer():
    names = [name for layer in LAYERS.values() for name in layer]
    assert sorted(names) == sorted(set(names))


def test_every_name_exists():
    modules = sources()
    rooms = {top_of(module) for module in modules} | {"_C"}
    assert {name for layer in LAYERS.values() for name in layer} == rooms
    for part in CLOSED:
        assert any(f"{module}.".startswith(f"{part}.") for module in modules), part


def test_the_house_is_no_higher_than_it_was_drawn():
    graph = arrows(sources())
    storeys: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        storeys[room] = 1 + max((storeys[below] for below in graph.get(room, ())), default=0)
    assert max(storeys.values()) <= MAX_STOREYS, sorted(storeys.items(), key=lambda item: item[1])


def test_every_file_name_is_unique():
    """But for an op, its kernel and its reference, which share theirs."""
    mirrored = {path.name for path in (PACKAGE / "ops").glob("*.py")}
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("__"):
            places.setdefault(path.name, []).append(str(path.relative_to(PACKAGE)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not {name: found for name, found in twice.items() if name not in mirrored}


@pytest.mark.parametrize(
    "texts, message",
    [
        ({"models.layout": "from bonsai_fast.scoring import MaskScorer"}, "above it"),
        ({"models.layout": "from bonsai_fast import scoring"}, "above it"),
        ({"models.layout": "import bonsai_fast.scoring.sequence_nll"}, "above it"),
        ({"models": "from . import scoring"}, "above it"),
        ({"models.llama": "from ..scoring import sequence_nll"}, "above it"),
        ({"models": "def f():\n    from bonsai_fast.methods import bonsai"}, "above it"),
        ({"models": "from bonsai_fast import Layout"}, "public API"),
        ({"methods.bonsai": "import bonsai_fast as bf"}, "public API"),
        ({"prune": "from bonsai_fast.testing.cases import tiny_llama"}, "for tests alone"),
        (
            {"runs.ledger": "import bonsai_fast.scoring", "scoring.a": "import bonsai_fast.runs"},
            "each other",
        ),
        ({"kernels.a": "from transformers import LlamaConfig"}, "kernels may import"),
        ({"kernels.a": "from bonsai_fast.console import track"}, "kernels may import"),
        ({"testing.reference.a": "import triton"}, "testing.reference may import"),
        ({"hub.modeling": "import bonsai_fast.console"}, "hub may import"),
        ({"novelty": ""}, "bonsai_fast/novelty has no place yet"),
    ],
)
def test_wrong_imports_are_found(texts, message):
    assert message in "\n".join(problems(texts))


@pytest.mark.parametrize(
    "texts",
    [
        {"scoring.nll": "import math, torch, numpy\nfrom bonsai_fast.models.layout import Layout"},
        {
            "scoring.__init__": "from .nll import nll",
            "scoring.nll": "from bonsai_fast.scoring import a",
        },
        {"kernels.a": "import torch, triton.language as tl\nfrom bonsai_fast.kernels._c import d"},
        {"hub.modeling": "from .configuration import Config\nfrom transformers import LlamaConfig"},
    ],
)
def test_right_imports_pass(texts):
    assert problems(texts) == []


def test_nothing_imports_the_bare_name_kernels():
    """It is Hugging Face's."""
    files = [
        path
        for folder in ("bonsai_fast", "kernels", "tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
    ]
    guilty = [
        str(path.relative_to(ROOT))
        for path in files
        if any(top_of(name) == "kernels" for name in imports_of("x", path.read_text()))
    ]
    assert not guilty, f"write bonsai_fast.kernels in {guilty}"


def test_kernels_folder_is_no_package_of_its_own():
    """A folder with an __init__.py in the current directory would win over site-packages."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"


FROM_THE_ROOT = """
import importlib, importlib.metadata, sys
accepted, *names = sys.argv[1:]
installed = importlib.metadata.version
if accepted:
    importlib.metadata.version = lambda name: accepted if name == "kernels" else installed(name)
import transformers
from transformers import LlamaForCausalLM
for name in names:
    importlib.import_module("bonsai_fast.kernels." + name)
import kernels
print(transformers.utils.is_kernels_available(), kernels.__file__)
"""


def run_from_the_root(*options: str, accepted: str = "", **environment: str) -> list[str]:
    """What FROM_THE_ROOT prints, in words, with the repository first on sys.path.

    `accepted` is the version that Hugging Face's kernels then seems to have.
    """
    pytest.importorskip("triton")
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    finished = subprocess.run(
        [sys.executable, *options, "-c", FROM_THE_ROOT, accepted, *names],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-1].split()


def test_from_the_root_with_hugging_face_kernels():
    """transformers imports from `kernels` only at a version that it accepts."""
    try:
        theirs = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed")
    accepted = import_utils.KERNELS_MIN_VERSION
    assert run_from_the_root(accepted=accepted) == ["True", str(theirs)]


def test_from_the_root_without_hugging_face_kernels(tmp_path):
    """The same environment less one package: links to everything else in site-packages."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if entry.name != "kernels" and not entry.name.startswith("kernels-"):
                (tmp_path / entry.name).symlink_to(entry)
    # -S leaves the real site-packages out. The folder is a namespace package: no file, no version.
    assert run_from_the_root("-S", PYTHONPATH=str(tmp_path)) == ["False", "None"]
