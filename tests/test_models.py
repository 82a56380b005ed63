"""replace on the models people run: the numbers are those of the untouched model.

Needs the extra ``models``; ``make test-models`` installs it.
"""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import jacobian_ops
from jacobian_ops import replace, replacements, restore

from .copies import copies

pytestmark = pytest.mark.cpu_only

if not all(map(importlib.util.find_spec, ("transformers", "timm", "torchvision", "lightning"))):
    pytest.skip("needs the extra `models`", allow_module_level=True)

import bench.models as bench_models  # noqa: E402

transformers = bench_models.import_transformers()
import lightning  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402

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


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # so small tensors gain nothing from more


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
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
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
    labels = inputs["input_ids"][:, :5].contiguous()
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


def resnet():
    """Without the last two stages, which small images leave with few values a channel."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model


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
    "torchvision resnet": vision(resnet),
    "torchvision vit": vision(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=3)
    ),
    "torch transformer": transformer,
}


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
    out = (
        model(*args, **kwargs) if weights is None else functional_call(model, weights, args, kwargs)
    )
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
    want, got = (gradients(m, r[1]) for m, r in zip((native, ours), results, strict=True))
    for g, w in zip(got, want, strict=True):
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
    close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.parametrize("name", MODELS)
def test_jvp_and_hvp(name):
    """The product with the Jacobian of the logits, and with the Hessian of the loss.

    Of the native model the latter in reverse mode, as layer_norm's second derivative in forward
    mode is wrong.
    """
    native, ours, inputs = built(name, torch.float64)
    weights, tangents = weights_of(native)
    for model in (native, ours):  # running statistics cannot be written under a transform
        torch.func.replace_all_batch_norm_modules_(model)
    with KeepFloat64():
        products = []
        for model in (native, ours):
            with sdpa_kernel(SDPBackend.MATH):
                f = functools.partial(lambda m, w: run(m, inputs, w)[0], model)
                products.append(jvp(f, (weights,), (tangents,)))
        close(products[1], products[0], rtol=1e-9, atol=1e-9)
        hvp = jvp(grad(lambda w: run(ours, inputs, w)[1]), (weights,), (tangents,))[1]
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(
                run(native, inputs)[1],
                list(native.parameters()),
                create_graph=True,
                allow_unused=True,
            )
        along = sum(
            (a * t).sum() for a, t in zip(g, tangents.values(), strict=True) if a is not None
        )
        want = torch.autograd.grad(
            along, list(native.parameters()), materialize_grads=True, allow_unused=True
        )
    close(list(hvp.values()), list(want), rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------ what is done and undone


def classes(model):
    return [type(m) for m in model.modules()]


def attributes(model):
    return [list(m.__dict__) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_restore_gives_back_what_was(name):
    native, ours, inputs = built(name)
    assert classes(ours) != classes(native)
    keys, pointers = list(native.state_dict()), [p.data_ptr() for p in ours.parameters()]
    assert list(ours.state_dict()) == keys and replace(ours) is ours
    assert restore(ours) is ours
    assert classes(ours) == classes(native) and attributes(ours) == attributes(native)
    assert [p.data_ptr() for p in ours.parameters()] == pointers
    if hasattr(native, "config"):
        assert ours.config._attn_implementation == native.config._attn_implementation == "sdpa"
    close(run(ours, inputs), run(native, inputs), rtol=0, atol=0)


@copies
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "timm vit", "torchvision vit"])
def test_copies(name, duplicate):
    native, ours, inputs = built(name)
    other = duplicate(ours)
    assert classes(other) == classes(ours)
    close(run(other, inputs), run(ours, inputs), rtol=0, atol=0)
    restore(other)
    assert classes(other) == classes(native)
    assert classes(ours) != classes(native)


def test_a_pickled_model_brings_its_attention_along(tmp_path):
    """In a process that has not called replace."""
    _, ours, inputs = built("bert")
    torch.save((ours, inputs, run(ours, inputs)[0]), tmp_path / "model.pt")
    code = (
        "import torch; from bench.models import import_transformers; import_transformers();"
        f"model, inputs, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "torch.testing.assert_close(model(**inputs).logits, y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_state_dict_and_save_pretrained(tmp_path):
    native, ours, inputs = built("gpt2")
    other = MODELS["gpt2"]()[0]
    other.load_state_dict(ours.state_dict())
    close(run(other, inputs)[0], run(native, inputs)[0], rtol=0, atol=0)
    ours.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(loaded.transformer.h[0].mlp).__module__.startswith("transformers")
    close(run(loaded.train(), inputs)[0], run(native, inputs)[0], rtol=0, atol=0)


def test_tied_weights_stay_tied():
    _, ours, inputs = built("gpt2")
    assert ours.lm_head.weight is ours.transformer.wte.weight
    run(ours, inputs)[1].backward()
    assert ours.lm_head.weight.grad is ours.transformer.wte.weight.grad is not None


def test_a_model_that_shares_the_config_keeps_its_attention():
    for name in ("llama", "t5"):
        native = built(name)[0]
        other = type(native)(native.config)
        assert other.config is native.config
        replace(native)
        assert native.config._attn_implementation == "jacobian_ops"
        assert {m.config._attn_implementation for m in other.modules() if hasattr(m, "config")} == {
            "sdpa"
        }
        own = [m.config for m in native.modules() if hasattr(m, "config")]
        assert {c._attn_implementation for c in own} == {"jacobian_ops"}
        restore(native)
        assert {c._attn_implementation for c in own} == {"sdpa"}


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    native, _, inputs = built("llama")
    swap = importlib.import_module("jacobian_ops.replace.swap")
    real, before = swap.transformers.adopt, classes(native)
    monkeypatch.setattr(swap.transformers, "adopt", lambda m: (real(m), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        replace(native)
    assert classes(native) == before and native.config._attn_implementation == "sdpa"
    assert swap.transformers.SETTINGS not in native.__dict__
    run(native, inputs)
    monkeypatch.undo()
    replace(native)
    after, real = classes(native), swap.transformers.leave
    monkeypatch.setattr(swap.transformers, "leave", lambda m: (real(m), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        restore(native)
    assert classes(native) == after and native.config._attn_implementation == "jacobian_ops"


@pytest.mark.parametrize("name,child", [("gpt2", "mlp.act"), ("bert", "output.dropout")])
def test_hooks_of_children_run(name, child):
    native, ours, inputs = built(name)
    seen = []
    for model in (native, ours):
        module = next(m for n, m in model.named_modules() if n.endswith(child))
        module.register_forward_hook(lambda m, args, y: seen.append(type(m)) or 1.5 * y)
    close(run(ours, inputs), run(native, inputs), rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_quantized_and_other_layers_in_place_of_children():
    """What a block finds in place of its layers runs as it is."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    native, ours, inputs = built("llama")
    for model in (native, ours):
        old = model.model.layers[0].mlp.gate_proj
        new = model.model.layers[0].mlp.gate_proj = Doubled(32, 48, bias=False)
        new.load_state_dict(old.state_dict())
        model.model.layers[1].mlp.act_fn = nn.Tanh()
    close(run(ours, inputs), run(native, inputs), rtol=1e-5, atol=1e-5)
    row = {r.name: r for r in replacements(ours).layers}["model.layers.0.mlp.gate_proj"]
    assert (
        row.action == "left" and row.detail == "a subclass of Linear, which may do something else"
    )


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_peft_lora(early):
    peft = pytest.importorskip("peft")
    native, ours, inputs = built("gpt2")
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, init_lora_weights=False)
    results = []
    for model in (native, ours):
        if model is ours and early:
            restore(ours)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D's fan_in_fan_out
            adapted = peft.get_peft_model(model, config)
        if model is ours and early:
            replace(adapted)
        logits, loss = run(adapted, inputs)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        results.append((logits, loss, torch.autograd.grad(loss, trained)))
        assert len(trained) == 8
    close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_dropout_masks_are_the_seed_s():
    _, ours, inputs = built("bert")
    for m in ours.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.2
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(ours, inputs)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    ours.eval()
    assert torch.equal(run(ours, inputs)[0], run(ours, inputs)[0])


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "timm vit", "torchvision resnet"])
def test_autocast(name):
    native, ours, inputs = built(name)
    exact = run(native, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        (want, want_loss), (got, loss) = run(native, inputs), run(ours, inputs)
    assert got.dtype is want.dtype and loss.dtype is want_loss.dtype
    assert (got - exact).norm() <= 1.5 * (want - exact).norm() + 2**-9 * exact.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing(name):
    native, ours, inputs = built(name)
    want = gradients(native, run(native, inputs)[1])
    ours.gradient_checkpointing_enable()
    close(gradients(ours, run(ours, inputs)[1]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "timm vit"])
def test_compiles_without_a_graph_break(name):
    _, ours, inputs = built(name)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    assert torch._dynamo.explain(ours)(*args, **kwargs).graph_break_count == 0


def test_bench(tmp_path, capsys):
    options = ["--quick", "--model", "BERT-base", "--dtype", "float32", "--rounds", "1"]
    assert bench_models.main([*options, "--output", str(tmp_path)]) == 0
    eager, ours = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert (eager["provider"], ours["provider"]) == ("eager", "jacobian_ops")
    assert 0 < ours["kept_bytes"] < eager["kept_bytes"] and ours["median"] > 0
    assert "BERT-base" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ norms


class Scaled(nn.Module):
    """Looks like an RMSNorm, and is none."""

    def __init__(self, power):
        super().__init__()
        self.weight, self.eps, self.power = nn.Parameter(torch.ones(8)), 1e-6, power

    def forward(self, x):
        mean = x.abs().pow(self.power).mean(-1, keepdim=True)
        return self.weight * x * (mean + self.eps).pow(-1 / self.power)


class ScaledNorm(Scaled):
    pass


class NoisyNorm(ScaledNorm):
    def forward(self, x):
        return super().forward(x) * (1.01 if self.training else 1.0)


@pytest.mark.parametrize(
    "layer,known",
    [
        (lambda: ScaledNorm(2), True),
        (lambda: ScaledNorm(3), False),
        (lambda: NoisyNorm(2), False),
        (lambda: Scaled(2), False),  # its name promises nothing
        (lambda: timm.layers.RmsNorm(8), True),
        (lambda: timm.layers.LayerNorm(8), True),
        (lambda: timm.layers.LayerNorm2d(8), True),
        (lambda: timm.layers.SimpleNorm(8), False),
        (lambda: timm.layers.Swish(), True),
        (lambda: timm.layers.Swish(inplace=True), False),
        (lambda: transformers.activations.FastGELUActivation(), False),
        (lambda: transformers.activations.QuickGELUActivation(), False),
    ],
)
def test_layers_are_known_by_what_they_do(layer, known):
    layer = layer()
    before = type(layer)
    replace(layer)
    assert (type(layer) is not before) == known and isinstance(layer, before)
    assert type(restore(layer)) is before


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16])
def test_norms_of_mixed_dtypes(offset, weight, input):
    module = transformers.models.gemma if offset else transformers.models.llama
    cls = "GemmaRMSNorm" if offset else "LlamaRMSNorm"
    cls = getattr(importlib.import_module(f"{module.__name__}.modeling_{cls[:-7].lower()}"), cls)
    native = cls(32).to(weight)
    nn.init.normal_(native.weight)
    ours, x = replace(copy.deepcopy(native)), torch.randn(5, 32).to(input)
    assert type(ours) is not cls and ours(x).dtype is native(x).dtype
    close(ours(x), native(x))
    close(ours(hidden_states=x) if not offset else ours(x=x), native(x))


# -------------------------------------------------------------------------------------- attention

HEADS = dict(num_key_value_groups=2, is_causal=True)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("queries,keys", [(5, 5), (1, 7), (3, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [None, False])
def test_attention_is_that_of_sdpa(mask, queries, keys, bias, causal):
    jacobian_ops.register_transformers()
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    q = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, keys, 8, dtype=torch.float64).unbind()
    if mask is not None:
        keep = torch.rand(2, 1, queries, keys) < 0.7
        keep[..., 0] = True
        mask = keep if mask == "bool" else torch.zeros(keep.shape).double().masked_fill(~keep, -9.0)
    bias = torch.randn(1, 4, queries, keys, dtype=torch.float64) if bias else None
    args = layer, q, k, v, mask, 0.0, 0.3
    (got, weights), (want, _) = (
        functions[name](*args, is_causal=causal, position_bias=bias)
        for name in ("jacobian_ops", "sdpa")
    )
    assert weights is None
    close(got, want)


def test_attention_says_what_it_cannot():
    attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["jacobian_ops"]
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="softcap is 30.0; allowed: None"):
        attention(nn.Module(), x, x, x, None, softcap=30.0)
    with pytest.warns(UserWarning, match="attention weights are None"):
        attention(nn.Module(), x, x, x, None, output_attentions=True)


def test_attention_is_left_where_it_is_another():
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    model = replace(transformers.Gemma2ForCausalLM(config))
    assert model.config._attn_implementation == "eager"
    assert replacements(model).layers[0].detail == (
        "attention: attn_logit_softcapping caps the scores"
    )


def test_a_model_can_ask_for_it():
    jacobian_ops.register_transformers()
    native, _, inputs = built("llama")
    config = copy.deepcopy(native.config)
    config._attn_implementation = "jacobian_ops"
    ours = transformers.LlamaForCausalLM(config).train()
    ours.load_state_dict(native.state_dict())
    close(run(ours, inputs), run(native, inputs), rtol=1e-5, atol=1e-5)


def test_replace_again_after_the_attention_was_set_otherwise():
    model = replace(built("llama")[0])
    model.set_attn_implementation("eager")
    restore(replace(model))
    assert model.config._attn_implementation == "eager" and "_loss_function" not in vars(model)
    replace(model).set_attn_implementation("sdpa")
    assert restore(model).config._attn_implementation == "sdpa"


def test_generate():
    native, ours, inputs = built("qwen3")
    prompt = dict(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 11).long())
    results = [
        m.eval().generate(**prompt, max_new_tokens=5, do_sample=False) for m in (native, ours)
    ]
    assert torch.equal(*results) and results[0].shape == (2, 16)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_causal_lm_loss(name, count):
    native, ours, inputs = built(name)
    labels = inputs.pop("labels").clone()
    labels[0, 3:6] = -100
    want = native(**inputs, labels=labels, num_items_in_batch=count).loss
    for model in (native, ours):
        got = jacobian_ops.causal_lm_loss(model, labels, num_items_in_batch=count, **inputs)
        close(got, want, rtol=1e-5, atol=1e-5)
        close(
            gradients(model, got),
            gradients(native, native(**inputs, labels=labels, num_items_in_batch=count).loss),
            rtol=1e-4,
            atol=1e-5,
        )


def test_causal_lm_loss_keeps_no_logits():
    config = transformers.LlamaConfig(**SIZES | dict(vocab_size=4096), num_key_value_heads=2)
    model = replace(transformers.LlamaForCausalLM(config))
    ids = torch.randint(4096, (1, 64))

    def kept(f):
        largest = 0

        def pack(t):
            nonlocal largest
            largest = max(largest, t.numel() if t.numel() != 4096 * 32 else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            f()
        return largest

    inputs = dict(input_ids=ids, use_cache=False)
    assert kept(lambda: model(**inputs, labels=ids).loss) == 64 * 4096
    assert kept(lambda: jacobian_ops.causal_lm_loss(model, ids, **inputs)) < 64 * 100


def test_causal_lm_loss_of_other_models():
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
    capped = transformers.Gemma2ForCausalLM(config)
    labels = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="Gemma2ForCausalLM are not those of its head"):
        jacobian_ops.causal_lm_loss(capped, labels, input_ids=labels)
    for model in (nn.Linear(3, 3), built("t5")[1]):
        with pytest.raises(TypeError, match="model is a .*; allowed: a causal language model"):
            jacobian_ops.causal_lm_loss(model, labels, input_ids=labels)
    native = built("llama")[0]
    native.lm_head = nn.Sequential(native.lm_head)
    with pytest.raises(TypeError, match="is a Sequential; allowed: torch.nn.Linear"):
        jacobian_ops.causal_lm_loss(native, labels, input_ids=labels)


# ------------------------------------------------------------------------------------------ table

FUSED = {
    "gpt2": 2,
    "bert": 6,
    "llama": 2,
    "t5": 4,
    "vit": 2,
    "timm vit": 4,
    "timm convnext": 4,
    "torchvision resnet": 0,
    "torchvision vit": 2,
    "torch transformer": 4,
}


@pytest.mark.parametrize("name", FUSED)
def test_replacements(name):
    native, ours, inputs = built(name)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    state = torch.random.get_rng_state()
    result = replacements(ours, *args, **kwargs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.counts()["fused"] == FUSED[name]
    assert result.parameters == sum(p.numel() for p in native.parameters())
    assert result.saved_bytes == sum(row.saved_bytes for row in result.layers)
    assert result.saved_bytes < result.native_saved_bytes
    text = str(result)
    assert all(row.name in text for row in result.layers)
    assert result.to_dict()["layers"][0]["name"] == result.layers[0].name
    assert replacements(native).counts()["swapped"] == 0
    assert {row.detail for row in replacements(native).layers} >= {"it came after replace"}
    assert nn.Module.__call__ is replacements.__globals__["torch"].nn.Module.__call__
    assert attributes(native) == attributes(restore(ours))


def test_lightning_trainer(tmp_path):
    """Two epochs on the CPU: the loss curve is that of the native model."""
    x, target = torch.randn(64, 8), torch.randint(4, (64,))
    data = torch.utils.data.TensorDataset(x, target)

    class Classifier(lightning.LightningModule):
        def __init__(self, model, loss):
            super().__init__()
            self.model, self.loss, self.losses = model, loss, []

        def training_step(self, batch, _):
            loss = self.loss(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fit(model, loss, precision):
        classifier = Classifier(model, loss)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            precision=precision,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(classifier, torch.utils.data.DataLoader(data, batch_size=16))
        return torch.tensor(classifier.losses)

    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 2e-2)):
        native = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
        ours = replace(copy.deepcopy(native))
        expected = fit(native, torch.nn.functional.cross_entropy, precision)
        given = fit(ours, jacobian_ops.functional.cross_entropy, precision)
        close(given, expected, atol=tolerance, rtol=tolerance)
