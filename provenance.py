"""What a result was made from: the machine and versions, digests of files, settings under which work may be reused."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from . import __version__
from .files import atomic_file, read_json

PACKAGES = ("torch", "transformers", "flash-linear-attention", "triton")


def environment(device: str | None = None) -> dict:
    """
    Hardware, date and versions, to stand beside every number.

    Args:
        device: where the number was computed; a GPU by default, if this process has PyTorch and PyTorch sees one.
    """
    torch = sys.modules.get("torch")  # not imported for this: a process without PyTorch has used no GPU
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if torch is not None:
        hardware += f", {torch.get_num_threads()} threads"
        if str(device or "cuda").startswith("cuda") and torch.cuda.is_available():
            hardware = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "hydrahead": __version__}  # it may run uninstalled
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware, "date": date.today().isoformat(), "versions": versions}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights in a model's folder, in hexadecimal."""
    if path.is_dir():
        parts = {file.name: digest(file) for file in sorted(path.glob("*.safetensors"))}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    found = path.stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@cache  # gigabytes, and asked for by every check
def _digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(before: Mapping, now: Mapping, prefix: str = "") -> str | None:
    """The first key, down to nested ones, that differs, with both values in words; `None` where nothing does."""
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            if found := first_difference(one, other, f"{prefix}{key}."):
                return found
        elif one != other:
            return f"{prefix}{key} ({one!r}, now {other!r})"
    return None


class Record:
    """
    Settings beside the work that was done under them, so that the same settings reuse it and others do not.

    Settings are what JSON makes of them: tuples are lists, paths text. The file may hold more at its top level, the
    state of the work: what the settings do not name is not compared.

    Args:
        path: of a JSON file.
        defaults: what files from before some settings were recorded stand for.
    """

    def __init__(self, path: Path, defaults: Mapping = MappingProxyType({})):
        self.path, self.defaults = path, defaults

    def read(self) -> dict | None:
        """
        What the file holds; `None` where there is none.

        Raises:
            ValueError: it cannot be read, or holds no JSON object.
        """
        return {**self.defaults, **read_json(self.path)} if os.path.lexists(self.path) else None

    def difference(self, settings: dict) -> str | None:
        """The first setting that the file has otherwise, in words; `None` where there is none, or no file."""
        before, now = self.read(), json.loads(json.dumps(settings, default=str))
        return None if before is None else first_difference({key: before.get(key) for key in now}, now)

    def matches(self, settings: dict) -> bool:
        """Whether work is there that was done under these settings."""
        return self.path.is_file() and self.difference(settings) is None

    def check(self, settings: dict, advice: str) -> None:
        """
        Raises:
            ValueError: the work that is there was done under other settings; names the first, and gives `advice`.
        """
        if changed := self.difference(settings):
            raise ValueError(f"{self.path.parent}: made with another {changed}; {advice}")

    def write(self, settings: dict) -> None:
        """Say under which settings the work is done, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as partial:
            partial.write_text(json.dumps(settings, indent=2, default=str) + "\n")
