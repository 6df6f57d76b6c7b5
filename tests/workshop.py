"""Everything that commands take as input, tiny and valid, and the command lines that take it."""

import contextlib
import ctypes
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import save_forms
from hydrahead.convert.migration import convert_to_folder
from hydrahead.convert.options import options_of, student_config
from hydrahead.convert.scoring.scores import HeadScores, ProbeResult
from hydrahead.convert.teachers import EMBEDDED_TEACHER, open_teacher
from hydrahead.tests.families import HEADS, KV_HEADS, LAYERS, MIXED, make_teacher
from hydrahead.tests.training_runs import MAINS as STAGES
from hydrahead.training import sft

MAINS = STAGES | {"sft": sft.main}
VOCABULARY, NATIVE = 2048, 512
WORDS = ["amber", "basket", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket"]
STAGE = {"tokens": 256, "batch_tokens": 128, "length": 64, "learning_rate": 1e-3, "final_learning_rate": 1e-4}
RECIPE = {
    "data": {"heldout_tokens": 512},
    "teacher": {"dtype": "float32"},
    "run": {"micro_batch_tokens": 64, "mixed_precision": "no"},
    "evaluate": {"lengths": [192], "tasks": ["niah_single_2"], "prompts": 1, "new_tokens": 2, "text_tokens": 192},
    "align": STAGE | {"calibration_tokens": 64},
    "score": {"length": 192, "pairs": 1, "only": ["niah-single.value"], "evidence": False},
    "select": {"strategy": "global"},
    "distill": dict(STAGE),
    "finetune": dict(STAGE),
}
COMMANDS = {
    "score": "score {teacher} {out} --forms {forms} --text {text} --probe {pairs} --no-built-in --length 192 "
    "--no-evidence --dtype float32 --method attention",
    "score, aligning first": "score {teacher} {out} --text {text} --probe {pairs} --length 192 --pairs 1 "
    "--no-evidence --align-steps 1 --dtype float32",
    "select": "select {scores} --output {out}/masks.json --strategy global",
    "select, exchanging": "select {scores} --output {out}/masks.json --strategy global --exchange 1 "
    "--teacher {teacher} --forms {forms} --text {text} --length 192",
    "convert": "convert {teacher} {out} --masks {masks} --text {text}",
    "convert, aligned": "convert {teacher} {out} --masks {masks} --forms {forms}",
    "run": "run {recipe} output={out} teacher.name={teacher} data.name={corpus} score.text={text} "
    "score.probe=[{pairs}]",
    "demo": "demo --config {recipe} --teacher {teacher} output={out} data.name={corpus} score.probe=[{pairs}]",
    "plan": "plan {teacher} --ratio 0.25",
    "plan, of a recipe": "plan {recipe} teacher.name={teacher} data.name={corpus} masks={masks} output={out}",
    "evaluate": "evaluate {student} --teacher {teacher} --text {text} --scores {scores} --lengths 200 "
    "--tasks niah_single_2 --prompts 1 --new-tokens 2 --text-tokens 192",
    "evaluate, side by side": "evaluate {teacher} {student} --text {text} --output {out} --lengths 192 "
    "--tasks niah_single_2 --prompts 1 --new-tokens 2 --text-tokens 192",
    "card": "card {student}",
    "push": "push {student} someone/student --dry-run",
    "chat": "chat {student}",
    "align": "align --config {recipe} output={out} teacher.name={teacher} data.name={corpus}",
    "align, going on": "align --config {recipe} output={begun} teacher.name=./teacher data.name=./corpus.jsonl "
    "align.tokens=384",
    "distill": "distill --config {recipe} output={out} teacher.name={teacher} data.name={corpus} masks={masks} "
    "distill.head_forms={forms}",
    "finetune": "finetune --config {recipe} output={out} teacher.name={teacher} data.name={corpus} masks={masks} "
    "finetune.student={student}",
    "sft": "sft --model_name_or_path {student} --dataset_name {corpus} --output_dir {out} --max_steps 1 --use_cpu "
    "--max_length 32 --per_device_train_batch_size 1 --report_to none --save_strategy no",
}
"""Lines of the commands; a word in braces is an input in the workshop, `out` what is written."""


@dataclass
class Ended:
    """How a command ended: its status, what it wrote on stderr and stdout, and the error that got through, if any."""

    status: int
    said: str
    printed: str = ""
    error: BaseException | None = None


def run_command(line: Sequence[str], typed: str = "/quit\n") -> Ended:
    """Run a command, or a stage of training, in this process, with what is typed into it."""
    name, *words = line
    if name not in MAINS:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [name, *words], input=typed)
        error = None if isinstance(result.exception, (SystemExit, type(None))) else result.exception
        return Ended(result.exit_code, result.stderr, result.stdout, error)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            MAINS[name](words)
        except SystemExit as ended:
            return Ended(ended.code or 0, said.getvalue())
        except Exception as error:
            return Ended(1, said.getvalue(), error=error)
    return Ended(0, said.getvalue())


DAC_OVERRIDE = 1 << 1  # the superuser's right to write wherever it wants, in linux/capability.h


@contextlib.contextmanager
def as_anyone() -> Iterator[None]:
    """Files and folders that may not be written are not written, by the superuser of Linux neither."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    try:
        sets[0] = effective & ~DAC_OVERRIDE
        assert libc.capset(header, sets) == 0
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def succeed(line: Sequence[str]) -> None:
    """Run a command that has to work."""
    ended = run_command(line)
    assert (ended.status, ended.error) == (0, None), ended.said


def inputs(folder: Path) -> dict[str, Path]:
    """Inputs in a workshop by their names in the lines of commands."""
    return {path.stem: path for path in folder.iterdir()} | {"out": folder / "out"}


def line_of(command: str, names: Mapping[str, Path]) -> list[str]:
    """The words of a command's line, on some inputs."""
    return [word.format(**names) for word in COMMANDS[command].split()]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All files of a folder with what they hold, and all folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write_text(path: Path, pages: int = 60) -> Path:
    """Text of some pages, no two alike: plain, or a page a line under `text`."""
    written = [" ".join(WORDS[(page * step) % 10] for step in range(1, 120)) for page in range(1, pages)]
    is_json = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" if is_json else f"{each}\n\n" for each in written))
    return path


def write_teacher(folder: Path, family: str = "qwen3-tied", **changes) -> None:
    """A teacher with the tokenizer of the one that ships."""
    sizes = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": NATIVE}
    make_teacher(family, **sizes | changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_TEACHER).save_pretrained(folder)


def write_forms(path: Path, teacher: Path) -> None:
    opened = open_teacher(teacher)
    config = student_config(opened.adapter, opened.adapter.blank_masks)
    forms = head_forms_of(opened.load(device="cpu"), torch.arange(64).view(1, 64), config)
    save_forms(forms, options_of(config), path, opened.identity)


def write_scores(path: Path, teacher: str = "teacher", layers: int = LAYERS, heads: int = HEADS) -> None:
    effects = {"receiver": [[[0.5, 0.1, 0.0, 0.2, 0.3, 0.0][:heads]] * layers]}
    probe = ProbeResult("a", "retrieval", pairs=1, used=1, answered=1, readouts=[[4.0, 1.0]], effects=effects)
    drawn = HeadScores.drawn(layers, heads, KV_HEADS)
    drawn.probes, drawn.teacher, drawn.head_dim = [probe], teacher, 16
    drawn.using("receiver").save(path)


def write_short_teacher(folder: Path, layers: int = 2) -> Path:
    """The shipped teacher up to its retrieval heads, in layer 1: it finds needles still, in a third of the time."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_TEACHER)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers, model.config.layer_types = layers, model.config.layer_types[:layers]
    shutil.copytree(EMBEDDED_TEACHER, folder)
    model.save_pretrained(folder)
    return folder


def write_pairs(path: Path, teacher: Path) -> None:
    """A pair of which even a teacher of random weights knows the answer: what it says in the one case only."""
    opened, texts = open_teacher(teacher), {"clean": "x = 1", "corrupt": "x = 2"}
    tokenizer, model = opened.tokenizer(), opened.load(device="cpu")
    clean, corrupt = (model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts.values())
    order = [word for token in (clean - corrupt).argsort() if (word := tokenizer.decode(token)).isalpha()]
    path.write_text(json.dumps(texts | {"answer": order[-1], "wrong": order[0]}) + "\n")


def make_workshop(folder: Path) -> None:
    """All inputs, of one teacher."""
    write_teacher(folder / "teacher")
    write_text(folder / "text.txt")
    write_text(folder / "corpus.jsonl")
    (folder / "masks.json").write_text(json.dumps({"masks": MIXED, "teacher": "teacher", "revision": None}))
    write_scores(folder / "scores.json")
    write_pairs(folder / "pairs.jsonl", folder / "teacher")
    write_forms(folder / "forms.safetensors", folder / "teacher")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    names = inputs(folder) | {"begun": Path("begun")}
    with contextlib.chdir(folder):  # names in the record of what was begun hold in any copy
        succeed([word.replace("384", "256") for word in line_of("align, going on", names)])
    convert_to_folder(str(folder / "teacher"), folder / "student", folder / "masks.json", folder / "text.txt")
    # At another length, so that there is more to measure.
    succeed([word.replace("200", "208") for word in line_of("evaluate", inputs(folder))])
    succeed(["card", str(folder / "student"), "--license", "apache-2.0"])
