"""``python docs/build_api.py``: write ``docs/api.md`` from the docstrings of every public name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
MODULES = {
    "acs_triton": """\
Volumes are `(N, C, D, H, W)`. Sizes, strides, paddings and offsets are in voxels; a kernel is `(ku, kv)`
on the two axes of a plane. Floating-point tensors keep their dtype and device.

>>> import torch, acs_triton
>>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
>>> acs_triton.check_lifting(net, torch.rand(1, 1, 8, 8), depth=4) < 1e-5
True
>>> model = acs_triton.convert(net)
>>> model(torch.rand(2, 1, 4, 8, 8)).shape
torch.Size([2, 6, 2, 4, 4])
>>> what = acs_triton.describe(model, torch.rand(1, 1, 4, 8, 8))  # doctest: +ELLIPSIS
layer  operation   becomes            input ...
""",
    "acs_triton.functional": "The convolutions as functions, with derivatives of every order.",
    "acs_triton.operators": "The layers, with ACSConv's names, arguments and state-dict keys.",
    "acs_triton.lifting": "What `acs_triton.convert` is made of.",
    "acs_triton.converters": "ACSConv's converter names over `acs_triton.convert`.",
    "acs_triton.models": "Networks for volumes.",
    "acs_triton.viz": "Pictures of kernels and features.",
    "acs_triton.acsconv_compat": "Code written for the published package, unchanged.",
}


def public_names(module) -> list[str]:
    """The names in ``__all__`` that are no modules, or those that the module defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in names if name[0] != "_" and not inspect.ismodule(getattr(module, name))]


def plain(text: str) -> str:
    """Sphinx roles and double backticks as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def examples_fenced(lines: list[str]) -> list[str]:
    """Doctest examples in fences; the empty line before a closing fence ends the expected output."""
    result, inside = [], False
    for line in [*lines, ""]:
        if line.startswith(">>> ") and not inside:
            result.append("```pycon")
            inside = True
        if not line and inside:
            result += ["", "```"]
            inside = False
        result.append(line)
    return result


def markdown(docstring: str) -> str:
    """A Google-style docstring: sections in bold, their entries as a list."""
    lines, section = [], None
    for line in plain(inspect.cleandoc(docstring)).splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        elif section and line.startswith("    "):
            name, colon, rest = line.strip().partition(": ")
            entry = section != "Returns" and colon
            lines.append(f"* `{name}`: {rest}" if entry else line.strip())
        else:
            section = section if not line else None
            lines.append(line)
    return "\n".join(examples_fenced(lines)).strip()


def entry(name: str, value) -> str:
    if not callable(value):
        shown = repr(value).replace("'", '"')
        return f"### `{name}`\n\n```python\n{name} = {shown}\n```"
    signature = str(inspect.signature(value)) if inspect.isfunction(value) or "__init__" in vars(value) else ""
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)
    kind = "class " if inspect.isclass(value) else ""
    return f"### `{name}`\n\n```python\n{kind}{name}{signature}\n```\n\n{markdown(value.__doc__ or '')}"


def page() -> str:
    parts = ["# API", "Made from the docstrings by `python docs/build_api.py`. The examples are tested."]
    written = set()
    for name, introduction in MODULES.items():
        module = importlib.import_module(name)
        parts += [f"## `{name}`", markdown(introduction)]
        values = {public: getattr(module, public) for public in public_names(module)}
        parts += [entry(public, value) for public, value in values.items() if id(value) not in written]
        written |= {id(value) for value in values.values()}
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
