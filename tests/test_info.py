"""build_info, the choice of instruction set, and the OpenMP runtime that torch shares with us."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import jacobian_ops

pytestmark = pytest.mark.cpu_only


def python(*arguments, **environment):
    """Run a fresh interpreter."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_build_info():
    facts = jacobian_ops.build_info()
    assert facts["version"] == jacobian_ops.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["version"])
    assert facts["isa"] in facts["available_isas"]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    built = importlib.util.find_spec("jacobian_ops._cuda")
    assert re.match(
        r"built for sm_\d+.* with CUDA 1\d\.\d" if built else "not built$", facts["cuda"]
    )
    assert facts["compiler"]


def test_command_line_prints_every_fact():
    shown = python("-W", "error::RuntimeWarning", "-m", "jacobian_ops.info")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    for name, value in jacobian_ops.build_info().items():
        assert name.replace("_", " ") in shown.stdout
        if isinstance(value, str):
            assert value in shown.stdout


def test_unknown_instruction_set_says_which_there_are():
    shown = python("-c", "import jacobian_ops", JACOBIAN_OPS_ISA="mmx")
    assert shown.returncode != 0
    assert "mmx" in shown.stderr
    for isa in jacobian_ops.build_info()["available_isas"]:
        assert isa in shown.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_shared_with_torch():
    """A second one would mean a second pool of threads.  In a process of its own: other packages
    bring runtimes too.
    """
    code = """if True:
        import re
        import torch, jacobian_ops
        torch.ones(1 << 20).exp()
        jacobian_ops.functional.gelu(torch.ones(1 << 20))
        print(jacobian_ops.build_info()["openmp"]["library"])
        print(*set(re.findall(r"/\\S*lib[gi]omp\\S*", open("/proc/self/maps").read())))
    """
    ours, loaded = python("-c", code).stdout.splitlines()
    assert {os.path.realpath(p) for p in loaded.split()} == {os.path.realpath(ours)}
