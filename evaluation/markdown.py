"""Text that others wrote, in Markdown that we write: a model's name is no markup, no HTML and no link."""

import html
import re
from collections.abc import Sequence

# What CommonMark and the Hub's renderer give a meaning to within a line; an underscore within a word has none.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_LINKS = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}  # which become links and mentions by themselves


def escaped(words: object) -> str:
    """What reads as `words` in one line of Markdown, and does nothing else."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(words)).split())
    line = _SPECIAL.sub(lambda found: "\\" + found[0], html.escape(line, quote=False))
    for plain, entity in _LINKS.items():
        line = line.replace(plain, entity)
    return line


def table(rows: Sequence[Sequence[object]], names: int = 1) -> str:
    """
    A table, heads of columns first.

    Args:
        rows: cells as plain text; they are escaped.
        names: so many columns, the first ones, stand left, all others right.
    """
    first, *others = [[escaped(cell) for cell in row] for row in rows]
    lines = [["---"] * names + ["---:"] * (len(first) - names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (first, *lines, *others))
