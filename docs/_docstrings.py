"""Prepare docstrings and signatures for the API reference: an extension of griffe.

The docstrings are Markdown except for their doctests; the annotations hold shapes for
jaxtyping, which would crowd a signature.
"""

import re
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).parent / "api"
PUBLIC = {
    name
    for page in API.glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}
SHAPED = {"Array", "Bool", "Float", "Inexact", "Int", "Real"}  # jaxtyping's


class Readable(griffe.Extension):
    """Fence doctests, link public names, and take shapes out of annotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Run for each module, class, function and attribute."""
        if obj.docstring:
            text = _link_names(obj.docstring.value, obj.path)
            obj.docstring.value = _fence_doctests(text)
        if isinstance(obj, griffe.Function):
            obj.returns = _simple(obj.returns)
            for parameter in obj.parameters:
                parameter.annotation = _simple(parameter.annotation)
        if isinstance(obj, griffe.Attribute):
            obj.annotation = _simple(obj.annotation)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a NamedTuple, whose source has no `__init__`, its signature."""
        if "NamedTuple" in map(str, cls.bases):
            init = griffe.Function("__init__", parameters=_parameters(cls))
            cls.set_member("__init__", init)


def _parameters(cls: griffe.Class) -> griffe.Parameters:
    kind = griffe.ParameterKind.positional_or_keyword
    fields = [
        griffe.Parameter(name, annotation=_simple(field.annotation), kind=kind)
        for name, field in cls.attributes.items()
    ]
    return griffe.Parameters(griffe.Parameter("self", kind=kind), *fields)


def _fence_doctests(text: str) -> str:
    """Put every doctest, from `>>>` to the next empty line, in a block of code."""
    block = r"^>>> .*?(?=\n\n|\Z)"
    return re.sub(block, r"```pycon\n\g<0>\n```", text, flags=re.M | re.S)


def _link_names(text: str, here: str) -> str:
    """Link every public name in backticks, except in its own docstring."""

    def link(match: re.Match[str]) -> str:
        known = match[1] in PUBLIC - {here}
        return f"[{match[0]}][{match[1]}]" if known else match[0]

    return re.sub(r"`(jaxbn\.[\w.]+)`", link, text)


def _simple(annotation: Any) -> Any:
    """Replace jaxtyping's `Float[Array, "..."]` by `Array`, an alias by its class."""
    match annotation:
        case griffe.ExprName(name="AnyParams"):
            return griffe.ExprName("BatchNormParams", annotation.parent)
        case griffe.ExprSubscript(
            left=griffe.ExprName(name=name), slice=griffe.ExprTuple(elements=parts)
        ) if name in SHAPED:
            return parts[0]
        case griffe.ExprBinOp(operator="|"):
            left, right = _simple(annotation.left), _simple(annotation.right)
            return griffe.ExprBinOp(left, "|", right)
        case griffe.ExprSubscript():
            return griffe.ExprSubscript(annotation.left, _simple(annotation.slice))
        case griffe.ExprTuple():
            elements = [_simple(element) for element in annotation.elements]
            return griffe.ExprTuple(elements, implicit=annotation.implicit)
    return annotation
