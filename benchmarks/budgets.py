"""
What a byte of KV cache buys: needles that students of SmolLM2-135M find, over the bytes that a token leaves there.

    python benchmarks/budgets.py   # docs/budgets.png, and its points on the screen

Rows of the study that differ only in which heads, and how many, they keep; RoPE kept, rows of 2,048 tokens, nothing
finetuned. Alignments and GPUs differ; the prompts are the same.
"""

import json
from itertools import chain
from pathlib import Path

import matplotlib.pyplot as plt

from hydrahead.evaluation.figures import save_picture
from hydrahead.evaluation.statistics import wilson_interval

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "budgets.png"
STUDIES = ("position-budget-16m", "choices-16m", "controls-tenth", "controls-3to1")
LENGTHS = (1024, 2048, 4096)
TASKS = {"niah_single_2": "one key", "niah_multikey_1": "four keys"}
CHOICES = {  # by the options of `select`: what they choose, and its color and mark
    '{"budget_unit": "kv_groups", "strategy": "global"}': ("KV groups by score, anywhere", "tab:green", "s"),
    '{"budget_unit": "kv_groups", "strategy": "layer"}': ("KV groups by score, one a layer", "tab:olive", "D"),
    "{}": ("heads by score, in every layer", "tab:blue", "o"),
    '{"strategy": "global"}': ("heads by score, anywhere", "tab:cyan", "o"),
    '{"strategy": "layerwise"}': ("whole layers", "tab:orange", "^"),
    '{"strategy": "global-random"}': ("heads at random", "tab:gray", "v"),
}


def points() -> tuple[list[dict], dict]:
    """
    Every student, with what it keeps, whether it had all tokens of distillation, its KV bytes a token, and the scores
    it got by task; and the teacher, as the last study asked it.
    """
    found = []
    for study in (json.loads((HERE / "smollm2" / f"{name}.json").read_text()) for name in STUDIES):
        held = {model["label"]: model["kv_bytes_per_token"] for model in study["report"]["models"]}
        cells = {(cell["model"], cell["task"], cell["length"]): cell["scores"] for cell in study["report"]["needles"]}
        scores = {
            name: {task: list(chain.from_iterable(cells[name, task, length] for length in LENGTHS)) for task in TASKS}
            for name in held
            if (name, "niah_single_2", LENGTHS[0]) in cells
        }
        for name, row in study["rows"].items():
            choice = json.dumps(row["select"], sort_keys=True)
            if choice not in CHOICES or row["student"] or row["training"] or not row["share"]:
                continue
            found.append({"choice": choice, "whole": row["share"] == 1, "bytes": held[name], **scores[name]})
    return found, {"bytes": held["teacher"], **scores["teacher"]}


def share(one: dict, task: str) -> float:
    return sum(one[task]) / len(one[task])


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    every, teacher = points()
    for axis, (task, title) in zip(axes, TASKS.items()):
        axis.axhline(share(teacher, task), color="black", linewidth=1, linestyle=":")
        axis.text(teacher["bytes"] / 1024, share(teacher, task) + 0.015, "teacher", ha="right", fontsize=8)
        for choice, (label, color, marker) in CHOICES.items():
            for one in (one for one in every if one["choice"] == choice):
                found = share(one, task)
                low, high = wilson_interval(found, len(one[task]))
                axis.errorbar(
                    one["bytes"] / 1024,
                    found,
                    [[found - low], [high - found]],
                    color=color,
                    marker=marker,
                    markersize=7,
                    fillstyle="full" if one["whole"] else "none",
                    linewidth=0.8,
                )
                print(f"{title:10} {label:32} {'16M' if one['whole'] else '1.6M':>5} {one['bytes']:>6,} {found:.2f}")
            if any(one["choice"] == choice for one in every):
                axis.plot([], [], color=color, marker=marker, linestyle="none", label=label)
        axis.set_xlim(0, teacher["bytes"] / 1024 + 1)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("KV cache, KiB a token (bf16)")
        axis.set_title(f"{title}, among 1,024 to 4,096 tokens", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("needles found")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        "SmolLM2-135M, plain text; filled after 16M tokens of distillation, hollow after 1.6M", fontsize=10
    )
    save_picture(figure, PICTURE)
    print(f"written: {PICTURE.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
