"""Threads, processes, instruction sets: the same bits everywhere, and no hang."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import jacobian_ops
import jacobian_ops.functional as J
from jacobian_ops import _cpu, kernels

from .cases import CASES

pytestmark = pytest.mark.cpu_only


def python(code, **environment):
    """Run code in a new interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BIG = (257, 1031)


def everything(dtype=torch.float32):
    """Every family of kernels on inputs that several threads share."""
    g = torch.Generator().manual_seed(1)
    x, t = (torch.randn(BIG, generator=g).to(dtype) for _ in range(2))
    w = torch.randn(193, BIG[1], generator=g).to(dtype)
    outs = [kernels.activation(x, name) for name in kernels.NAMES]
    outs += [
        kernels.activation_vjp(x, t, name, order=k) for name in ("gelu", "mish") for k in (1, 3)
    ]
    outs += [*kernels.activation_jvp(x, t, "tanh", seed=3, p=0.3)]
    outs += [*kernels.activation_vjp_sum(x, t, "gelu", seed=3, p=0.3)]
    for dim in (0, 1):
        outs += [kernels.softmax(x, dim), *kernels.softmax_jvp(x, t, dim)]
        outs += [*kernels.log_softmax_jvp(x, t, dim), *kernels.softmax_vjp_vjp(x, t, t, dim)]
        outs += [kernels.softmax_dropout(x, dim, 0.3, 5)]
    outs += [kernels.dropout(x, 0.3, 5), kernels.column_sum(x)]
    outs += [kernels.linear(x, w), *kernels.linear_vjp(x, w, kernels.linear(x, w))]
    outs += [kernels.linear_act_dropout(x, w, None, "gelu", 0.2, 9)[0], kernels.linear(x[:2], w)]
    return outs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(ours, dtype):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(everything(dtype))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_sixteen_threads_call_every_op():
    """The GIL is released while a kernel runs: calls must not disturb each other."""
    torch.set_num_threads(1)
    inputs = [case.inputs(requires_grad=True) for case in CASES]

    def run(_):
        results = []
        for case, xs in zip(CASES, inputs, strict=True):
            y = case.ours(*xs)
            results += [y, *torch.autograd.grad(y.sum(), xs)]
        return results

    want = run(0)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for got in pool.map(run, range(64)):
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)


def in_child(queue):
    x = torch.ones(300, 400, requires_grad=True)
    y = J.softmax(J.linear(x, x), -1).sum() + J.dropout(J.gelu(x), 0.5).sum()
    y.backward()
    queue.put(x.grad.isfinite().all().item())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_process_does_not_hang(method):
    """GNU OpenMP's pool does not survive a fork: a child runs on one thread."""
    J.softmax(torch.randn(1000, 1000), -1)  # the pool is up
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    child.join(120)
    hangs = child.is_alive()
    if hangs:
        child.kill()
    assert not hangs and child.exitcode == 0 and queue.get()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return J.softmax(J.gelu(torch.full((200, 300), float(i))), -1)


def test_data_loader_workers():
    J.gelu(torch.randn(1000, 1000))
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, timeout=120)
    assert sum(len(batch) for batch in loader) == 8


def test_threads_are_torchs():
    torch.set_num_threads(1)
    assert jacobian_ops._backend.threads() == 1
    torch.set_num_threads(2)
    assert jacobian_ops._backend.threads() == 2


SMOKE = """
    import jacobian_ops, pytest, sys
    info = jacobian_ops.build_info()
    assert info["isa"] == {isa!r}, info
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header",
        "tests/test_gradients.py", "tests/test_accuracy.py", "tests/test_dropout.py",
        "tests/test_layouts.py", "-k", {keep!r}]))
"""
# Accuracy of every dtype, first and second derivatives, GEMM edges, generator: what differs between
# instruction sets.
KEEP = (
    "gradcheck and not (gradgradcheck and attention) or accuracy or generator or mask_does "
    "or anything"
)


# The one that is used by itself runs all the other tests.
@pytest.mark.parametrize("isa", [isa for isa in _cpu.available_isas() if isa != _cpu.isa()])
def test_every_instruction_set(isa):
    print(
        python(
            SMOKE.format(isa=isa, keep=KEEP), JACOBIAN_OPS_ISA=isa, JACOBIAN_OPS_NATIVE_BELOW="0"
        )
    )


def test_unknown_instruction_set():
    code = """
        try:
            import jacobian_ops
        except ImportError as e:
            print(e)
    """
    text = python(code, JACOBIAN_OPS_ISA="sse9")
    assert "JACOBIAN_OPS_ISA" in text and "sse9" in text and "baseline" in text


def test_import_after_torch_and_before():
    code = "import jacobian_ops, torch; print(jacobian_ops.functional.relu(torch.ones(2)).sum())"
    assert "2." in python(code)


def test_denormals_survive_the_import():
    """A library linked with -ffast-math would flush them in the whole process."""
    code = "import jacobian_ops, numpy as np; print(np.float32(1e-40) * np.float32(1) > 0)"
    assert "True" in python(code)


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2])
def test_tiny_results_are_zeros_in_kernels_alone(threads):
    """Or a saturated exponential would take ten times as long; what is only moved stays."""
    torch.set_num_threads(threads)
    tiny = torch.full((40000,), 1e-40)
    assert (jacobian_ops.functional.relu(tiny) == tiny).all()
    x = torch.tensor([0.0, -90.0]).repeat(20000, 1)  # e^-90 is below the least normal number
    y = jacobian_ops.functional.softmax(x, -1)
    assert (y == torch.tensor([1.0, 0.0])).all()
    assert (tiny * 0.5 > 0).all()  # on every thread, as before


def test_build_info_names_what_runs():
    info = jacobian_ops.build_info()
    assert info["isa"] in info["available_isas"]
