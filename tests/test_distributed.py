"""DDP, FSDP2 and DTensor on two local processes, which run all of :mod:`tests.ranks` at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors").read_text())


@pytest.mark.parametrize("check", ranks.CHECKS)
def test_two_processes(check, errors):
    assert len(errors[check]) == ranks.RANKS
    for rank, error in enumerate(errors[check]):
        assert error is None, f"on rank {rank}:\n{error}"


def programs(page):
    """The Python programs of a page of the documentation."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_documentation(tmp_path):
    """Its programs run under torchrun, one after the other in one start."""
    page = Path(__file__).parents[1] / "docs" / "use_with_distributed.md"
    found = programs(page)
    assert len(found) == 3
    start, end = 'dist.init_process_group("gloo")\n', "dist.destroy_process_group()\n"
    assert all(start in program and end in program for program in found)
    body = "".join(program.replace(start, "").replace(end, "") for program in found)
    # A second group would meet the keys of the first one in torchrun's store, and hang.
    (tmp_path / "page.py").write_text(f"import torch.distributed as dist\n{start}{body}{end}")
    launch = ["--standalone", "--nproc-per-node", str(ranks.RANKS), str(tmp_path / "page.py")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *launch],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
