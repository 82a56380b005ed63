"""What the build and the documents promise, checked on the sources and the installed package."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jacobian_ops
from jacobian_ops import _cpu, functional

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parent.parent


def test_version_is_that_of_pyproject():
    (line,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line == metadata.version("jacobian_ops") == jacobian_ops.__version__


def test_torch_floor():
    requirements = [Requirement(text) for text in metadata.requires("jacobian_ops")]
    (torch_requirement,) = [r for r in requirements if r.name == "torch"]
    assert str(torch_requirement.specifier) == ">=2.10"


def test_native_sources_include_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cuh", ".cu"}]
    assert sources
    for source in sources:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', source.read_text())
        assert not [name for name in included if re.match(r"torch/|ATen/|c10/", name)], source


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_native_modules_link_no_torch():
    for module in Path(_cpu.__file__).parent.glob("_c*.so"):
        shown = subprocess.run(["readelf", "-d", module], capture_output=True, text=True)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", shown.stdout)
        # The plain name: the runtime that torch has loaded under it is then shared.
        assert ("libgomp.so.1" in needed) == module.name.startswith("_cpu")
        assert not [name for name in needed if re.match(r"lib(torch|c10|cuda)", name)]


def test_readme_names_every_op():
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in functional.__all__ if f"`{name}" not in readme]
    assert not missing


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
