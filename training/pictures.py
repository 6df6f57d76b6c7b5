"""A run's record as pictures."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLORS = ("#1f6f9f", "#d1495b", "#3a7d44", "#6c757d")


def draw_training(metrics_file: Path, folder: Path) -> None:
    """
    Draw what `metrics.jsonl` holds: `training.png`, losses, held-out results and gradient norm over the steps; and,
    of an alignment, `layers.png`, the loss of each layer.
    """
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    if not lines:
        return
    names = [name for name in ("linear_loss", "full_loss", "layer_loss", "kl", "ce") if name in lines[0]]
    evaluated = [line for line in lines if any(name.startswith(("heldout", "niah")) for name in line)]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5.4), sharex=True, gridspec_kw={"height_ratios": [3, 1]}, layout="constrained"
    )
    for name, color in zip(names, COLORS):
        _draw_smooth(
            top, [line["step"] for line in lines], [line[name] for line in lines], name.replace("_", " "), color
        )
    for name in sorted({name for line in evaluated for name in line if name.startswith(("heldout", "niah"))}):
        found = [(line["step"], line[name]) for line in evaluated if name in line]
        top.plot(*zip(*found), marker="o", markersize=4, linestyle=":", label=name.replace("_", " "))
    top.set_yscale("log" if not any(name.startswith("niah") for line in evaluated for name in line) else "linear")
    top.set_ylabel("loss")
    top.grid(alpha=0.25, which="both")
    top.legend(fontsize=8)
    bottom.plot(
        [line["step"] for line in lines], [line["grad_norm"] for line in lines], color="#6c757d", linewidth=0.8
    )
    bottom.set_yscale("log")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.25)
    figure.savefig(folder / "training.png", dpi=150)
    plt.close(figure)
    layers = [name for name in ("linear_layers", "full_layers", "layers") if name in lines[0]]
    if layers:
        _draw_layers(lines, layers, folder / "layers.png")


def _draw_smooth(axes, steps: list[int], values: list[float], label: str, color: str) -> None:
    """Every step faintly, and a running mean over a fiftieth of the run."""
    width = max(1, len(values) // 50)
    axes.plot(
        steps, values, color=color, alpha=0.25 if width > 1 else 1.0, linewidth=0.8, label=None if width > 1 else label
    )
    if width > 1:
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color=color, linewidth=1.6, label=label)


def _draw_layers(lines: list[dict], names: list[str], path: Path) -> None:
    figure, panels = plt.subplots(
        1, len(names), figsize=(1 + 4.2 * len(names), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], names):
        values = np.array([line[name] for line in lines])  # [steps, L]
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, values.shape[1]))
        for layer, color in enumerate(colors):
            _draw_smooth(axes, [line["step"] for line in lines], values[:, layer].tolist(), f"layer {layer}", color)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, which="both")
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylabel("squared error / mean square of the teacher's")
    if values.shape[1] <= 12:
        panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
