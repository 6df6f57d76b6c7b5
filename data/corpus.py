"""Real text that every machine with Python holds: the standard library's sources, documentation and licence."""

import ast
import hashlib
import inspect
import re
import sysconfig
from pathlib import Path

import numpy as np

# Tests, generated tables and vendored or optional parts: long, repetitive, or absent on some systems.
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "distutils", "tkinter", "turtledemo",
    "encodings", "ensurepip", "__pycache__", "__phello__",
}  # fmt: skip
_HELD_OUT_SHARE = 0.05

# Every triple-quoted string, in order, so that a closing quote is never taken for an opening one; group 1 is set
# for those that open a line: documentation strings. Six times faster than parsing the sources.
_TRIPLE_QUOTED = re.compile(r"(^[ \t]*)?[rRuUbBfF]{0,2}(\"\"\"|''')(.*?)\2", re.DOTALL | re.MULTILINE)
_SHORTEST_DOCSTRING = 80


def load_corpus(split: str = "train") -> list[str]:
    """
    Read one split of the standard library's text.

    A document is a source file, the documentation strings of a source file as prose, a topic of Python's help, or a
    licence text. The split is a hash of the document's path inside the library, so a file held out on one Python
    version is held out on all; documentation strings go with their source file.

    Args:
        split: `"train"` (about 95% of the files) or `"heldout"`.

    Returns:
        Documents in a fixed order, each a non-empty string with `\\n` line ends.

    Raises:
        ValueError: `split` is neither name.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split is "train" or "heldout", got {split!r}')
    wanted = split == "heldout"
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        if relative.parts[0] == "pydoc_data":
            if relative.stem == "topics":
                documents += [text for name, text in _help_topics(path) if _is_held_out(f"topics/{name}") == wanted]
        elif _is_held_out(_module_path(relative)) == wanted:
            source = path.read_text(encoding="utf-8", errors="ignore")
            documents += [source, _docstrings(source)]
    if not wanted:
        documents += [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(root.glob("LICENSE*"))]
    return [text for document in documents if (text := document.strip())]


def encode_corpus(tokenizer, documents: list[str]) -> np.ndarray:
    """Token ids of the documents one after the other, a blank line after each: int64 `[tokens]`."""
    documents = [document + "\n\n" for document in documents]
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded.input_ids])


def _module_path(relative: Path) -> str:
    """The same name whether a module is `zipfile.py` or, in a later Python, `zipfile/__init__.py`."""
    return relative.with_suffix("").as_posix().removesuffix("/__init__")


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def _docstrings(source: str) -> str:
    found = (inspect.cleandoc(match[3]) for match in _TRIPLE_QUOTED.finditer(source) if match[1] is not None)
    return "\n\n".join(text for text in found if len(text) >= _SHORTEST_DOCSTRING)


def _help_topics(path: Path) -> list[tuple[str, str]]:
    """The help texts are the values of one dictionary literal."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []
