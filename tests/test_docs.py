"""The examples in docstrings and in the README run."""

import doctest
import importlib.util
import inspect
import pkgutil
import re
import sys
from contextlib import contextmanager
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


@contextmanager
def acsconv_put_back():
    """One example puts this library in ACSConv's place."""

    def imported():
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "acsconv"}

    before = imported()
    yield
    for name in imported():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    with acsconv_put_back():
        assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def api():
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_that_of_the_docstrings():
    assert (ROOT / "docs" / "api.md").read_text() == api().page(), "run python docs/build_api.py"


def test_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = [importlib.import_module(name) for name in MODULES if name.count(".") == 1]
    names = {name for module in (acs_triton, *modules) for name in getattr(module, "__all__", ())}
    modules = {name for name in names if inspect.ismodule(getattr(acs_triton, name, None))}
    assert {"ACSConv", "acs_conv3d", "convert", "use_backend"} < names
    assert [name for name in sorted(names - modules) if f"### `{name}`" not in text] == []
    assert [name for name in sorted(modules) if f"## `acs_triton.{name}`" not in text] == []


def test_api_page_examples():
    names = {"torch": torch, "acs_triton": acs_triton}
    page = api()
    for module in map(importlib.import_module, page.MODULES):
        names |= {name: getattr(module, name) for name in page.public_names(module)}
    with acsconv_put_back():
        result = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False, globs=names)
    assert result.attempted > 20
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
