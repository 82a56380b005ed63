"""python -m bench limits: what it measures, and what it says of it."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from bench import limits, limits_report
from bench.__main__ import main
from bench.limits_report import Point, Result
from bench.targets import LINES, SIZES, SWEEP

pytestmark = pytest.mark.cpu_only

RESULT = Result(
    *("gelu", "4x4", "float32", "forward"),
    target=2.0,
    threads=2,
    ours=1.0,
    eager=3.0,
    compile=1.5,
    ours_retaining=1.0,
    eager_installed=6.0,
    one_thread=None,
    bytes=8.0,
    flops=None,
    limit="copy",
    limit_seconds=0.5,
    status="ok",
)
LINEAR = dataclasses.replace(
    RESULT, op="linear", shape="4x4 -> 4", flops=64.0, limit="fma", one_thread=1.9
)
ENVIRONMENT = {"copy_bytes_per_second": {"plain": 10.0}, "fma_peak_flops": {"float32": 1e3}}


# Limited by arithmetic, so that one thread is measured too.
TITLE = "linear 32x64 -> 64 float32 forward+vjp"


def test_one_line_from_its_processes_to_its_files(tmp_path, capsys):
    files = tmp_path / "made" / "limits.json", tmp_path / "table.md", tmp_path / "pictures"
    status = main(
        ["limits", "--only", TITLE, "--seconds", "0"]
        + ["--json", str(files[0]), "--markdown", str(files[1]), "--plots", str(files[2])]
    )
    (result,), points, environment = limits_report.read(files[0])
    assert status == bool(result.short and not result.reason) and not points
    assert result.title() == TITLE and result.status == "ok"
    assert result.threads == torch.get_num_threads()
    for seconds in (result.ours, result.eager, result.compile, result.one_thread):
        assert 1e-7 < seconds < 1
    for seconds in (result.ours_retaining, result.eager_installed):
        assert 1e-7 < seconds < 1
    assert environment["fma_peak_flops"]["float32"] > 1e9
    assert f"| {TITLE} |" in files[1].read_text()
    assert {p.name for p in files[2].iterdir()} == {"ratios.png", "roofline.png"}
    assert TITLE in capsys.readouterr().out
    assert main(["limits", "--read", str(files[0])]) == status


class Session:
    """Stands for the processes of a run: results at once, and a user who interrupts it."""

    def __init__(self, threads, compiled, numbers):
        self.left = 1

    def __call__(self, number, seconds):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return dataclasses.replace(RESULT, op=LINES[number].case.op)

    def close(self):
        self.left = None


def test_an_interrupted_run_reports_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(limits, "Session", Session)
    path = tmp_path / "limits.json"
    main(["limits", "--only", "gelu", "--skip", "linear_act_dropout", "--json", str(path)])
    assert "interrupted after 1 lines" in capsys.readouterr().out
    assert [r["op"] for r in json.loads(path.read_text())["lines"]] == ["gelu"]


def test_skipped_lines(monkeypatch, capsys):
    monkeypatch.setattr(limits, "Session", Session)
    with pytest.raises(SystemExit):
        main(["limits", "--only", "mish", "--skip", "float32"])  # nothing is left
    assert "no such line" in capsys.readouterr().err


def test_processes_have_their_own_memory_settings(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    monkeypatch.setenv("JACOBIAN_OPS_RETAIN_HOST_MEMORY", "1")
    import os

    with limits._environment({"MALLOC_MMAP_MAX_": "0"}):
        assert os.environ["MALLOC_MMAP_MAX_"] == "0"
        assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
        assert "JACOBIAN_OPS_RETAIN_HOST_MEMORY" not in os.environ
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "5" and "MALLOC_MMAP_MAX_" not in os.environ


def test_a_failing_process_says_why():
    worker = limits.Worker({}, ("eager",), 1)
    try:
        with pytest.raises(RuntimeError, match="KeyError"):
            worker._ask(("nobody", 1))
    finally:
        worker.close()


def test_figures():
    assert (RESULT.kernel, RESULT.user, RESULT.over_compile) == (3.0, 6.0, 1.5)
    assert (RESULT.percent, RESULT.most) == (50.0, 6.0)
    assert RESULT.short == [] and RESULT.reason == ""


def test_what_is_short(monkeypatch):
    monkeypatch.setattr(limits_report, "REASONS", ((("gelu", "vjp"), "no"), (("gelu",), "yes")))
    behind = dataclasses.replace(RESULT, eager=1.5, compile=1.1)
    assert behind.short == ["eager 2x", "compile 1.2x"] and behind.reason == "yes"
    monkeypatch.setattr(limits_report, "REASONS", ())
    assert behind.reason == ""
    near = dataclasses.replace(RESULT, ours=0.55, eager=1.01, compile=None, target=2.0)
    assert near.short and near.reason == limits_report.AT_LIMIT
    least = dataclasses.replace(behind, eager=0.9, compile=None)
    assert least.most == 1.8 and least.reason == limits_report.NOTHING_LEFT
    # torch.compile is behind the limit by more than what is wanted of it.
    assert dataclasses.replace(least, compile=1.1).reason == ""
    # Of a target below 1.2x no more is asked against torch.compile.
    assert dataclasses.replace(RESULT, target=1.0, compile=1.05).short == []


def test_table(monkeypatch):
    monkeypatch.setattr(limits_report, "REASONS", ((("gelu",), "a cause"),))
    short = dataclasses.replace(RESULT, eager=1.5)
    lines = limits_report.markdown([RESULT, short, LINEAR]).splitlines()
    assert lines[0].count("|") == lines[2].count("|") and "**3.00x**" in lines[2]
    assert lines[3].rstrip("| ").endswith("[1]") and "1. a cause" in lines
    assert "| 1.90x |" in lines[4]
    assert "short of a target: 1, unexplained: 0" in "\n".join(lines)
    console = Console(record=True, width=200, quiet=False)
    monkeypatch.setattr(limits_report, "REASONS", ())
    limits_report.print_table(console, [dataclasses.replace(short, compile=None)])
    assert "unexplained" in console.export_text()


def test_files(tmp_path):
    point = Point("relu", 8192.0, 2e-6, 3e-6, 1e-6)
    limits_report.write(tmp_path / "x.json", [RESULT], [point], ENVIRONMENT)
    assert limits_report.read(tmp_path / "x.json") == ([RESULT], [point], ENVIRONMENT)
    limits_report.draw(tmp_path, [RESULT, LINEAR], [point], ENVIRONMENT)
    for name in ("ratios", "roofline", "sizes"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_lines():
    titles = [line.title() for line in LINES]
    assert len(titles) == len(set(titles))
    assert all(line.target > 0 for line in LINES)
    assert SIZES[0] == 1 << 10 and SIZES[-1] == 1 << 28 and len(SWEEP) == 4 * len(SIZES)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--only", "no such op"], "'no such op': no such line"),
        (["--read", "/no/file"], "no file of --json"),
    ],
)
def test_bad_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["limits", *arguments])
    assert stop.value.code == 2 and text in capsys.readouterr().err


def test_a_file_of_something_else(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"lines": [{"op": 1}]}))
    with pytest.raises(SystemExit):
        main(["limits", "--read", str(tmp_path / "x.json")])
    assert "no file of --json" in capsys.readouterr().err
