"""What every op should reach, and the sizes over which its speed is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import (
    Case,
    activation,
    attention,
    channel_norm,
    cross_entropy,
    dropout,
    linear,
    linear_act_dropout,
    linear_cross_entropy,
    norm,
    saturated,
    softmax,
    softmax_dropout,
)

FORWARD, BOTH, JVP, HVP = "forward", "forward+vjp", "jvp", "hvp"
OVER_COMPILE = 1.2  # enough ahead of torch.compile, where the target is no less
LEAST = 0.97  # of eager's speed, but for tiny tensors
P = 0.1


@dataclass(frozen=True)
class Line:
    """One op, shape, dtype and mode, and how many times eager's speed it should reach."""

    case: Case
    mode: str
    target: float
    dtype: torch.dtype = torch.float32

    def title(self) -> str:
        """The line in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.op} {self.case.label} {dtype} {self.mode}"


def _lines(case: Case, forward, both, jvp, dtype=torch.float32, hvp=None) -> list[Line]:
    targets = ((FORWARD, forward), (BOTH, both), (JVP, jvp), (HVP, hvp))
    return [Line(case, mode, target, dtype) for mode, target in targets if target]


LARGE, SMALL = (4096, 4096), (32, 64)
HEADS, LONG = (2, 8, 1024, 64), (1, 4, 4096, 64)  # of attention: batch, heads, length, width
SHAPES = ((2048, 1024, 4096), (4096, 256, 1024), (16384, 64, 256))
# float32 targets of forward, forward+VJP and JVP, with memory kept.
ACTIVATIONS = {
    "gelu": (1.25, 1.6, 2.5),
    "silu": (1.1, 1.1, 7),
    "sigmoid": (1.4, 1.5, 2),
    "tanh": (7, 3.8, 5),
    "softplus": (2.5, 2.1, 3),
    "mish": (9, 9, 20),
}
CHEAP = ("relu", "leaky_relu", "relu6", "hardtanh", "hardswish", "hardsigmoid")
EXPONENTIAL = ("elu", "selu", "celu", "logsigmoid")

LINES = tuple(
    line
    for lines in (
        *(
            _lines(softmax(name, (8192, 1024)), 2, 1.6, 5)
            + _lines(softmax(name, (512, 32768)), 1.6, 1.6, 4.5)
            for name in ("softmax", "log_softmax")
        ),
        _lines(softmax("softmax", (65536, 64)), 2.2, 1.4, 5),
        _lines(softmax("softmax", (8192, 1024), dim=0), 4, 3, 5),
        _lines(softmax("softmax", (64, 512, 256), dim=1), 2.2, 2, 5),
        _lines(softmax("softmax", (8192, 1024)), 2, 1.6, 5, torch.bfloat16),
        _lines(saturated(softmax("softmax", (8192, 1024))), 2, 1.6, 5),
        *(_lines(activation(name, LARGE), *targets) for name, targets in ACTIVATIONS.items()),
        _lines(saturated(activation("gelu", LARGE)), *ACTIVATIONS["gelu"]),
        _lines(activation("gelu", LARGE, approximate="tanh"), 4, 3.5, 5),
        *(_lines(activation(name, LARGE), 1, 1.3, 2) for name in CHEAP),
        *(_lines(activation(name, LARGE), 1, 1.3, 2) for name in EXPONENTIAL),
        *(
            _lines(activation("gelu", LARGE), *ACTIVATIONS["gelu"], dtype)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        _lines(activation("gelu", (1024, 4096)), LEAST, LEAST, LEAST, torch.float64),
        _lines(dropout((1024, 1024)), 40, 17, 17),
        _lines(dropout(LARGE), 40, 17, 17),
        *(_lines(linear(*shape), 2.4, 2.3, 2.3) for shape in SHAPES),
        *(_lines(linear(m, 4096, 4096), 3, 2.5, 2.5) for m in (64, 256)),
        *(_lines(linear(m, 4096, 4096), 4, 3, 3) for m in (1, 8)),
        *(
            _lines(linear(*shape), 1.15, 1.1, 1.1, torch.bfloat16)
            for shape in (*SHAPES, (64, 4096, 4096), (8, 4096, 4096))
        ),
        _lines(linear(1024, 1024, 1024), LEAST, LEAST, LEAST, torch.float64),
        *(
            _lines(linear_act_dropout("gelu", *shape, P), 3, both, 4)
            for shape, both in zip(SHAPES, (2.8, 4.5, 4.5), strict=True)
        ),
        *(
            _lines(linear_act_dropout("gelu", *shape, 0.0), LEAST, both, LEAST)
            for shape, both in zip(SHAPES, (2.4, 2.6, 2.4), strict=True)
        ),
        _lines(softmax_dropout((8192, 1024)), 15, 10, 10),
        *(_lines(activation(name, SMALL), None, 1 / 1.1, None) for name in ("relu", "gelu")),
        _lines(softmax("softmax", SMALL), None, 1 / 1.1, None),
        _lines(linear(32, 64, 64), None, 1 / 1.1, None),
        _lines(attention(HEADS), 2.3, 2.3, 3.5, hvp=3),
        _lines(attention(LONG), 2.2, 2.2, 4.5),
        *(_lines(attention(shape, causal=True), 3, 3, 8) for shape in (HEADS, LONG)),
        _lines(attention(HEADS), 1.5, 1.5, 3, torch.bfloat16),
        _lines(norm("layer_norm", (8192, 1024)), 1.2, 1.5, 5.5),
        _lines(norm("rms_norm", (8192, 1024)), 2.5, 5, 6.5),
        _lines(channel_norm("batch_norm", (64, 128, 56, 56)), 2.2, 1.5, 7),
        _lines(cross_entropy((2048, 32000)), 3.5, 5, 9),
        _lines(linear_cross_entropy(1024, 512, 32000), None, 2.2, 3),
    )
    for line in lines
)

# Forward over sizes, 1 Ki to 256 Mi elements.
SIZES = tuple(1 << k for k in range(10, 29, 2))
SWEEP = tuple(
    Line(case, FORWARD, 0.0)
    for n in SIZES
    for case in (
        activation("relu", (n,)),
        activation("gelu", (n,)),
        softmax("softmax", (n // 1024, 1024)),
        dropout((n,)),
    )
)
