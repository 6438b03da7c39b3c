"""Test that the annotations of public names are right at run time."""

import inspect
import typing

import pytest

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx

MODULES = (jaxbn, jaxbn.linen, jaxbn.nnx, jaxbn.convert)


def public_functions():
    """Yield all public functions, classes, and methods of their own."""
    for module in MODULES:
        for name in sorted(n for n in dir(module) if not n.startswith("_")):
            value = getattr(module, name)
            if inspect.isclass(value):
                yield value
                yield from filter(inspect.isfunction, vars(value).values())
            elif inspect.isfunction(value):
                yield value


@pytest.mark.parametrize(
    "function", [*public_functions()], ids=lambda f: f.__qualname__
)
def test_annotations_are_types(function):
    hints = typing.get_type_hints(function)
    if inspect.isfunction(function):
        assert {*hints} >= {*function.__annotations__}
