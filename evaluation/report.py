"""Results as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle


def plot_head_map(scores: Sequence[Sequence[float]], masks: Sequence[Sequence[int]], title: str, path: Path) -> None:
    """
    Draw scores `[L][H]` as a map, layers down and query heads across, with the full-attention heads outlined.

    Args:
        masks: `[L][H]`, 1 for the heads to outline.
    """
    layers, heads = len(scores), len(scores[0])
    figure, axes = plt.subplots(figsize=(max(5.6, 0.42 * heads + 2), max(2.4, 0.42 * layers + 1.4)))
    image = axes.imshow(scores, cmap="Blues", vmin=0, aspect="equal")
    for layer, row in enumerate(masks):
        for head, chosen in enumerate(row):
            if chosen:
                axes.add_patch(
                    Rectangle((head - 0.46, layer - 0.46), 0.92, 0.92, fill=False, edgecolor="#d1495b", linewidth=2)
                )
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"{title}\nred: stays full attention", fontsize=9)
    figure.colorbar(image, ax=axes, label="score", shrink=0.85)
    _save(figure, path)


def plot_accuracy_over_length(
    lengths: Sequence[int],
    accuracies: Mapping[str, Mapping[str, Sequence[float]]],
    native_length: int,
    samples: int,
    title: str,
    path: Path,
) -> None:
    """
    Draw accuracy in [0, 1] over context length with 95% Wilson intervals of `samples` answers.

    Args:
        accuracies: values per length, by model (a colour each) and task (a line style each).
    """
    figure, axes = plt.subplots(figsize=(6.4, 4))
    count = sum(map(len, accuracies.values()))
    shifts = iter(1 + 0.02 * (index - (count - 1) / 2) for index in range(count))  # equal values stay visible
    for (model, tasks), color in zip(accuracies.items(), ("#6c757d", "#d1495b", "#1f6f9f", "#3a7d44")):
        for (task, values), style in zip(tasks.items(), ("-", "--", ":")):
            places = [length * shift for length, shift in zip(lengths, [next(shifts)] * len(lengths))]
            low, high = zip(*(wilson_interval(value, samples) for value in values))
            spread = [[value - a for value, a in zip(values, low)], [b - value for value, b in zip(values, high)]]
            axes.errorbar(
                places,
                values,
                yerr=spread,
                linestyle=style,
                marker="o",
                color=color,
                elinewidth=0.8,
                capsize=2,
                label=f"{model}, {task}",
            )
    axes.axvline(native_length, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("1x", (native_length, 1.02), xycoords=("data", "axes fraction"), fontsize=8, ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("accuracy")
    axes.set_title(title, fontsize=10, pad=16)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", fontsize=8)
    _save(figure, path)


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95% interval of a share seen in `samples` independent trials (Wilson 1927)."""
    z = 1.96
    center = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * (share * (1 - share) / samples + z * z / (4 * samples**2)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
