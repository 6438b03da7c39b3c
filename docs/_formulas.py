r"""A hook for MkDocs: formulas become MathML, which browsers draw themselves.

That needs no script and no other host, but a font that was made for it, or roots and
brackets do not grow with what they hold. Not every system has one: the site brings the
part of STIX Two Math that its formulas use.
"""

import html
import io
import re
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from fontTools import subset
from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

CONVERTER = LatexToMathML(fancy_error=False)

# ASCII, Greek, the italic letters that a browser takes for them in a formula, and the
# root, which MathML does not write as a character.
LETTERS = [(0x20, 0x7F), (0x391, 0x3F6), (0x1D434, 0x1D468), (0x1D6E2, 0x1D71C)]
ROOT = 0x221A
_used = {ROOT}


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draw the formulas, which Arithmatex has marked."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda m: _formula(m[2], m[1] == "div", page.file.src_uri),
        html,
        flags=re.DOTALL,
    )


def _formula(text: str, display: bool, page: str) -> str:
    latex = _upright_words(html.unescape(text).strip())
    try:
        mathml = CONVERTER.convert_with_local_state(latex, displaystyle=display)
    except LatexError as error:
        raise PluginError(f"{page}: {error} in {latex!r}") from error
    _used.update(map(ord, mathml))
    return f'<div class="formula">{mathml}</div>' if display else mathml


def _upright_words(latex: str) -> str:
    """Names of more than one letter as words, not as products of their letters."""
    skipped = r"\\(?:text|mathrm|operatorname|begin|end)\{[^}]*\}|\\[A-Za-z]+"
    return re.sub(
        rf"{skipped}|([A-Za-z]{{2,}})",
        lambda m: rf"\mathrm{{{m[1]}}}" if m[1] else m[0],
        latex,
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Write the font for the characters that were used."""
    letters = chain.from_iterable(range(*bounds) for bounds in LETTERS)
    font = _subset({*letters, *_used})
    (Path(config.site_dir) / "css" / "math.woff2").write_bytes(font)


def _subset(characters: set[int]) -> bytes:
    """Of STIX Two Math (SIL Open Font License), with its names and its license."""
    # "ssty" has the shapes of indices; sizes of roots and brackets come with MATH.
    options = subset.Options(flavor="woff2", name_IDs=["*"], layout_features=["ssty"])
    source = files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    font = subset.load_font(io.BytesIO(source.read_bytes()), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=characters)
    subsetter.subset(font)
    written = io.BytesIO()
    subset.save_font(font, written, options)
    return written.getvalue()
