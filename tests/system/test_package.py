"""Test the imports, the requirements and the public names of the package."""

import pydoc
import sys
from importlib.metadata import requires, version
from types import ModuleType

import pytest
from helpers import run_script

import jaxbn

LIST_IMPORTS = """
import sys
before = set(sys.modules)
import jaxbn{also}
after = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(after & {{"flax", "optax", "chex", "beartype", "matplotlib"}}))
"""


@pytest.mark.parametrize(
    ("also", "found"), [("", "[]"), (", optax", "['optax']"), (".linen", "'flax'")]
)
def test_core_imports_neither_flax_nor_optax(also, found):
    """The other parameters test that the script detects an import."""
    assert found in run_script(LIST_IMPORTS.format(also=also))


def test_core_requires_only_jax_and_jaxtyping():
    core = [r for r in requires("jaxbn") or [] if "extra ==" not in r]
    assert sorted(r.partition(">")[0] for r in core) == ["jax", "jaxtyping"]


def test_version_matches_the_metadata():
    assert jaxbn.__version__ == version("jaxbn")


def test_core_works_without_flax_and_linen_error_names_flax():
    script = """
import sys
sys.modules["flax"] = None  # as if it were not installed
import jaxbn
params, state = jaxbn.init(2)
try:
    jaxbn.linen
except ModuleNotFoundError as error:
    print(error)
"""
    assert "flax" in run_script(script)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxbn' has no attribute 'haiku'"):
        jaxbn.haiku  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_public_names_are_complete_and_documented():
    public = {
        name
        for name, value in vars(jaxbn).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    variables = {"BatchNormParams", "BatchNormState", "BatchStatistics"}
    functions = {"batch_norm", "batch_renorm", "checkpoint_policy", "init"}
    functions |= {"batch_statistics", "normalize", "update_running_stats"}
    functions |= {"fold", "inference_affine", "merge_states", "population"}
    assert public == variables | functions
    for name in public:
        assert getattr(jaxbn, name).__doc__.strip()


def test_dir_lists_public_names_and_submodules_alone():
    names = set(dir(jaxbn))
    assert {"linen", "nnx", "convert", "batch_norm", "__version__"} <= names
    assert not [name for name in names if name.startswith("_") and name[:2] != "__"]
    assert not {"importlib", "types", "typing"} & names


def test_help_of_batch_norm_fits_a_terminal():
    text = pydoc.plain(pydoc.render_doc(jaxbn.batch_norm))
    assert "y = (x - μ) / √(σ² + ε) · scale + bias" in text
    assert "$" not in text
    signature, body = text.split("Normalize `x`")
    assert max(map(len, body.splitlines())) <= 92  # 88, indented by 4
    assert "numpy" not in signature
    if sys.version_info >= (3, 13):  # earlier versions print one line
        assert max(map(len, signature.splitlines()[1:])) <= 80
