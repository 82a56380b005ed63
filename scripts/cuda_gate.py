"""What nvcc made of the CUDA kernels: a table, and an error where a kernel is not well made.

    python scripts/cuda_gate.py MODULE [--report docs/cuda-kernels.md] [--host MODULE]

Reads the built module itself with cuobjdump and nvdisasm, which CUDA's toolkit, Triton's package or
PyPI (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) have.  A kernel fails if it spills or uses local
memory, if a kernel made for 16-byte accesses has none, or if one made for tensor cores has no
HMMA.  With ``--host``, the module that runs the same kernels on the host, every product is run once
and the bytes that it moves are compared with the least: each input read once, each output written
once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Shared memory, threads and registers of a multiprocessor, by compute capability: CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    75: (65536, 1024, 16),
    80: (167936, 2048, 32),
    86: (102400, 1536, 16),
    89: (102400, 1536, 24),
    90: (233472, 2048, 32),
    100: (233472, 2048, 32),
    120: (102400, 1536, 24),
}
REGISTERS = 65536

STAGED_COLUMNS = r"^softmax::columns<.*, true>$"
# Kernels for which accesses of 16 bytes, or tensor cores, are the point.
WIDE = re.compile(
    r"^(activation::(pointwise|vjp_sum)|gated::pointwise|rotary::rotate_all"
    r"|dropout::multiply|columns::sum_parts|group_norm::normalize"
    r"|norm::(held|sweep)"
    r"|softmax::(team|block|staged|sweep)|linear::(tensor|tiles)(_vjp)?"
    rf"|attention::(forward|queries|keys|delta))<|{STAGED_COLUMNS}"
)
# Of them those that write a number a column or a row: few, or adjacent ones of a warp.
WRITES_ONE = re.compile(rf"^(columns::sum_parts|attention::delta)<|{STAGED_COLUMNS}")
# Kernels with dynamic shared memory, and the fewest blocks of a multiprocessor that it leaves.
DYNAMIC = {r"^softmax::staged<": 1, STAGED_COLUMNS: 2}
TENSOR = re.compile(r"^(linear::tensor(_vjp)?<|attention::(forward|queries|keys)<(Bf16|F16)\b)")


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    opcodes: Counter = field(default_factory=Counter)

    @property
    def family(self) -> str:
        """The template without its storage type: rows of the report."""
        return re.sub(r"(, )?\b(float|double|F16|Bf16)\b", "", self.name).replace("<>", "")

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode begins with one of these."""
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefixes))

    def accesses(self, kind: str) -> Counter:
        """Bits of the accesses of global memory: LDG, STG or LDGSTS."""
        widths = Counter()
        for op, n in self.opcodes.items():
            if op.split(".")[0] == kind:
                width = re.search(r"\.(64|128)\b", op)
                narrow = re.search(r"\.[SU](8|16)\b", op)
                widths[int(width[1]) if width else int(narrow[1]) if narrow else 32] += n
        return widths

    @property
    def fewest(self) -> int | None:
        """Blocks of a multiprocessor at the most dynamic shared memory; None: it has none."""
        return next((n for name, n in DYNAMIC.items() if re.search(name, self.name)), None)

    @property
    def occupancies(self) -> list[float]:
        """Resident threads over those that a multiprocessor can hold.

        Those with the most and with the least dynamic shared memory, where a kernel has it.
        """
        shared, most, blocks = LIMITS[self.arch]
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps  # given in pieces of 256, a warp
        fitting = min(
            blocks,
            most // (warps * 32),
            REGISTERS // max(registers, 1),
            shared // max(self.shared, 1),
        )
        blocks = [fitting] if self.fewest is None else [min(self.fewest, fitting), fitting]
        return [n * warps * 32 / most for n in blocks]

    def faults(self) -> list[str]:
        """What is wrong with it."""
        local = self.count("STL", "LDL")
        found = []
        if local or self.stack:
            found.append(f"{self.stack} bytes of stack, {local} accesses of local memory")
        if WIDE.search(self.name):
            reads = self.accesses("LDG") + self.accesses("LDGSTS")
            if not reads[128]:
                found.append("no read of 16 bytes")
            if not WRITES_ONE.search(self.name) and not self.accesses("STG")[128]:
                found.append("no write of 16 bytes")
        turing = self.arch < 80 and "Bf16" in self.name  # has no such tensor cores
        if TENSOR.search(self.name) and not turing and not self.count("HMMA"):
            found.append("no tensor-core instruction")
        return found


def tool(name: str) -> str:
    """The path of one of CUDA's tools."""
    places = [os.environ.get("CUDA_HOME", ""), sys.prefix + "/bin", "/usr/local/cuda"]
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    places += [*packages.glob("nvidia/cu*"), *packages.glob("triton/backends/nvidia")]
    for place in places:
        for path in (Path(place) / "bin" / name, Path(place) / name):
            if path.is_file():
                path.chmod(path.stat().st_mode | 0o111)
                return str(path)
    found = shutil.which(name)
    if not found:
        package = f"nvidia-cuda-{name}==13.2.*"
        print(f"{name} is not there: installing {package} into {sys.prefix}")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
        return tool(name)
    return found


def demangled(names: list[str]) -> dict[str, str]:
    """Short names: without the project's namespaces, result and parameters."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = {}
    for name, text in zip(names, run.stdout.splitlines(), strict=True):
        text = re.sub(r"jops::(cuda::)?", "", text.removeprefix("void "))
        depth = 0
        for i, c in enumerate(text):  # the parameters begin at the first bracket outside <>
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                text = text[:i]
                break
        short[name] = re.sub(r"\((?:int|bool)\)", "", text)
    return short


def parse_usage(lines: Iterable[str]) -> dict[tuple[str, int], dict[str, int]]:
    """``cuobjdump -res-usage``: registers and memory by (kernel, architecture)."""
    arch, name, usage = 0, None, {}
    for line in lines:
        if m := re.match(r"arch = sm_(\d+)", line.strip()):
            arch = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif name and "REG:" in line:
            pairs = re.findall(r"(\w+):(\d+)", line)
            usage[name, arch] = {k: int(v) for k, v in pairs if k in ("REG", "STACK", "SHARED")}
            name = None
    return usage


def parse_sass(lines: Iterable[str]) -> dict[tuple[str, int], Counter]:
    """``cuobjdump -sass``: opcodes by (kernel, architecture)."""
    arch, counter, found = 0, None, {}
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
    for line in lines:
        if m := re.match(r"arch = sm_(\d+)", line.strip()):
            arch = int(m[1])
        elif m := re.match(r"\s*Function : (\S+)", line):
            counter = found.setdefault((m[1], arch), Counter())
        elif counter is not None and (m := instruction.match(line)):
            counter[m[1]] += 1
    return found


def parse_threads(lines: Iterable[str]) -> dict[tuple[str, int], int]:
    """``cuobjdump -elf``: the threads of __launch_bounds__ by (kernel, architecture)."""
    arch, name, asked, found = 0, None, False, {}
    for line in lines:
        if m := re.match(r"arch = sm_(\d+)", line.strip()):
            arch = int(m[1])
        elif m := re.match(r"\.nv\.info\.(\S+)", line):
            name = m[1]
        elif "EIATTR_MAX_THREADS" in line:
            asked = True
        elif asked and (m := re.search(r"Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", line)):
            x, y, z = (int(g, 16) for g in m.groups())
            found[name, arch] = x * y * z
            asked = False
    return found


def read(module: Path) -> list[Kernel]:
    """The kernels of a built module."""
    cuobjdump, disassembler = tool("cuobjdump"), tool("nvdisasm")
    environment = os.environ | {"NVDISASM_PATH": disassembler}
    environment["PATH"] = f"{Path(disassembler).parent}:{environment['PATH']}"

    def dump(parse, *options):  # line by line: it is gigabytes
        command = [cuobjdump, *options, str(module)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
            parsed = parse(run.stdout)
        if run.returncode:
            sys.exit(f"{' '.join(command)}: exit status {run.returncode}")
        return parsed

    usage = dump(parse_usage, "-res-usage")
    threads = dump(parse_threads, "-elf")
    sass = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(
            lambda arch: dump(parse_sass, "-sass", "-arch", f"sm_{arch}"),
            sorted({arch for _, arch in usage}),
        ):
            sass |= part
    names = demangled(sorted({name for name, _ in usage}))
    kernels = []
    for (name, arch), used in usage.items():
        if "::" not in names[name]:
            continue  # of the runtime
        reserved = 1024 if arch >= 90 else 0
        kernels.append(
            Kernel(
                names[name],
                arch,
                used["REG"],
                used["STACK"],
                max(0, used["SHARED"] - reserved),
                threads.get((name, arch), 1024),
                sass[name, arch],
            )
        )
    return kernels


def spread(values) -> str:
    """``40`` or ``40-63``."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def widths(kernels: list[Kernel], kind: str) -> str:
    """Bits of the accesses, the widest first."""
    found = sorted({w for k in kernels for w in k.accesses(kind)}, reverse=True)
    return "/".join(map(str, found)) or "-"


def table(kernels: list[Kernel]) -> str:
    """Rows of Markdown: one for a kernel template, ranges over storage types."""
    archs = sorted({k.arch for k in kernels})
    titles = (
        *("kernel", "types", "threads", "shared", "spills, local", "loads", "stores", "tensor"),
        *(f"sm_{arch}" for arch in archs),
    )
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    groups: dict[str, list[Kernel]] = {}
    for k in kernels:
        groups.setdefault(k.family, []).append(k)
    for family, group in sorted(groups.items()):
        of = {arch: [k for k in group if k.arch == arch] for arch in archs}
        copies = widths(group, "LDGSTS")
        reads = widths(group, "LDG") + (f", async {copies}" if copies != "-" else "")
        cells = (
            f"`{family}`",
            len(group) // len([a for a in archs if of[a]]),
            spread([k.threads for k in group]),
            spread([k.shared for k in group]) + (" + dynamic" if group[0].fewest else ""),
            sum(k.stack for k in group) + sum(k.count("LDL", "STL") for k in group),
            reads,
            widths(group, "STG"),
            spread([k.count("HMMA") for k in group]),
            *(
                f"{spread([k.registers for k in of[arch]])}, "
                f"{spread([round(100 * o) for k in of[arch] for o in k.occupancies])} %"
                for arch in archs
            ),
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def traffic(path: Path) -> str:
    """Bytes of global memory an element, counted while the products run on the host."""
    import torch

    from jacobian_ops import _backend, kernels

    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    _backend.BACKENDS["cpu"] = host
    rows = ["| product | bytes read | written | least | |", "|---|---|---|---|---|"]
    shapes = {
        "": (64, 256),
        ", rows of 4096": (4, 4096),
        ", rows of 8400": (4, 8400),
        ", rows of 32768": (2, 32768),
        ", middle dim": (4, 64, 64),
        ", middle dim of 400": (2, 400, 64),
    }
    x = {label: [torch.randn(shape) for _ in range(3)] for label, shape in shapes.items()}

    def one(title, tensors, run):
        host.reset_counters()
        run()
        n = x[""][0].numel() if tensors is None else tensors[0].numel()
        read, written = (sum(launch[i] for launch in host.launches()) / n for i in (1, 2))
        return title, read, written

    measured = []
    a, b, c = x[""]
    for title, least, run in (
        ("activation", 8, lambda: kernels.activation(a, "gelu")),
        ("activation + residual", 12, lambda: kernels.activation(a, "gelu", residual=b)),
        ("activation_vjp", 12, lambda: kernels.activation_vjp(a, b, "gelu")),
        ("activation_jvp", 16, lambda: kernels.activation_jvp(a, b, "gelu")),
        (
            "activation_jvp + residual",
            24,
            lambda: kernels.activation_jvp(a, b, "gelu", residual=c, tresidual=a),
        ),
        ("activation_vjp_vjp", 20, lambda: kernels.activation_vjp_vjp(a, b, c, "gelu")),
        ("activation_vjp_jvp", 20, lambda: kernels.activation_vjp_jvp(a, b, c, None, "gelu")),
        ("activation_vjp_sum", 12, lambda: kernels.activation_vjp_sum(a, b, "gelu")),
        ("dropout", 8, lambda: kernels.dropout(a, 0.1, 1)),
        ("dropout_add", 12, lambda: kernels.dropout_add(a, b, 0.1, 1)),
        ("column_sum", 4, lambda: kernels.column_sum(a)),
    ):
        measured.append((*one(title, x[""], run), least))
    for label, (a, b, c) in x.items():
        for name, least, run in (
            ("softmax", 8, lambda a=a: kernels.softmax(a, 1)),
            ("softmax_vjp", 12, lambda a=a, b=b: kernels.softmax_vjp(a, b, 1)),
            ("softmax_jvp", 16, lambda a=a, b=b: kernels.softmax_jvp(a, b, 1)),
            (
                "softmax_vjp_vjp",
                20,
                lambda a=a, b=b, c=c: kernels.softmax_vjp_vjp(a, b, c, 1),
            ),
            ("softmax_dropout", 8, lambda a=a: kernels.softmax_dropout(a, 1, 0.1, 1)),
            (
                "softmax_dropout_vjp",
                12,
                lambda a=a, b=b: kernels.softmax_dropout_vjp(a, b, 1, 0.1, 1),
            ),
        ):
            measured.append((*one(name + label, (a,), run), least))
    for title, read_, written, least in measured:
        total = read_ + written
        note = "" if total <= 1.05 * least else f"{total / least:.2f}x"
        rows.append(f"| {title} | {read_:.1f} | {written:.1f} | {least} | {note} |")
    return "\n".join(rows)


HEADER = """\
# The CUDA kernels as compiled

Made by `make cuda-gate`, which fails where a kernel spills, uses local memory, or misses the
accesses of 16 bytes or the tensor-core instructions that it is made for. No time was measured on a
GPU yet. A range is over the storage types. Shared memory is in bytes, widths of global loads and
stores are in bits, tensor are HMMA instructions; below an architecture are registers of a thread
and the theoretical occupancy from registers, shared memory and threads. Dynamic shared memory is
what a call's inputs take: for a row of `staged` up to all that a block can have, one block of a
multiprocessor, and for a strip of `columns` up to half of it, two blocks. The occupancy is then
from that many blocks to what the rest allows.
"""

TRAFFIC = """
## Bytes an element

In float32, counted while the kernels ran on the host (tests/cuda_on_host), with 99 KiB of shared
memory a block; the least is each input read once and each output written once. Where more is read,
a row or a column is too long to be held; a seed of dropout, 8 bytes that are in the cache, is
counted at each of its reads.
"""


def main() -> int:
    """The command; 1 when a kernel is not well made."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("module", type=Path)
    p.add_argument("--report", type=Path, help="write the table here")
    p.add_argument("--host", type=Path, help="the module of tests/cuda_on_host, checked")
    options = p.parse_args()
    kernels = read(options.module)
    archs = sorted({k.arch for k in kernels})
    print(f"{len(kernels)} kernels for {', '.join(f'sm_{a}' for a in archs)}")
    if options.report:
        text = f"{HEADER}\n{table(kernels)}\n"
        if options.host:
            text += f"{TRAFFIC}\n{traffic(options.host)}\n"
        options.report.write_text(text)
    bad = 0
    for k in kernels:
        for fault in k.faults():
            print(f"{k.name} for sm_{k.arch}: {fault}")
            bad += 1
    if not kernels:
        print(f"{options.module}: no kernels in it")
    return int(bad > 0 or not kernels)


if __name__ == "__main__":
    sys.exit(main())
