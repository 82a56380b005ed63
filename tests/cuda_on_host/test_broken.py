"""Deliberately broken kernels: each must be caught, and its right form must pass.

``broken.cu`` has them, in the module ``_broken`` beside the backend that is tested.  The variant
with sanitizers aborts the process at what it finds, so that each of its runs is a process.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ON_HOST

if not ON_HOST:
    pytest.skip(
        "the CUDA kernels run on the host in make test-cuda-on-host", allow_module_level=True
    )
BACKEND = os.environ["JACOBIAN_OPS_TEST_BACKEND"]
MODULE = next(Path(BACKEND).resolve().parent.glob("_broken*.so"))
SANITIZED = b"libasan.so" in MODULE.read_bytes()
SEEDS = range(10)

# What the message of an error must say.
WORDS = {
    "missing_barrier": "nothing wrote|no __syncthreads",
    "write_after_read": "a race",
    "missing_syncwarp": "nothing wrote|no __syncwarp",
    "shuffle_for_syncwarp": "nothing wrote|no __syncwarp",
    "syncwarp_of_other_lanes": "nothing wrote|no __syncwarp",
    "syncwarp_between_warps": "nothing wrote|no __syncthreads",
    "writers_of_one_word": "wrote: a race",
    "shared_off_by_one": "writes bytes 512 to 516|use-after-poison",
    "dynamic_off_by_one": "reads bytes 512 to 516|use-after-poison",
    "global_off_by_one": "heap-buffer-overflow",
    "misaligned_vector": "no multiple|misaligned address",
    "signed_overflow": "signed integer overflow",
    "divergent_barrier": "they diverged",
    "barrier_of_some_warps": "exited",
    "exit_before_barrier": "exited",
    "uninitialised_read": "nothing wrote",
    "lane_outside_mask": "reads lane 16, which is not in mask 0x0000ffff",
    "caller_outside_mask": "does not name itself|not in mask",
    "absent_lanes": "names lane 16, which does not exist",
    "exited_lanes": "exited",
    "different_masks": "exited|waits elsewhere",
    "different_shuffles": "waits at another",
    "shuffle_against_barrier": "forever",
    "missing_copy_wait": "before the wait",
    "wait_of_one_group_too_few": "before the wait",
    "copy_without_barrier": "nothing wrote|before the wait|no __syncthreads",
    "copy_over_readers": "a race",
    "copy_left_behind": "never waited",
    "misaligned_copy": "no multiple of 16",
    "matrix_without_syncwarp": "nothing wrote|no __syncwarp",
    "misaligned_matrix": "no multiple of 16",
    "endless_loop": "still runs",
    "too_much_shared_memory": "bytes of static",
    "too_many_threads": "no GPU runs a block of",
}

CHILD = """
import importlib.util, json, sys
path, name, right, seed = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_broken", path)
broken = importlib.util.module_from_spec(spec)
spec.loader.exec_module(broken)
if not name:
    print(json.dumps([broken.variant, broken.cases()]))
else:
    broken.set_seed(int(seed))
    broken.run(name, right == "right")
"""


def child(name="", right=True, seed=0):
    """A process that runs one case under the sanitizers."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": ":".join(found.stdout.strip() for found in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-c", CHILD, str(MODULE), name, "right" if right else "wrong"]
    return subprocess.run([*command, str(seed)], capture_output=True, text=True, env=env)


@functools.cache
def module():
    spec = importlib.util.spec_from_file_location("_broken", MODULE)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken


def found_by():
    return json.loads(child().stdout)[1] if SANITIZED else module().cases()


def variant():
    return "sanitize" if SANITIZED else module().variant


def error(name, right, seed):
    """The message of a run's error, or an empty string."""
    if SANITIZED:
        done = child(name, right, seed)
        return done.stderr if done.returncode else ""
    module().set_seed(seed)
    try:
        module().run(name, right)
    except RuntimeError as e:
        return str(e)
    return ""


CASES = found_by()


@pytest.mark.parametrize("name", CASES)
def test_right_form_passes(name):
    for seed in SEEDS if not SANITIZED else SEEDS[:1]:
        assert not error(name, True, seed)


@pytest.mark.parametrize("name", [n for n, variants in CASES.items() if variant() in variants])
def test_broken_form_is_caught(name):
    # A loop without end is the same in every order, and takes its time.
    for seed in SEEDS if name != "endless_loop" else SEEDS[:1]:
        message = error(name, False, seed)
        assert any(words in message for words in WORDS[name].split("|")), f"seed {seed}: {message}"
        if not SANITIZED:
            assert f"broken::{name}<false>" in message


@pytest.mark.skipif(SANITIZED, reason="the module is imported in processes of their own")
class TestInThisProcess:
    def test_an_error_tells_where(self):
        message = error("shared_off_by_one", False, 3)
        if variant() == "checked":
            source = (Path(__file__).parent / "broken.cu").read_text().splitlines()
            line = next(
                i for i, text in enumerate(source, 1) if "kRight ? i : i + 1] = x[i]" in text
            )
            assert f"block (0, 0, 0), thread (127, 0, 0), broken.cu:{line}:" in message
            assert message.endswith("(seed 3)")

    def test_a_kernel_runs_after_an_error(self):
        for name in ("missing_copy_wait", "divergent_barrier", "exited_lanes"):
            error(name, False, 0)
            assert not error(name, True, 0)

    def test_blocks_run_in_an_order_of_the_seed(self):
        """Races between blocks are no error, but a result that depends on the seed."""

        def results(right):
            for seed in SEEDS:
                module().set_seed(seed)
                yield tuple(module().run("blocks_of_one_word", right))

        assert len(set(results(True))) == 1
        assert len(set(results(False))) > 1

    def test_bytes_of_global_memory_are_counted(self):
        module().reset_counters()
        error("missing_barrier", True, 0)
        error("copy_without_barrier", True, 0)
        read_and_written = 128 * 4 if variant() == "checked" else 0
        names = [f"broken::{name}<true>" for name in ("missing_barrier", "copy_without_barrier")]
        if variant() == "checked":
            assert module().launches() == [
                (name, read_and_written, read_and_written) for name in names
            ]
