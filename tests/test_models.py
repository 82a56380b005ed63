"""replace on the models people run: the numbers are those of the untouched model.

Needs the extra ``models``; ``make test-models`` installs it.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import jacobian_ops
from jacobian_ops import replace, replacements, restore

pytestmark = [pytest.mark.cpu_only, pytest.mark.not_on_host]

for _library in ("transformers", "timm", "torchvision"):
    pytest.importorskip(_library, exc_type=ImportError)

from bench.models import import_transformers  # noqa: E402

transformers = import_transformers()
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

close = torch.testing.assert_close
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
BATCH, TOKENS = 2, 11


def language(name, config, kind="ForCausalLM", **changes):
    """A tiny language model without dropout."""
    cls = getattr(transformers, f"{name}{kind}")
    quiet = {k: 0.0 for k in vars(config) if k.endswith(("dropout", "_pdrop", "dropout_prob"))}
    for key, value in (quiet | changes).items():
        setattr(config, key, value)
    return cls(config)


def tokens():
    ids = torch.randint(3, SIZES["vocab_size"], (BATCH, TOKENS))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, 7:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def causal(**extra):
    inputs = tokens()
    return inputs | dict(labels=inputs["input_ids"], use_cache=False) | extra


def images():
    return torch.randn(4, 3, 32, 32)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config), causal()


def family(name, **changes):
    def make():
        config = getattr(transformers, f"{name}Config")
        sizes = SIZES | dict(num_key_value_heads=2, head_dim=8) | changes
        return getattr(transformers, f"{name}ForCausalLM")(config(**sizes)), causal()

    return make


def bert():
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.BertForSequenceClassification(config)
    return model, tokens() | dict(labels=torch.tensor([0, 1]))


def t5(**changes):
    config = transformers.T5Config(
        **dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        **dict(dropout_rate=0.0, decoder_start_token_id=0, **changes),
    )
    inputs = tokens()
    labels = inputs["input_ids"][:, :5]
    return transformers.T5ForConditionalGeneration(config), inputs | dict(labels=labels)


def vit():
    sizes = {k: SIZES[k] for k in SIZES if not k.endswith(("size", "id"))}
    config = transformers.ViTConfig(
        **sizes,
        **dict(hidden_size=32, intermediate_size=48, image_size=32, patch_size=8),
        **dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    )
    model = transformers.ViTForImageClassification(config)
    return model, dict(pixel_values=images(), labels=torch.tensor([0, 1, 1, 0]))


def vision(make):
    return lambda: (make(), (images(),))


def transformer():
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    return model, (torch.randn(2, 7, 16), torch.randn(2, 5, 16))


MODELS = {
    "gpt2": gpt2,
    "bert": bert,
    "llama": family("Llama"),
    "qwen2": family("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": family("Qwen3"),
    "gemma": family("Gemma"),
    "t5": t5,
    "t5 gated": lambda: t5(feed_forward_proj="gated-gelu"),
    "vit": vit,
    "timm vit": vision(
        lambda: timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3
        )
    ),
    "timm convnext": vision(
        lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=3)
    ),
    "timm mixer": vision(
        lambda: timm.models.MlpMixer(
            img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=3
        )
    ),
    "torchvision resnet": vision(
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3
        )
    ),
    "torchvision vit": vision(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=3)
    ),
    "torch transformer": transformer,
}
# How many of its layers run as one op, and how many have no op of ours.
COUNTS = {}


class KeepFloat64(TorchFunctionMode):
    """Casts from float64 to float32, which transformers makes whatever the model's dtype, are none.

    So that float64 tells the two models apart to 1e-9.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64
        if wide and func is Tensor.float:
            return args[0]
        if wide and func in (Tensor.to, Tensor.type) and torch.float32 in args:
            return args[0]
        if wide and kwargs.get("dtype") is torch.float32:
            del kwargs["dtype"]
        return func(*args, **kwargs)


def built(name, dtype=torch.float32):
    """The model, a copy on our ops, and what to call them with."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():  # not at the special values of initialization
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    cast = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs
    )
    model = model.to(dtype).train()
    return model, replace(copy.deepcopy(model)), cast


def run(model, inputs, weights=None):
    """Logits and loss."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    out = model(*args, **kwargs) if weights is None else functional_call(model, weights, args, kwargs)
    if isinstance(out, Tensor):
        target = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
        return out, (out - target).square().mean()
    return out.logits, out.loss


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def weights_of(model):
    weights = {k: p.detach() for k, p in model.named_parameters()}
    random = torch.Generator().manual_seed(1)
    return weights, {
        k: torch.randn(w.shape, generator=random, dtype=w.dtype) for k, w in weights.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_same_in_float64(name):
    native, ours, inputs = built(name, torch.float64)
    results = []
    for model in (native, ours):
        with KeepFloat64():
            logits, loss = run(model, inputs)
        results.append((logits, loss, gradients(model, loss)))
    close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_same_in_float32(name):
    native, ours, inputs = built(name)
    results = [(*run(model, inputs),) for model in (native, ours)]
    close(results[1], results[0], rtol=1e-5, atol=1e-5)
    for g, w in zip(*(gradients(m, r[1]) for m, r in zip((ours, native), results[::-1])), strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert (g - w).norm() <= 1e-4 * w.norm() + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_trains_along_the_same_curve(name):
    *models, inputs = built(name)
    curves = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for _ in range(50):
            loss = run(model, inputs)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    print(name, max(abs(a-b)/abs(b) for a,b in zip(*curves)), curves[0][0], curves[0][-1])
    close(curves[1], curves[0], rtol=1e-3, atol=1e-4)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.parametrize("name", MODELS)
def test_jvp_and_hvp(name):
    """The product with the Jacobian of the logits, and with the Hessian of the loss.

    Of the native model the latter in reverse mode, as layer_norm's second derivative in forward
    mode is wrong.
    """
    native, ours, inputs = built(name, torch.float64)
    weights, tangents = weights_of(native)
    with KeepFloat64():
        products = []
        for model in (native, ours):
            with sdpa_kernel(SDPBackend.MATH):
                products.append(jvp(lambda w: run(model, inputs, w)[0], (weights,), (tangents,)))
        close(products[1], products[0], rtol=1e-9, atol=1e-9)
        hvp = jvp(grad(lambda w: run(ours, inputs, w)[1]), (weights,), (tangents,))[1]
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(
                run(native, inputs)[1], list(native.parameters()), create_graph=True, allow_unused=True
            )
        along = sum((a * t).sum() for a, t in zip(g, tangents.values(), strict=True) if a is not None)
        want = torch.autograd.grad(along, list(native.parameters()), materialize_grads=True, allow_unused=True)
    close(list(hvp.values()), list(want), rtol=1e-8, atol=1e-8)
