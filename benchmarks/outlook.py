"""
What more tokens of distillation may buy: KL to the teacher over tokens as it was measured, and drawn on from there.

    python benchmarks/outlook.py   # docs/outlook.png, and what it is drawn from on the screen

Runs of their own, each with its schedule to the end; KV groups by the default score, RoPE kept; KL of the last ten
steps, on text that was not read before. SmolLM2-135M was run at two and three numbers of tokens, from which the slopes
are; the 1.5B teacher at one, from which the steepest and the flattest go on: that part nobody has measured.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from hydrahead.evaluation.figures import BLUE, RED, save_picture

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "outlook.png"
SMALL, LARGE = "SmolLM2-135M", "Qwen2.5-Coder-1.5B"
RUNS = {  # of KV groups by score, which the recipes choose
    (SMALL, "3to1"): [
        ("smollm2/units-strategies", "groups-3to1-tenth"),
        ("smollm2/controls-3to1", "groups-3to1"),
        ("smollm2/recipe-groups", "groups-3to1"),
    ],
    (SMALL, "7to1"): [("smollm2/controls-tenth", "groups-7to1-tenth"), ("smollm2/controls-3to1", "groups-7to1")],
    (LARGE, "3to1"): [
        ("qwen2.5-coder/groups-6m", "groups-3to1"),
        ("qwen2.5-coder/groups-controls", "groups-3to1-again"),
    ],
    (LARGE, "7to1"): [
        ("qwen2.5-coder/groups-6m", "groups-7to1"),
        ("qwen2.5-coder/groups-controls", "groups-7to1-again"),
    ],
}
FAR = 1e9  # tokens, to which the larger teacher's points are drawn on
BUDGETS = {"3to1": BLUE, "7to1": RED}


def point(file: str, row: str) -> tuple[float, float]:
    """Tokens of distillation of a run, and KL in its last ten steps, nats a token."""
    found = json.loads((HERE / f"{file}.json").read_text())["rows"][row]
    return found["tokens"]["distill"], mean(step["kl"] for step in found["steps"]["distill"][-10:])


def means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of runs of as many tokens the mean, fewest tokens first."""
    return [(at, mean(kl for tokens, kl in points if tokens == at)) for at in sorted({tokens for tokens, _ in points})]


def slopes(points: Sequence[tuple[float, float]]) -> list[float]:
    """Powers of the tokens by which KL changes from each number of tokens to the next."""
    found = means(points)
    return [math.log(kl / before) / math.log(at / then) for (then, before), (at, kl) in pairwise(found)]


def drawn_on(start: tuple[float, float], powers: Sequence[float], tokens: float) -> tuple[float, float]:
    """Lowest and highest KL at so many tokens, by the steepest and the flattest of some powers."""
    at, kl = start
    found = [kl * (tokens / at) ** power for power in powers]
    return min(found), max(found)


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    found = {which: [point(*run) for run in runs] for which, runs in RUNS.items()}
    for (teacher, budget), points in found.items():
        measured, color = means(points), BUDGETS[budget]
        label = f"{teacher}, {budget.replace('to', ':')}"
        style = {"color": color, "marker": "o", "fillstyle": "full" if teacher == LARGE else "none"}
        axes.plot(*zip(*points), linestyle="none", label=label, **style)
        axes.plot(*zip(*measured), color=color, linewidth=1)
        print(label, *(f"{tokens / 1e6:g}M: {kl:.3f}" for tokens, kl in measured))
        if teacher == LARGE:
            powers = [power for each in BUDGETS for power in slopes(found[SMALL, each])]
            marks = [measured[0][0] * (FAR / measured[0][0]) ** (step / 40) for step in range(41)]
            low, high = zip(*(drawn_on(measured[0], powers, mark) for mark in marks))
            axes.fill_between(marks, low, high, color=color, alpha=0.15, linewidth=0, label=f"{label}, extrapolated")
            by = ", ".join(f"{power:.2f}" for power in powers)
            print(f"  by powers {by}: {low[-1]:.3f} to {high[-1]:.3f} at {FAR:g}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of distillation")
    axes.set_ylabel("KL to the teacher, nats a token")
    axes.set_xticks([1e6, 1e7, 1e8, 1e9], ["1M", "10M", "100M", "1B"])
    axes.set_yticks([0.03, 0.05, 0.1, 0.2, 0.3], ["0.03", "0.05", "0.1", "0.2", "0.3"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_title("Measured (circles), and drawn on by SmolLM2's slopes: not measured", fontsize=9)
    axes.legend(fontsize=8)
    save_picture(figure, PICTURE)
    print(f"written: {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
