"""Check the installed wheel, in an environment with JAX but without Flax.

Beside this file there is no `jaxbn`: it is imported from the environment.
"""

import re
from importlib import import_module
from importlib.metadata import metadata

import jax.numpy as jnp

import jaxbn


def message_on_import(name: str) -> str:
    """Return the message of the error, or nothing if the module is found."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        return str(error)
    return ""


# PyPI resolves no relative link. In code "](" is an index and a call.
readme = metadata("jaxbn")["Description"]
prose = re.sub(r"```.*?```|`[^`]*`", "", readme, flags=re.DOTALL)
relative = re.findall(r'(?:\]\(|src="|href=")((?!https:|#)[^)"]*)', prose)
assert "](https:" in prose, "The wheel has no README."
assert not relative, f"Links in the README for PyPI must be absolute: {relative}"

params, state = jaxbn.init(2)
x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
y, state = jaxbn.batch_norm(params, state, x, train=True)
assert jnp.allclose(y, jnp.array([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4), y

for name in ["jaxbn.linen", "jaxbn.nnx"]:
    assert "pip install 'jaxbn[flax]'" in message_on_import(name), name
