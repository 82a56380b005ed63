"""Settings that every test relies on."""

import os

# What is tested is ours: without this, tiny calls would go to the native op.  `make test` runs the
# suite a second time with the variable at its default.
os.environ.setdefault("JACOBIAN_OPS_NATIVE_BELOW", "0")

import hypothesis
import pytest
import torch

import jacobian_ops.functional

hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def ours(monkeypatch):
    """Every call through our own kernels: for what they promise and native ops do not."""
    monkeypatch.setattr(jacobian_ops.functional, "NATIVE_BELOW", 0)


@pytest.fixture(autouse=True)
def _same_start():
    """Seed, threads and compile caches as if each test ran alone."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()
