"""A run's record as pictures."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from ..evaluation.figures import save_picture

COLORS = {
    **{"linear_loss": "#1f6f9f", "full_loss": "#d1495b", "layer_loss": "#1f6f9f", "kl": "#1f6f9f", "ce": "#d1495b"},
    **{"niah_single": "#3a7d44", "niah_four": "#b8860b"},
}
HELD_OUT = {f"heldout_{name}": name for name in COLORS} | {"heldout_loss": "ce"}


def draw_training(metrics_file: Path, folder: Path) -> None:
    """
    Draw what `metrics.jsonl` holds: `training.png`, losses, needles found and gradient norm over the steps; and, of an
    alignment, `layers.png`, the loss of each layer.
    """
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    if not lines:
        return
    has_needles = any("niah_single" in line for line in lines)
    heights = [3, 1.2, 1] if has_needles else [3, 1]
    figure, panels = plt.subplots(
        len(heights),
        1,
        figsize=(7, 1.4 * sum(heights)),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for name, color in COLORS.items():
        if name in lines[0]:
            _draw_smooth(
                panels[0], [line["step"] for line in lines], [line[name] for line in lines], _words(name), color
            )
    for name, of in HELD_OUT.items():
        _draw_points(panels[0], lines, name, COLORS[of])
    _use_log(panels[0])
    panels[0].set_ylabel("loss")
    panels[0].legend(fontsize=8)
    if has_needles:
        for name in ("niah_single", "niah_four"):
            _draw_points(panels[1], lines, name, COLORS[name])
        panels[1].set_ylim(-0.05, 1.05)
        panels[1].set_ylabel("needles found")
        panels[1].legend(fontsize=8)
    panels[-1].plot(
        [line["step"] for line in lines], [line["grad_norm"] for line in lines], color="#6c757d", linewidth=0.8
    )
    _use_log(panels[-1])
    panels[-1].set_ylabel("gradient norm")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.25)
    save_picture(figure, folder / "training.png")
    layers = [name for name in ("linear_layers", "full_layers", "layers") if name in lines[0]]
    if layers:
        _draw_layers(lines, layers, folder / "layers.png")


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
    """Every step faintly, and a running mean over a twentieth of the run."""
    width = max(1, len(values) // 20)
    axes.plot(
        steps, values, color=color, alpha=0.25 if width > 1 else 1.0, linewidth=0.8, label=None if width > 1 else label
    )
    if width > 1:
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color=color, linewidth=1.6, label=label)


def _draw_layers(lines: list[dict], names: list[str], path: Path) -> None:
    """One panel for each kind of head, one line for each layer, from the first (dark) to the last."""
    figure, panels = plt.subplots(
        1, len(names), figsize=(1 + 4.2 * len(names), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], names):
        values = np.array([line[name] for line in lines])  # [steps, L]
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, values.shape[1]))
        for layer, color in enumerate(colors):
            _draw_smooth(axes, [line["step"] for line in lines], values[:, layer].tolist(), f"layer {layer}", color)
        axes.set_title(_words(name), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    _use_log(panels[0][0])
    panels[0][0].set_ylabel("relative squared error")
    if values.shape[1] <= 12:
        panels[0][-1].legend(fontsize=7)
    save_picture(figure, path)
