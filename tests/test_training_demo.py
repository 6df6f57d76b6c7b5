"""The demo recipe from end to end as people launch it, in a shortened form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hydrahead.convert.forms import load_forms
from hydrahead.convert.teachers import open_teacher
from hydrahead.hub.checkpoint import answer_in_clean_process
from hydrahead.tests.training_runs import MAINS
from hydrahead.tests.workshop import write_short_teacher

SHORT = [
    *("align.tokens=4096", "distill.tokens=4096", "finetune.tokens=4096", f"masks={[[1, 0, 0, 0, 0, 0, 0, 1]] * 2}"),
    *("evaluate.every=2", "evaluate.length=192", "evaluate.niah_prompts=2", "evaluate.text_windows=2"),
]
WATCHED = {
    "align": {"linear_loss", "full_loss", "linear_layers", "full_layers"},
    "distill": {"kl", "ce", "niah_single_2", "niah_multikey_1", "heldout_loss"},
    "finetune": {"ce", "niah_single_2", "niah_multikey_1", "heldout_loss"},
}


@pytest.mark.slow
def test_the_demo_recipe_runs_end_to_end_and_its_student_answers_without_hydrahead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = write_short_teacher(tmp_path / "teacher")
    words = ["--config", "demo", f"teacher.name={teacher}", f"output={tmp_path}", *SHORT]
    for stage, watched in WATCHED.items():
        if stage == "align":  # to launch takes longer than the rest: the others run in this process
            launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--num_processes", "1"]
            command = [*launcher, "-m", "hydrahead.training.align", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            MAINS[stage](words)
        folder = tmp_path / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1]
        assert watched <= lines[1].keys() and "heldout_loss" not in lines[0]
        assert (folder / "training.png").is_file()  # what is in it: test_training_figures.py
    assert (tmp_path / "align" / "layers.png").is_file()
    _, options = load_forms(tmp_path / "align" / "head_forms.safetensors", open_teacher(teacher))
    assert options["fusion_norm"] == "linear", "scores and conversions learn from the file what the heads are for"

    student = tmp_path / "finetune" / "student"
    answer_in_clean_process(student, "def main():", max_new_tokens=2)
    AutoTokenizer.from_pretrained(student)
    card = (student / "README.md").read_text()
    assert "100% of rows from a mixture with synthetic retrieval" in card and "the Python standard library" in card
    assert str(tmp_path) not in card
