"""Settings that every test relies on."""

import os

# What is tested is ours: without this, tiny calls and some matrix products would go to torch.
# `make test` runs the suite a second time with the variables at their defaults.
os.environ.setdefault("JACOBIAN_OPS_NATIVE_BELOW", "0")
os.environ.setdefault("JACOBIAN_OPS_GEMM", "own")

import hypothesis
import pytest
import torch

import jacobian_ops.functional
import jacobian_ops.kernels._gemm

hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def ours(monkeypatch):
    """Every call through our own kernels: for what they promise and native ops do not."""
    monkeypatch.setattr(jacobian_ops.functional, "NATIVE_BELOW", 0)
    monkeypatch.setattr(jacobian_ops.kernels._gemm, "CHOICE", "own")


@pytest.fixture(autouse=True)
def _same_start():
    """Seed, threads and compile caches as if each test ran alone."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()
