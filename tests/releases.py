"""Prints what pip installs beside .venv: the lowest versions that pyproject.toml admits, the newest, or quantizers."""

import re
import sys
import tomllib
from pathlib import Path

requirements = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
if sys.argv[1:] == ["lowest"]:
    # Not torch: a second one is gigabytes. Its lower bound is the one that the GPU benchmarks ran on.
    print(*(re.sub(r">=([\w.]+).*", r"==\1", each) for each in requirements if not each.startswith("torch")))
elif sys.argv[1:] == ["newest"]:
    print(*(each for each in requirements if each.startswith("transformers")))
elif sys.argv[1:] == ["quantizers"]:
    # Not in .venv: wherever transformers or PEFT is imported, they say on stderr what they could not load.
    print("bitsandbytes==0.50.2 torchao==0.18.0")
else:
    sys.exit("usage: releases.py lowest|newest|quantizers")
