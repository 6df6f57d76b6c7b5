"""The command line as a person meets it: help, bad input, interruption, and the folders it writes."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hydrahead import __version__
from hydrahead.cli import app
from hydrahead.convert import teachers
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import forms_made_from, save_forms
from hydrahead.convert.masks import read_masks
from hydrahead.convert.options import options_of, student_config
from hydrahead.convert.scoring.command import score_to_folder
from hydrahead.convert.scoring.measure import _Measuring
from hydrahead.convert.scoring.settings import ScoreSettings
from hydrahead.convert.teachers import EMBEDDED_TEACHER, adapter_for
from hydrahead.files import atomic_folder
from hydrahead.hub.checkpoint import answer_in_clean_process
from hydrahead.provenance import digest
from hydrahead.tests.families import make_teacher
from hydrahead.tests.workshop import write_short_teacher

COMMAND = [sys.executable, "-m", "hydrahead"]
MASKS = [[1, 0, 0, 0, 1, 1, 0, 0]] * 6


def write_scores(path: Path) -> Path:
    """A score file of a teacher with 2 layers of 4 heads."""
    effects = {"receiver": [[[0.5, 0.1, 0.0, 0.0]] * 2]}
    probe = {"name": "a", "capability": "a", "pairs": 1, "used": 1, "effects": effects}
    scores = {"scores": [[1.0, 0.2, 0, 0]] * 2, "tie_break": [[0.0] * 4] * 2, "num_key_value_heads": 2}
    scores |= {"probes": [probe], "capabilities": {}, "method": "receiver", "teacher": "t", "head_dim": 16}
    path.write_text(json.dumps(scores))
    return path


def hydrahead(*arguments, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, **options
    )


def hydrahead_here(*arguments):
    """The command in this process, which has imported all that takes long."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


@pytest.fixture
def masks(tmp_path) -> Path:
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(MASKS))
    return path


def test_help_does_not_wait_for_pytorch():
    code = "import hydrahead.cli, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "convert" in hydrahead("--help").stdout


def test_the_version_is_the_packages():
    assert hydrahead("--version").stdout == f"hydrahead {__version__}\n"


def test_only_debugging_shows_where_bad_input_was_found(tmp_path):
    arguments = ["select", tmp_path / "none.json", "--output", tmp_path / "masks.json"]
    plain, debug = hydrahead(*arguments), hydrahead("--debug", *arguments)
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.startswith("hydrahead: ") and plain.stderr.count("\n") == 1
    assert debug.stderr.startswith("Traceback") and "ValueError" in debug.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("hydrahead.convert.masks.select_to_file", broken)
    result = CliRunner().invoke(app, ["select", "scores.json", "--output", "masks.json"])
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1 and result.stderr == ""


# Runs the command, then says what it has imported of what takes long to import.
IMPORTS = """
import sys
from hydrahead import cli
try:
    cli.app()
finally:
    print("imported", *[name for name in ("torch", "transformers", "fla", "matplotlib") if name in sys.modules])
"""


def imported(*arguments) -> tuple[int, set[str], str]:
    """Exit code, long imports, and stderr of a command."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, set(done.stdout.splitlines()[-1].split()[1:]), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["select", "SCORES", "--output", "out.json", "--strategy", "best"],
        ["select", "SCORES", "--output", "out.json", "--method", "attention"],
        ["select", "SCORES", "--output", "out.json", "--weight", "b=1"],
        ["select", "SCORES", "--output", "out.json", "--ratio", "0.01"],
        ["score", EMBEDDED_TEACHER, "out", "--method", "best"],
        ["score", EMBEDDED_TEACHER, "out", "--forms", "none.safetensors"],
        ["convert", EMBEDDED_TEACHER, "out", "--masks", "none.json"],
        ["demo", "--text", "none.txt"],
        ["demo", "--config", "nosuch"],
        ["run", "demo", "distill.token=1"],
        ["evaluate", "none"],
        ["card", "none"],
        ["push", "none", "me/none"],
    ],
)
def test_a_typo_does_not_wait_for_pytorch(tmp_path, arguments):
    scores = write_scores(tmp_path / "scores.json")
    code, names, said = imported(*[scores if each == "SCORES" else each for each in arguments])
    assert code == 1 and said.startswith("hydrahead: ") and said.count("\n") == 1
    assert names == set()


def test_choosing_heads_needs_no_pytorch(tmp_path):
    scores = write_scores(tmp_path / "scores.json")
    code, names, _ = imported("select", scores, "--output", tmp_path / "masks.json", "--weight", "a=2")
    assert code == 0 and names == {"matplotlib"}


def test_the_public_names_come_when_they_are_asked_for():
    from hydrahead.convert import HeadScores, convert_model, score_heads, select_heads

    assert all(map(callable, (HeadScores, convert_model, score_heads, select_heads)))
    code = "import hydrahead.convert, sys; assert 'torch' not in sys.modules; hydrahead.convert.select_head"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'hydrahead.convert' has no")


def test_what_flash_linear_attention_says_without_a_gpu_is_not_repeated(tmp_path, masks):
    """A stand-in for its import where Triton is installed and finds no GPU; other warnings are shown."""
    code = (
        "import sys, warnings\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fla':\n"
        "            warnings.warn('Triton is not supported on current platform, roll back to CPU.')\n"
        "            warnings.warn('something else is old')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from hydrahead import cli\n"
        "cli.main()\n"
    )
    masks.write_text("[[1, 0]]")
    arguments = ["convert", str(EMBEDDED_TEACHER), str(tmp_path / "new"), "--masks", str(masks)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert "head_masks must have one row per layer" in done.stderr
    assert "something else is old" in done.stderr and "Triton" not in done.stderr


def test_convert_writes_a_folder_that_answers_in_a_clean_process(tmp_path, masks):
    output = tmp_path / "student"
    done = hydrahead_here("convert", EMBEDDED_TEACHER, output, "--masks", masks, "--calibration-tokens", 256)
    assert done.exit_code == 0, done.stderr
    names = {path.name for path in output.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "head_masks.json", "model.safetensors"}
    code = {f"{name}_hydrahead.py" for name in ("configuration", "modeling", "ops", "kernels")}
    assert names >= {*code, "tokenizer.json"}
    assert json.loads((output / "config.json").read_text())["head_masks"] == MASKS
    assert answer_in_clean_process(output, "import os\n", max_new_tokens=4)


def a_folder_of(tmp_path: Path, family: str, **changes) -> Path:
    folder = tmp_path / "teacher"
    make_teacher(family, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_TEACHER).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "sliding"}, "sliding-window attention"),
        ({"masks": "missing.json"}, "cannot be read (No such file or directory)"),
        ({"masks": "[1, 0]"}, "expected a list of layers"),
        ({"masks": "[[1, 0]]"}, "head_masks must have one row per layer (6), got 1"),
        ({"text": "missing.txt"}, "missing.txt: no such file"),
        ({"output": "."}, "not empty"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, masks, arguments, message):
    teacher = arguments.get("teacher", EMBEDDED_TEACHER)
    if teacher == "sliding":
        teacher = a_folder_of(tmp_path, "mistral", sliding_window=8)
    if "masks" in arguments:
        masks = tmp_path / "other.json"
        if arguments["masks"].startswith("["):
            masks.write_text(arguments["masks"])
    options = ["--text", tmp_path / arguments["text"]] if "text" in arguments else []
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / arguments.get("output", "new")
    done = CliRunner().invoke(app, list(map(str, ["convert", teacher, output, "--masks", masks, *options])))
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("hydrahead: ")
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def nope_forms(tmp_path_factory) -> Path:
    """Untrained forms of the shipped teacher's heads, of a student with `fusion_norm: linear`."""
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED_TEACHER)
    config = student_config(adapter_for(teacher.config), MASKS, fusion_norm="linear")
    file = tmp_path_factory.mktemp("forms") / "head_forms.safetensors"
    save_forms(head_forms_of(teacher, torch.arange(64).view(1, 64), config), options_of(config), file)
    return file


@pytest.mark.parametrize(
    ("command", "given", "line"),
    [
        ("convert", ["--position", "rope"], "full_attention_position 'nope', and 'rope' is asked for"),
        ("convert", ["--fusion-norm", "all"], "fusion_norm 'linear', and 'all' is asked for"),
        ("convert", ["--logit-scale-base", "512"], "logit_scale_base 1024, and 512.0 is asked for"),
        ("convert", ["--no-gate"], "full_attention_gate True, and False is asked for"),
        ("convert", ["--fusion", "concat"], "fusion 'scale', and 'concat' is asked for"),
        ("score", ["--position", "rope"], "full_attention_position 'nope', and 'rope' is asked for"),
        ("score", ["--fusion-norm", "all"], "fusion_norm 'linear', and 'all' is asked for"),
    ],
    ids=str,
)
def test_an_option_that_contradicts_the_forms_is_refused(tmp_path, masks, nope_forms, command, given, line):
    arguments = [command, EMBEDDED_TEACHER, tmp_path / "out", "--forms", nope_forms, *given]
    arguments += ["--masks", masks] if command == "convert" else []
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1 and f"its heads were aligned for {line}" in done.stderr
    assert done.stderr.strip().count("\n") == 0 and not (tmp_path / "out").exists()


def test_an_option_that_was_not_given_is_the_forms_own(tmp_path, masks, nope_forms):
    arguments = ["convert", EMBEDDED_TEACHER, tmp_path / "out", "--forms", nope_forms, "--masks", masks]
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--position", "nope", "--fusion", "gate"])))
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["full_attention_position"], config["fusion_norm"], config["fusion"]) == ("nope", "linear", "gate")


def test_an_unknown_name_gets_one_line_too(tmp_path, masks):
    done = hydrahead_here("convert", "no/such-model", tmp_path / "new", "--masks", masks)
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("hydrahead: no/such-model: no folder here, and not to be had from the Hub (")
    assert "Check the spelling; offline, only what was downloaded before is found" in done.stderr


def test_a_hybrid_is_no_teacher(tmp_path, masks):
    (tmp_path / "hybrid").mkdir()
    (tmp_path / "hybrid" / "config.json").write_text('{"model_type": "hydrahead"}')
    for command in (["score"], ["convert", "--masks", str(masks)]):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "hybrid"), str(tmp_path / "new")])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert f"{tmp_path / 'hybrid'}: a HydraHead student; pass the pretrained transformer" in result.stderr


def test_masks_and_scores_of_another_teacher_are_refused_by_name(tmp_path, nope_forms):
    """Both tell whose they are; what says nothing, as a bare list, is taken as it is."""
    (tmp_path / "masks.json").write_text(json.dumps({"masks": MASKS, "teacher": "other", "revision": "v1"}))
    select = ["select", str(write_scores(tmp_path / "scores.json")), "--exchange", "1", "--forms", str(nope_forms)]
    for arguments, of in (
        (["convert", "demo", str(tmp_path / "new"), "--masks", str(tmp_path / "masks.json")], "other at v1"),
        ([*select, "--teacher", "demo", "--output", str(tmp_path / "new.json")], "t"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert f"made from the teacher {of}, not from demo" in result.stderr
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_convert_leaves_no_folder(tmp_path, masks, sent):
    """The signal comes while the folder is being written: a hook stops there and waits for it."""
    marker = tmp_path / "writing"
    code = (
        "import sys, time, pathlib\n"
        "from hydrahead import cli\n"
        "from transformers import PreTrainedModel\n"
        "save = PreTrainedModel.save_pretrained\n"
        "def slow(self, folder, *args, **kwargs):\n"
        "    save(self, folder, *args, **kwargs)\n"
        f"    pathlib.Path({str(marker)!r}).touch()\n"
        "    time.sleep(60)\n"
        "PreTrainedModel.save_pretrained = slow\n"
        f"sys.argv = ['hydrahead', 'convert', {str(EMBEDDED_TEACHER)!r}, {str(tmp_path / 'out' / 'student')!r},\n"
        f"            '--masks', {str(masks)!r}, '--calibration-tokens', '64']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    for _ in range(600):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert marker.exists(), process.communicate()[1].decode()
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_is_replaced_only_when_asked_and_only_when_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as partial:
        (partial / "old").touch()
    with pytest.raises(ValueError, match=r"not empty"), atomic_folder(folder):
        pass
    with pytest.raises(RuntimeError), atomic_folder(folder, overwrite=True) as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


TEXT = Path(argparse.__file__)  # the whole library takes seconds to encode
SCORE = ["--length", "200", "--pairs", "2", "--seed", "1", "--device", "cpu", "--text", TEXT]


def test_score_and_select_go_from_a_teacher_to_masks(tmp_path):
    """The shipped teacher: its two retrieval heads, in layer 1, are kept; masks fit `hydrahead convert`."""
    methods = ["--method", "receiver", "--method", "attention", "--no-evidence"]
    done = hydrahead_here("score", EMBEDDED_TEACHER, tmp_path / "scores", *SCORE, *methods)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["head_maps.png", "head_scores.json"]
    file = tmp_path / "scores" / "head_scores.json"
    assert json.loads(file.read_text())["probes"][0]["used"] == 2

    done = hydrahead_here("select", file, "--output", tmp_path / "masks.json", "--ratio", 0.25, "--keep", "5.0,5.1")
    assert done.exit_code == 0, done.stderr
    assert "full attention: 12 of 48 query heads (25.0%), in 6 of 24 KV heads" in done.stdout
    assert "the same cache, budgeted in heads: " in done.stdout
    file = json.loads((tmp_path / "masks.json").read_text())
    masks = read_masks(tmp_path / "masks.json")
    assert masks == file["masks"] and file["method"] == "receiver" and file["teacher"] == "demo"
    assert file["scores"] == {"head_scores.json": digest(tmp_path / "scores" / "head_scores.json")}
    scores = json.loads((tmp_path / "scores" / "head_scores.json").read_text())["scores"]
    kept = [score for row, mask in zip(scores, masks) for score, full in zip(row, mask) if full]
    assert file["kept"] == 12 and file["without_evidence"] == sum(score <= 0 for score in kept)
    done = hydrahead_here("convert", EMBEDDED_TEACHER, tmp_path / "out", "--masks", tmp_path / "masks.json")
    assert done.exit_code == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Chosen by their receiver score, strategy global, 0.25 of kv_groups; kept by name: 5.0, 5.1" in card
    without = f"**Without evidence:** {file['without_evidence']} of the 12 chosen heads"
    assert (without if file["without_evidence"] else "All 12 chosen heads score above 0.") in card
    assert masks[1][2] == masks[1][3] == masks[5][0] == masks[5][1] == 1 and sum(map(sum, masks)) == 12
    assert (tmp_path / "masks.png").is_file()
    other = ["--budget-unit", "heads", "--strategy", "global-constrained", "--output", tmp_path / "other.json"]
    assert hydrahead_here("select", tmp_path / "scores" / "head_scores.json", *other).exit_code == 0
    assert all(map(any, read_masks(tmp_path / "other.json"))) and not all(map(any, masks))


def test_a_student_that_cannot_be_is_refused_before_the_teacher_is_read(tmp_path):
    done = hydrahead_here("score", EMBEDDED_TEACHER, tmp_path / "out", *SCORE, "--logit-scale-base", 0.5)
    assert done.exit_code == 1 and "logit_scale_base must be a finite number greater than 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_score_goes_on_where_the_last_probe_was_finished(tmp_path, monkeypatch):
    """Stopped in the third probe: the second run measures the others only, and gives what one run gives."""
    output, plain = tmp_path / "scores", tmp_path / "plain"
    settings = ScoreSettings(str(EMBEDDED_TEACHER), ("receiver",), length=200, pairs=2, text=TEXT, evidence=False)
    score_to_folder(settings, plain)
    measure, measured = _Measuring.probe, []

    def stop_in_the_third(self, probe, methods):
        measured.append(probe.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, probe, methods)

    monkeypatch.setattr(_Measuring, "probe", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        score_to_folder(settings, output)
    assert not output.exists()
    score_to_folder(settings, output)
    assert len(measured) == 3 + 8, "ten probes, two of them done before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    one, two = (json.loads((folder / "head_scores.json").read_text()) for folder in (plain, output))
    assert one | {"seconds": 0} == two | {"seconds": 0}


def test_probes_are_measured_again_where_only_their_names_or_the_teachers_name_are_the_same(tmp_path, monkeypatch):
    """A user's file may call its probe as a built-in one; a teacher's folder may hold other weights than before."""
    teacher, mine = shutil.copytree(EMBEDDED_TEACHER, tmp_path / "teacher"), tmp_path / "mine.jsonl"
    line = {"clean": "import os", "corrupt": "import re", "answer": ".p", "wrong": ".s"}
    mine.write_text(json.dumps(line | {"probe": "copy", "capability": "imports"}))
    settings = ScoreSettings(
        str(teacher),
        ("receiver",),
        length=200,
        pairs=2,
        text=TEXT,
        probe_files=(mine,),
        only=("copy.value",),
        evidence=False,
    )
    measure, measured = _Measuring.probe, []

    def stopping(self, probe, methods):
        if len(measured) == 1:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(probe.capability)
        return measure(self, probe, methods)

    monkeypatch.setattr(_Measuring, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_to_folder(settings, tmp_path / "scores")
    shutil.copytree(tmp_path / ".scores.unfinished", tmp_path / ".other.unfinished")
    score_to_folder(settings, tmp_path / "scores")
    assert measured == ["copying", "stopped", "imports"]
    weights = load_file(teacher / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, teacher / "model.safetensors")
    score_to_folder(settings, tmp_path / "other")
    assert measured[3:] == ["copying", "imports"]


def test_a_method_that_needs_forms_is_refused_without_before_anything_is_written(tmp_path):
    settings = ScoreSettings("demo", ("replacement",), length=200, pairs=1, text=TEXT, only=("copy.value",))
    with pytest.raises(ValueError, match=r"^replacement: needs aligned forms of the heads; pass those of [^\n]*$"):
        score_to_folder(settings, tmp_path / "scores")
    assert list(tmp_path.iterdir()) == []


def test_scores_of_a_teacher_from_the_hub_are_named_by_its_id(tmp_path, monkeypatch):
    """Not by the folder in which its files are kept here, so that masks made of them are known to be its own."""
    kept = shutil.copytree(EMBEDDED_TEACHER, tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr(teachers, "snapshot_download", lambda *_, **__: str(kept))
    opened = teachers.Teacher("org/model", "v1", "org/model", teachers.open_teacher(str(kept)).config)
    opened.fetch()
    monkeypatch.setattr("hydrahead.convert.scoring.command.open_teacher", lambda *_: opened)
    settings = ScoreSettings("org/model", ("receiver",), length=200, pairs=1, text=TEXT, revision="v1")
    scores = score_to_folder(replace(settings, only=("copy.value",), evidence=False), tmp_path / "scores")
    assert {"teacher": scores.teacher, "revision": scores.revision} == opened.identity
    assert scores.teacher == "org/model"


@pytest.mark.slow
def test_score_aligns_by_itself_and_its_forms_serve_the_next_run(tmp_path):
    teacher = write_short_teacher(tmp_path / "teacher")
    steps = ["--align-steps", "2", "--fusion-norm", "linear"]
    done = hydrahead_here("score", teacher, tmp_path / "one", *SCORE, *steps)
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "ablation.png",
        "conversion.png",
        "head_forms.safetensors",
        "head_maps.png",
        "head_scores.json",
    }
    forms = ["--forms", tmp_path / "one" / "head_forms.safetensors", "--no-evidence"]
    done = hydrahead_here("score", teacher, tmp_path / "two", *SCORE, *forms)
    assert done.exit_code == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "head_scores.json").read_text()) for name in ("one", "two"))
    assert one["method"] == two["method"] == "combined" and one["scores"] == two["scores"]
    assert one["made_from"]["forms"] == two["made_from"]["forms"] == digest(forms[1])
    aligned = forms_made_from(forms[1])
    assert (aligned["teacher"], aligned["steps"], aligned["dtype"]) == ("teacher", 2, "auto")

    chosen = ["--output", tmp_path / "masks.json", "--weight", "language=0.5", "--strategy", "global"]
    exchange = ["--exchange", 1, "--teacher", teacher, "--forms", forms[1], "--length", 200, "--text", TEXT]
    done = hydrahead_here("select", tmp_path / "two" / "head_scores.json", *chosen, *exchange)
    assert done.exit_code == 0, done.stderr
    assert "after 1 conversions: needles 0." in done.stdout and "after 5 conversions: " in done.stdout
    assert sum(map(sum, read_masks(tmp_path / "masks.json"))) == 4

    masks = ["--masks", tmp_path / "masks.json"]
    done = hydrahead_here("convert", teacher, tmp_path / "out", *masks, *forms[:2])
    assert done.exit_code == 0, done.stderr
    aligned = load_file(forms[1])
    student = load_file(tmp_path / "out" / "model.safetensors")
    head = read_masks(tmp_path / "masks.json")[1].index(0)
    rows = aligned["1.linear.q_proj.weight"][head]
    found = student["model.layers.1.self_attn.linear_attention.q_proj.weight"][: len(rows)]
    assert (found == rows.to(found.dtype)).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fusion_norm"] == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "method must be one of combined, "),
        (["--length", "4096"], "length 4096 is more than the 1024 positions"),
        (["--text", "none.txt"], "none.txt: no such file"),
        (["--forms", "none.safetensors"], "none.safetensors: no such file"),
        (["--probe", "none.jsonl", "--method", "receiver"], "none.jsonl: no such file"),
        (["--no-built-in"], "no probes"),
        (["--length", "128"], "length 128 is too short for a prompt with 4 needles: the least that always works"),
        (["--length", "3"], "length 3 is too short for a prompt with 4 needles: the least that always works"),
        (["--length", "0"], "length 0 is too short"),
        (["--device", "cuda:99"], "device cuda:99: not on this machine"),
        (["--device", "gpu"], "device gpu: not on this machine, or not one that this PyTorch was built for"),
        (
            ["--forms", str(EMBEDDED_TEACHER / "config.json")],
            "config.json: not the aligned forms of a",
        ),
        (["--forms", str(EMBEDDED_TEACHER / "model.safetensors")], "write them as head_forms.safetensors"),
    ],
)
def test_bad_score_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("hydrahead.convert.scoring.command.load_teacher", lambda *_: pytest.fail("read the weights"))
    monkeypatch.setattr("hydrahead.convert.scoring.command.read_text", lambda *_: pytest.fail("read the text"))
    result = CliRunner().invoke(app, ["score", str(EMBEDDED_TEACHER), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "1"], "'1': expected LAYER.HEAD"),
        (["--strategy", "best"], "strategy must be one of"),
        (["--method", "attention"], "attention was not measured"),
        (["--weight", "b=1"], "no capability 'b' was measured; measured: a"),
        (["--weight", "a"], "'a': expected NAME=NUMBER"),
        (["--exchange", "2"], "pass --teacher and --forms"),
        (["--output", "masks.txt"], "masks.txt: expected a name that ends in .json"),
    ],
)
def test_bad_select_input_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    write_scores(tmp_path / "scores.json")
    output = ["--output", str(tmp_path / "masks.json")]
    result = CliRunner().invoke(app, ["select", str(tmp_path / "scores.json"), *output, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "masks.json").exists()
