"""Layers and blocks of other libraries, and how they run on our ops.

Each block has the code that it stands for beside its own.  No library is imported: a class is known
by what it does.
"""

from __future__ import annotations

import copy
import inspect

import torch
import torch.nn.functional as F  # the name that the code of others has for it
from torch import Tensor

from .. import functional as ops
from .classes import Recipe
from .sequence import gated, run

# ------------------------------------------------------------------------------------ activations

# Those that others define as classes of their own.
_NAMES = {
    "transformers.activations": {
        "AccurateGELUActivation": "gelu_tanh",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "MishActivation": "mish",
        "NewGELUActivation": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "SiLUActivation": "silu",
    },
    "timm.layers.activations": {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "HardSigmoid": "hardsigmoid",
        "HardSwish": "hardswish",
        "Mish": "mish",
        "Sigmoid": "sigmoid",
        "Swish": "silu",
        "Tanh": "tanh",
    },
}


class Activation(Recipe):
    """An activation, known by its class and by its values."""

    @classmethod
    def fits(cls, module):
        """Whether its class is known under this name, and float64 values are this function's."""
        names = _NAMES.get(type(module).__module__, {})
        if names.get(type(module).__name__) != cls.activation or getattr(module, "inplace", False):
            return False
        x = torch.linspace(-20, 20, 801, dtype=torch.float64, device="cpu")
        want = cls.function(x)
        return torch.allclose(type(module).forward(module, x), want, rtol=1e-13, atol=1e-14)

    @classmethod
    def ours(cls, m, input: Tensor) -> Tensor:
        """Apply it."""
        return cls.function(input)


def _activation(name, function):
    body = {"activation": name, "function": staticmethod(function), "__module__": __name__}
    return type(name.title().replace("_", ""), (Activation,), body)


Gelu = _activation("gelu", ops.gelu)
GeluTanh = _activation("gelu_tanh", lambda x: ops.gelu(x, "tanh"))
Silu = _activation("silu", ops.silu)
Mish = _activation("mish", ops.mish)
Sigmoid = _activation("sigmoid", ops.sigmoid)
Tanh = _activation("tanh", ops.tanh)
Hardswish = _activation("hardswish", ops.hardswish)
Hardsigmoid = _activation("hardsigmoid", ops.hardsigmoid)

# ------------------------------------------------------------------------------------------ norms

_EPS = ("variance_epsilon", "eps", "epsilon")


def _eps(module) -> float | None:
    state = module.__dict__
    for name in _EPS:
        if name in state:
            return state[name]
    return None


class _Norm(Recipe):
    """A norm of the last dimension, known by what it does to random rows.

    Where a norm rounds to float32 inside, as those of transformers do, float64 stays float64 here,
    and 16 bits are rounded once, at the end.
    """

    parameters: tuple[str, ...] = ("weight",)

    @classmethod
    def fits(cls, module):
        """Whether results are the same for rows large and small, in float32 and bfloat16."""
        own = {k: p for k, p in module._parameters.items() if p is not None}
        # Only what looks like such a norm is called at all.
        if (
            "norm" not in type(module).__name__.lower()
            or not isinstance(_eps(module), float)
            or module._buffers
            or module._modules
            or tuple(own) not in ((), cls.parameters)
            or any(p.dim() != 1 or not p.is_floating_point() for p in own.values())
            or len(inspect.signature(type(module).forward).parameters) != 2
        ):
            return False
        size = len(own["weight"]) if own else _size(module)
        try:
            return size is not None and cls._agrees(module, own, size)
        except Exception:  # a layer that cannot run on such rows is another one
            return False

    @classmethod
    def _agrees(cls, module, own, size) -> bool:
        random, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
        probe = copy.copy(module)
        probe.__dict__ = dict(module.__dict__)
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
            drawn = {k: torch.randn(size, generator=random, device=cpu).to(dtype) for k in own}
            probe._parameters = {k: drawn.get(k) for k in module._parameters}
            for training in (True, False):
                probe.training = training
                for shape, scale in (((4, size), 1.0), ((2, 3, size), 1e-3), ((4, size), 100.0)):
                    x = (scale * torch.randn(shape, generator=random, device=cpu)).to(dtype)
                    with torch.no_grad():
                        got = type(module).forward(probe, x)
                        want = cls.compute(probe, x)
                    same = got.dtype is dtype and got.shape == x.shape
                    if not same or not torch.allclose(got, want, rtol=rtol, atol=rtol):
                        return False
        return True

    @classmethod
    def ours(cls, m, x: Tensor) -> Tensor:
        """Apply it; other dtypes than the weight's run as they did, as results have another."""
        weight = _weight(m)
        if weight is not None and x.dtype is not weight.dtype:
            return NotImplemented
        return cls.compute(m, x)


def _weight(norm) -> Tensor | None:
    return getattr(norm, "weight", None)


def _size(module):
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


class RMSNorm(_Norm):
    """``weight * x / sqrt(mean(x^2) + eps)``."""

    @staticmethod
    def compute(norm, x):
        """What it does."""
        return ops.rms_norm(x, x.shape[-1:], _weight(norm), _eps(norm)).to(x.dtype)


class OffsetRMSNorm(_Norm):
    """``(1 + weight) * x / sqrt(mean(x^2) + eps)``, as Gemma's."""

    @staticmethod
    def compute(norm, x):
        """What it does, 16 bits in float32 as their weights are near zero."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + norm.weight.to(wide)
        return ops.rms_norm(x.to(wide), x.shape[-1:], weight, _eps(norm)).to(x.dtype)


class LayerNorm(_Norm):
    """A LayerNorm with a forward of its own, as timm's."""

    parameters = ("weight", "bias")

    @staticmethod
    def compute(norm, x):
        """What it does."""
        return ops.layer_norm(
            x, x.shape[-1:], _weight(norm), getattr(norm, "bias", None), _eps(norm)
        )


fast_layer_norm = None  # timm's, whatever it is: where it is called its own forward runs


class ChannelLayerNorm(Recipe):
    """timm's LayerNorm of the channels of images (N, C, H, W)."""

    def _native(self, x):
        x = x.permute(0, 2, 3, 1)
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return x

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Apply it."""
        if m._fast_norm:
            return NotImplemented
        x = x.permute(0, 2, 3, 1)
        y = ops.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps)
        return y.permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------- linear layers


class Conv1D(Recipe):
    """transformers' linear layer with the weight (in, out)."""

    is_linear = True

    def _native(self, x):
        size_out = x.size()[:-1] + (self.nf,)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        x = x.view(size_out)
        return x

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """``x W + b``."""
        return ops.linear(x, m.weight.t(), m.bias)


# ------------------------------------------------------------------------------------------ blocks


class Row(Recipe):
    """A subclass of Sequential that runs its children in order, as it does."""

    fuses = "layers in a row"

    @classmethod
    def fits(cls, module):
        """Whether it inherits all that running is made of."""
        own = type(module)
        return isinstance(module, torch.nn.Sequential) and all(
            getattr(own, name) is getattr(torch.nn.Sequential, name)
            for name in ("forward", "__iter__", "__call__")
        )

    @staticmethod
    def ours(m, x):
        """Run the children, some of them as one op."""
        return run(list(m._modules.values()), x)


class DenseAct(Recipe):
    """BERT's intermediate layer."""

    fuses = "linear, activation"

    def _native(self, hidden_states):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.intermediate_act_fn(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.dense, m.intermediate_act_fn), x)


class DenseActNorm(Recipe):
    """The transform before BERT's word predictions."""

    fuses = "linear, activation"

    def _native(self, hidden_states):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.transform_act_fn(hidden_states)
        hidden_states = self.LayerNorm(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.dense, m.transform_act_fn, m.LayerNorm), x)


class DenseDropoutAddNorm(Recipe):
    """The end of BERT's attention and of its MLP."""

    fuses = "linear, dropout, residual"

    def _native(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor, residual: Tensor) -> Tensor:
        """Run its layers, the first two and the residual as one op."""
        return m.LayerNorm(run((m.dense, m.dropout), x, residual))


class ConvMLP(Recipe):
    """GPT-2's MLP."""

    fuses = "linear, activation; linear, dropout"

    def _native(self, hidden_states):
        hidden_states = self.c_fc(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.c_proj(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.c_fc, m.act, m.c_proj, m.dropout), x)


class MLP(Recipe):
    """The MLP of transformers' ViT and CLIP."""

    fuses = "linear, activation"

    def _native(self, hidden_states):
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.fc1, m.activation_fn, m.fc2), x)


class DropoutMLP(Recipe):
    """timm's Mlp."""

    fuses = "linear, activation, dropout; linear, dropout"

    def _native(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.fc1, m.act, m.drop1, m.norm, m.fc2, m.drop2), x)


class GatedMLP(Recipe):
    """``down(act(gate(x)) * up(x))``, the MLP of Llama, Mistral, Qwen and Gemma."""

    fuses = "activation, product"

    def _named(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj

    def _plain(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    natives = (_named, _plain)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, the activation and the product as one op."""
        return m.down_proj(gated(m.act_fn, m.gate_proj(x), m.up_proj(x)))


class PackedGatedMLP(Recipe):
    """Phi-3's MLP, whose gate and up are halves of one linear layer."""

    fuses = "activation, product"

    def _native(self, hidden_states):
        up_states = self.gate_up_proj(hidden_states)

        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)

        return self.down_proj(up_states)

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, the activation and the product as one op."""
        return m.down_proj(gated(m.activation_fn, *m.gate_up_proj(x).chunk(2, dim=-1)))


class T5MLP(Recipe):
    """T5's MLP without a gate."""

    fuses = "linear, activation, dropout"

    def _native(self, hidden_states):
        hidden_states = self.wi(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.dropout(hidden_states)
        if (
            isinstance(self.wo.weight, torch.Tensor)
            and hidden_states.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            hidden_states = hidden_states.to(self.wo.weight.dtype)
        hidden_states = self.wo(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, the first three as one op."""
        return m.wo(_as_weight(run((m.wi, m.act, m.dropout), x), m.wo.weight))


class T5GatedMLP(Recipe):
    """T5's MLP with a gate, of version 1.1 on."""

    fuses = "activation, product"

    def _native(self, hidden_states):
        hidden_gelu = self.act(self.wi_0(hidden_states))
        hidden_linear = self.wi_1(hidden_states)
        hidden_states = hidden_gelu * hidden_linear
        hidden_states = self.dropout(hidden_states)
        if (
            isinstance(self.wo.weight, torch.Tensor)
            and hidden_states.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            hidden_states = hidden_states.to(self.wo.weight.dtype)

        hidden_states = self.wo(hidden_states)
        return hidden_states

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, the activation and the product as one op."""
        y = m.dropout(gated(m.act, m.wi_0(x), m.wi_1(x)))
        return m.wo(_as_weight(y, m.wo.weight))


def _as_weight(x, weight):
    """T5 keeps its last weight in float32 in a model of float16."""
    cast = isinstance(weight, Tensor) and weight.dtype not in (x.dtype, torch.int8)
    return x.to(weight.dtype) if cast else x


# timm's functions, whatever they are: where they are called its own forward runs.
resolve_self_attn_mask = maybe_add_mask = None


class Attention(Recipe):
    """timm's attention of vision transformers."""

    fuses = "attention"

    def _native(self, x, attn_mask=None, is_causal=False):
        B, N, C = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
            )
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn_bias = resolve_self_attn_mask(N, attn, attn_mask, is_causal)
            attn = maybe_add_mask(attn, attn_bias)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v

        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        x = self.proj(x)
        x = self.proj_drop(x)
        return x

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend in tiles, with masks as scaled_dot_product_attention takes them."""
        if not m.fused_attn:
            # Its own softmax, under hooks and dropout of its own.
            return NotImplemented
        qkv = m.qkv(x).unflatten(-1, (3, m.num_heads, m.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        p = m.attn_drop.p if m.training else 0.0
        y = ops.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v, attn_mask, p, is_causal)
        y = m.norm(y.transpose(1, 2).flatten(2))
        if m.gate is not None:
            y = y * m.gate(x).sigmoid()
        return run((m.proj, m.proj_drop), y)


class EncoderLayer(Recipe):
    """torch.nn.TransformerEncoderLayer; its activation may be a function."""

    method = "_ff_block"
    fuses = "linear, activation, dropout; linear, dropout"

    def _native(self, x):
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.dropout2(x)

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.linear1, m.activation, m.dropout, m.linear2, m.dropout2), x)


class DecoderLayer(Recipe):
    """torch.nn.TransformerDecoderLayer."""

    method = "_ff_block"
    fuses = "linear, activation, dropout; linear, dropout"

    def _native(self, x):
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.dropout3(x)

    natives = (_native,)

    @staticmethod
    def ours(m, x: Tensor) -> Tensor:
        """Run its layers, some of them as one op."""
        return run((m.linear1, m.activation, m.dropout, m.linear2, m.dropout3), x)


# In the order in which they are tried: what is only compared before what is called.
RECIPES: tuple[type[Recipe], ...] = (
    *(Conv1D, DenseAct, DenseActNorm, DenseDropoutAddNorm, ConvMLP, MLP, DropoutMLP, GatedMLP),
    *(PackedGatedMLP, T5MLP, T5GatedMLP, Attention, EncoderLayer, DecoderLayer, ChannelLayerNorm),
    *(Gelu, GeluTanh, Silu, Mish, Sigmoid, Tanh, Hardswish, Hardsigmoid),
    *(RMSNorm, OffsetRMSNorm, LayerNorm),
)
