"""The snippets of docs/use_with.md, run in the order of the page."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only

PAGE = Path(__file__).parent.parent / "docs" / "use_with.md"
LIBRARIES = "transformers", "timm", "torchvision", "peft", "lightning"
if not all(map(importlib.util.find_spec, LIBRARIES)):
    pytest.skip("needs the extra `models`", allow_module_level=True)

from bench.models import import_transformers  # noqa: E402


def snippets():
    """(line, code) of the page's blocks of Python."""
    text = PAGE.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield text[: match.start(1)].count("\n"), match[1]


def test_snippets(capsys, tmp_path, monkeypatch):
    import_transformers()
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names = {"__name__": "use_with"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        for line, code in snippets():
            exec(compile("\n" * line + code, PAGE, "exec"), names)
    assert "Replacements" in capsys.readouterr().out
    assert len(list(snippets())) >= 8
