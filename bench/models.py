"""Whole models."""

import torch


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
