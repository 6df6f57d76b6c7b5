"""The study of students: rows share alignment and scores, nothing is done twice, tables say what was found."""

import json
import os
import re
import subprocess
import sys

import pytest

from hydrahead.benchmarks.students import merged, tables
from hydrahead.benchmarks.study import ROWS, TENTH, Study
from hydrahead.tests.gguf_models import tiny_teacher, write_gguf
from hydrahead.tests.workshop import write_short_teacher

SMALL = [
    *("data.heldout_tokens=4096", "run.micro_batch_tokens=512", "run.save_every=1000", "align.tokens=1024"),
    *("align.batch_tokens=512", "align.length=256", "align.calibration_tokens=512", "align.warmup_steps=1"),
    *("score.method=[receiver]", "score.pairs=2", "score.length=256", "score.only=[niah-single.value]"),
    *("distill.tokens=10240", "distill.batch_tokens=1024", "distill.length=256", "distill.warmup_steps=1"),
    *("finetune=null", "evaluate.lengths=[512]", "evaluate.prompts=2", "evaluate.text_tokens=1024"),
]
NAMES = ["constrained-3to1", "random-3to1", "constrained-3to1-tenth", "constrained-3to1-aligned"]


def run(folder, *rows: str, times: int = 1, status: int = 0) -> str:
    """What the calls print, errors last: several work side by side, and all end with a status."""
    command = [sys.executable, "-m", "hydrahead.benchmarks.study", "demo", *SMALL]
    command += [f"teacher.name={folder / 'teacher'}", f"--output={folder / 'out'}", "--rows", *rows]
    ways = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    calls = [subprocess.Popen(command, text=True, **ways) for _ in range(times)]
    done = [call.communicate() for call in calls]
    assert {call.returncode for call in calls} == {status}, done[0][1][-2000:] + done[-1][1][-2000:]
    return "".join(printed + said for printed, said in done)


@pytest.mark.slow
def test_rows_share_what_they_can_and_go_on(tmp_path):
    write_short_teacher(tmp_path / "teacher")
    first = run(tmp_path, *NAMES[:2], times=2)
    assert first.count("constrained, 3:1\n") == first.count("random, 3:1\n") == 1, "each by one of the two"
    assert first.count("align 2/2") <= 1 and "| random-3to1 | 0.01024M |" in first
    # A row may be a folder of `hydrahead run`, which finetuned the student too.
    (tmp_path / "out" / NAMES[1] / "finetune").mkdir()
    (tmp_path / "out" / NAMES[1] / "finetune" / "metrics.jsonl").write_text("{}\n")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    second = run(tmp_path, *NAMES)
    assert all(path.stat().st_mtime_ns == then for path, then in made.items()) and len(made) == 2
    assert not (tmp_path / "out" / NAMES[3] / "distill").exists(), "aligned heads, and nothing trained"
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(study["rows"]) == NAMES
    assert [len(study["rows"][name]["steps"].get("distill", [])) for name in NAMES] == [10, 10, 1, 0]
    assert study["rows"][NAMES[0]]["masks"] != study["rows"][NAMES[1]]["masks"]
    assert study["rows"][NAMES[0]]["masks"] == study["rows"][NAMES[2]]["masks"]
    assert {len(cell["scores"]) for cell in study["report"]["needles"]} == {2}
    assert {cell["model"] for cell in study["report"]["needles"]} == {"teacher", *NAMES}
    assert tables(study) in second and re.search(r"^\| random, 3:1, 0.01024M \| 1, 1 \| ", second, flags=re.M)


@pytest.mark.slow
def test_a_row_that_fails_stops_no_other(tmp_path):
    """A file is where one row's folder would be."""
    write_short_teacher(tmp_path / "teacher")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layerwise-7to1-aligned").touch()
    said = run(tmp_path, "layerwise-7to1-aligned", "random-3to1-aligned", status=1)
    assert "layerwise-7to1-aligned: [Errno" in said and "| random-3to1-aligned |" in said
    assert said.rstrip().endswith("hydrahead: layerwise-7to1-aligned: failed, each for the reason above")
    assert not list((tmp_path / "out").rglob("head_scores.json")), "controls need no scores"


def test_controls_are_of_the_very_teacher_that_a_gguf_file_holds(tmp_path, monkeypatch):
    """Which its name alone does not say."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "teacher.gguf", tiny_teacher("qwen2-tied"))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the others are in there " * 200}) + "\n")
    given = [*SMALL, f"teacher.name={file}", f"data.name={tmp_path / 'text.jsonl'}", "data.subset=null"]
    lengths = ["align.length=16", "distill.length=16", "run.micro_batch_tokens=16"]
    study = Study("demo", [*given, *lengths], tmp_path / "out")
    study.check("random-3to1")
    assert not (tmp_path / "out").exists()
    beyond = Study("demo", [*given, *lengths, "evaluate.lengths=[100000]"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"evaluate\.lengths needs"):
        beyond.check("random-3to1")


def test_rows_are_named_by_what_they_are():
    assert ROWS["groups-3to1"].ratio == 0.25 and ROWS["fixed-7to1-tenth"].select["strategy"] == "fixed"
    assert all({"budget_unit", "strategy"} <= row.select.keys() for row in ROWS.values()), "defaults may change"
    assert all((row.share == TENTH) == name.endswith("tenth") for name, row in ROWS.items())
    assert all((row.share == 0) == ("-aligned" in name) for name, row in ROWS.items())
    assert [ROWS[f"random-3to1{seed}"].seed for seed in ("", "-1", "-2")] == [0, 1, 2]


def test_studies_that_asked_the_same_prompts_make_one_page():
    """Beside heads with one in every layer, of its budget and tokens, prompt by prompt, seeds as one."""
    lengths = (512, 1024)

    def student(name: str, scores: list[float], *, depth: float = 0.5, weights: str = "w", **changed) -> dict:
        """A study of one student: of each length two prompts, behind each other in `scores`."""
        needles = [
            {"task": "niah_single_2", "length": length, "depths": [depth, depth], "accuracy": 0.5, "low": 0, "high": 1}
            | {"model": model, "scores": found[2 * place : 2 * place + 2]}
            for place, length in enumerate(lengths)
            for model, found in (("teacher", [1.0] * 4), (name, scores))
            if found[2 * place :]
        ]
        models = [{"label": model, "weights": weights} for model in ("teacher", name)]
        text = [{"model": model, "length": 512, "loss": 1.0} for model in ("teacher", name)]
        report = {"prompts": 2, "text_name": "the text", "models": models, "needles": needles, "text": text}
        row = {"about": "default, 3:1", "ratio": 0.25, "seed": 0, "tokens": {"distill": 10**6}, "steps": {}}
        row |= {"batch_tokens": 1, "select": {}, "student": [], "training": []}
        return {"recipe": "r", "rows": {name: row | changed}, "report": report}

    fixed = {"about": "fixed, 3:1", "select": {"strategy": "fixed"}}
    default = student("default", [1.0, 1.0, 0.0, 0.0])
    seed = student("default-1", [1.0, 0.0, 1.0, 0.0], about="constrained, 3:1", seed=1)  # as it is called by now
    page = tables(
        merged(
            [
                default,
                seed,
                student("same", [1.0, 0.5, 0.5, 0.0], **fixed, tokens={"distill": 1e6}),
                student("eighth", [0.0] * 4, about="default, 7:1", ratio=0.125),
                student("tenth", [0.0] * 4, tokens={"distill": 1e5}),
                student("tenth-fixed", [1.0, 1.0, 1.0, 0.0], **fixed, tokens={"distill": 1e5}),
                student("rows", [0.0] * 4, about="default, 3:1, long rows", training=["distill.length=8192"]),
                student("mean", [0.0] * 4, about="mean of ranks, 3:1"),
                student("partly", [0.0] * 2, about="random, 3:1"),
            ]
        )
    )
    assert "| default-1 | 1M | 0.50 (0.00–1.00) | 0.50 (0.00–1.00) |" in page
    beside = page[page.index("Minus heads by score") :]
    assert "| fixed, 3:1, 1M | 1, 2 | +0.00 (+0.00 to +0.00) |" in beside, "alike on every single prompt"
    assert "| fixed, 3:1, 0.1M | 1, 1 | +0.75 (+0.25 to +1.00) |" in beside
    for about in ("default, 3:1, long rows", "mean of ranks, 3:1"):
        assert f"| {about}, 1M | 1, 2 | -0.50 " in beside
    assert "7:1" not in beside and beside.count("\n| ") == 6, "what others are held against is not held against itself"
    assert beside.rstrip().endswith("left out: partly.")

    same = student("same", [0.0] * 4, **fixed)
    assert "fixed" not in tables(merged([default, same], ["default"]))
    with pytest.raises(ValueError, match="other: no such row; there are default, same"):
        merged([default, same], ["other"])
    with pytest.raises(ValueError, match="default: in two studies"):
        merged([default, default])
    for asked in ({"depth": 0.1}, {"weights": "another"}):
        with pytest.raises(ValueError, match="did not ask the same prompts"):
            merged([default, student("same", [0.0] * 4, **fixed, **asked)])
    assert list(default["rows"]) == ["default"], "the first is left as it was"
