"""Training steps of whole models: ``python -m bench models``.

GPT-2-small, BERT-base, a ViT-S and a Llama-style model of 60M parameters, with random weights: a
forward and a backward pass and AdamW, native eager, native under torch.compile and after
``jacobian_ops.replace``, in float32 and in bfloat16 autocast, interleaved in one run.  Beside the
medians are the bytes that the forward pass keeps and the most that is alive in the two passes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import jacobian_ops

from .checkpoint import LiveBytes

PROVIDERS = ("eager", "compile", "jacobian_ops")
DTYPES = ("float32", "bfloat16")


def import_transformers():
    """transformers, where torchvision is there but cannot load its library too.

    PyPI's torchvision needs CUDA's libraries; without them it lacks the ops that it describes as
    it is imported, which classification does not use.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for op in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{op}", schema)
    except ImportError:
        pass
    import transformers

    return transformers


def gpt2(quick: bool):
    t = import_transformers()
    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=512) if quick else {}
    special = dict(bos_token_id=0, eos_token_id=0)
    return _causal(t.GPT2LMHeadModel(t.GPT2Config(**sizes, **special)), 1, 64 if quick else 512)


def bert(quick: bool):
    t = import_transformers()
    config = t.BertConfig(**_sizes(64, 2, 4, 256, 512) if quick else {})
    model = t.BertForSequenceClassification(config)
    ids = torch.randint(config.vocab_size, (1, 64) if quick else (4, 128))
    return model, dict(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long))


def vit(quick: bool):
    t = import_transformers()
    sizes = _sizes(64, 2, 4, 256) | dict(image_size=32) if quick else _sizes(384, 12, 6, 1536)
    config = t.ViTConfig(**sizes)
    images = torch.randn(2 if quick else 8, 3, config.image_size, config.image_size)
    labels = torch.zeros(len(images), dtype=torch.long)
    return t.ViTForImageClassification(config), dict(pixel_values=images, labels=labels)


def llama(quick: bool):
    t = import_transformers()
    sizes = _sizes(64, 2, 4, 172, 512) if quick else _sizes(512, 8, 8, 1376, 32000)
    config = t.LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=not quick)
    return _causal(t.LlamaForCausalLM(config), 1, 64 if quick else 512)


def _sizes(hidden, layers, heads, intermediate, vocabulary=None):
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    sizes = dict(zip(names, (hidden, layers, heads, intermediate), strict=True))
    return sizes if vocabulary is None else sizes | dict(vocab_size=vocabulary)


def _causal(model, batch, tokens):
    ids = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, dict(input_ids=ids, labels=ids, use_cache=False)


MODELS: dict[str, Callable] = {
    "GPT-2-small": gpt2,
    "BERT-base": bert,
    "ViT-S": vit,
    "Llama 60M": llama,
}


@dataclass
class Row:
    """One model in one precision by one provider.

    Times are seconds a step.  ``kept_bytes`` are alive after the forward pass, ``peak_bytes`` at
    most in it and the backward pass, parameters and inputs counted in neither; None under
    torch.compile, whose buffers are not seen.
    """

    model: str
    dtype: str
    provider: str
    parameters: int
    median: float
    lower: float  # quartiles
    upper: float
    loss: float
    kept_bytes: int | None = None
    peak_bytes: int | None = None


def steps(model, inputs, dtype: str):
    """A training step, and its forward pass alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def forward() -> Tensor:
        low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with low:
            return model(**inputs).loss

    def step() -> float:
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, forward


def memory(forward) -> tuple[int, int]:
    """Bytes alive after the forward pass, and most in it and the backward pass."""
    with LiveBytes() as live:
        loss = forward()
        kept = live.now
        loss.backward()
        return kept, live.peak


def measure(name: str, dtype: str, providers, quick: bool, rounds: int) -> list[Row]:
    """Rows of all providers, timed in turns."""
    torch.manual_seed(0)
    native, inputs = MODELS[name](quick)
    native.train()
    calls, rows = {}, {}
    for provider in providers:
        model = copy.deepcopy(native)
        if provider == "jacobian_ops":
            jacobian_ops.replace(model)
        step, forward = steps(model, inputs, dtype)
        kept = peak = None
        if provider == "compile":
            step, forward = steps(torch.compile(model), inputs, dtype)
        else:
            kept, peak = memory(forward)
            model.zero_grad()
        loss = step()  # compiles, and makes the optimizer's state
        size = sum(p.numel() for p in model.parameters())
        calls[provider] = step
        rows[provider] = Row(name, dtype, provider, size, 0, 0, 0, loss, kept, peak)
    times = {provider: [] for provider in providers}
    for _ in range(rounds):
        for provider, step in calls.items():
            began = time.perf_counter()
            step()
            times[provider].append(time.perf_counter() - began)
    for provider, row in rows.items():
        t = times[provider]
        row.lower, row.median, row.upper = (
            statistics.quantiles(t, n=4, method="inclusive") if len(t) > 1 else t * 3
        )
    return list(rows.values())


def table(rows: list[Row]) -> Table:
    """The rows, with how many times as long as ours each takes."""
    result = Table(title=f"A training step, {torch.get_num_threads()} threads")
    for heading in ("model", "precision", "", "a step", "quartiles", "of ours", "kept", "peak"):
        result.add_column(heading, justify="left" if heading in ("model", "") else "right")
    ours = {(r.model, r.dtype): r.median for r in rows if r.provider == "jacobian_ops"}
    for r in rows:
        ratio = ours.get((r.model, r.dtype))
        sizes = (r.kept_bytes, r.peak_bytes)
        result.add_row(
            *(r.model, r.dtype, r.provider, f"{1e3 * r.median:.1f} ms"),
            f"{1e3 * r.lower:.1f} to {1e3 * r.upper:.1f}",
            "-" if ratio is None else f"{r.median / ratio:.2f}x",
            *("-" if n is None else f"{n / 2**20:.1f} MiB" for n in sizes),
        )
    return result


def main(arguments: list[str]) -> int:
    """The command; 1 where a loss is not that of eager."""
    parser = argparse.ArgumentParser(prog="python -m bench models", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="default: all")
    parser.add_argument("--rounds", type=int, help="timed steps of each")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--quick", action="store_true", help="tiny models, no torch.compile")
    options = parser.parse_args(arguments)
    rounds = options.rounds if options.rounds is not None else 3 if options.quick else 7
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)

    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe
    chosen = [(m, d) for m in options.model or MODELS for d in options.dtype or DTYPES]
    quick = tuple(p for p in PROVIDERS if p != "compile")  # which takes minutes
    providers = options.provider or (quick if options.quick else PROVIDERS)
    rows, failures = [], []
    with Progress(console=console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's advice
        task = progress.add_task("models", total=len(chosen))
        for name, dtype in chosen:
            progress.update(task, description=f"{name} {dtype}")
            rows += measure(name, dtype, providers, options.quick, rounds)
            progress.advance(task)
            losses = {r.provider: r.loss for r in rows if (r.model, r.dtype) == (name, dtype)}
            for provider, loss in losses.items():  # under masks of their own
                if abs(loss - losses[providers[0]]) > 0.1 * abs(losses[providers[0]]):
                    failures.append(f"{name} {dtype}: the loss of {provider} is {loss:.4f}")
            torch._dynamo.reset()
    console.print(table(rows))
    settings = dict(threads=torch.get_num_threads(), torch=torch.__version__, rounds=rounds)
    record = dict(settings=settings, rows=[asdict(row) for row in rows], failures=failures)
    (options.output / "models.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote models.json into {escape(str(options.output))}", soft_wrap=True)
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    return 1 if failures else 0
