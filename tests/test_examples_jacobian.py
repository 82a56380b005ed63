"""The examples of Jacobians: they run, their records say what they checked, and they can fail."""

import json
import math

import matplotlib.image
import pytest
import torch

from bench import checkpoint
from bench.__main__ import main as bench
from examples import backprop, flow, gradient_flow, newton_krylov

pytestmark = pytest.mark.cpu_only


def run(module, folder, *arguments):
    torch.set_num_threads(1)  # so small sizes gain nothing from more
    status = module.main(["--quick", "--output", str(folder), *arguments])
    name = module.__name__.split(".")[-1]
    record = json.loads((folder / f"{name}.json").read_text())
    height, width, _ = matplotlib.image.imread(folder / f"{name}.png").shape
    assert width > height > 300
    return status, record


def test_backprop(tmp_path, capsys):
    folder = tmp_path / "new" / "[folder]"
    status, record = run(backprop, folder, "--largest", "100")
    assert status == 0 and record["failures"] == []
    steps = record["steps"]
    # By hand: z = (1.9, -1.3, 1.2), of which ReLU stops the second.
    torch.testing.assert_close(steps["h"], [[1.9, 0.0, 1.2]])
    torch.testing.assert_close(steps["gy"], [[-0.25, 1.19]])
    torch.testing.assert_close(steps["gW2"], [[-0.475, 0.0, -0.3], [2.261, 0.0, 1.428]])
    torch.testing.assert_close(steps["gz"], [[0.107, 0.0, 0.964]])
    assert steps["gW1"][1] == [0, 0, 0, 0] and record["difference"] < 1e-14
    assert [row["n"] for row in record["costs"]] == [10, 32, 100]
    for row in record["costs"]:
        assert 0 <= row["difference"] < backprop.PRODUCTS_AGREE
        assert row["jacobian_bytes"] == 4 * row["n"] ** 2 and row["vjp_seconds"] > 0
    printed = capsys.readouterr().out
    for words in ("gh where z > 0", "W1^T gz", "all of J", str(folder)):
        assert words in printed


def test_backprop_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(backprop, "GRADIENTS_AGREE", -1.0)
    status, record = run(backprop, tmp_path, "--largest", "10")
    assert status == 1 and "gradients differ from autograd's" in record["failures"][0]


def test_newton_krylov(tmp_path, capsys):
    status, record = run(newton_krylov, tmp_path)
    assert status == 0 and record["failures"] == [] and record["settings"]["points"] == 24
    assert [r["solver"] for r in record["runs"]] == ["jacobian_ops", "scipy"] * 2
    for r in record["runs"]:
        assert r["residual"] <= record["settings"]["tol"] and r["calls"] > len(r["history"]) > 0
        assert r["history"][-1][1] == pytest.approx(r["residual"])
    plain, _, preconditioned, _ = record["runs"]
    assert preconditioned["calls"] < plain["calls"]
    assert 1.1 < record["max_u"] < 1.2 and max(record["differences"]) < 1e-6
    assert "sine transform" in capsys.readouterr().out


def test_newton_krylov_fails(tmp_path):
    """Beyond the critical strength there is no solution."""
    status, record = run(newton_krylov, tmp_path, "--strength", "12", "--points", "3")
    assert status == 1
    assert all("ours did not converge" in failure for failure in record["failures"])
    assert record["runs"][0]["failure"].startswith("RuntimeError: newton_krylov: ")


def test_bratu_is_the_pde():
    """The stencil and its inverse on an eigenfunction of the Laplacian."""
    n = 63
    x = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    u = torch.outer((math.pi * x).sin(), (2 * math.pi * x).sin())
    scaled = newton_krylov.bratu(u, 3.0) * (n + 1) ** 2
    torch.testing.assert_close(scaled, 5 * math.pi**2 * u - 3 * u.exp(), rtol=0, atol=0.2)
    linear = newton_krylov.bratu(u, 3.0) + (3.0 / (n + 1) ** 2) * u.exp()
    again = torch.from_numpy(newton_krylov.inverse_laplacian(n)(linear.numpy()))
    torch.testing.assert_close(again, u)


def test_checkpoint(tmp_path, capsys):
    status, record = run(checkpoint, tmp_path, "--depth", "16")
    assert status == 0 and record["failures"] == [] and record["settings"]["depths"] == [4, 8, 16]
    assert record["powers"]["none"] == pytest.approx(1, abs=0.1)
    assert record["powers"]["all"] == pytest.approx(0, abs=0.1)
    rows = {(row["depth"], row["policy"]): row for row in record["rows"]}
    assert rows[16, "sqrt"]["peak_bytes"] < 0.5 * rows[16, "none"]["peak_bytes"]
    assert rows[16, "all"]["peak_bytes"] > 0.9 * rows[16, "none"]["peak_bytes"]
    assert "L^1.0" in capsys.readouterr().out


def test_checkpoint_is_a_command_of_the_bench(capsys):
    with pytest.raises(SystemExit, match="0"):
        bench(["checkpoint", "--help"])
    assert "usage: python -m bench checkpoint" in capsys.readouterr().out


def test_checkpoint_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.jacobian_ops, "checkpoint", lambda model, policy: model)
    status, record = run(checkpoint, tmp_path, "--depth", "16")
    assert status == 1 and len(record["failures"]) == 2
    assert "policy sqrt keeps L^1.0" in record["failures"][0]


def test_flow(tmp_path, capsys):
    status, record = run(flow, tmp_path, "--steps", "50")
    assert status == 0 and record["failures"] == []
    plane, images = record["results"]
    assert (plane["n"], images["n"]) == (2, 64)
    for result in (plane, images):
        assert result["test"] < result["gaussian"] - 0.1 and len(result["losses"]) == 50
        assert result["determinants"] < flow.DETERMINANTS_AGREE
        assert result["inverses"] < flow.INVERSES_AGREE
    assert plane["integral"] == pytest.approx(1, abs=flow.INTEGRAL_AGREES)
    assert [row["n"] for row in record["determinants"]] == [2, 16, 64]
    assert "slogdet" in capsys.readouterr().out


def test_flow_fails(tmp_path, monkeypatch):
    """A wrong log-determinant is told by the dense one and by the integral."""
    forward = flow.Flow.forward

    def wrong(self, x):
        z, log_det = forward(self, x)
        return z, log_det + 0.5

    monkeypatch.setattr(flow.Flow, "forward", wrong)
    status, record = run(flow, tmp_path, "--steps", "3")
    words = " ".join(record["failures"])
    assert status == 1 and "two moons: the integral of the density is off by 6.5e-01" in words
    assert "digits: log|det J| differs from the dense one by 5.0e-01" in words


def test_gradient_flow(tmp_path, capsys, monkeypatch):
    reports, check = {}, gradient_flow.check
    monkeypatch.setattr(gradient_flow, "check", lambda r: check(reports.update(r) or r))
    status, record = run(gradient_flow, tmp_path)
    assert status == 0 and record["failures"] == []
    first = {name: r["layers"][0]["gradient"] for name, r in record["reports"].items()}
    assert first["sigmoid"] < 1e-3 and first["large weights"] > 1e3
    assert 0.3 < first["residual"] < 30
    printed = capsys.readouterr().out
    assert "Jacobians of the layers" in printed and str(tmp_path) in printed

    names = ["residual", "sigmoid", "large weights"]  # were the networks mixed up
    assert len(check(dict(zip(names, reports.values(), strict=True)))) == 4


@pytest.mark.parametrize(
    "module,arguments",
    [
        (backprop, ("--largest", "5")),
        (newton_krylov, ("--points", "1")),
        (newton_krylov, ("--tol", "0")),
        (checkpoint, ("--depth", "8")),
        (checkpoint, ("--repeats", "0")),
        (flow, ("--steps", "0")),
        (gradient_flow, ("--depth", "4")),
    ],
)
def test_bad_arguments(module, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.main(["--output", str(tmp_path / "out"), *arguments])
    assert arguments[0] in capsys.readouterr().err.split("error: ")[1]
    assert not (tmp_path / "out").exists()
