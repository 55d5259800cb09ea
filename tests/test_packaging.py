"""The wheel holds what it must and links what it may; a missing extension is said plainly."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "bonsai_fast_cli.py",
)
TEMPLATES = {f"bonsai_fast/report/templates/report.{kind}" for kind in ("html", "css")}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy to build in, so that the real one keeps its extension and gets no build folders."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("_C.*.so", "__pycache__")
    for name in ("bonsai_fast", "csrc", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    for tool in BUILD_TOOLS:
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"building without isolation needs {tool}")
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    finished = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(target), str(checkout)],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def python_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in (root / "bonsai_fast").rglob("*.py")}


def kernel_files() -> set[str]:
    return {f"bonsai_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def test_wheel_holds_the_package(wheel, checkout):
    names = set(wheel.namelist())
    assert kernel_files() and kernel_files() <= names
    assert python_files(checkout) <= names
    assert {"bonsai_fast/py.typed", "bonsai_fast/_C.pyi"} | TEMPLATES <= names
    assert any(
        name.startswith("bonsai_fast/_C.") and name.endswith((".so", ".pyd")) for name in names
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_else(wheel):
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {
        "bonsai_fast",
        "bonsai_fast_cli.py",
    }
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_extension_links_neither_libtorch_nor_python(wheel, tmp_path):
    """The wheel must work with every version of PyTorch, and with a statically linked Python."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    (name,) = [name for name in wheel.namelist() if name.endswith(".so")]
    extension = wheel.extract(name, tmp_path)
    dynamic = subprocess.run([readelf, "-d", extension], capture_output=True, text=True, check=True)
    needed = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "c10" in line or "python" in line]
    assert not [
        line for line in dynamic.stdout.splitlines() if "RPATH" in line or "RUNPATH" in line
    ]


def test_sdist_can_be_built_from(wheel, checkout, tmp_path):
    code = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.[ch]pp")}
    assert set(members) >= TEMPLATES
    assert sources | kernel_files() | {"CMakeLists.txt", "setup.py", "LICENSE"} <= set(members)
    # A link would point at a folder that the archive may lack.
    assert all(members[name].isreg() for name in kernel_files())


def test_missing_extension_is_one_clear_line(checkout):
    """A checkout that was never built, with Python started in it."""
    # -S: an editable install of another checkout would lend its extension.
    finished = subprocess.run(
        [sys.executable, "-S", "-c", "import bonsai_fast.ops.native"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the C++ extension bonsai_fast._C is not built")
    assert "pip install -e ." in last
