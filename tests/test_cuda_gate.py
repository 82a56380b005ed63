"""The static gate reads what CUDA's tools print, and fails what it must."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only
_PATH = Path(__file__).parent.parent / "scripts" / "cuda_gate.py"
_SPEC = importlib.util.spec_from_file_location("cuda_gate", _PATH)
gate = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = gate  # dataclasses look there
_SPEC.loader.exec_module(gate)

MANGLED = "_ZN4jops4cuda7dropout8multiplyINS0_4Bf16ELb1EEEvNS1_7TensorsIT_EE"
USAGE = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {MANGLED}:
  REG:48 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
arch = sm_90
\t\tFunction : {MANGLED}
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
        /*02c0*/               @P0 LDG.E.U16 R9, desc[UR6][R20.64+0x4] ;  /* 0x00 */
  /* 0x00 */
        /*04a0*/                   LDG.E.128.CONSTANT R8, desc[UR6][R20.64] ;  /* 0x00 */
        /*04b0*/              @!P1 STG.E.128 desc[UR6][R20.64], R8 ;  /* 0x00 */
        /*10a00*/                  STL [R1], R3 ;  /* 0x00 */
"""
ELF = f"""
arch = sm_90
.nv.info.{MANGLED}
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1
"""


def kernel(name="dropout::multiply<float>", arch=90, **opcodes):
    counts = {k.replace("_", "."): n for k, n in opcodes.items()}
    return gate.Kernel(name, arch, 32, 0, 0, 256, Counter(counts))


def test_what_the_tools_print():
    usage = gate.parse_usage(USAGE.splitlines())
    assert usage == {(MANGLED, 90): {"REG": 48, "STACK": 0, "SHARED": 1024}}
    opcodes = gate.parse_sass(SASS.splitlines())[MANGLED, 90]
    assert opcodes == {"LDG.E.U16": 1, "LDG.E.128.CONSTANT": 1, "STG.E.128": 1, "STL": 1}
    assert gate.parse_threads(ELF.splitlines()) == {(MANGLED, 90): 256}
    assert gate.demangled([MANGLED])[MANGLED] == "dropout::multiply<Bf16, true>"


def test_a_good_kernel_passes():
    k = kernel(LDG_E_128_CONSTANT=2, STG_E_128=1, LDG_E=3, LDG_E_U16=1)
    assert k.faults() == []
    assert k.accesses("LDG") == {128: 2, 32: 3, 16: 1}
    assert k.occupancies == [1.0]
    assert k.family == "dropout::multiply"
    lines = gate.table([k, kernel(arch=80)]).splitlines()
    assert lines[0].endswith("| tensor | sm_80 | sm_90 |")
    assert lines[2].startswith("| `dropout::multiply` | 1 | 256 | 0 | 0 | 128/32/16 | 128 | 0 |")
    assert lines[2].endswith("| 32, 100 % | 32, 100 % |")


@pytest.mark.parametrize(
    "k, fault",
    [
        (kernel(LDG_E_128=1, STG_E_128=1, LDL=1), "1 accesses of local memory"),
        (kernel(LDG_E_64=1, STG_E_128=1), "no read of 16 bytes"),
        (kernel(LDG_E_128=1, STG_E=1), "no write of 16 bytes"),
        (
            kernel("linear::tensor<F16, false>", LDGSTS_E_128=1, STG_E_128=1),
            "no tensor-core instruction",
        ),
    ],
)
def test_faults(k, fault):
    assert len(k.faults()) == 1 and fault in k.faults()[0]


def test_turing_has_no_tensor_cores_for_bfloat16():
    opcodes = dict(LDG_E_128=1, STG_E_128=1)
    assert kernel("linear::tensor<Bf16, true>", 75, **opcodes).faults() == []
    assert kernel("linear::tensor<F16, true>", 75, **opcodes).faults()


def test_a_spill_is_a_fault():
    k = kernel(LDG_E_128=1, STG_E_128=1)
    k.stack = 8
    assert "8 bytes of stack" in k.faults()[0]


def test_occupancy_of_many_registers():
    k = kernel()
    k.registers = 128
    assert k.occupancies == [0.25]
    k.shared = 200 << 10
    assert k.occupancies == [0.125]


def test_occupancy_with_dynamic_shared_memory():
    """From a block, or two, that fill the shared memory to what the registers allow."""
    staged = kernel("softmax::staged<SoftmaxRow, float, false>")
    columns = kernel("softmax::columns<SoftmaxRow, float, false, true>")
    assert staged.occupancies == [0.125, 1.0] and columns.occupancies == [0.25, 1.0]
    assert kernel("softmax::columns<SoftmaxRow, float, false, false>").occupancies == [1.0]
    assert "| 0 + dynamic |" in gate.table([staged]) and "32, 12-100 %" in gate.table([staged])


def test_staged_columns_are_copied_in_packs():
    name = "softmax::columns<SoftmaxRow, float, false, true>"
    assert kernel(name, LDGSTS_E_128=1, STG_E=1).faults() == []
    assert kernel(name, LDG_E=1, STG_E=1).faults() == ["no read of 16 bytes"]
