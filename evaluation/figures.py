"""Results as pictures."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..console import printable
from ..files import atomic_file

plt.rcParams["text.parse_math"] = False  # names with a dollar are names

RED, BLUE, GREEN, GREY = "#d1495b", "#1f6f9f", "#3a7d44", "#6c757d"
# Methods that stand out where many are compared.
STRONG = {"combined": GREEN, "replacement": RED, "receiver+sender": BLUE}
LAYER_TITLES = {"linear_layers": "linear forms", "full_layers": "full-attention forms", "layers": "whole layers"}
MODELS = (GREY, RED, BLUE, GREEN, "#b8860b", "#7b4fa3", "#2a9d8f", "#8c564b")  # colours of models side by side
NEEDLE_COLORS = {"niah_single_2": GREEN, "niah_multikey_1": "#b8860b"}
TRAINING_COLORS = {"linear_loss": BLUE, "full_loss": RED, "layer_loss": BLUE, "kl": BLUE, "ce": RED}
BANDS = 4  # students whose intervals are drawn over each other
CURVES = {"kl": "KL to the teacher, nats a token", "niah_single_2": "needles, one key", "niah_multikey_1": "four keys"}
HELD_OUT = {f"heldout_{name}": name for name in TRAINING_COLORS} | {"heldout_loss": "ce"}


def plot_head_map(scores: Sequence[Sequence[float]], masks: Sequence[Sequence[int]], title: str, path: Path) -> None:
    """
    Draw scores `[L][H]` as a map, layers down and query heads across, with the full-attention heads framed.

    Args:
        masks: `[L][H]`, 1 for the heads to frame.
    """
    layers, heads = len(scores), len(scores[0])
    size = (max(5.6, 0.42 * heads + 2), max(2.4, 0.42 * layers + 1.4))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = _draw_heads(axes, scores, masks, line_width=1.8)
    axes.set_aspect("equal")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    signs = "framed: stays full attention" + ("; –: score below 0" if np.less(scores, 0).any() else "")
    figure.suptitle(f"{_wrapped(title, size[0])}\n{signs}", fontsize=9)
    figure.colorbar(image, ax=axes, label="score", shrink=0.85)
    save_picture(figure, path)


def plot_head_maps(
    scores: Mapping[str, Sequence[Sequence[float]]],
    masks: Mapping[str, Sequence[Sequence[int]]],
    title: str,
    path: Path,
) -> None:
    """
    Draw the scores `[L][H]` of several methods side by side, each with its own best heads framed.

    Args:
        masks: by method, `[L][H]`, 1 for the heads to frame.
    """
    first = next(iter(scores.values()))
    layers, heads = len(first), len(first[0])
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    size = (max(4.8, columns * max(2.6, 0.22 * heads + 1)), rows * max(1.9, 0.2 * layers + 1) + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(scores) :]:
        axes.axis("off")
    for axes, (method, values) in zip(grid.flat, scores.items()):
        image = _draw_heads(axes, values, masks[method], line_width=1.2)
        axes.set_aspect("auto")
        axes.set_title(method, fontsize=9)
        axes.tick_params(labelsize=6)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("score", fontsize=8)
        bar.ax.tick_params(labelsize=6)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer", fontsize=8)
    for axes in grid.flat[max(0, len(scores) - columns) : len(scores)]:
        axes.set_xlabel("query head", fontsize=8)
    signs = "; –: score below 0" if np.less(list(scores.values()), 0).any() else ""
    figure.suptitle(_wrapped(title + signs, size[0]), fontsize=9)
    save_picture(figure, path)


def plot_similarity(
    layers: Sequence[Sequence[float]], heads: Sequence[Sequence[float]], title: str, path: Path
) -> None:
    """
    Draw how alike layers `[L, L]` and heads `[L · H, L · H]` are, in 0 to 1, side by side.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.8), layout="constrained")
    width = len(heads) // len(layers)
    for axes, values, name in ((left, layers, "layers"), (right, heads, f"heads, {width} a layer")):
        image = axes.imshow(values, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
    ticks = range(0, len(layers), max(1, len(layers) // 7))
    left.set_xticks(ticks)
    left.set_yticks(ticks)
    right.set_xticks([(tick + 0.5) * width - 0.5 for tick in ticks], ticks)
    right.set_yticks([(tick + 0.5) * width - 0.5 for tick in ticks], ticks)
    left.set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=right, label="similarity", shrink=0.85)
    figure.suptitle(_wrapped(title, 10), fontsize=9)
    save_picture(figure, path)


def _draw_heads(axes, scores: Sequence[Sequence[float]], masks: Sequence[Sequence[int]], line_width: float):
    """A map of scores: white is 0, red below it, grey unknown; frames and dashes have a seam to be seen on any."""
    values = np.array(scores, dtype=float)
    most = max(np.abs(values[np.isfinite(values)]).max(initial=0), 1e-12)
    colours = ("RdBu", -most) if (values < 0).any() else ("Blues", 0)
    image = axes.imshow(values, cmap=plt.get_cmap(colours[0]).with_extremes(bad="#bbbbbb"), vmin=colours[1], vmax=most)
    seam = [withStroke(linewidth=line_width + 2, foreground="white")]
    layers, heads = np.nonzero(values < 0)
    axes.scatter(heads, layers, marker="_", s=30 * line_width, linewidth=line_width, color="black", path_effects=seam)
    for layer, head in np.argwhere(np.array(masks)):
        look = {"fill": False, "edgecolor": "black", "linewidth": line_width, "path_effects": seam, "zorder": 3}
        axes.add_patch(Rectangle((head - 0.44, layer - 0.44), 0.88, 0.88, **look))
    return image


def _wrapped(title: str, width: float) -> str:
    """A title in lines that fit a figure of `width` inches, at 9 points."""
    return textwrap.fill(printable(title), int(width * 12), break_on_hyphens=False)


def plot_knockout(curves: Mapping[str, dict], title: str, path: Path) -> None:
    """
    Draw accuracy over the number of heads replaced: a row for each probe, a column for each method.

    Args:
        curves: by probe, what `convert.scoring.evidence.knockout` gives.
    """
    methods = list(next(iter(curves.values()))["methods"])
    size = (max(4, 1.9 * len(methods) + 1), 1.9 * len(curves) + 1)
    shape = {"figsize": size, "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, grid = plt.subplots(len(curves), len(methods), **shape)
    for row, (probe, found) in zip(grid, curves.items()):
        places = range(len(found["sizes"]))
        for axes, method in zip(row, methods):
            ends = found["methods"][method]
            _draw_random(axes, found["random"])
            axes.plot(places, ends["top"], "o-", color=RED, markersize=3, label="its best")
            axes.plot(places, ends["bottom"], "s-", color=BLUE, markersize=3, label="its worst")
            axes.axhline(found["intact"], color="black", linewidth=0.6, linestyle=":")
            axes.set_xticks(places, found["sizes"], fontsize=6)
            axes.set_ylim(-0.05, 1.05)
            axes.tick_params(axis="y", labelsize=6)
            axes.grid(alpha=0.2)
        row[0].set_ylabel(f"{probe}\naccuracy", fontsize=8)
    for axes, method in zip(grid[0], methods):
        axes.set_title(method, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("heads replaced", fontsize=7)
    _legend_below(figure, grid[0][0], columns=3)
    figure.suptitle(_wrapped(title, size[0]), fontsize=9)
    save_picture(figure, path)


def _draw_random(axes, runs: Sequence[Sequence[float]]) -> None:
    """Mean and range of random choices `[runs][places]`."""
    values = np.array(runs)
    axes.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=GREY, alpha=0.2, linewidth=0)
    axes.plot(values.mean(0), color=GREY, linewidth=1, label="random: mean, range")


def _legend_below(figure, axes, columns: int) -> None:
    """What the lines of one panel are, once for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def plot_stability(stability: Mapping[str, Mapping[str, dict]], title: str, path: Path) -> None:
    """
    Draw split-half rank correlation, with the 95% interval of the splits, over the number of pairs.

    Args:
        stability: by method, what `convert.scoring.evidence.stability` gives.
    """
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    counts = sorted({int(count) for found in stability.values() for count in found})
    for index, (method, found) in enumerate(stability.items()):
        points = [(counts.index(int(count)), entry) for count, entry in found.items() if entry["rho"] is not None]
        if not points:
            axes.plot([], [], "o", color=f"C{index}", label=f"{method}: fewer than three heads take part")
            continue
        places = [place + 0.06 * (index - len(stability) / 2) for place, _ in points]
        values, low, high = ([entry[key] for _, entry in points] for key in ("rho", "rho_low", "rho_high"))
        label = f"{method}, {points[-1][1]['heads']} heads"
        spread = np.subtract([values, high], [low, values]).clip(0)  # a bootstrap's may lie beside the value
        axes.errorbar(places, values, yerr=spread, fmt="o-", capsize=2, color=f"C{index}", label=label)
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlabel("pairs of each probe, split in halves")
    axes.set_ylabel("Spearman, heads that take part")
    axes.set_ylim(-0.4, 1.05)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower right")
    axes.set_title(_wrapped(title, 5), fontsize=9)
    save_picture(figure, path)


def plot_conditions(tables: Mapping[str, dict], columns: Sequence[str], path: Path) -> None:
    """
    Draw accuracy and text loss of converted students by ranking method, a column of panels for each condition.

    Args:
        tables: by condition and method, by column, `accuracy` and `text`; under `random` a list of such rows.
        columns: what to draw, the fewest changes first.
    """
    size = (3 * len(tables) + 1.2, 5.6)
    figure, grid = plt.subplots(2, len(tables), figsize=size, squeeze=False, sharey="row", layout="constrained")
    places = range(len(columns))
    for column, (condition, table) in enumerate(tables.items()):
        methods = [name for name, row in table.items() if name != "random" and all(key in row for key in columns)]
        others = [name for name in dict.fromkeys(name.split(",")[0] for name in methods) if name not in STRONG]
        colors = STRONG | dict(zip(others, ("C1", "C2", "C4", "C5", "C6", "C8", "C9")))  # no other red, blue or grey
        for axes, key in zip(grid[:, column], ("accuracy", "text")):
            _draw_random(axes, [[row[name][key] for name in columns] for row in table["random"]])
            for method in methods:
                style, width = ("o-", 2) if method in STRONG else (".--", 0.8)
                values, color = [table[method][name][key] for name in columns], colors[method.split(",")[0]]
                axes.plot(places, values, style, linewidth=width, color=color, label=method)
            axes.set_xticks(places, columns, fontsize=7)
            axes.grid(alpha=0.2)
        grid[0][column].set_title(condition, fontsize=9)
        grid[0][column].set_ylim(-0.05, 1.05)
    grid[0][0].set_ylabel("needles found", fontsize=8)
    grid[1][0].set_ylabel("text loss beyond the teacher's, nats", fontsize=8)
    _legend_below(figure, grid[0][0], columns=5)
    title = "Heads aligned one by one on text with needles or plain, without position (nope) or with RoPE; no more"
    figure.suptitle(title, fontsize=10)
    save_picture(figure, path)


def plot_accuracy_over_length(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]],
    native_length: int | None,
    title: str,
    path: Path,
) -> None:
    """
    Draw accuracy in [0, 1] over context length, a panel for each task and a line for each model.

    Args:
        panels: by task and model, points of length, accuracy and the ends of its interval.
        native_length: to be marked: the first model's.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    shape = {"figsize": (max(5, 3.1 * columns), 2.5 * rows + 0.9), "squeeze": False, "sharey": True}
    figure, grid = plt.subplots(rows, columns, layout="constrained", **shape)
    lengths = sorted({point[0] for lines in panels.values() for points in lines.values() for point in points})
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (task, lines) in zip(grid.flat, panels.items()):
        for index, (model, points) in enumerate(lines.items()):
            shift = 1 + 0.02 * (index - (len(lines) - 1) / 2)  # equal values stay visible
            places, values, low, high = (np.array(part) for part in zip(*points)) if points else ([],) * 4
            spread = np.subtract([values, high], [low, values])
            look = {"marker": "o", "markersize": 4, "color": MODELS[index % len(MODELS)], "elinewidth": 0.8}
            axes.errorbar(np.multiply(places, shift), values, spread, label=model, capsize=2, **look)
        if native_length and lengths[0] <= native_length <= lengths[-1]:
            label = "native length of the first"
            axes.axvline(native_length, color="black", linewidth=0.8, linestyle=":", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_short(length) for length in lengths], fontsize=7)
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.05)
        axes.set_title(task, fontsize=9)
        axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy", fontsize=8)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("context, tokens", fontsize=8)
    _legend_below(figure, grid[0][0], columns=3)
    figure.suptitle(_wrapped(title, shape["figsize"][0]), fontsize=9)
    save_picture(figure, path)


def plot_depths(
    maps: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], lengths: Sequence[int], title: str, path: Path
) -> None:
    """
    Draw accuracy over length and depth: a row for each model, a column for each task.

    Args:
        maps: by model and task, `[depths][lengths]` from the beginning of the text to its end; NaN where nothing was
            asked.
    """
    tasks = list(dict.fromkeys(task for row in maps.values() for task in row))
    size = (max(4.5, (0.45 * len(lengths) + 0.9) * len(tasks) + 1.4), 1.5 * len(maps) + 0.9)
    figure, grid = plt.subplots(len(maps), len(tasks), figsize=size, squeeze=False, layout="constrained")
    colors = plt.get_cmap("viridis").with_extremes(bad="#bbbbbb")
    for row, (model, by_task) in zip(grid, maps.items()):
        for axes, task in zip(row, tasks):
            values = by_task.get(task, [[None] * len(lengths)])
            image = axes.imshow(np.array(values, dtype=float), cmap=colors, vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=6, rotation=60)
            axes.set_yticks([-0.5, len(values) - 0.5], ["0%", "100%"], fontsize=6)
        row[0].set_ylabel(f"{model}\ndepth", fontsize=7)
    for axes, task in zip(grid[0], tasks):
        axes.set_title(task, fontsize=7)
    figure.colorbar(image, ax=grid, label="accuracy", shrink=0.8)
    figure.suptitle(_wrapped(title, size[0]), fontsize=9)
    save_picture(figure, path)


def _short(length: int) -> str:
    """131072 as 128K."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def save_picture(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


def draw_training(folder: Path) -> None:
    """
    Draw what a run's `metrics.jsonl` holds: `training.png`, losses, needles found and gradient norm over the steps;
    and, of an alignment, `layers.png`, the loss of each layer.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    has_needles = any("niah_single_2" in line for line in lines)
    heights = [3, 1.2, 1] if has_needles else [3, 1]
    size, shape = (7, 1.4 * sum(heights)), {"sharex": True, "height_ratios": heights}
    figure, panels = plt.subplots(len(heights), 1, figsize=size, layout="constrained", **shape)
    steps = [line["step"] for line in lines]
    for name, color in TRAINING_COLORS.items():
        if name in lines[-1]:
            _draw_smooth(panels[0], steps, [line[name] for line in lines], _words(name), color)
    for name, of in HELD_OUT.items():
        _draw_points(panels[0], lines, name, TRAINING_COLORS[of])
    _use_log(panels[0])
    panels[0].set_ylabel("loss")
    panels[0].legend(fontsize=8)
    if has_needles:
        for name, color in NEEDLE_COLORS.items():
            _draw_points(panels[1], lines, name, color)
        panels[1].set_ylim(-0.05, 1.05)
        panels[1].set_ylabel("needles found")
        panels[1].legend(fontsize=8)
    panels[-1].plot(steps, [line["grad_norm"] for line in lines], color=GREY, linewidth=0.8)
    _use_log(panels[-1])
    panels[-1].set_ylabel("gradient norm")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.25)
    save_picture(figure, folder / "training.png")
    if layers := [name for name in LAYER_TITLES if name in lines[-1]]:
        _draw_layers(lines, layers, folder / "layers.png")


def plot_students(curves: Mapping[str, Mapping[str, Sequence[tuple]]], file: Path) -> None:
    """
    Draw how students learn, a panel for each number, a line for each student; nothing where no point is known yet.
    Students that differ in nothing but their seed, a digit behind their names, share a color.

    Args:
        curves: of every student, for every number, points: millions of tokens, value, and the low and high end of its
            interval or `None`; no interval is drawn where there are more students than can be told apart by it.
    """
    names = [name for name in next(iter(curves.values())) if any(each[name] for each in curves.values())]
    if not names:
        return
    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names):
        colors: dict[str, str] = {}
        for student, each in curves.items():
            if not each[name]:
                continue
            at, value, low, high = zip(*each[name])
            choice = re.sub(r"-\d$", "", student)
            label = None if choice in colors else choice
            color = colors.setdefault(choice, MODELS[(len(colors) + 1) % len(MODELS)])  # grey is the teacher's
            axes.plot(at, value, color=color, label=label, marker="o" if low[0] is not None else "", markersize=4)
            if low[0] is not None and len(curves) <= BANDS:
                axes.fill_between(at, low, high, color=color, alpha=0.1, linewidth=0)
        axes.set_xlabel("tokens of distillation, millions")
        axes.set_title(CURVES.get(name, name), fontsize=10)
        axes.grid(alpha=0.25)
        if name in NEEDLE_COLORS:
            axes.set_ylim(-0.05, 1.05)
        else:
            _use_log(axes)
    panels[0][0].legend(fontsize=8)
    save_picture(figure, file)


def _words(name: str) -> str:
    return name.replace("heldout", "held-out").replace("_", " ")


def _use_log(axes) -> None:
    """A logarithmic axis with plain numbers on it."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_points(axes, lines: list[dict], name: str, color: str) -> None:
    found = [(line["step"], line[name]) for line in lines if name in line]
    if found:
        axes.plot(*zip(*found), marker="o", markersize=4, linestyle=":", color=color, label=_words(name))


def _draw_smooth(axes, steps: list[int], values: list[float], label: str, color) -> None:
    """Every step, faintly where there are enough for a running mean over a twentieth of the run."""
    width = len(values) // 20
    if width < 2:
        return axes.plot(steps, values, color=color, linewidth=0.8, label=label)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], mean, color=color, linewidth=1.6, label=label)


def _draw_layers(lines: list[dict], names: list[str], path: Path) -> None:
    """One panel for each kind of head, one line for each layer, from the first (dark) to the last."""
    size = (1 + 4.2 * len(names), 3.6)
    figure, panels = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, name in zip(panels[0], names):
        values = np.array([line[name] for line in lines])  # [steps, L]
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, values.shape[1]))
        for layer, color in enumerate(colors):
            _draw_smooth(axes, [line["step"] for line in lines], values[:, layer].tolist(), f"layer {layer}", color)
        axes.set_title(LAYER_TITLES[name], fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    _use_log(panels[0][0])
    panels[0][0].set_ylabel("relative squared error")
    if values.shape[1] <= 12:
        panels[0][-1].legend(fontsize=7)
    save_picture(figure, path)
