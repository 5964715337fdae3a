"""The examples in docstrings and in the README run."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

import acs_triton

ROOT = Path(__file__).parents[1]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(acs_triton.__path__, "acs_triton.")
    if not module.name.startswith(("acs_triton.kernels", "acs_triton.demo", "acs_triton.backends.triton"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    modules = dict(sys.modules)  # one example puts this library in ACSConv's place
    try:
        result = doctest.testmod(module, extraglobs={"torch": torch})
    finally:
        sys.modules.clear()
        sys.modules.update(modules)
    assert result.failed == 0


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_examples():
    pytest.importorskip("torchvision")
    names = {"x": torch.zeros(1, 3, 8, 8, 8), "weight": torch.zeros(6, 3, 3, 3)}
    before = acs_triton.current_backend()
    try:
        for block in readme_blocks():
            exec(block, names)
    finally:
        acs_triton.use_backend(before)
    assert names["logits"].shape == (1, 1000)


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"(?:tests|acs_triton|benchmarks)/[\w/]*(?:\.py)?", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
