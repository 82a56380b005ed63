"""retain_host_memory: counted in page faults and resident pages, which no other load disturbs."""

import os
import subprocess
import sys
import textwrap

import pytest

import jacobian_ops

pytestmark = pytest.mark.cpu_only

PROGRAM = """
    import resource
    import torch
    import jacobian_ops

    SIZE = 64 << 20
    PAGE = resource.getpagesize()

    def faults(n=5):
        '''Page faults of n tensors, one after the other.

        Not of the first ones: until glibc's caches of small chunks are full, such a chunk may lie
        behind a large one and keep it from growing together with what is free.
        '''
        small = [torch.ones(8) for _ in range(64)]
        del small
        for _ in range(3):
            torch.ones(SIZE, dtype=torch.int8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(n):
            torch.ones(SIZE, dtype=torch.int8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * PAGE
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OFF = "before = faults(); assert before >= 5 * (SIZE >> 21)"  # even where a fault brings 2 MiB


def test_off_by_the_variable():
    run(OFF, JACOBIAN_OPS_RETAIN_HOST_MEMORY="0")


def test_retained_memory_is_not_faulted_in_again():
    run(
        OFF
        + """
changed = jacobian_ops.retain_host_memory()
assert changed["M_MMAP_MAX"] == 0, changed
assert faults() < before / 4
"""
    )


def test_variable_and_release():
    code = """
        assert faults() < 2 * SIZE / PAGE
        torch.ones(4 * SIZE, dtype=torch.int8)
        peak = resident()
        changed = jacobian_ops.release_host_memory()
        assert changed["M_MMAP_MAX"] > 0, changed
        assert peak - resident() > 3 * SIZE
    """
    run(code, JACOBIAN_OPS_RETAIN_HOST_MEMORY="1")


def test_bad_variable():
    done = subprocess.run(
        [sys.executable, "-c", "import jacobian_ops"],
        env={**os.environ, "JACOBIAN_OPS_RETAIN_HOST_MEMORY": "yes"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "JACOBIAN_OPS_RETAIN_HOST_MEMORY: allowed 0 or 1" in done.stderr


@pytest.mark.parametrize("name", ["retain_host_memory", "release_host_memory"])
def test_is_public(name):
    assert name in jacobian_ops.__all__
