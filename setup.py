"""Builds the native modules by calling CMake, whose files are the one description of the build.

JACOBIAN_OPS_CUDA=1 or 0 says whether the CUDA kernels are built, by default where CMake finds a
toolkit; JACOBIAN_OPS_CUDA_ARCHS for which GPUs, as "80;90"; JACOBIAN_OPS_ISAS for which instruction
sets of the CPU, as "avx2;avx512".
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Kept between builds, one for each interpreter: only what changed is compiled again.
BUILD = ROOT / "build" / f"python-{sysconfig.get_config_var('SOABI')}"


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        BUILD.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DJACOBIAN_OPS_PYTHON=ON",
            "-DJACOBIAN_OPS_TOOLS=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DJACOBIAN_OPS_CUDA={os.environ.get('JACOBIAN_OPS_CUDA') or 'AUTO'}",
            # Build isolation gives a new ninja each time: look for it again.
            "-UCMAKE_MAKE_PROGRAM",
        ]
        for name in ("JACOBIAN_OPS_ISAS", "JACOBIAN_OPS_CUDA_ARCHS"):
            value = os.environ.get(name)
            configure.append(f"-D{name}={value}" if value else f"-U{name}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS")
        command = ["cmake", "--build", str(BUILD)]
        subprocess.run([*command, "-j", jobs] if jobs else command, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(BUILD / target.name), str(target))
        self._place_cuda(target.parent)

    def copy_extensions_to_source(self):  # of an editable install
        super().copy_extensions_to_source()
        self._place_cuda(ROOT / "jacobian_ops")

    def _place_cuda(self, folder):
        """Put the module _cuda of this build into ``folder``; where none was built, none stays."""
        name = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
        (folder / name).unlink(missing_ok=True)
        if (BUILD / name).exists() and os.environ.get("JACOBIAN_OPS_CUDA") != "0":
            self.copy_file(str(BUILD / name), str(folder / name))


setup(ext_modules=[Extension("jacobian_ops._cpu", [])], cmdclass={"build_ext": CMakeBuild})
