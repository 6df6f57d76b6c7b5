"""The main job from end to end on a few steps, and taking up where an interrupted one stopped."""

import json

import pytest
from rich.console import Console

from hydrahead.convert import HeadScores, teachers
from hydrahead.demo import run
from hydrahead.demo.run import Demo, DemoSettings

FEW = DemoSettings(length=192, pairs=2, train_length=96, batch_size=2, align_steps=3, distill_steps=3, samples=1)


@pytest.mark.slow
def test_the_demo_runs_from_teacher_to_reloaded_checkpoint_and_resumes(tmp_path, monkeypatch):
    console = Console(record=True, width=120)
    report = Demo(FEW, tmp_path, console).run()
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"hybrid", "report.json", "head_map.png", "accuracy.png", "head_scores.json", "metrics.jsonl"}
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["lengths"] == [192, 384, 768, 1536]
    assert sum(map(sum, report["head_masks"])) == 12
    for name in ("teacher", "hybrid"):
        assert all(len(values) == 4 for values in report["results"][name].values())
    cache = {name: report["results"][name]["cache_bytes"] for name in report["results"]}
    assert cache["hybrid"][-1] < cache["teacher"][-1]
    shown = console.export_text()
    assert report["reloaded"]["needle"] in shown and "needles" in shown
    scores = HeadScores.load(tmp_path / "head_scores.json").scores
    kept = [s for row, mask in zip(scores, report["head_masks"]) for s, keep in zip(row, mask) if keep]
    assert report["without_evidence"] == sum(score <= 0 for score in kept)
    card = (tmp_path / "hybrid" / "README.md").read_text()
    assert "12 of 48 full attention" in card and run.condition(FEW) in card

    # What is meant for the Hub says nothing of this machine.
    for file in [tmp_path / "report.json", *(tmp_path / "hybrid").glob("*.json"), *(tmp_path / "hybrid").glob("*.md")]:
        assert str(run.EMBEDDED_TEACHER) not in file.read_text() and str(tmp_path) not in file.read_text(), file

    # Nothing that is done already is done again.
    for stage in ("score_heads", "align_heads", "distill"):
        monkeypatch.setattr(run, stage, lambda *_, **__: pytest.fail("repeated a finished stage"))
    again = Demo(FEW, tmp_path, Console(quiet=True)).run()
    assert again["results"] == report["results"]


def test_the_condition_says_what_is_true_of_this_teacher_and_text(tmp_path):
    own = run.condition(DemoSettings())
    assert "the teacher's own training mixture" in own
    assert run.condition(DemoSettings(teacher=f"{run.EMBEDDED_TEACHER}/../teacher")) == own
    other = run.condition(DemoSettings(teacher="someone/model", text=tmp_path / "book.txt"))
    assert "own training mixture" not in other
    assert "the demo's synthetic mixture, made of book.txt, which the teacher never saw" in other
    assert str(tmp_path) not in other
    text = run.condition(DemoSettings(text=tmp_path / "book.txt"))
    assert "own training mixture" not in text and "made of book.txt, which the teacher did not read" in text


def test_heads_kept_without_evidence_are_said():
    """In the card and on the screen."""
    report = {"decided_by_tie_break": 2, "without_evidence": 7}
    assert run._choice(report).startswith(
        "kept by replacement effect, 2 of them by tie-break; 7 of them without evidence"
    )
    assert run._choice(dict.fromkeys(report, 0)) == "kept by replacement effect"


@pytest.mark.parametrize("length", [0, 3, 128])
def test_a_length_without_room_for_needles_is_refused_before_the_teacher_is_read(length, tmp_path, monkeypatch):
    for name in ("load_corpus", "encode_corpus"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("read the text"))
    with pytest.raises(ValueError, match=rf"^length {length} is too short [^\n]* the least that always works [^\n]*$"):
        Demo(DemoSettings(length=length), tmp_path / "out", Console(quiet=True))


def test_a_short_text_is_refused_before_the_teacher_is_read(tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("too short " * 50)
    monkeypatch.setattr(teachers.Teacher, "load", lambda *_, **__: pytest.fail("read the teacher"))
    with pytest.raises(ValueError, match=r"^the held-out text has [^\n]*$"):
        Demo(DemoSettings(text=tmp_path / "short.txt"), tmp_path / "out", Console(quiet=True))
