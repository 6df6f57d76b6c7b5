"""One recipe from teacher to card: killed anywhere, nothing is done twice and the result is the same, bit for bit."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hydrahead import pipeline
from hydrahead.cli import app
from hydrahead.convert.scoring.command import Unfinished
from hydrahead.convert.teachers import Teacher
from hydrahead.evaluation.cells import KINDS, Cells
from hydrahead.evaluation.report import lengths, read_report
from hydrahead.pipeline import walk
from hydrahead.tests.training_runs import MAINS
from hydrahead.tests.workshop import write_short_teacher
from hydrahead.training.checkpoints import Checkpoints
from hydrahead.training.recipe import RECIPES

STAGE = {"tokens": 256, "batch_tokens": 128, "length": 64, "learning_rate": 1e-3, "final_learning_rate": 1e-4}
WORDS = ["amber", "basket", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A short road, whose output is `out` beside it unless an override says otherwise."""
    folder = tmp_path_factory.mktemp("road")
    teacher = write_short_teacher(folder / "teacher")
    text = " ".join(WORDS[(step * step // 7) % 10] for step in range(6000))
    (folder / "text.txt").write_text(text)
    content = {
        "output": str(folder / "out"),
        "teacher": {"name": str(teacher), "dtype": "float32"},
        "student": {"fusion_norm": "linear"},
        "data": {"name": str(folder / "text.txt"), "heldout_tokens": 1024},
        "run": {"micro_batch_tokens": 128, "mixed_precision": "no", "save_every": 1},
        "evaluate": {
            "lengths": [200, 256],
            "tasks": ["niah_single_2", "niah_multikey_1"],
            "prompts": 1,
            "new_tokens": 8,
            "text_tokens": 512,
        },
        "align": STAGE | {"calibration_tokens": 128},
        "score": {
            "length": 200,
            "pairs": 2,
            "only": ["niah-single.value", "niah-4-keys.value"],
            "evidence": False,
            "text": str(folder / "text.txt"),
        },
        "select": {"strategy": "global"},
        "distill": STAGE,
        "finetune": STAGE,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def walk_and_die(recipe: Path, output: Path, events: Path, life: int) -> None:
    """What a process does: walks, says in a file what it has done, and dies without a word after `life` of that."""
    torch.set_num_threads(1)  # as the tests beside: the order of sums decides the last bit
    lives = iter(range(life))

    def after(owner, name, word):
        work = getattr(owner, name)

        def done(self, *arguments, **options):
            result = work(self, *arguments, **options)
            if event := word(self, *arguments):
                with events.open("a") as file:
                    file.write(event + "\n")
                if next(lives, None) is None:
                    os._exit(9)
            return result

        setattr(owner, name, done)

    after(Checkpoints, "save", lambda self, _, step, *__: f"{self.folder.name} {step}")
    after(Unfinished, "keep", lambda self, results: f"score {len(results)}")
    after(Cells, "keep", lambda self, kind, cell: f"{kind} {[cell[name] for name in KINDS[kind]]}")
    steps = pipeline.Road.steps
    pipeline.Road.steps = lambda self: [with_event(step, events, lives) for step in steps(self)]
    walk(str(recipe), [f"output={output}"])


def with_event(step, events: Path, lives):
    work = step.do

    def do():
        work()
        with events.open("a") as file:
            file.write(f"{step.name} is done\n")
        if next(lives, None) is None:
            os._exit(9)

    step.do = do
    return step


def run_process(*arguments) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hydrahead.tests.test_pipeline"])
    process = context.Process(target=walk_and_die, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def finished(recipe) -> tuple[Path, list[str]]:
    """The output of a run that nothing stopped, and what it did."""
    output, events = recipe.parent / "plain", recipe.parent / "plain.txt"
    assert run_process(recipe, output, events, 1000) == 0
    return output, events.read_text().splitlines()


@pytest.mark.slow
def test_killed_between_and_inside_steps_nothing_is_done_twice_and_the_result_is_the_same(recipe, finished):
    plain, expected = finished
    output, events, kills = recipe.parent / "killed", recipe.parent / "killed.txt", 0
    while (status := run_process(recipe, output, events, 1 + kills % 3)) == 9:
        kills += 1
    assert status == 0 and kills > 4
    assert events.read_text().splitlines() == expected
    students = [folder / "finetune" / "student" for folder in (plain, output)]
    for name in ("model.safetensors", "config.json", "heads.md", "head_map.png"):
        assert students[0].joinpath(name).read_bytes() == students[1].joinpath(name).read_bytes(), name
    cards = [re.sub(r"\S+ CPU-hours", "", (student / "README.md").read_text()) for student in students]
    assert cards[0] == cards[1]
    assert report_of(students[0]) == report_of(students[1])
    assert report_of(students[0])["heads"]["method"] == "combined"
    one, two = (json.loads((folder / "scores" / "head_scores.json").read_text()) for folder in (plain, output))
    assert one["scores"] == two["scores"] and [path.name for path in output.glob(".*")] == []
    assert sorted(path.name for path in students[0].glob("*.png")) == ["accuracy.png", "depths.png", "head_map.png"]


def report_of(student: Path) -> dict:
    """A report without its clocks."""
    report = read_report(student)
    for cell in [*report["needles"], *report["text"]]:
        cell.pop("seconds")
    return report


def finished_copy(finished, tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "out")


def hydrahead(*words) -> str:
    """What a command that succeeds prints."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_demo_shows_its_student_answering_without_hydrahead_and_does_nothing_again(recipe, finished, monkeypatch):
    for name in ("run_align", "run_distill", "run_finetune", "score_to_folder", "select_to_file", "evaluate"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: pytest.fail("repeated a finished step"))
    said = hydrahead("demo", "--config", recipe, f"output={finished[0]}")
    assert said.count(" is there already\n") == 7
    assert "special magic number for" in said and "What is the special" in said and "trust_remote_code" in said
    assert "single key" in said
    # What is meant for the Hub says nothing of this machine.
    student = finished[0] / "finetune" / "student"
    for file in [*student.glob("*.json"), *student.glob("*.md"), student / "report.html"]:
        assert str(recipe.parent) not in file.read_text(), file


@pytest.mark.slow
def test_a_person_may_type_the_printed_commands_instead(recipe, finished, tmp_path, monkeypatch):
    """The same student comes out, and the road goes on from what the commands left."""
    output = tmp_path / "typed"
    said = hydrahead("run", recipe, f"output={output}", "--dry-run")
    assert not output.exists()
    for line in said.splitlines():
        name, _, command = line.partition(": ")
        if command.startswith("python -m hydrahead.training."):
            MAINS[name](shlex.split(command)[3:])
        elif command.startswith("hydrahead "):
            hydrahead(*shlex.split(command)[1:])
    one, two = (folder / "finetune" / "student" for folder in (finished[0], output))
    assert one.joinpath("model.safetensors").read_bytes() == two.joinpath("model.safetensors").read_bytes()
    assert report_of(one) == report_of(two)
    assert hydrahead("run", recipe, f"output={output}").count(" is there already\n") == 7


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("align.learning_rate=0.5", "out/align: made with another align.learning_rate (0.001, now 0.5); choose"),
        (
            "select.ratio=0.5",
            "out: made with another ratio (0.25, now 0.5); choose another output, or have it made anew: remove ",
        ),
        ("evaluate.prompts=2", "student: made with another prompts (1, now 2); choose another output"),
        ("score.pairs=3", "out/scores: made with another pairs (2, now 3); choose another output"),
        (
            "score.method=[receiver]",
            "out/scores: made with another method ('combined', now 'receiver'); choose another output",
        ),
        ("output=nowhere select.ratio=0.01", "keeps 0 of 8 kv_groups"),
        ("output=nowhere align=null", "align/head_forms.safetensors: no such file"),
        ("score=null", "the recipe has a section select and no section score"),
        ("score.length=100", "length 100 is too short"),
        ("evaluate.lengths=[5]", "length 5: no room for a prompt of "),
        ("evaluate.lengths=[4096]", "data.heldout_tokens: 1,024, evaluate.lengths needs 8,193"),
        ("launch=nowhere.yaml", "launch: nowhere.yaml: no such file, nor one of ddp, fsdp2, ddp_cpu"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_done(
    override, line, recipe, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("read the weights"))
    output = finished_copy(finished, tmp_path)
    before = sorted(output.rglob("*"))
    result = CliRunner().invoke(app, ["run", str(recipe), f"output={output}", *override.split()])
    assert result.exit_code == 1 and result.stderr.strip().count("\n") == 0
    assert line in result.stderr
    assert sorted(output.rglob("*")) == before


def test_what_was_made_before_a_step_that_is_not_done_is_refused(recipe, finished, tmp_path, monkeypatch):
    output = finished_copy(finished, tmp_path)
    shutil.rmtree(output / "distill")
    with pytest.raises(ValueError, match=r"finetune/student: made before distill, which is not done; choose another"):
        walk(str(recipe), [f"output={output}"])


def test_scores_of_other_forms_are_refused(recipe, finished, tmp_path, monkeypatch):
    output = finished_copy(finished, tmp_path)
    forms = output / "align" / "head_forms.safetensors"
    with forms.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    for folder in ("distill", "finetune"):
        shutil.rmtree(output / folder)
    with pytest.raises(ValueError, match=r"out/scores: made with another forms .*, now "):
        walk(str(recipe), [f"output={output}"])


def test_a_finished_evaluation_goes_on_with_further_lengths(recipe, finished, tmp_path, monkeypatch):
    output, measured, keep = finished_copy(finished, tmp_path), [], Cells.keep

    def kept(self, kind, cell):
        measured.append((kind, cell["length"]))
        keep(self, kind, cell)

    monkeypatch.setattr(Cells, "keep", kept)
    student = walk(str(recipe), [f"output={output}", "evaluate.lengths=[200, 300]"]).student
    assert measured == 2 * [("text", 300)] + 4 * [("needles", 300)]
    assert lengths(read_report(student)) == [200, 256, 300]
    assert "| 300 | " in (student / "README.md").read_text()


@pytest.mark.slow
def test_a_finished_road_goes_on_where_a_stage_grew(recipe, finished, tmp_path):
    """The last one at once; an earlier one where what was made of it has been removed, and not before."""
    output = finished_copy(finished, tmp_path)
    records = {stage: (output / stage / "metrics.jsonl").read_text() for stage in ("align", "finetune")}
    student = walk(str(recipe), [f"output={output}", "finetune.tokens=512"]).student
    after = (output / "finetune" / "metrics.jsonl").read_text()
    assert after.startswith(records["finetune"]) and len(after.splitlines()) == 4
    assert (student / "report.json").is_file() and "512 tokens" in (student / "README.md").read_text()
    grown = [f"output={output}", "align.tokens=512"]
    with pytest.raises(ValueError, match=r"distill: made with another text_begins .* begin the stage anew$"):
        walk(str(recipe), grown)
    for made in ("distill", "finetune", "scores"):
        shutil.rmtree(output / made)
    (output / "head_masks.json").unlink()
    walk(str(recipe), grown)
    after = (output / "align" / "metrics.jsonl").read_text()
    assert after.startswith(records["align"]) and len(after.splitlines()) == 4


def test_stages_of_several_processes_go_through_accelerate(recipe, tmp_path, monkeypatch):
    """With the configuration that the recipe names; what stops them stops the road."""
    started = []

    class Process:
        def __init__(self, words, **_):
            started.extend([words] if words[0] == sys.executable else [])  # and not what looks at GPUs meanwhile

        def wait(self) -> int:
            return -15

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(pipeline.subprocess, "Popen", Process)
    with pytest.raises(SystemExit) as stopped:
        walk(str(recipe), [f"output={tmp_path}", "launch=ddp_cpu", "evaluate.lengths=[]"])
    assert stopped.value.code == 128 + 15
    file = RECIPES / "accelerate" / "ddp_cpu.yaml"
    words = f"-m accelerate.commands.launch --config_file {file} -m hydrahead.training.align --config {recipe}"
    words += f" output={tmp_path} launch=ddp_cpu evaluate.lengths=[]"
    assert started == [[sys.executable, *words.split()]]


@pytest.mark.parametrize(
    ("gpus", "launch", "options"),
    [
        (4, "ddp", ["--config_file", "ddp.yaml", "--num_processes", "4"]),
        (2, "fsdp2", ["--config_file", "fsdp2.yaml", "--num_processes", "2"]),
        (1, "ddp", []),
        (0, "ddp", ["--config_file", "ddp.yaml"]),  # a look from a laptop
        (4, "ddp_cpu", ["--config_file", "ddp_cpu.yaml"]),
        (1, "own.yaml", ["--config_file", "own.yaml"]),
        (4, "null", []),
    ],
)
def test_a_step_starts_a_process_for_each_gpu(gpus, launch, options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = pipeline.Road("demo", [f"output={tmp_path}", f"launch={launch}"]).launched()
    assert [word.rsplit("/", 1)[-1] for word in found] == options


def test_gpus_that_a_batch_cannot_be_shared_among_are_refused_before_anything_runs(tmp_path, monkeypatch):
    changes = [f"output={tmp_path / 'out'}", "launch=ddp"]
    changes += [f"{stage}.batch_tokens=8192" for stage in ("align", "distill", "finetune")]  # four micro-batches
    for gpus in (2, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        walk("demo", changes, dry_run=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"^align.batch_tokens .* times the processes \(3\)$"):
        walk("demo", changes, dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--text=book.txt", "--samples", "--output"])
def test_what_were_options_of_the_demo_are_called_keys_of_the_recipe_in_one_line(word):
    result = CliRunner().invoke(app, ["demo", word, "5"])
    assert result.exit_code == 1 and f"{word}: a key of the recipe now, " in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_where_a_gpu_trains_another_process_tokenises_ahead(recipe, tmp_path, monkeypatch):
    def road(*changes: str) -> pipeline.Road:
        return pipeline.Road(str(recipe), [f"output={tmp_path / 'out'}", *changes])

    with pipeline.tokens_ahead(road()) as process:
        assert process is None, "without a GPU the processor has enough to do"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pipeline.tokens_ahead(road("launch=several_machines.yaml")) as process:
        assert process is None, "each machine would start one"
    with pipeline.tokens_ahead(road()) as process:
        assert process.wait(120) == 0
    needed = 1024 + 3 * STAGE["tokens"]
    assert json.loads((tmp_path / "out" / "tokens" / "tokens.json").read_text())["tokens"] >= needed
    with pipeline.tokens_ahead(road("data.name=no_such_file.txt", f"data.cache={tmp_path / 'other'}")) as process:
        assert process.wait(120) != 0  # the stage that needs the text says why


def test_a_walk_that_has_something_to_train_tokenises_ahead(recipe, finished, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ahead(road):
        raise Asked(road.arguments)

    monkeypatch.setattr(pipeline, "tokens_ahead", ahead)
    walk(str(recipe), dry_run=True)
    walk(str(recipe), [f"output={finished[0]}"])
    with pytest.raises(Asked, match=re.escape(str(tmp_path))):
        walk(str(recipe), [f"output={tmp_path / 'out'}"])
