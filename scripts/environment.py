"""Make the virtual environment that the Makefile's targets run in, or complete the one there is.

Standard library only: it runs under any Python >= 3.10, before anything is installed.  It installs
torch first, then the build requirements, the dependencies and the extras that pyproject.toml lists.
The package itself is installed by `make build`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "demo", "bench")

# Named exactly, so that the CPU build of this version, wherever pip finds one, wins over the
# CUDA build that PyPI carries for Linux on x86-64 (a local version such as 2.13.0+cpu sorts above
# 2.13.0).  Without the exact version a newer CUDA build would win over a local CPU build.
DEFAULT_TORCH = "torch==2.13.0"
FLOOR = (2, 10)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(*command: str | os.PathLike) -> None:
    """Show a command and run it; a failure ends the program with its exit status."""
    print("+", *command, flush=True)
    status = subprocess.run([os.fspath(part) for part in command]).returncode
    if status:
        sys.exit(status)


def install(python: Path, *arguments: str | os.PathLike) -> None:
    """Install with pip; what is imported of it is compiled when it is, not all of torch now."""
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *arguments)


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "bin" / "python"


def make_venv(venv: Path) -> None:
    """Create ``venv`` with pip in it, unless it is there."""
    python = python_of(venv)
    if python.exists():
        return
    # Debian's python3 may come without ensurepip (its python3-venv package): pip can install
    # itself into an environment instead.
    complete = subprocess.run([sys.executable, "-m", "venv", venv], capture_output=True)
    if complete.returncode:
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv)
        run(sys.executable, "-m", "pip", "--python", python, "install", "pip")
    # The pip that Python 3.10 carries is older than editable installs from pyproject.toml.
    install(python, "--upgrade", "pip")


def cpu_index() -> list[str]:
    """The option that adds PyTorch's index of CPU builds; nothing when it cannot be reached.

    Asked once with a short time-out: pip itself would retry for each package, for minutes.
    """
    try:
        request = urllib.request.Request(f"{CPU_INDEX}/torch/", method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        print(f"{CPU_INDEX} cannot be reached: torch comes from pip's usual sources")
        return []
    return ["--extra-index-url", CPU_INDEX]


def installed_torch(python: Path) -> tuple[int, int] | None:
    """Major and minor version of the torch that ``python`` sees, without importing it."""
    code = "from importlib.metadata import version as v; print(*v('torch').split('.')[:2])"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return None if answer.returncode else tuple(int(n) for n in answer.stdout.split())


def install_torch(python: Path, requirement: str) -> None:
    """Install torch as ``requirement`` says, the CPU build where pip finds one, and what it needs.

    In two steps, so that only torch itself is looked for on PyTorch's index.
    """
    install(python, "--no-deps", *cpu_index(), requirement)
    install(python, requirement)


def requirements(extra: str = "") -> list[str]:
    """What pyproject.toml asks for: to build, to run, and the usual extras; or one extra alone."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    if extra:
        return extras[extra]
    listed = project["build-system"]["requires"] + project["project"]["dependencies"]
    return listed + [requirement for name in EXTRAS for requirement in extras[name]]


def install_extra(python: Path, extra: str) -> None:
    """Install one more extra beside the torch that is there, which torchvision's must fit."""
    code = "from importlib.metadata import version; print(version('torch').split('+')[0])"
    torch = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    fixed = f"torch=={torch.stdout.strip()}"
    install(python, *cpu_index(), fixed, *requirements(extra))


def main() -> None:
    """Command line: the environment's folder and, if wanted, a torch requirement or an extra."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument(
        "--torch",
        default="",
        help=f"requirement for pip; by default {DEFAULT_TORCH}, or any torch already there",
    )
    parser.add_argument(
        "--extra", default="", help="install only this extra into a complete folder"
    )
    options = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036  this script may meet an older one
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: set PYTHON=")

    venv = options.venv.absolute()
    python = python_of(venv)
    if options.extra:
        install_extra(python, options.extra)
        return
    make_venv(venv)
    if options.torch:
        install_torch(python, options.torch)
    elif (installed_torch(python) or (0, 0)) < FLOOR:
        install_torch(python, DEFAULT_TORCH)
    install(python, *requirements())


if __name__ == "__main__":
    main()
