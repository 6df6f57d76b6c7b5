"""What a run's pictures show: the record, all of it, under its names."""

import json

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from hydrahead.evaluation.figures import draw_training

STEPS = 12
ALIGNMENT = {"linear_loss", "full_loss", "linear_layers", "full_layers"}


def record(names: set[str], scale: float = 1.0) -> list[dict]:
    """Metrics of a short run: a value of its own at each step for each name, evaluated at two of them."""
    lines = []
    for step in range(STEPS):
        line = {"step": step, "grad_norm": 2.0 + step}
        for index, name in enumerate(sorted(names)):
            value = scale * (1 + index) / (1 + step)
            evaluated = name.startswith(("heldout", "niah"))
            if not evaluated or step in (5, STEPS - 1):
                line[name] = [value, value / 2] if name.endswith("layers") else min(value, 1.0 if evaluated else value)
        lines.append(line)
    return lines


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, which would else be closed."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def draw(lines: list[dict], folder) -> dict[str, np.ndarray]:
    """Pictures of a record by their names."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_training(folder)
    return {file.name: matplotlib.image.imread(file) for file in folder.glob("*.png")}


def test_a_run_that_stopped_recording_a_number_is_drawn_without_it(drawn, tmp_path):
    """As one by code that fits fewer kinds of forms."""
    lines = record(ALIGNMENT)
    for line in lines[STEPS // 2 :]:
        del line["full_loss"], line["full_layers"]
    assert draw(lines, tmp_path / "run").keys() == {"training.png", "layers.png"}
    assert "full loss" not in {curve.get_label() for axes in drawn[0].axes for curve in axes.get_lines()}


@pytest.mark.parametrize(
    "names",
    [ALIGNMENT | {"heldout_linear_loss"}, {"kl", "ce", "niah_single_2", "niah_multikey_1", "heldout_loss"}],
    ids=["align", "distill"],
)
def test_every_number_of_a_record_is_drawn_under_its_name(names, drawn, tmp_path):
    lines = record(names)
    draw(lines, tmp_path / "run")
    panels = drawn[0].axes
    assert [panel.get_ylabel() for panel in panels] == (
        ["loss", "needles found", "gradient norm"] if "niah_multikey_1" in names else ["loss", "gradient norm"]
    )
    shown = {curve.get_label(): curve for panel in panels for curve in panel.get_lines()}
    for name in names:
        if not name.endswith("layers"):
            values = [(line["step"], line[name]) for line in lines if name in line]
            assert shown[name.replace("heldout", "held-out").replace("_", " ")].get_xydata().tolist() == [
                list(pair) for pair in values
            ]
    (gradient,) = panels[-1].get_lines()
    assert gradient.get_ydata().tolist() == [line["grad_norm"] for line in lines]
    words = {text.get_text() for panel in panels[:-1] for text in panel.get_legend().get_texts()}
    assert words == {label for label in shown if not label.startswith("_")}

    layers = sorted((name for name in names if name.endswith("layers")), reverse=True)
    assert len(drawn) == (2 if layers else 1)
    for panel, name in zip(drawn[-1].axes if layers else [], layers):
        assert panel.get_title().startswith(name.removesuffix("_layers"))
        found = [curve.get_ydata().tolist() for curve in panel.get_lines()]
        assert found == np.array([line[name] for line in lines]).T.tolist()


def test_other_numbers_are_other_pictures(tmp_path):
    """The file holds what the figure holds, whole: the same record gives the same picture, another one another."""
    first, again, other = (
        draw(record(ALIGNMENT, scale), tmp_path / str(index)) for index, scale in enumerate((1.0, 1.0, 3.0))
    )
    assert first.keys() == {"training.png", "layers.png"}
    for name, picture in first.items():
        assert (again[name] == picture).all()
        assert other[name].shape != picture.shape or (other[name] != picture).any()
