"""What one fused kernel computes on a GPU: built in, measured, kept."""

import json

import pytest
import torch

from jacobian_ops import _backend, autotune, kernels, tuning
from jacobian_ops.kernels import _gemm

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JACOBIAN_OPS_CACHE", str(tmp_path))
    limits = tuning.limits  # a test may replace it
    limits.cache_clear()
    yield tmp_path / "products.json"
    tuning._measured.clear()
    limits.cache_clear()


def test_measured_sizes_are_kept(own_cache, monkeypatch):
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    monkeypatch.setattr(tuning, "_DEPTHS", (8, 16))
    monkeypatch.setattr(tuning, "_ACROSS", 1)
    choice = _gemm.CHOICE
    assert tuning.limits(DEVICE) == tuning.BUILT_IN
    found = autotune(DEVICE, seconds=1e-4)
    assert _gemm.CHOICE == choice
    assert found.keys() == tuning.BUILT_IN.keys()
    for steps in found.values():
        assert steps.keys() == set(tuning.DTYPES) and set(steps.values()) <= {0, 8, 16, 32}
    assert tuning.limits(DEVICE) == found
    assert json.loads(own_cache.read_text()).keys() == {"cpu"}


def test_measured_sizes_need_no_file(own_cache, monkeypatch):
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    monkeypatch.setattr(tuning, "_crossing", lambda kind, device, dtype, seconds: 7)
    found = autotune(DEVICE, save=False)
    assert not own_cache.exists()
    assert tuning.limits(DEVICE) == found == {k: dict.fromkeys(tuning.DTYPES, 7) for k in found}


def test_steps(monkeypatch):
    x, weight = torch.empty(3, 65, 40), torch.empty(3, 129, 40)
    assert tuning.steps(x, weight) == 40 * 3 * 2 * 3
    assert tuning.steps(x.double(), weight.double(), 2) == 2 * 40 * 3 * 3 * 5
    monkeypatch.setattr(tuning, "_multiprocessors", lambda device: 16)
    assert tuning.steps(x, weight) == 40 * 2


def test_large_products_go_to_cublas(monkeypatch):
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    monkeypatch.setattr(_gemm, "CHOICE", "auto")
    for dtype, most in tuning.BUILT_IN["fused"].items():
        for products in (1, 2):
            for depth in (most // products, most // products + 1):
                x = torch.empty(2, depth, dtype=dtype)
                tangents = (x,) * (products - 1)
                assert _gemm.torch_is_faster_unfused(x, x, *tangents) == (depth * products > most)


def test_large_vjps_go_to_cublas(monkeypatch):
    """(64, 20) and (64, 30): products 20 and 64 deep; without x the sums are as deep."""
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    monkeypatch.setattr(_gemm, "CHOICE", "auto")
    x, w, gy = torch.empty(64, 30), torch.empty(20, 30), torch.empty(64, 20)
    for weight, factor, sums, size in (
        (w, x, True, 84),
        (w, None, False, 20),
        (w, None, True, 84),
        (None, x, True, 64),
    ):
        for most in (size - 1, size):
            limits = {"vjp": dict.fromkeys(tuning.DTYPES, most)}
            monkeypatch.setattr(tuning, "limits", lambda device, limits=limits: limits)
            assert _gemm.torch_is_faster_for_vjp(gy, weight, factor, sums) == (most < size)
    assert _gemm.torch_is_faster_for_vjp(gy, None, None, True)


def test_plain_products_and_their_vjp(monkeypatch):
    """Depths of the three products of (64, 30) and (20, 30): 30, 20 and 64."""
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    monkeypatch.setattr(_gemm, "CHOICE", "auto")
    x, w, gy = torch.empty(64, 30), torch.empty(20, 30), torch.empty(64, 20)
    for most, expected in (
        (0, [True] * 4),
        (30, [False, True, False, True]),
        (64, [False] * 4),
    ):
        limits = {"plain": dict.fromkeys(tuning.DTYPES, most)}
        monkeypatch.setattr(tuning, "limits", lambda device, limits=limits: limits)
        assert expected == [
            _gemm.torch_is_faster(x, w),
            _gemm.torch_is_faster_for_tangents(x, w, x, None),
            _gemm.torch_is_faster_for_gx(gy, w),
            _gemm.torch_is_faster_for_gweight(gy, x),
        ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"cpu": 1}', '{"cpu": {"fused": {"float32": "x"}}}']
)
def test_a_broken_file_is_not_used(own_cache, text):
    own_cache.write_text(text)
    assert tuning.limits(DEVICE) == tuning.BUILT_IN


@pytest.mark.cpu_only
def test_only_gpus_are_tuned():
    with pytest.raises(ValueError, match="autotune: device is cpu; allowed: a GPU"):
        autotune("cpu")


def test_both_ways_agree(monkeypatch):
    """A product by torch with the epilogue after it, and one kernel."""
    monkeypatch.setattr(_backend, "on_device", lambda t: True)
    for batch in ((), (2,), (2, 3)):
        x, tx = (torch.randn(*batch, 9, 5, dtype=torch.float64) for _ in range(2))
        w, tw = (torch.randn(*batch, 7, 5, dtype=torch.float64) for _ in range(2))
        b, tb = (torch.randn(*batch, 7, dtype=torch.float64) for _ in range(2))
        seed, residual = torch.randint(9, batch), torch.randn(*batch, 9, 7, dtype=torch.float64)
        for bias, *tangents in (
            *((b, tx, tw, tb), (b, tx, None, tb), (b, tx, None, None), (None, tx, None, tb)),
            *(
                (None, tx, None, None),
                (b, None, tw, tb),
                (b, None, None, tb),
                (b, None, None, None),
            ),
        ):
            results = []
            for choice in ("own", "torch"):
                monkeypatch.setattr(_gemm, "CHOICE", choice)
                rest = "gelu", 0.4, seed
                options = dict(residual=residual)
                forward = kernels.linear_act_dropout(x, w, bias, *rest, keep_z=True, **options)
                dual = kernels.linear_act_dropout_jvp(x, w, bias, *tangents, *rest, **options)
                plain = kernels.linear_jvp(x, w, bias, *tangents)
                back = kernels.linear_vjp(x, w, forward[0])
                back += kernels.linear_act_dropout_vjp(x, w, forward[1], forward[0], *rest)
                results.append((*forward, *dual, *plain, *back))
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
