"""Checkpoint folders that load anywhere, and the proof of it: a process without hydrahead."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_hydrahead import AUTO_MAP
from ..files import atomic_folder, read_json
from ..provenance import Record
from .card import write_card
from .folder import MADE_FROM

if TYPE_CHECKING:  # what only writes files needs no PyTorch
    from transformers import PreTrainedTokenizerBase

    from ..modeling_hydrahead import HydraHeadForCausalLM

CODE = [f"{name}_hydrahead.py" for name in ("configuration", "kernels", "modeling", "ops")]


def save_checkpoint(
    student: "HydraHeadForCausalLM",
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: str | Path,
    made_from: Mapping | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write a student as a folder that loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        made_from: gives the folder a card, the masks and `made_from.json`: `teacher` (its public name), `revision`,
            `inherited` (`hub.metadata.inherited`), `options`, `masks` and `forms` (the SHA-256 of each file and what
            it says of itself; empty where there was none), `stages`, what each stage of training says of itself,
            among it `stage` and a `summary` in words; where heads were measured only, `calibrated_on`.
        overwrite: replace what the folder holds.

    Raises:
        ValueError: the folder holds something already, and `overwrite` is not set.
    """
    with atomic_folder(folder, overwrite) as partial:
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if made_from is not None:
            Record(partial / "head_masks.json").write(student.config.head_masks)
            Record(partial / MADE_FROM).write(dict(made_from))
            write_card(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read


def check_code(folder: Path) -> None:
    """
    Check that what a folder makes transformers run, where it is trusted, is this package's own code and no other.

    Raises:
        ValueError: it names, holds or lacks other code.
    """
    advice = "not the code of this hydrahead; load the student with it and save it again"
    for path in folder.rglob("*.py"):
        if path.parent != folder or path.name not in CODE:
            raise ValueError(f"{path}: {advice}")
    for name in CODE:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}, which whoever loads it needs")
        if (folder / name).read_bytes() != (Path(__file__).parents[1] / name).read_bytes():
            raise ValueError(f"{folder / name}: {advice}")
    for name, own in (("config.json", AUTO_MAP), ("tokenizer_config.json", None)):
        if (folder / name).is_file() and read_json(folder / name).get("auto_map") != own:
            raise ValueError(f"{folder / name}: its auto_map names {advice}")


# What a process without hydrahead begins with: an import of it fails, whatever is installed.
_WITHOUT_HYDRAHEAD = """
import json, sys
sys.modules["hydrahead"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
"""
_RELOAD = """
folder, max_new_tokens = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(sys.stdin.read(), return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"class": type(model).__module__, "answer": answer}))
"""


def answer_in_clean_process(folder: str | Path, prompt: str, max_new_tokens: int = 16) -> str:
    """
    Load a checkpoint folder in a fresh Python process that cannot import hydrahead, and continue a prompt greedily.

    Returns:
        the text of the continuation.

    Raises:
        ValueError: the folder's code, which is run there, is not this package's own.
        RuntimeError: the folder does not load or generate there, with the last line of what the process said.
    """
    check_code(Path(folder))
    arguments = [str(Path(folder).absolute()), str(max_new_tokens)]
    result = run_clean_process(_RELOAD, arguments, prompt, {"HF_HUB_OFFLINE": "1"}, str(folder))
    assert result["class"].startswith("transformers_modules."), result
    return result["answer"]


def run_clean_process(
    code: str, arguments: Sequence[str], prompt: str, environment: Mapping[str, str], name: str
) -> dict:
    """
    Run Python code in a fresh process that cannot import hydrahead.

    Args:
        code: finds `AutoModelForCausalLM`, `AutoTokenizer`, `json` and `sys` imported, `arguments` in `sys.argv` and
            `prompt` on stdin; prints JSON in its last line.
        environment: on top of this process's.
        name: of what is loaded, for the error.

    Returns:
        what it printed.

    Raises:
        RuntimeError: it failed, with the last line of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_HYDRAHEAD + code, *arguments],
        input=prompt,
        capture_output=True,
        text=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", **environment},
        cwd=tempfile.gettempdir(),
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"{name}: does not load in a clean process: {said[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
