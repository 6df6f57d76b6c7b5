"""What `hydrahead plan` computes with: points from `decode-`, `training-` and `scaling-cuda.json` and from recipes.

`report.py` writes them to training/measured.json, beside the page.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from hydrahead.benchmarks.decode import BUDGETS, LAYERWISE, TEACHER
from hydrahead.training.recipe import load_recipe

FOLDER = Path(__file__).parent
OUTPUT = FOLDER.parent / "training" / "measured.json"
# Of the rows of `gpu.py`: what a plan calls it, the value, and its unit in that of a plan.
VALUES = {
    "decode": ("decode", "ms_per_token", 1e-3),
    "batches": ("decode", "ms_per_token", 1e-3),
    "eager": ("prefill", "prefill_seconds", 1),
    "sequences": ("sequences", "sequences", 1),
}
STRATEGIES = {"kv_groups": "layer", "heads": "global"}  # by which the hybrids' heads are chosen, at random


def read(name: str) -> dict:
    """A file of results."""
    return json.loads((FOLDER / name).read_text())


def measured() -> dict:
    """The points, from the JSON files beside this one."""
    decode = read("decode-cuda.json")
    training = [json.loads(file.read_text()) for file in FOLDER.glob("training-cuda*.json")]
    training.sort(key=lambda report: -report["shape"]["hidden_size"])
    several = "scaling-cuda.json"
    return {
        "inference": {"shape": decode["shape"], "points": list(inference(decode["parts"]))},
        "training": [stages(report) for report in training],
        "recipes": [
            *recipes(*(read(f"smollm2/{name}.json") for name in ("recipes", "alignment"))),
            *larger(*(read(f"qwen2.5-coder/{name}.json") for name in ("hybrids-6m", "alignment"))),
        ],
        "scaling": list(scaling(read(several))) if (FOLDER / several).is_file() else [],
    }


def inference(parts: dict) -> Iterator[dict]:
    """
    Seconds of compiled steps and of eager prefills, and sequences that fit, one point each; of two measurements of one
    thing, the later.

    What a plan does not predict is not fitted: the step of a teacher whose attention repeats keys and values.
    """
    rows = {
        (row["what"], row["tokens"], row["model"]): row | {"hardware": part["hardware"]}
        for part in parts.values()
        for row in part["rows"]
    }
    for (what, tokens, model), row in rows.items():
        if "error" in row or what not in VALUES or model == LAYERWISE:
            continue
        as_planned, value, unit = VALUES[what]
        point = {"what": as_planned, "model": model, "length": tokens, "batch": row.get("batch", 1)}
        point |= {"measured": row[value] * unit, "hardware": row["hardware"], "is_fitted": True}
        if as_planned == "decode":
            point |= {"kernels": row["kernels_per_token"], "is_fitted": model != TEACHER}
        if model in BUDGETS:
            ratio, budget_unit = BUDGETS[model]
            point |= {"ratio": ratio, "budget_unit": budget_unit, "strategy": STRATEGIES[budget_unit]}
        yield point | ({"note": row["note"]} if "note" in row else {})


def stages(report: dict) -> dict:
    """Tokens a second of each stage, and peaks of memory above weights, gradients and optimiser where measured."""
    settings, speed, peaks = report["settings"], report["speed"]["tokens_per_second"], {}
    if "alignment_peak_bytes" in report:
        by_layers = report["alignment_peak_bytes"]["layer_by_layer"]
        peaks = {
            "align": by_layers[max(filter(str.isdigit, by_layers), key=int)],
            "distill": report["distillation_peak_bytes"]["chunked"],
        }
    return {
        "hardware": report["hardware"],
        "shape": shape_of(report),
        "rows": settings["rows"],
        "length": settings["length"],
        "tokens_per_second": {stage: speed[stage] for stage in ("align", "distill", "finetune")},
        "align_rows": settings["align_rows"],
        "peak_bytes": peaks,
    }


def recipes(study: dict, alignment: dict) -> Iterator[dict]:
    """
    Tokens a second of the stages of recipes that were run as they ship, in the median step, and what distillation held
    at its peak; the first is fitted.

    Args:
        alignment: without full forms, which the recipes' runs had fitted too and which are left alone since.
    """
    small = read("training-cuda-135m.json")
    as_shipped = [row for row in study["rows"].values() if not row["student"]]
    for number, row in enumerate(as_shipped):
        recipe = load_recipe(row["recipe"])
        for stage, steps in row["steps"].items():
            seconds, case = median(step["seconds"] for step in steps), {}
            if stage == "align":
                if row["recipe"] != alignment["recipe"]:
                    continue
                found = alignment["rows"]["linear"]
                seconds, case = found["seconds"], {"case": f"{row['recipe']}, {found['about']}"}
            if stage == "distill":  # finetuning's peak is counted from the start of the process, which distilled
                case |= {"bytes": 1e9 * max(step["memory_gb"] for step in steps)}
            yield case | {
                "hardware": study["report"]["hardware"],
                "shape": shape_of(small),
                "recipe": row["recipe"],
                "ratio": row["ratio"],
                "stage": stage,
                "tokens_per_second": recipe.stage(stage).batch_tokens / seconds,
                "is_fitted": number == 0,
            }


def larger(study: dict, alignment: dict) -> Iterator[dict]:
    """
    As `recipes`, of a larger teacher, over all steps but the first, in which kernels are compiled: alignment on
    several GPUs, and students by the default score.
    """

    def speed(row: dict, steps: list[dict]) -> float:
        return row["batch_tokens"] * len(steps[1:]) / sum(step["seconds"] for step in steps[1:])

    shape = alignment["shape"]
    for case, row in alignment["rows"].items():
        yield {
            "case": f"{alignment['recipe']}, {case}",
            "bytes": 1e9 * row["memory_gb"],
            "hardware": alignment["hardware"],
            "shape": shape,
            "recipe": alignment["recipe"],
            "ratio": 0.25,
            "stage": "align",
            "gpus": row["gpus"],
            "tokens_per_second": speed(row, row["steps"]),
            "is_fitted": False,
        }
    for budget in ("3to1", "7to1"):
        row = study["rows"][f"default-{budget}"]
        steps = row["steps"]["distill"]
        yield {
            "bytes": 1e9 * max(step["memory_gb"] for step in steps),
            "hardware": study["report"]["hardware"],
            "shape": shape,
            "recipe": study["recipe"].replace("3to1", budget),
            "ratio": row["ratio"],
            "stage": "distill",
            "tokens_per_second": speed(row, steps),
            "is_fitted": False,
        }


def scaling(report: dict) -> Iterator[dict]:
    """Tokens a second of one GPU and of several, by the micro-batches that each accumulates, and bytes on each."""
    settings = report["settings"]
    common = {"hardware": report["hardware"], "shape": shape_of(report)}
    common |= {"rows": settings["rows"], "length": settings["length"]}
    for way, run in report["runs"].items():
        for stage, found in run.items():
            if isinstance(found, dict) and "error" not in found:
                yield common | {
                    "stage": stage,
                    "way": way,
                    "gpus": run["processes"],
                    "tokens_per_second": found["tokens_per_second"],
                    "bytes": found["memory_gb"] * 1e9,
                }


def shape_of(report: dict) -> dict:
    """Fields of a configuration."""
    shape = {key: value for key, value in report["shape"].items() if key != "name"}
    return shape | {"vocab_size": report["settings"]["speed_vocabulary"]}
