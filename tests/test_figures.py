"""Pictures of head scores: what is in them, and that all of it is on the canvas."""

import math

import pytest
from matplotlib.patches import Rectangle

from hydrahead.evaluation import figures

LONG = "SomeOrganisation/A-Teacher-of-135M-Instruct: receiver+sender score, global-constrained, 0.25 of kv_groups"
SIGNED = [[0.5, -0.02, 0.0, -0.3], [0.0, 0.1, math.nan, 0.0]]
POSITIVE = [[0.5, 0.0, 0.0, 0.2], [0.0, 0.1, 0.0, 0.0]]
MASKS = [[1, 1, 0, 0], [0, 0, 0, 1]]


@pytest.fixture
def drawn(monkeypatch):
    """The figures, not written to files but laid out as they would be."""
    found = []

    def keep(figure, path):
        figure.canvas.draw()
        found.append(figure)

    monkeypatch.setattr(figures, "save_picture", keep)
    yield found
    for figure in found:
        figures.plt.close(figure)


def assert_on_canvas(figure) -> None:
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            if axes.axison and text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()
    for whole in (figure._suptitle, *figure.legends):
        box = whole.get_window_extent() if whole else figure.bbox
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, whole


def assert_shows(axes, scores, masks) -> None:
    """Kept heads are framed, negative ones marked and of another colour than zero and than positive ones."""
    frames = {tuple(round(x + 0.44) for x in patch.get_xy()) for patch in axes.patches if isinstance(patch, Rectangle)}
    assert frames == {(head, layer) for layer, row in enumerate(masks) for head, kept in enumerate(row) if kept}
    marks = {tuple(map(int, place)) for place in axes.collections[0].get_offsets()}
    assert marks == {(head, layer) for layer, row in enumerate(scores) for head, s in enumerate(row) if s < 0}
    (image,) = axes.images
    low, high = image.get_clim()
    assert high == 0.5 and low == (-0.5 if marks else 0)
    red, _, blue, _ = image.cmap(image.norm(-0.3 if marks else 0.0))
    assert red > blue if marks else red > 0.9
    red, _, blue, _ = image.cmap(image.norm(0.3))
    assert blue > red


@pytest.mark.parametrize("scores", [SIGNED, POSITIVE], ids=["signed", "positive"])
def test_a_head_map_shows_kept_heads_and_negative_scores(scores, drawn, tmp_path):
    figures.plot_head_map(scores, MASKS, LONG, tmp_path / "map.png")
    (figure,) = drawn
    axes, bar = figure.axes
    assert_shows(axes, scores, MASKS)
    assert bar.get_ylabel() == "score"
    assert ("score below 0" in figure._suptitle.get_text()) == (scores is SIGNED)
    assert_on_canvas(figure)


def test_maps_of_several_methods_have_a_scale_each(drawn, tmp_path):
    maps = {"replacement": SIGNED, "receiver": POSITIVE, "attention": POSITIVE, "logit-contribution": POSITIVE}
    figures.plot_head_maps(maps, dict.fromkeys(maps, MASKS), LONG, tmp_path / "maps.png")
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == list(maps)
    for axes, scores in zip(panels, maps.values()):
        assert_shows(axes, scores, MASKS)
    assert [axes.get_ylabel() for axes in figure.axes].count("score") == len(maps)
    assert_on_canvas(figure)


def test_a_tall_map_keeps_its_labels(drawn, tmp_path):
    figures.plot_head_map([[0.0, 1.0]] * 40, [[0, 1]] * 40, LONG, tmp_path / "map.png")
    assert_on_canvas(drawn[0])


@pytest.mark.parametrize("methods", [["replacement"], ["replacement", "receiver+sender"]])
def test_knock_out_curves_keep_their_title_and_legend_with_few_methods(methods, drawn, tmp_path):
    lines = {"top": [1.0, 0.0], "bottom": [1.0, 0.9]}
    curve = {"sizes": [1, 2], "random": [[1.0, 0.5]], "intact": 1.0, "methods": dict.fromkeys(methods, lines)}
    figures.plot_knockout(dict.fromkeys(["niah-single", "copy"], curve), LONG, tmp_path / "ablation.png")
    assert len(drawn[0].legends) == 1
    assert_on_canvas(drawn[0])


def test_stability_keeps_its_title(drawn, tmp_path):
    entry = {"rho": 0.5, "rho_low": 0.1, "rho_high": 0.9, "heads": 7}
    figures.plot_stability({"replacement": {"4": entry, "8": entry}}, LONG, tmp_path / "stability.png")
    assert_on_canvas(drawn[0])


def test_students_are_drawn_as_far_as_they_are_known(drawn):
    none = {"kl": [], "niah_single_2": [], "niah_multikey_1": []}
    figures.plot_students({"default": none}, None)
    assert not drawn, "fewer than ten steps, and no needles asked for"
    figures.plot_students(
        {"default": none | {"kl": [(at, 1 / at, None, None) for at in range(1, 9)]}, "random": none}, None
    )
    assert [axes.get_title() for axes in drawn[0].axes] == ["KL to the teacher, nats a token"]


def test_students_of_several_seeds_share_a_color(drawn):
    seeds = {name: {"kl": [(1, 0.5, None, None)]} for name in ("default-3to1", "random-3to1", "default-3to1-1")}
    figures.plot_students(seeds, None)
    colors = [line.get_color() for line in drawn[0].axes[0].get_lines()]
    assert colors[0] == colors[2] != colors[1]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["default-3to1", "random-3to1"]


def test_similarity_names_layers_where_their_heads_are(drawn):
    figures.plot_similarity([[1, 0.5], [0.5, 1]], [[1.0] * 8] * 8, LONG, None)
    left, right = drawn[0].axes[:2]
    assert list(left.get_xticks()) == [0, 1] and list(right.get_xticks()) == [1.5, 5.5]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "1"]
    assert_on_canvas(drawn[0])
