"""DDP, FSDP2 and DTensor on two local processes, which run all of :mod:`tests.ranks` at once."""

import json
import os
import subprocess
import sys

import pytest

from . import ranks

pytestmark = pytest.mark.cpu_only


def environment(folder):
    """For processes that are many on few cores, and start in ``folder``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(folder)}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """By the name of a check: its error on each rank, or None."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ranks", folder / "errors"],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors").read_text())


@pytest.mark.parametrize("check", ranks.CHECKS)
def test_two_processes(check, errors):
    assert len(errors[check]) == ranks.RANKS
    for rank, error in enumerate(errors[check]):
        assert error is None, f"on rank {rank}:\n{error}"
