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
# Fields and defaults of linen's layer, which are mostly Flax's; the last three are not.
LINEN = re.findall(r"^\| `(\w+)` \| `([^|]+)` \|", (API / "linen.md").read_text(), re.M)
POSITIONAL = griffe.ParameterKind.positional_or_keyword
KEYWORD = griffe.ParameterKind.keyword_only
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
        """Give a NamedTuple or linen layer, without `__init__`, its signature."""
        if "NamedTuple" in map(str, cls.bases):
            parameters = _parameters(cls)
        elif cls.path.startswith("jaxbn.linen.") and cls.name.startswith("Batch"):
            parameters = _linen_parameters(cls)
        else:
            return
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _parameters(cls: griffe.Class) -> griffe.Parameters:
    fields = [
        griffe.Parameter(name, annotation=_simple(field.annotation), kind=POSITIONAL)
        for name, field in cls.attributes.items()
    ]
    return griffe.Parameters(griffe.Parameter("self", kind=POSITIONAL), *fields)


def _linen_parameters(cls: griffe.Class) -> griffe.Parameters:
    fields = dict(LINEN)
    if cls.name == "BatchRenorm":
        del fields["virtual_batch_size"]  # of batch norm alone
    for name, field in cls.attributes.items():
        default = re.search(r"default=([^,)]+)", str(field.value))
        if name not in dict(LINEN) and default:
            fields[name] = default[1]
    parameters = griffe.Parameters(griffe.Parameter("self", kind=POSITIONAL))
    for name, default in fields.items():
        kind = POSITIONAL if name in dict(LINEN[:-3]) else KEYWORD
        parameters.add(griffe.Parameter(name, kind=kind, default=default))
    return parameters


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
