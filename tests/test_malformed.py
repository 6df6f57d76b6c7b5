"""
Whatever is wrong with whichever input, every command says so in one line and leaves everything as it was.

The table is made of the lines in `workshop.COMMANDS`, the inputs that each takes, and what can be wrong with each kind
of input. A command is one row there, an input one row in `DAMAGES`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter

import pytest
import torch
import yaml
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hydrahead.tests.families import HEADS, LAYERS, MIXED
from hydrahead.tests.gguf_models import tiny_teacher, write_gguf
from hydrahead.tests.workshop import (
    COMMANDS,
    as_anyone,
    inputs,
    line_of,
    make_workshop,
    run_command,
    succeed,
    tree,
    write_forms,
    write_teacher,
)

ALREADY = ("run", "demo", "score, aligning first", "select, exchanging")  # long ones work in test_security.py


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    write_teacher(folder / "other", num_hidden_layers=LAYERS + 1)
    write_forms(folder / "other_forms.safetensors", folder / "other")
    return folder


# Ways to damage a file. What they are given may be a link to the workshop's own: it is replaced, never written into.


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def empty(path: Path) -> None:
    replace(path, b"")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    replace(path, content[: len(content) // 2])


def not_utf8(path: Path) -> None:
    replace(path, b"\xff\xfe" + path.read_bytes())


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def read_only(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(0o555)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


def an_empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def holds(value) -> Callable[[Path], None]:
    """Something else, as JSON."""
    return lambda path: replace(path, json.dumps(value).encode())


def changed(**fields) -> Callable[[Path], None]:
    """The same JSON or YAML object with other values of some keys, by dotted names; `...` takes one out."""

    def damage(path: Path) -> None:
        content = yaml.safe_load(path.read_text())
        for name, value in fields.items():
            *parents, last = name.split(".")
            place = content
            for parent in parents:
                place = place[parent]
            place.pop(last) if value is ... else place.update({last: value})
        replace(path, json.dumps(content).encode())

    return damage


def of(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage to a file of a folder."""
    return lambda folder: damage(folder / name)


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """The same safetensors with other tensors."""

    def damage(path: Path) -> None:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        content = change(load_file(path))
        path.unlink()
        save_file(content, path, header.get("__metadata__"))

    return damage


def fewer_tensors(found: dict) -> dict:
    return dict(sorted(found.items())[:-1])


def cut_tensors(found: dict) -> dict:
    return {name: tensor[: max(1, len(tensor) - 1)].clone() for name, tensor in found.items()}


def whole_numbers(found: dict) -> dict:
    return {name: tensor.to(torch.int8) for name, tensor in found.items()}


def copy_of(other: str) -> Callable[[Path], None]:
    """Another thing of the same kind from the workshop."""

    def damage(path: Path) -> None:
        source = path.parent / other
        missing(path)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)

    return damage


def a_gguf_file(damage: Callable[[Path], None]) -> Callable[[Path], Path]:
    """A GGUF file in place of a folder."""

    def give(path: Path) -> Path:
        file = write_gguf(path.with_name("model.gguf"), tiny_teacher("llama3-tied"), "F32")
        damage(file)
        return file

    return give


FILE = {
    "missing": missing,
    "empty": empty,
    "truncated": truncated,
    "not UTF-8": not_utf8,
    "a folder": a_folder,
}
JSON = FILE | {
    "a number": holds(7),
    "a text": holds("seven"),
    "null": holds(None),
    "a list of texts": holds(["seven"]),
}
WEIGHTS = {
    "missing": missing,
    "empty": empty,
    "truncated": truncated,
    "a text": lambda path: replace(path, b"not safetensors at all, but long enough for a header"),
    "a folder": a_folder,
    "with a tensor less": tensors(fewer_tensors),
    "of another shape": tensors(cut_tensors),
    "in whole numbers": tensors(whole_numbers),
}
MODEL = {
    "missing": missing,
    "a file": a_file,
    "an empty folder": an_empty_folder,
    **{f"config.json {name}": of("config.json", damage) for name, damage in JSON.items()},
    **{f"weights {name}": of("model.safetensors", damage) for name, damage in WEIGHTS.items()},
    **{
        f"tokenizer.json {name}": of("tokenizer.json", damage)
        for name, damage in {**JSON, "of no model": holds({"version": "1.0"})}.items()
    },
    "generation_config.json truncated": of("generation_config.json", truncated),
    "tokenizer_config.json truncated": of("tokenizer_config.json", truncated),
    "layers in words": of("config.json", changed(num_hidden_layers="two")),
    "hidden size negative": of("config.json", changed(hidden_size=-48)),
    "heads null": of("config.json", changed(num_attention_heads=None)),
    "RoPE a number": of("config.json", changed(rope_parameters=7)),
    "of no known family": of("config.json", changed(model_type="seven")),
    "without a family": of("config.json", changed(model_type=...)),
}
DAMAGES = {
    "teacher": {
        **MODEL,
        **{
            f"a GGUF file {name}": a_gguf_file(damage)
            for name, damage in {
                "missing": missing,
                "empty": empty,
                "truncated": truncated,
                "a folder": a_folder,
            }.items()
        },
        "a GGUF file of text": a_gguf_file(lambda path: path.write_text("not GGUF")),
    },
    "student": {
        **MODEL,
        "read-only": read_only,
        "another teacher's": of("made_from.json", changed(teacher="other")),
        **{
            f"made_from.json {name}": of("made_from.json", damage)
            for name, damage in JSON.items()
            if name != "missing"
        },
        **{f"report.json {name}": of("report.json", damage) for name, damage in JSON.items() if name != "missing"},
        "masks of another shape": of("config.json", changed(head_masks=[[1, 0]])),
        "masks in words": of("config.json", changed(head_masks=[["one"] * HEADS] * LAYERS)),
    },
    "masks": {
        **JSON,
        "an object without masks": holds({"teacher": "teacher"}),
        "of other layers": holds([*MIXED, MIXED[0]]),
        "of other heads": holds([row[:-1] for row in MIXED]),
        "ragged": holds([MIXED[0], MIXED[1][:-1]]),
        "with a 2": holds([MIXED[0], [2] * HEADS]),
        "with texts": holds([MIXED[0], ["1"] * HEADS]),
        "another teacher's": changed(teacher="other"),
    },
    "scores": {
        **JSON,
        "without scores": changed(scores=...),
        "scores a number": changed(scores=7),
        "scores texts": changed(scores=[["a"] * HEADS] * LAYERS),
        "scores ragged": changed(scores=[[0.1] * HEADS, [0.1]]),
        "scores empty": changed(scores=[]),
        "tie-break of other layers": changed(tie_break=[[0.1] * HEADS]),
        "KV heads negative": changed(num_key_value_heads=-1),
        "KV heads zero": changed(num_key_value_heads=0),
        "KV heads that do not divide": changed(num_key_value_heads=4),
        "head size a text": changed(head_dim="sixteen"),
        "probes a number": changed(probes=7),
        "probes of numbers": changed(probes=[7]),
        "an unknown key": changed(seven=7),
        "an unknown method": changed(method="seven"),
    },
    "forms": {
        **WEIGHTS,
        "another teacher's": copy_of("other_forms.safetensors"),
        "a teacher's weights": copy_of("teacher/model.safetensors"),
    },
    "text": FILE | {"truncated": lambda path: replace(path, path.read_bytes()[:-9] + "é".encode()[:1])},
    "pairs": {
        **JSON,
        "answers of unequal length": holds({"clean": "x", "corrupt": "y", "answer": "1", "wrong": "one two three"}),
        "without an answer": changed(answer=...),
    },
    "corpus": {
        **{name: damage for name, damage in JSON.items() if name not in ("null", "a list of texts")},
        "without text": holds({"page": "seven"}),
        "text a number": holds({"text": 7}),
    },
    "begun": {
        "read-only": of("align", read_only),
        **{
            f"recipe.json {name}": of("align/recipe.json", damage)
            for name, damage in JSON.items()
            if name != "missing"
        },
        "recipe.json of nothing": of("align/recipe.json", holds({"align": {}})),
        "another teacher's": of("align/recipe.json", changed(**{"teacher.name": "other"})),
        **{f"facts.json {name}": of("align/facts.json", damage) for name, damage in JSON.items() if name != "missing"},
        **{
            f"tokens.json {name}": of("tokens/tokens.json", damage)
            for name, damage in JSON.items()
            if name != "missing"
        },
        "tokens.json of nothing": of("tokens/tokens.json", changed(tokens=...)),
        "tokens.json of another tokenizer": of("tokens/tokens.json", changed(tokenizer="other")),
        "tokens.bin truncated": of("tokens/tokens.bin", truncated),
        "tokens.bin missing": of("tokens/tokens.bin", missing),
        **{f"progress.json {name}": of("align/checkpoint-2/progress.json", damage) for name, damage in JSON.items()},
        **{
            f"checkpoint {name}": of(
                "align/checkpoint-2", lambda folder, damage=damage: damage(min(folder.glob("*.safetensors")))
            )
            for name, damage in {"missing": missing, "truncated": truncated, "empty": empty}.items()
        },
    },
    "recipe": {
        **JSON,
        "tabs": lambda path: replace(path, b"teacher:\n\tname: demo"),
        "an unknown key": changed(seven=7),
        "a text for a number": changed(**{"run.micro_batch_tokens": "many"}),
        "a number for a section": changed(data=7),
        "a list for a section": changed(run=[7]),
        "without tokens": changed(**{"align.tokens": ..., "distill.tokens": ..., "finetune.tokens": ...}),
        "zero lengths": changed(**{"align.length": 0, "distill.length": 0, "finetune.length": 0}),
        "negative tokens": changed(**{"align.tokens": -1, "distill.tokens": -1, "finetune.tokens": -1}),
        "micro-batches of none": changed(**{"run.micro_batch_tokens": 0}),
    },
    "out": {
        "under a file": lambda path: path.with_name("text.txt") / "out",
        "under a device": lambda path: Path("/dev/null/out"),
        "where nothing can be written": lambda path: Path("/proc/out"),
        "read-only": read_only,
        "a file": lambda path: path.write_text("not a folder") and None,
    },
}
NOT_READ = {  # of some inputs of some commands: what they make no use of cannot be wrong
    "plan": {"teacher": ("weights", "tokenizer", "generation")},
    "plan, of a recipe": {"teacher": ("weights", "tokenizer", "generation"), "corpus": "", "out": ""},
    "card": {"student": ("weights", "tokenizer", "generation", "another")},
    "push": {"student": ("tokenizer.json", "generation", "another", "read-only")},
    "chat": {"student": ("made_from", "report", "another", "read-only")},
    "evaluate, side by side": {
        "teacher": "weights in whole",  # of any model, which may be quantised
        "student": ("made_from", "report", "another", "read-only"),
    },
    "finetune": {"student": ("tokenizer", "report", "read-only")},
    "sft": {"student": ("report", "another", "read-only")},
}


QUICK = {  # the command on which everything that can be wrong with an input is tried; on the others, a part of it
    "teacher": "convert",
    "student": "evaluate",
    "masks": "convert",
    "scores": "select",
    "forms": "convert, aligned",
    "text": "convert",
    "pairs": "score",
    "corpus": "align",
    "recipe": "plan, of a recipe",
    "begun": "align, going on",
}
ELSEWHERE = (
    "missing",
    "read-only",
    "a file",
    "empty",
    "truncated",
    "not UTF-8",
    "another",
    "layers",
    "weights of",
    "of no known",
)


def cases() -> Iterator:
    """Every command, with each of its inputs and each way in which that can be wrong."""
    for command, line in COMMANDS.items():
        for name in dict.fromkeys(name for _, name, *_ in Formatter().parse(line) if name):
            is_home = QUICK.get(name, command) == command
            for damage in DAMAGES[name]:
                if damage.startswith(NOT_READ.get(command, {}).get(name, "nothing")):
                    continue
                if is_home or any(part in damage for part in ELSEWHERE):
                    is_slow = not is_home or damage.endswith(("a text", "null", "a list of texts", "a folder"))
                    marks = pytest.mark.slow if is_slow else ()
                    yield pytest.param(command, name, damage, id=f"{command}: {name}: {damage}", marks=marks)


CASES = list(cases())


@pytest.fixture
def copy(workshop, tmp_path, monkeypatch) -> Path:
    """The workshop once more, in files that may be replaced; what is written without being told where is in it too."""
    folder = tmp_path / "copy"
    shutil.copytree(workshop, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HOME", str(folder / "hub"))
    return folder


def test_the_table_is_long():
    assert len(CASES) > 200


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ALREADY])
def test_a_command_works_where_nothing_is_wrong(copy, command):
    succeed(line_of(command, inputs(copy)))


@pytest.mark.parametrize(("command", "name", "damage"), CASES)
def test_malformed_input_ends_in_one_line_and_leaves_everything_as_it_was(copy, command, name, damage):
    names = inputs(copy)
    names[name] = DAMAGES[name][damage](names[name]) or names[name]
    before = tree(copy)
    with as_anyone():
        ended = run_command(line_of(command, names))
    assert ended.error is None, f"{type(ended.error).__name__}: {ended.error}"
    assert ended.status != 0
    assert ended.said.startswith("hydrahead: ") and ended.said.count("\n") == 1, ended.said
    assert tree(copy) == before


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "none", "seven", "1", "../up", "\x00", "\ud800", "${a}"])
    | st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def places(content, above: tuple = ()) -> Iterator[tuple]:
    """Where something stands in JSON, as the keys and numbers that lead there."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, key))


@st.composite
def changed_somewhere(draw, content: dict) -> str:
    """JSON of an object in which one to three places hold anything else, or nothing any more."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(places(content)) or [("key",)]))
        place = content
        for key in parents:
            place = place[key]
        if draw(st.booleans()) or isinstance(place, list):
            place[last] = draw(VALUES)
        else:
            place.pop(last, None)
    return json.dumps(content)


@pytest.mark.parametrize(("command", "name"), [("plan, of a recipe", "recipe"), ("select", "scores")])
@given(data=st.data())
def test_whatever_a_file_holds_the_command_works_or_refuses_it_in_one_line(workshop, copy, command, name, data):
    names = inputs(copy)
    content = yaml.safe_load((workshop / names[name].name).read_text())
    replace(names[name], data.draw(changed_somewhere(content).map(str.encode) | st.binary(max_size=40)))
    before = tree(copy)
    ended = run_command(line_of(command, names))
    assert ended.error is None, f"{type(ended.error).__name__}: {ended.error}"
    if ended.status == 0:
        shutil.rmtree(copy / "out", ignore_errors=True)
    else:
        assert ended.said.startswith("hydrahead: ") and ended.said.count("\n") == 1, ended.said
    assert tree(copy) == before
