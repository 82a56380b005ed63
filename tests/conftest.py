"""Settings that every test relies on."""

import os

# What is tested is ours: without this, tiny calls and some matrix products would go to torch.
# `make test` then runs what that can change a second time, with the defaults of the variables.
os.environ.setdefault("JACOBIAN_OPS_NATIVE_BELOW", "0")
os.environ.setdefault("JACOBIAN_OPS_GEMM", "own")

import importlib.util
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import jacobian_ops.functional
import jacobian_ops.kernels._gemm
from jacobian_ops import _backend

from . import cases

# A native module that CPU tensors are sent to instead: the CUDA kernels without a GPU in `make
# test-cuda-on-host`, the CPU's with sanitizers in `make sanitize`.
if _path := os.environ.get("JACOBIAN_OPS_TEST_BACKEND", ""):
    _spec = importlib.util.spec_from_file_location(Path(_path).name.split(".")[0], _path)
    _backend.BACKENDS["cpu"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_backend.BACKENDS["cpu"])
ON_HOST = _backend.BACKENDS["cpu"].kind == "cuda"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() and "cuda" in _backend.BACKENDS else ("cpu",)


def pytest_addoption(parser):
    parser.addoption(
        "--routed",
        action="store_true",
        help="of the cases only those that torch may run",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only: about the CPU's kernels and what is around them")


def pytest_generate_tests(metafunc):
    """Every test on every device that is there."""
    cpu_only = any(m.name == "cpu_only" for m in metafunc.definition.iter_markers())
    if len(DEVICES) > 1 and not cpu_only:
        metafunc.parametrize("_same_start", DEVICES, indirect=True)


def pytest_collection_modifyitems(config, items):
    def kept(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        is_op = isinstance(case, cases.Case)
        if is_op and config.getoption("--routed") and case not in cases.ROUTED:
            return False
        return not (ON_HOST and item.get_closest_marker("cpu_only"))

    config.hook.pytest_deselected(items=[i for i in items if not kept(i)])
    items[:] = [i for i in items if kept(i)]


hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def ours(monkeypatch):
    """Every call through our own kernels: for what they promise and native ops do not."""
    monkeypatch.setattr(jacobian_ops.functional, "NATIVE_BELOW", 0)
    monkeypatch.setattr(jacobian_ops.kernels._gemm, "CHOICE", "own")


def _move_tensors(module, device, monkeypatch):
    """Put the tensors that a module made when it was imported on ``device`` for one test."""

    def moved(t):
        return t.detach().to(device).requires_grad_(t.requires_grad)

    for name, value in list(vars(module).items()):
        leaves = tree_leaves(value) if isinstance(value, (Tensor, tuple, list, dict)) else ()
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            monkeypatch.setattr(module, name, tree_map_only(Tensor, moved, value))


@pytest.fixture(autouse=True)
def _same_start(request, monkeypatch):
    """Seed, threads, device and compile caches as if each test ran alone."""
    device = getattr(request, "param", "cpu")
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()
    if device != "cpu":
        torch.set_default_device(device)
        for module in (request.module, cases):
            _move_tensors(module, device, monkeypatch)
    yield
    if device != "cpu":
        torch.set_default_device(None)
