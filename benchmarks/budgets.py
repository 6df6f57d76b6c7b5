"""
What a byte of KV cache buys: needles that students of two teachers find, over the bytes that a token leaves there.

    python benchmarks/budgets.py   # docs/budgets.png, and its points on the screen

Rows of the study that differ only in which heads, and how many, they keep; RoPE kept, nothing finetuned. Alignments
and GPUs differ; of one teacher the prompts are the same.
"""

import json
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from hydrahead.evaluation.figures import save_picture
from hydrahead.evaluation.statistics import wilson_interval

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "budgets.png"
TASKS = {"niah_single_2": "one key", "niah_multikey_1": "four keys"}


class Teacher(NamedTuple):
    """Of which studies, in their folder, and of which lengths the points are."""

    folder: str
    studies: tuple[str, ...]
    lengths: tuple[int, ...]


TEACHERS = {
    "SmolLM2-135M": Teacher(
        "smollm2",
        (
            *("position-budget-16m", "choices-16m", "controls-tenth", "controls-3to1"),
            *("units-strategies", "groups-random-tenth"),
        ),
        (1024, 2048, 4096),
    ),
    "Qwen2.5-Coder-1.5B": Teacher(
        "qwen2.5-coder", ("hybrids-6m", "groups-6m", "groups-controls"), (4096, 16384, 32768)
    ),
}
KINDS = {  # of choices, each with its color and mark
    "KV groups by score": ("tab:green", "s"),
    "KV groups by score, one a layer": ("tab:olive", "D"),
    "KV groups by score, evenly over layers": ("tab:brown", "P"),
    "KV groups at random": ("tab:pink", "v"),
    "heads by score": ("tab:cyan", "o"),
    "heads by score, one a layer at least": ("tab:blue", "o"),
    "whole layers": ("tab:orange", "^"),
    "heads at random": ("tab:gray", "v"),
}
STRATEGIES = {
    ("kv_groups", "global"): "KV groups by score",
    ("kv_groups", "layer"): "KV groups by score, one a layer",
    ("kv_groups", "global-even"): "KV groups by score, evenly over layers",
    ("kv_groups", "global-random"): "KV groups at random",
    ("heads", "global"): "heads by score",
    ("heads", "global-constrained"): "heads by score, one a layer at least",  # what older files call the default
    ("heads", "layerwise"): "whole layers",
    ("heads", "global-random"): "heads at random",
}


def points(name: str) -> tuple[list[dict], dict]:
    """
    Every student of a teacher that was asked everything: what it keeps, its tokens of distillation in millions, its KV
    bytes a token, and the scores it got by task; and the teacher, as the last study asked it.
    """
    folder, studies, lengths = TEACHERS[name]
    found = []
    for study in (json.loads((HERE / folder / f"{each}.json").read_text()) for each in studies):
        held = {model["label"]: model["kv_bytes_per_token"] for model in study["report"]["models"]}
        cells = {(cell["model"], cell["task"], cell["length"]): cell for cell in study["report"]["needles"]}
        scores = {
            label: {
                task: list(chain.from_iterable(cells[label, task, at]["scores"] for at in lengths)) for task in TASKS
            }
            for label in held
            if all("scores" in cells.get((label, task, at), {}) for task in TASKS for at in lengths)
        }
        for label, row in study["rows"].items():
            select = {"budget_unit": "heads", "strategy": "global-constrained"} | row["select"]
            kind = STRATEGIES.get((select.pop("budget_unit"), select.pop("strategy")))
            if kind is None or select or row["student"] or row["training"] or not row["share"] or label not in scores:
                continue
            tokens = row["tokens"]["distill"] / 1e6
            found.append(
                {"kind": kind, "ratio": row["ratio"], "tokens": tokens, "bytes": held[label], **scores[label]}
            )
    return found, {"bytes": held["teacher"], **scores["teacher"]}


def share(one: dict, task: str) -> float:
    return sum(one[task]) / len(one[task])


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharey=True, sharex="row")
    for row, name in zip(axes, TEACHERS):
        every, teacher = points(name)
        most, lengths = max(one["tokens"] for one in every), TEACHERS[name].lengths
        for axis, (task, title) in zip(row, TASKS.items()):
            axis.axhline(share(teacher, task), color="black", linewidth=1, linestyle=":")
            axis.text(teacher["bytes"] / 1024, share(teacher, task) + 0.015, "teacher", ha="right", fontsize=8)
            for one in every:
                found, (color, marker) = share(one, task), KINDS[one["kind"]]
                low, high = wilson_interval(found, len(one[task]))
                axis.errorbar(
                    one["bytes"] / 1024,
                    found,
                    [[found - low], [high - found]],
                    color=color,
                    marker=marker,
                    markersize=7,
                    fillstyle="full" if one["tokens"] == most else "none",
                    linewidth=0.8,
                )
                print(f"{name} {title:10} {one['kind']:38} {one['tokens']:4g}M {one['bytes']:>6,} {found:.2f}")
            axis.set_xlim(0, teacher["bytes"] / 1024 + 1)
            axis.set_ylim(-0.03, 1.06)
            axis.set_title(f"{name}, {title}, {lengths[0]:,} to {lengths[-1]:,} tokens", fontsize=9)
            axis.grid(alpha=0.3)
            axis.set_xlabel("KV cache, KiB a token (bf16)")
        row[0].set_ylabel("needles found")
    for kind, (color, marker) in KINDS.items():
        axes[0, 0].plot([], [], color=color, marker=marker, linestyle="none", label=kind)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.suptitle("Plain text; filled after 16M tokens of distillation (below 6M), hollow after 1.6M", fontsize=10)
    save_picture(figure, PICTURE)
    print(f"written: {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
