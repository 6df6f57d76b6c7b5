"""A folder, a recipe and a score file from a stranger are data: what was tried to make more of them."""

import ast
import builtins
import json
import pickle
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hydrahead.files import atomic_file, atomic_folder
from hydrahead.hub.checkpoint import answer_in_clean_process, check_code
from hydrahead.tests.families import MIXED
from hydrahead.tests.workshop import (
    COMMANDS,
    inputs,
    line_of,
    make_workshop,
    run_command,
    succeed,
    tree,
    write_teacher,
)

ROOT = Path(__file__).parents[1]
SLOW = ("run", "demo", "score, aligning first", "select, exchanging", "convert, aligned", "distill", "align, going on")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


@pytest.fixture
def copy(workshop, tmp_path, monkeypatch) -> Iterator[Path]:
    """A workshop to plant things in, where nobody answers a question."""
    folder = shutil.copytree(workshop, tmp_path / "copy")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(builtins, "input", lambda *words: pytest.fail(f"asked {words}"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in remote_code():
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in remote_code():  # else it is looked for in this folder by all tests to come
        del sys.modules[name]


def remote_code() -> list[str]:
    """Modules of checkpoints that were imported."""
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]


def change(path: Path, **fields) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields))


def plant_code(folder: Path) -> None:
    """Code that leaves a file behind, in every place from which transformers can be made to run it."""
    code = f"from pathlib import Path\nPath({str(folder.parent / 'was_run')!r}).touch()\n"
    for name in ("evil.py", "custom_generate/generate.py", *(path.name for path in folder.glob("*.py"))):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    names = {name: [f"evil.{name}", f"evil.{name}"] if name == "AutoTokenizer" else f"evil.{name}" for name in classes}
    change(folder / "config.json", auto_map=names, attn_implementation="evil/kernel")
    change(folder / "tokenizer_config.json", auto_map=names)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]
)
def test_no_command_runs_code_of_a_folder_or_asks_whether_to(copy, command):
    """Where a folder is to be published its code is refused, elsewhere passed over."""
    plant_code(copy / "teacher")
    plant_code(copy / "student")
    ended = run_command(line_of(command, inputs(copy)))
    assert ended.error is None and not (copy / "was_run").exists()
    if command == "push":
        assert ended.status == 1 and "not part of a student" in ended.said
    else:
        assert ended.status == 0, ended.said


UNKNOWN = [name for name in COMMANDS if "{teacher}" in COMMANDS[name] or "{student}" in COMMANDS[name]]


@pytest.mark.parametrize("command", UNKNOWN)
def test_a_model_that_needs_its_own_code_is_refused_in_one_line(copy, command):
    for folder in (copy / "teacher", copy / "student"):
        plant_code(folder)
        change(folder / "config.json", model_type="evil")
    before = tree(copy)
    ended = run_command(line_of(command, inputs(copy)))
    assert (ended.status, ended.error) == (1, None) and ended.said.count("\n") == 1, ended.said
    assert tree(copy) == before


CUSTOM = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("command", ["evaluate", "chat"])
def test_code_that_is_trusted_is_run(copy, command):
    """Without the option it is not: so the marker of the tests above can be left."""
    folder = copy / "teacher"
    write_teacher(copy / "llama", "llama3-tied")
    shutil.rmtree(folder)
    (copy / "llama").rename(folder)
    (folder / "evil.py").write_text(CUSTOM.format(marker=str(copy / "was_run")))
    change(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    line = line_of("evaluate, side by side", inputs(copy)) if command == "evaluate" else ["chat", str(folder)]
    assert "custom code" in run_command(line).said and not (copy / "was_run").exists()
    succeed([*line, "--trust-remote-code"])
    assert (copy / "was_run").exists()


@pytest.mark.slow
def test_the_harness_gets_a_tokenizer_without_code(copy):
    """lm-eval's RULER opens the model's tokenizer by its name, with `trust_remote_code=True`."""
    pytest.importorskip("lm_eval")
    plant_code(copy / "teacher")
    line = ["evaluate", str(copy / "teacher"), "--output", str(copy / "out"), "--suite", "lm-eval", "--lengths", "512"]
    succeed([*line, "--harness-tasks", "niah_single_1", "--harness-limit", "1"])
    assert not (copy / "was_run").exists()
    (cell,) = json.loads((copy / "out" / "report.json").read_text())["lm_eval"]
    assert cell["samples"] == 1


class Evil:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


PICKLES = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "optimizer.pt")


@pytest.mark.parametrize("command", [command for command in UNKNOWN if command != "card"])  # which reads no weights
def test_pickles_are_not_read(copy, command):
    for folder in (copy / "teacher", copy / "student"):
        (folder / "model.safetensors").unlink()
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Evil(copy / "was_run")))
    ended = run_command(line_of(command, inputs(copy)))
    assert ended.error is None and not (copy / "was_run").exists()
    if not command.startswith("plan"):
        assert ended.status == 1 and ended.said.count("\n") == 1, ended.said


def test_an_adapter_beside_the_weights_is_not_put_into_them(copy):
    (copy / "teacher" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    for command in ("convert", "evaluate, side by side"):
        assert "holds an adapter beside its weights" in run_command(line_of(command, inputs(copy))).said


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_what_a_teacher_names_does_not_get_into_its_students(copy, command):
    """Whoever loads one trusts this package's code, and would run that, too."""
    plant_code(copy / "teacher")
    succeed(line_of(command, inputs(copy)))
    check_code(copy / "out" if command == "convert" else copy / "out" / "finetune" / "student")
    assert not (copy / "was_run").exists()


def test_what_is_reloaded_as_everyone_loads_it_holds_this_packages_code_and_no_other(copy):
    student = copy / "student"
    check_code(student)
    for name in ("evil.py", "custom_generate/generate.py"):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).touch()
        with pytest.raises(ValueError, match=rf"{name}: not the code of this hydrahead"):
            answer_in_clean_process(student, "x")
        (student / name).unlink()
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil/repository--evil.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil/repository--evil.Tokenizer", None]}),
    ):
        before = (student / name).read_text()
        change(student / name, auto_map=auto_map)
        with pytest.raises(ValueError, match=f"{name}: its auto_map names not the code"):
            answer_in_clean_process(student, "x")
        (student / name).write_text(before)
    with (student / "modeling_hydrahead.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"modeling_hydrahead\.py: not the code of this hydrahead"):
        answer_in_clean_process(student, "x")


BILLION = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join(10 * [f'*{old}'])}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("output: !!python/object/apply:os.system ['touch was_run']", "cannot be read as YAML"),
        ("output: !!python/name:os.system", "cannot be read as YAML"),
        ("output: ${oc.env:HOME}", "recipes do not replace"),
        (BILLION, "more than 100,000 values"),
        ("a: &a [*a]", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
    ],
    ids=["a call", "a name", "the environment", "a billion", "itself", "deep"],
)
def test_a_recipe_is_plain_yaml(copy, text, line):
    (copy / "recipe.yaml").write_text(text)
    before = tree(copy)
    ended = run_command(["run", str(copy / "recipe.yaml")])
    assert ended.status == 1 and line in ended.said and ended.said.count("\n") == 1, ended.said
    assert tree(copy) == before


def outside(copy: Path, written: Path, line: list[str]) -> set[str]:
    """What a command changed in the workshop and around it, but for one folder."""
    before = tree(copy.parent)
    ended = run_command(line)
    assert ended.error is None, repr(ended.error)
    after = tree(copy.parent)
    changed = {name for name in before.keys() | after.keys() if before.get(name, 1) != after.get(name, 1)}
    return {name for name in changed if not (copy.parent / name).is_relative_to(written)}


UP = "../../../evil"


def index_upwards(copy: Path) -> None:
    """A shard outside of the folder: what lies there would be read, and published with the student."""
    weights = copy / "teacher" / "model.safetensors"
    names = load_file(weights)
    weights.rename(copy / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (copy / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))


def templates_upwards(copy: Path) -> None:
    """A chat template of a name under which transformers would save it elsewhere."""
    templates = [{"name": name, "template": "x"} for name in ("default", UP)]
    change(copy / "teacher" / "tokenizer_config.json", chat_template=templates)


def probes_upwards(copy: Path) -> None:
    change(copy / "pairs.jsonl", probe=UP, capability=UP)


def scores_upwards(copy: Path) -> None:
    change(copy / "scores.json", teacher=UP, versions={UP: UP}, warnings=[UP])


def records_upwards(copy: Path) -> None:
    made_from = json.loads((copy / "student" / "made_from.json").read_text())
    stage = {"stage": UP, "summary": UP, "recipe": {"retrieval_share": 0}}
    change(copy / "student" / "made_from.json", teacher=UP, stages=[stage], masks={"scored": {}} | made_from["masks"])


def report_upwards(copy: Path) -> None:
    report = json.loads((copy / "student" / "report.json").read_text())
    for cell in report["needles"]:
        cell["task"] = UP
    for cell in report["text"]:
        cell["domain"] = UP
    change(copy / "student" / "report.json", text_name=UP, **{kind: report[kind] for kind in ("needles", "text")})


def links_upwards(copy: Path) -> None:
    """Links in a folder that is written into, where partial files and interim work are."""
    (copy / "precious").mkdir()
    (copy / "precious" / "file").write_text("mine")
    student = copy / "student"
    for name in ("report.json", "report.md", "report.html", "accuracy.png", "README.md", "heads.md"):
        (student / f"{name}.partial").symlink_to(copy / "precious" / "file")
    (student / ".evaluation").symlink_to(copy / "precious")


@pytest.mark.parametrize(
    ("plant", "command", "written"),
    [
        (index_upwards, "convert", "out"),
        (index_upwards, "score", "out"),
        (templates_upwards, "convert", "out"),
        (templates_upwards, "align", "out"),
        (probes_upwards, "score", "out"),
        (scores_upwards, "select", "out"),
        (scores_upwards, "evaluate", "student"),
        (records_upwards, "card", "student"),
        (report_upwards, "card", "student"),
        (links_upwards, "card", "student"),
        (links_upwards, "evaluate", "student"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_no_name_in_a_file_leads_out_of_the_folder_that_is_written(copy, plant: Callable, command, written):
    plant(copy)
    assert outside(copy, copy / written, line_of(command, inputs(copy))) == set()


@pytest.mark.parametrize(
    ("plant", "line"), [(index_upwards, "weight_map"), (templates_upwards, "chat template's name")]
)
def test_paths_in_a_teacher_are_refused_by_name(copy, plant, line):
    plant(copy)
    ended = run_command(line_of("convert", inputs(copy)))
    assert ended.status == 1 and line in ended.said and not (copy / "out").exists()


def test_a_lock_empties_no_file_that_a_link_leads_to(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".folder.lock").symlink_to(tmp_path / "precious")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").touch()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_partial_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "file.partial").symlink_to(tmp_path / "precious")
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


NASTY = (
    "a|b <img src=x onerror=alert(1)> [x](javascript:alert(1)) `c` $\\frac$ *d* [red] \x1b[31m\x07 @e 'f' \"g\": {h}"
    "\n---\nlicense: evil\n# i"
)


def test_a_teachers_name_is_text_wherever_it_is_written(copy):
    """In cards (YAML, Markdown), reports (HTML, Markdown), pictures and on the terminal."""
    teacher = copy / NASTY
    (copy / "teacher").rename(teacher)
    (copy / "masks.json").write_text(json.dumps(MIXED))
    names = inputs(copy) | {"teacher": teacher, "student": copy / "new"}
    succeed(["convert", str(teacher), str(copy / "new"), "--masks", str(copy / "masks.json")])
    for command, line in (
        ("evaluate", [word for word in line_of("evaluate", names) if word not in ("--scores", str(names["scores"]))]),
        ("card", ["card", str(copy / "new"), "--license", "mit"]),
        ("side by side", line_of("evaluate, side by side", names)),
    ):
        ended = run_command(line)
        assert (ended.status, ended.error) == (0, None), (command, ended)
        assert "\x1b" not in ended.said + ended.printed and "\x07" not in ended.said + ended.printed
    card = ModelCard.load(copy / "new" / "README.md")
    assert card.data.license == "mit" and "evil" not in str(card.data.to_dict())
    for folder in (copy / "new", copy / "out"):
        for name in ("report.md", "report.html", "README.md"):
            text = (folder / name).read_text() if (folder / name).is_file() else ""
            assert "<img" not in text and "\x1b" not in text, name
            if name != "report.html":  # where it stands in JSON, which scripts put into text nodes
                assert not re.search(r"(?<!\\)\]\(javascript", text) and "\n---\nlicense: evil" not in text, name
        assert (folder / "accuracy.png").is_file()


def test_scores_of_such_a_teacher_are_drawn_and_listed(copy):
    change(copy / "scores.json", teacher=NASTY, warnings=[NASTY])
    ended = run_command(line_of("select", inputs(copy)))
    assert ended.status == 0 and "\x1b" not in ended.printed and (copy / "out" / "masks.png").is_file()


def test_a_chat_template_that_breaks_out_of_its_sandbox_is_an_error_of_the_model(copy):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = AutoTokenizer.from_pretrained(copy / "student")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copy / "student")
    ended = run_command(["chat", str(copy / "student")], "hello\n/quit\n")
    assert ended.status == 0 and "the chat template cannot be applied" in ended.said


# What the package itself never does, read from its code.
NEVER = {"eval", "exec", "load_module", "unsafe_load", "full_load"}
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
SOURCES = [path for name in PACKAGES for path in sorted(ROOT.joinpath(*name.split(".")[1:]).glob("*.py"))]


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """The calls in a file, by their dotted names."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_reads_no_pickle_and_runs_no_text(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in imported} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for name, node in calls(path):
        assert name not in NEVER and name not in ("torch.load", "os.system", "yaml.load", "os.popen"), name
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("shell") in (None, "False") and options.get("allow_pickle") in (None, "False")
        assert options.get("trust_remote_code") != "True", name


def test_auto_classes_open_models_in_one_place():
    """Elsewhere only GGUF files, which have no code; and the demo's own teacher."""
    opened = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for name, _ in calls(path)
        if name.startswith("Auto") and name.endswith("from_pretrained")
    }
    assert opened == {"loading.py", "convert/gguf_files.py", "demo/teacher_report.py"}
