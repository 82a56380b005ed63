"""The demo and examples: they run, say what they measured, and fail where two sides disagree."""

import json
import math
import re

import matplotlib.image
import pytest
import torch

from examples import hvp, meanflow
from examples.digits.__main__ import CURVES_AGREE, PRODUCTS_AGREE, check, main
from examples.digits.compare import PROVIDERS, Product, Run
from jacobian_ops import functional

pytestmark = pytest.mark.cpu_only


def run(folder, *arguments):
    torch.set_num_threads(1)  # so small a model gains nothing from more
    status = main(["--quick", "--output", str(folder), *arguments])
    return status, json.loads((folder / "digits.json").read_text())


def test_demo(tmp_path, capsys):
    folder = tmp_path / "new" / "[folder]"
    status, record = run(folder)
    assert status == 0 and record["failures"] == []

    assert record["settings"]["quick"] and record["settings"]["steps"] == 80
    assert record["build"]["isa"] and record["threads"] == 1
    assert [training["dropout"] for training in record["training"]] == [0.0, 0.1]
    for training in record["training"]:
        for name in PROVIDERS:
            side = training[name]
            assert len(side["losses"]) == len(side["seconds"]) == 80
            assert 0 < side["final_loss"] < 0.7 * side["losses"][0] < 0.7 * 2 * math.log(10)
            assert 0.3 <= side["accuracy"] <= 1 and side["step_seconds"] > 0
            assert side["saved_bytes"] > 0
    plain, dropped = record["training"]
    assert plain["curve_difference"] < CURVES_AGREE  # two implementations, one curve
    if functional.NATIVE_BELOW == 0:  # else a model this small may be native throughout
        assert plain["curve_difference"] > 0
    assert plain["native"]["accuracy"] == pytest.approx(plain["jacobian_ops"]["accuracy"], abs=0.01)
    assert dropped["native"]["losses"][0] != dropped["jacobian_ops"]["losses"][0]  # other masks
    assert dropped["jacobian_ops"]["saved_bytes"] < dropped["native"]["saved_bytes"]
    assert record["products"].keys() == {"jvp", "hvp"}
    for product in record["products"].values():
        assert 0 < product["relative_difference"] < PRODUCTS_AGREE
        assert product["seconds"].keys() == set(PROVIDERS)
        assert min(product["seconds"].values()) > 0

    printed = capsys.readouterr().out
    for words in ("dropout 0.1", "test accuracy", "saved for backward", "Hessian-vector product"):
        assert words in printed
    assert str(folder) in printed and "failed" not in printed

    picture = matplotlib.image.imread(folder / "digits.png")
    height, width, _ = picture.shape
    assert width > height > 300
    for colour in ((0x99, 0x99, 0x99), (0x0B, 0x62, 0xA4)):  # curves and bars of both
        drawn = abs(255 * picture[..., :3] - colour).max(-1) < 1
        thirds = [drawn[:, i * width // 3 : (i + 1) * width // 3].sum() for i in range(3)]
        assert min(thirds) > 100


def test_too_short_a_training_fails(tmp_path, capsys):
    """Without dropout asked for, there is one training."""
    status, record = run(tmp_path, "--steps", "3", "--dropout", "0")
    assert status == 1 and len(record["training"]) == 1
    assert len(record["failures"]) == 2
    for name, failure in zip(PROVIDERS, record["failures"], strict=True):
        assert failure.startswith(f"dropout 0, {name}: test accuracy ")
    printed = capsys.readouterr().out
    assert printed.count("failed: ") == 2
    assert printed.count("training, dropout 0") == 2  # its progress, its row of the table


@pytest.mark.parametrize(
    "arguments", [("--steps", "0"), ("--batch", "0"), ("--dropout", "1.5"), ("--dropout", "nan")]
)
def test_bad_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "out"), *arguments])
    (error,) = re.findall(r"error: (.*)", capsys.readouterr().err)
    assert arguments[0] in error
    assert not (tmp_path / "out").exists()


GOOD = (2.0, 1.0, 0.5)


def results(accuracy=0.9, curve=GOOD, difference=1e-7, dropped=0.9):
    """What a good demo measures, with our side's numbers as given."""
    trainings = {
        0.0: {"native": Run(GOOD, accuracy=0.9), "jacobian_ops": Run(curve, accuracy=accuracy)},
        0.1: {"native": Run(GOOD, accuracy=0.9), "jacobian_ops": Run(GOOD[::-1], accuracy=dropped)},
    }
    return trainings, {"jvp": Product({}, 1e-7), "hvp": Product({}, difference)}


@pytest.mark.parametrize(
    "changed,words",
    [
        ({}, None),
        (dict(curve=(2.0, 1.0, 0.5 + CURVES_AGREE / 2)), None),
        (dict(curve=(2.0 + CURVES_AGREE, 1.0, 0.5)), None),  # relative
        (dict(difference=PRODUCTS_AGREE / 2), None),
        (dict(accuracy=0.8), "dropout 0, jacobian_ops: test accuracy 80.0%, expected .* 85%"),
        (dict(dropped=0.8), "dropout 0.1, jacobian_ops: test accuracy 80.0%, expected .* 85%"),
        (dict(accuracy=math.nan), "dropout 0, jacobian_ops: test accuracy nan"),
        (dict(curve=(2.0, 1.0, 0.5 + 2 * CURVES_AGREE)), "loss curves differ by 2.0e-04"),
        (dict(curve=(2.0, 1.0 - 2 * CURVES_AGREE, 0.5)), "loss curves differ by 2.0e-04"),
        (dict(curve=(2.0, math.nan, 0.5)), "loss curves differ by nan"),
        (dict(curve=(math.inf, 1.0, 0.5)), "loss curves differ by inf"),
        (dict(difference=2 * PRODUCTS_AGREE), "hvp differs by 2.0e-04"),
        (dict(difference=math.nan), "hvp differs by nan"),
    ],
)
def test_check(changed, words):
    failures = check(*results(**changed), 0.85)
    assert len(failures) == (words is not None)
    assert all(re.search(words, failure) for failure in failures)


def test_meanflow(tmp_path, capsys):
    torch.set_num_threads(1)
    short = ("--steps", "6", "--both", "3", "--batch", "16")
    assert meanflow.main(["--quick", "--output", str(tmp_path), *short]) == 0
    record = json.loads((tmp_path / "meanflow.json").read_text())
    assert record["failures"] == [] and len(record["errors"]) == 6
    assert record["errors"][-1] < record["errors"][0]
    for run in record["runs"].values():
        assert len(run["errors"]) == len(run["seconds"]) == 3 and run["step_seconds"] > 0
    assert record["difference"] < meanflow.ERRORS_AGREE
    assert 0 <= record["nearest_accuracy"] <= 1
    height, width, _ = matplotlib.image.imread(tmp_path / "meanflow.png").shape
    assert height > 300 and width > 300
    printed = capsys.readouterr().out
    assert "peak memory of a step" in printed and str(tmp_path) in printed


def test_meanflow_sides_that_disagree(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        meanflow.JVP, "jacobian_ops", lambda f, x, t: (f(*x), 2 * meanflow.our_jvp(f, x, t)[1])
    )
    short = ("--steps", "4", "--both", "4", "--batch", "8")
    assert meanflow.main(["--quick", "--output", str(tmp_path), *short]) == 1
    assert "failed: the errors of the two sides differ" in capsys.readouterr().out


def test_one_step_of_a_known_velocity():
    """Where u is the noise itself, one step from it ends at zero."""
    images = meanflow.sample(
        lambda z, r, t, label: z, torch.arange(4), torch.Generator().manual_seed(0)
    )
    assert images.shape == (4, 8, 8) and images.abs().max() == 0


def test_hvp(tmp_path, capsys):
    torch.set_num_threads(1)
    few = ("--steps", "5", "--count", "2", "--batch", "16")
    assert hvp.main(["--quick", "--output", str(tmp_path), *few]) == 0
    record = json.loads((tmp_path / "hvp.json").read_text())
    native, ours = (record["runs"][name]["eigenvalues"] for name in PROVIDERS)
    assert len(native) == 2 and native[0] > native[1]
    assert ours == pytest.approx(native, rel=hvp.EIGENVALUES_AGREE)
    assert "eigenvalue 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "example, arguments",
    [
        (meanflow, ("--both", "4", "--steps", "3")),
        (meanflow, ("--batch", "0")),
        (hvp, ("--count", "0")),
    ],
)
def test_bad_arguments_of_examples(example, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--output", str(tmp_path / "out"), *arguments])
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
