"""Build bonsai_fast._C with CMake; everything else about the package is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures afresh on every build: an isolated build's tools are gone by the next one."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        configure = [
            *(program, "--fresh", "-G", "Ninja", "-S", str(Path(__file__).resolve().parent)),
            *("-B", str(build), f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([program, "--build", str(build)], check=True)


setup(ext_modules=[Extension("bonsai_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
