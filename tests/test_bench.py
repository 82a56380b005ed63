"""The bench: what it measures, what it writes, what it calls wrong or slower."""

import csv
import dataclasses
import json

import pytest
import torch
from rich.console import Console

from bench import compare, measure, modes, report
from bench.__main__ import main
from bench.cases import CASES, mask, reference
from bench.providers import make

pytestmark = pytest.mark.cpu_only


def run(*arguments):
    return main(["--quick", "--provider", "jacobian_ops,eager", *arguments])


def test_files(tmp_path, capsys):
    files = {kind: tmp_path / "made" / f"bench.{kind}" for kind in ("json", "csv", "png")}
    assert 0 == run(
        *("--op", "softmax,dropout", "--mode", "forward,jvp,saved bytes"),
        *("--dtype", "float32,bfloat16", "--json", str(files["json"])),
        *("--csv", str(files["csv"]), "--plot", str(files["png"])),
    )
    rows = report.read(files["json"])
    # 2 ops x 2 dtypes x 2 providers; softmax's forward also into preallocated memory.
    timed = [r for r in rows if r.median]
    assert len(timed) == 8 * 2 * 2 + 2 * 2 * 2 and len(rows) == len(timed) + 8
    assert all(r.status == "ok" and r.error < 0.02 for r in timed)
    assert all(0 < r.lower <= r.median <= r.upper for r in timed)
    assert all(0 < r.percent for r in timed)
    saved = {(r.op, r.dtype, r.provider): r.saved_bytes for r in rows if r.saved_bytes is not None}
    assert saved["softmax", "float32", "jacobian_ops"] == 64 * 1024 * 4
    assert saved["dropout", "bfloat16", "jacobian_ops"] == 8
    assert saved["dropout", "bfloat16", "eager"] >= 256 * 1024
    with files["csv"].open() as f:
        assert [r["op"] for r in csv.DictReader(f)] == [r.op for r in rows]
    environment = json.loads((tmp_path / "made" / "environment.json").read_text())
    assert environment["threads"] == torch.get_num_threads()
    assert environment["fma_peak_flops"]["float32"] > 1e9
    assert min(environment["copy_bytes_per_second"].values()) > 1e8
    assert files["png"].read_bytes()[:4] == b"\x89PNG" and files["png"].stat().st_size > 5000
    assert "geometric mean" in capsys.readouterr().out
    assert main(["markdown", str(files["json"])]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "eager, share of the limit"
    assert table[2] == "| op | forward | jvp | saved bytes |"
    assert [line.split("|")[1].strip() for line in table[4:8]] == [
        "softmax 64x1024 float32",
        "softmax 64x1024 bfloat16",
        "dropout 256x1024 float32",
        "dropout 256x1024 bfloat16",
    ]


@pytest.mark.parametrize("mode", modes.TIMED)
@pytest.mark.parametrize("case", {c.op: c for c in CASES}.values(), ids=lambda c: c.op)
def test_every_op_has_a_reference_in_every_mode(case, mode):
    shapes = [tuple(min(n, 4) for n in shape) for shape in case.shapes]
    small = dataclasses.replace(case, shapes=tuple(shapes))
    inputs = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    gy = torch.randn(small.output_shape, dtype=torch.float64)
    m = torch.ones_like(gy) if case.random else None
    results = modes.flatten(modes.callable_for(mode, reference(small, m), inputs, inputs, gy)())
    assert all(r.isfinite().all() for r in results)


def measured(case, mode, *names, dtype=torch.float32):
    """The rows of one case, timed as shortly as can be."""
    device, chosen = torch.device("cpu"), [make(name) for name in names]
    run = measure.Run([case], (mode,), [dtype], chosen, ("warm",), device, 0.0, 1)
    return run(Console(quiet=True))


@pytest.mark.parametrize("mode", ["vjp", "hvp", "saved bytes"])
def test_compiled(mode):
    case = next(c for c in CASES if c.quick and c.op == "gelu")
    rows = [
        r for r in measured(case, mode, "jacobian_ops", "compile") if r.output != "preallocated"
    ]
    assert [(r.provider, r.status) for r in rows] == [("jacobian_ops", "ok"), ("compile", "ok")]


@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.op)
@pytest.mark.parametrize("mode", modes.TIMED)
def test_every_case_is_checked(case, mode):
    """What is timed is the op: its results, and those of its preallocated form, are right."""
    rows = measured(case, mode, "jacobian_ops", "eager", dtype=torch.float64)
    assert len(rows) == 2 * (2 if mode in case.prepared else 1)
    for row in rows:
        assert row.status == "ok" and row.error < 1e-12, row


def only_softmax_is(f, monkeypatch):
    case = next(c for c in CASES if c.quick and c.op == "softmax")
    changed = dataclasses.replace(case, functions=case.functions | {"jacobian_ops": f})
    monkeypatch.setattr("bench.__main__.CASES", (changed,))


def test_wrong_results_are_reported(monkeypatch, capsys):
    only_softmax_is(lambda x: torch.softmax(x, -1) * 1.001, monkeypatch)
    assert run("--mode", "jvp", "--cache", "warm") == 1
    assert "wrong: error 1" in capsys.readouterr().out.replace("\n", " ")


def test_failures_are_rows(monkeypatch, tmp_path):
    def fails(x):
        raise NotImplementedError("not here")

    only_softmax_is(fails, monkeypatch)
    out = tmp_path / "x.json"
    run("--mode", "jvp,saved bytes", "--json", str(out))
    status = {r.status for r in report.read(out) if r.provider == "jacobian_ops"}
    assert status == {"fails: NotImplementedError: not here"}


@pytest.mark.parametrize("provider", ["jacobian_ops", "eager"])
def test_reference_uses_the_mask_that_was_drawn(provider):
    case = next(c for c in CASES if c.op == "dropout_add")
    x, r = torch.randn(2, *case.output_shape, dtype=torch.float64)
    m = mask(case, provider, x.dtype, x.device)
    assert 0.85 < (m != 0).double().mean() < 0.95
    torch.manual_seed(1)
    y = case.functions[provider](x, r)
    torch.testing.assert_close(y, reference(case, m)(x, r))


ROW = measure.Row(
    *("gelu", "4x4", "float32", "jvp", "warm", "fresh", 2, "jacobian_ops"),
    **dict(median=1.0, lower=0.98, upper=1.02, bytes=1.0, limit="copy", limit_seconds=0.5),
)


def slower(factor, row=ROW, **changes):
    fields = {k: getattr(row, k) * factor for k in ("median", "lower", "upper")}
    return dataclasses.replace(row, **fields, **changes)


EAGER = dataclasses.replace(ROW, provider="eager")


@pytest.mark.parametrize(
    "new, verdict",
    [
        ([slower(1.2), EAGER], "slower"),
        ([slower(0.8), EAGER], "faster"),
        ([slower(1.03), EAGER], ""),
        ([slower(1.2), slower(1.2, EAGER)], ""),  # the machine was slower, not we
        ([dataclasses.replace(slower(1.2), lower=1.0), EAGER], ""),  # within noise
        ([dataclasses.replace(ROW, median=None, status="fails: X"), EAGER], "fails: X"),
        ([dataclasses.replace(ROW, status="wrong: X"), EAGER], "wrong: X"),
    ],
)
def test_compare(new, verdict, tmp_path, capsys):
    assert [c[-1] for c in compare.changes([ROW, EAGER], new, 0.05)[0]] == [verdict]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, rows in zip(paths, ([ROW, EAGER], new), strict=True):
        path.write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
    assert main(["compare", *map(str, paths)]) == (verdict not in ("", "faster"))
    assert verdict in capsys.readouterr().out


def test_compare_saved_bytes():
    old = dataclasses.replace(ROW, mode="saved bytes", median=None, saved_bytes=8)
    new = dataclasses.replace(old, saved_bytes=16)
    assert compare.changes([old], [new], 0.05)[0][0][2:] == (2.0, "keeps more")


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--op", "tanhh"], "'tanhh'; allowed: linear, relu"),
        (["--dtype", "int8"], "'int8'; allowed: float64"),
        (["--mode", "backward"], "'backward'; allowed: forward, vjp"),
        (["--threads", "0"], "'0'; allowed: an integer of at least 1"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--quick", "--op", "mish"], "--quick leaves no shape"),
        (["compare", "/no/file", "/no/file"], "no file of python -m bench --json"),
    ],
)
def test_bad_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and text in capsys.readouterr().err
