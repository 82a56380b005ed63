"""Build one wheel with build isolation and no torch, and run it beside several torch versions.

The native core neither includes nor links torch, so one build must serve them all.  The wheel is
made by an environment that has pip alone, from this checkout, so that kernels that are compiled
are not compiled again; its files are compared with what git tracks.  Then scripts/smoke.py runs
against it in one environment for each torch.  Those are kept in the user's cache folder
(XDG_CACHE_HOME, else ~/.cache) and used again; removing them costs only time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import environment

ROOT = environment.ROOT
TORCHES = ("torch==2.13.0", "torch==2.10.0")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobian_ops"


def tracked_files() -> set[str]:
    """What git tracks of the package, and new files that it does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "jacobian_ops"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = filter(None, listing.stdout.decode().split("\0"))
    return {name for name in names if (ROOT / name).is_file()}


def build_wheel(folder: Path, scratch: Path) -> Path:
    """Build the wheel into ``folder`` and return its path."""
    venv = scratch / "builder"
    environment.make_venv(venv)
    python = environment.python_of(venv)
    # What an earlier build has put there would come along.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    for left in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(left)
    environment.run(python, "-m", "pip", "wheel", "--no-deps", "-w", scratch / "wheel", ROOT)
    (wheel,) = (scratch / "wheel").glob("*.whl")
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(wheel, folder))


def check_contents(wheel: Path) -> None:
    """The wheel has the package as git has it, the native modules, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    names = {name for name in names if ".dist-info/" not in name}
    libraries = {name for name in names if re.fullmatch(r"jacobian_ops/_(cpu|cuda)\.[^/]*so", name)}
    wrong = (names - libraries) ^ tracked_files()
    if wrong or not libraries:
        sys.exit(f"{wheel.name}: not both in the wheel and in git: {wrong or 'native modules'}")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, {', '.join(sorted(libraries))}")


def torch_environment(requirement: str) -> Path:
    """The interpreter of an environment with that torch, from the cache where there is one.

    Nothing is ever installed into it afterwards, so any number of checks may share it.
    """
    key = hashlib.sha256(f"{requirement} {sys.version} {sys.executable}".encode()).hexdigest()[:8]
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in requirement)
    venv = CACHE / f"{name}-{key}"
    if not environment.python_of(venv).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Made under another name, so that one that is in place is complete.
        with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as unfinished:
            new = Path(unfinished) / "venv"
            environment.make_venv(new)
            environment.install_torch(environment.python_of(new), requirement)
            environment.install(environment.python_of(new), "numpy")
            new.rename(venv)
    return environment.python_of(venv)


def main() -> None:
    """Command line: torch requirements, or --build-only and a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torches", nargs="*", default=TORCHES, help="requirements for pip")
    parser.add_argument("--build-only", type=Path, metavar="FOLDER", help="leave the wheel there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="jacobian_ops-") as scratch:
        scratch = Path(scratch)
        wheel = build_wheel(options.build_only or scratch / "dist", scratch)
        check_contents(wheel)
        if options.build_only:
            return
        # Installed once, beside no torch; run outside the checkout, which is not to be imported.
        site = scratch / "site"
        pip = (environment.python_of(scratch / "builder"), "-m", "pip")
        environment.run(*pip, "install", "--quiet", "--no-deps", "--target", site, wheel)
        smoke = shutil.copy2(ROOT / "scripts" / "smoke.py", scratch)
        os.chdir(scratch)
        os.environ["PYTHONPATH"] = os.fspath(site)
        for requirement in options.torches:
            print(f"== {requirement}", flush=True)
            python = torch_environment(requirement)
            environment.run(python, "-m", "pip", "check")
            environment.run(python, smoke)
        print(f"{wheel.name} works beside {', '.join(options.torches)}")


if __name__ == "__main__":
    main()
