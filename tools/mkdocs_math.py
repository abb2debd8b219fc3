"""Hook of mkdocs: replaces LaTeX between dollar signs by MathML.

Browsers render MathML without a script, so the site loads nothing from other servers. On GitHub the same
Markdown shows the formulas, because the pages contain LaTeX.
"""

import re
from typing import Any

# Code blocks and inline code are matched first and stay as they are.
PATTERN = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?<!\\)\$\$(?P<block>.+?)\$\$|(?<!\\)\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$",
    re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the Markdown of a page with its formulas as MathML."""
    return PATTERN.sub(_replaced, markdown)


def _replaced(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    if match["code"]:
        return match["code"]
    latex, display = (match["block"], "block") if match["block"] else (match["inline"], "inline")
    text: str = convert(latex.strip(), display=display)
    return f'<div class="formula">{text}</div>' if display == "block" else text
