"""transformers: our attention in its interface, and the losses of its language models.

The library is looked up among what is imported already; only :func:`register_transformers` imports
it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
import weakref

import torch
from torch import Tensor

from .. import functional as F
from .sequence import bare

NAME = "jacobian_ops"
# Where a model of transformers keeps what replace exchanged of its settings.
SETTINGS = "_jacobian_ops_settings"


def register_transformers() -> None:
    """Make ``attn_implementation="jacobian_ops"`` known to transformers.

    :func:`jacobian_ops.replace` does it for models of transformers.

    Raises:
        ImportError: transformers is not installed, or has no attention interface.
    """
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(NAME, attention)
    masking.AttentionMaskInterface.register(NAME, masking.sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by :func:`F.scaled_dot_product_attention`.

    Args:
        module: The attention layer, whose ``is_causal`` holds where none is given, True without.
        query: (batch, heads, queries, d).
        key: (batch, heads of key and value, keys, d); each serves a group of heads of ``query``.
        value: The same.
        attention_mask: Broadcasts to (batch, heads, queries, keys): bool, False hides, or what is
            added to the scores.  With a mask nothing else is causal.
        dropout: Probability that a weight is dropped.
        scaling: Of the scores; None is ``1 / sqrt(d)``.
        is_causal: Whether a query sees only keys up to its own index.
        position_bias: Added to the scores.
        kwargs: Of other implementations.

    Returns:
        (batch, queries, heads, d), and None: weights are never formed.

    Raises:
        ValueError: ``softcap`` is given: scores cannot be capped.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"{NAME}: softcap is {kwargs['softcap']}; allowed: None, as scores are not capped. Use "
            "attn_implementation='eager'"
        )
    if kwargs.get("output_attentions"):
        warnings.warn(
            f"{NAME}: output_attentions is True, and attention weights are None, as they are never "
            "formed; attn_implementation='eager' has them",
            stacklevel=2,
        )
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and attention_mask is None and queries > 1
    if is_causal and keys > queries:  # an empty static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask, is_causal, queries)
        is_causal = False
    y = F.scaled_dot_product_attention(
        *(query, key, value, attention_mask, dropout, is_causal, scaling),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return y.transpose(1, 2).contiguous(), None


def _with_bias(bias, mask, is_causal, queries):
    """A float mask of both, as transformers makes it for sdpa."""
    if mask is None and is_causal:
        mask = torch.ones(queries, bias.shape[-1], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def is_model(module) -> bool:
    """Whether it is a PreTrainedModel, of a library that is imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def why_not_attention(model) -> str | None:
    """Why its attention is left; None if it can be ours."""
    modeling = sys.modules["transformers.modeling_utils"]
    current = model.config._attn_implementation
    if not hasattr(modeling, "AttentionInterface"):
        return "this transformers has no attention interface"
    if current not in ("eager", "sdpa", NAME):
        return f"attn_implementation is {current!r}"
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        return "attn_logit_softcapping caps the scores"
    if not (getattr(model, "_supports_sdpa", False) and model._can_set_attn_implementation()):
        return "the model takes no attention of the kind of sdpa"
    if getattr(model.config, "output_attentions", False):
        return "output_attentions wants the weights"
    if getattr(model.config, "reorder_and_upcast_attn", False) and current == "eager":
        return "reorder_and_upcast_attn has an attention of its own"
    return None


def implementations(modules) -> list[tuple]:
    """Configs among the modules, and the attention that they name."""
    return [(m.config, m.config._attn_implementation) for m in modules if is_model(m)]


def copy_configs(modules) -> None:
    """Give models that get our attention configs of their own: other models may share theirs."""
    copied = {}
    for m in modules:
        if is_model(m) and _takes_attention(m):
            copy.deepcopy(m.config, copied)
    for m in modules:
        if id(m.__dict__.get("config")) in copied:
            m.config = copied[id(m.config)]


def _takes_attention(model) -> bool:
    return model.config._attn_implementation != NAME and why_not_attention(model) is None


def adopt(model) -> None:
    """Give a model our attention and its causal-LM loss on our cross_entropy."""
    former, config = _Former(model.__dict__.get(SETTINGS, {})), model.config
    if _takes_attention(model):
        register_transformers()
        former["attention"] = config._attn_implementation
        config._attn_implementation_internal = NAME
    if has_known_loss(model):
        former["loss"] = model.__dict__.get("_loss_function")
        model._loss_function = causal_lm_cross_entropy
    if former:
        model.__dict__[SETTINGS] = former


class _Former(dict):
    """What a model had; a process that loads it knows our attention, too."""

    def __reduce__(self):
        return _loaded, (dict(self),)


def _loaded(former):
    if "attention" in former:
        register_transformers()
    return _Former(former)


def leave(model) -> None:
    """Undo :func:`adopt`, but for what was set otherwise since."""
    former = model.__dict__.pop(SETTINGS, {})
    if "attention" in former and model.config._attn_implementation == NAME:
        model.config._attn_implementation_internal = former["attention"]
    if "loss" in former and model.__dict__.get("_loss_function") is causal_lm_cross_entropy:
        del model._loss_function
        if former["loss"] is not None:
            model._loss_function = former["loss"]


def settings(model) -> list[tuple[str, str]]:
    """What :func:`adopt` did, or left, and why."""
    former, found = model.__dict__.get(SETTINGS, {}), []
    if "attention" in former:
        found.append(("swapped", f"attn_implementation {former['attention']!r} -> {NAME!r}"))
    elif (reason := why_not_attention(model)) is not None:
        found.append(("left", f"attention: {reason}"))
    if "loss" in former:
        found.append(("swapped", "causal_lm_cross_entropy of jacobian_ops"))
    return found


def has_known_loss(model) -> bool:
    """Whether its loss is that of transformers' causal language models."""
    losses = sys.modules.get("transformers.loss.loss_utils")
    if losses is None:
        return False
    # GPT-2's model has no type of loss, and this by default.
    default = type(model).__name__.endswith("LMHeadModel") and "_loss_function" not in vars(model)
    if default and getattr(model, "loss_type", None) is None:
        return losses.LOSS_MAPPING.get("ForCausalLM") is losses.ForCausalLMLoss
    return (
        getattr(model, "loss_type", None) == "ForCausalLM"
        and model.loss_function is losses.ForCausalLMLoss
    )


def causal_lm_cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """The loss of transformers' causal language models, from logits; keeps no softmax of them.

    Args:
        logits: (*, tokens, vocab_size).
        labels: (*, tokens), compared with the logits of the token before.
        vocab_size: Of the logits.
        num_items_in_batch: What the sum of the losses is divided by; None is how many count.
        ignore_index: The label of tokens that do not count.
        shift_labels: (*, tokens), compared with the logits of the same token, instead of labels.
        kwargs: Of other losses.
    """
    target = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().view(-1, vocab_size),
        target.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return _per_item(loss, num_items_in_batch)


def _shifted(labels, ignore_index):
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _per_item(loss, count):
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def causal_lm_loss(
    model: torch.nn.Module,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **inputs,
) -> Tensor:
    """The loss of a causal language model of transformers, without its logits.

    What ``model(labels=labels, **inputs).loss`` is, by :func:`F.linear_cross_entropy` of the last
    hidden states and the head: the logits, tokens x vocabulary, exist a chunk at a time.

    Args:
        model: A model for causal language modelling, after :func:`jacobian_ops.replace` or not.
        labels: (batch, tokens).
        num_items_in_batch: What the sum of the losses is divided by; None is how many count.
        ignore_index: The label of tokens that do not count.
        inputs: Of the model, such as ``input_ids`` and ``attention_mask``.

    Raises:
        TypeError: ``model`` is none, its head is no plain linear layer, or its logits are not what
            the head gives, such as capped or scaled ones.
    """
    op = "causal_lm_loss"
    if not is_model(model) or model.config.is_encoder_decoder:
        raise TypeError(
            f"{op}: model is a {type(model).__name__}; allowed: a causal language model of "
            "transformers"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not bare(head):
        raise TypeError(
            f"{op}: the head of the model is a {type(head).__name__}; allowed: torch.nn.Linear "
            "without hooks"
        )
    if not _ends_in_head(model, head):
        raise TypeError(
            f"{op}: the logits of {type(model).__name__} are not those of its head; allowed: a "
            "model that returns what its head gives"
        )
    hidden = model.base_model(**inputs).last_hidden_state
    loss = F.linear_cross_entropy(
        *(hidden, head.weight, _shifted(labels, ignore_index).contiguous(), head.bias),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return _per_item(loss, num_items_in_batch)


_KNOWN_TO_END_IN_HEAD = weakref.WeakKeyDictionary()


def _ends_in_head(model, head) -> bool:
    """Whether the head gets the last hidden states and its result is the logits; found out once."""
    if model not in _KNOWN_TO_END_IN_HEAD:
        flags, inputs, results = {m: m.training for m in model.modules()}, [], []

        def hook(module, args, logits):
            inputs.append(args[0])
            results.append(torch.linspace(-99, 99, logits.numel()).to(logits).view_as(logits))
            return results[0]

        ids = torch.arange(min(4, head.weight.shape[0]), device=head.weight.device)[None]
        model.eval()
        handle = head.register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits = model(input_ids=ids).logits
                hidden = model.base_model(ids).last_hidden_state
        finally:
            handle.remove()
            for m, training in flags.items():
                m.training = training
        same = len(results) == 1 and torch.equal(logits.to(results[0].dtype), results[0])
        same = same and hidden.shape == inputs[0].shape and torch.allclose(hidden, inputs[0])
        _KNOWN_TO_END_IN_HEAD[model] = same
    return _KNOWN_TO_END_IN_HEAD[model]
