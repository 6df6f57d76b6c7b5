"""
Tables and pictures of what `study.py` and `hydrahead run` made: how students learn, and what they find beside others.

    python benchmarks/students.py runs/study/study.json students.md  # students.png and students_needles.png too
    python benchmarks/students.py one/study.json other/study.json students.md [--rows …]  # on the same prompts
"""

import argparse
import json
import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path

from hydrahead.console import one_line_errors
from hydrahead.evaluation.figures import plot_students
from hydrahead.evaluation.report import draw_accuracy, share_words
from hydrahead.evaluation.statistics import paired_difference, wilson_interval
from hydrahead.files import atomic_file
from hydrahead.training.stage import WATCHED

MARKS, EARLY = (4, 8, 16, 24, 32, 40), (2, 4, 6)  # millions of tokens of which tables give the KL; of short runs
HALF = 0.5  # million, by which the last ten steps may end before one
CELLS = {"models": "label", "needles": "model", "text": "model"}  # of a report, and whose they are


def merged(studies: list[dict], rows: Collection[str] = ()) -> dict:
    """
    Studies of one teacher as one, of all rows or of those named.

    Raises:
        ValueError: two of them have a row of one name, or asked other prompts; or none has a row that is named.
    """
    first, *others = studies
    whole = first | {"rows": dict(first["rows"]), "report": dict(first["report"] or {}) or None}
    for other in others:
        if twice := whole["rows"].keys() & other["rows"].keys():
            raise ValueError(f"{', '.join(sorted(twice))}: in two studies; leave one of them out")
        if not (whole["report"] and other["report"] and _same_prompts(whole["report"], other["report"])):
            raise ValueError("the studies did not ask the same prompts; make a page of each")
        whole["rows"] |= other["rows"]
        known = {model["label"] for model in whole["report"]["models"]}
        for kind, key in CELLS.items():
            whole["report"][kind] = whole["report"][kind] + [c for c in other["report"][kind] if c[key] not in known]
    if unknown := set(rows) - whole["rows"].keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no such row; there are {', '.join(whole['rows'])}")
    left_out = whole["rows"].keys() - set(rows or whole["rows"])
    whole["rows"] = {name: row for name, row in whole["rows"].items() if name not in left_out}
    for kind, key in CELLS.items() if whole["report"] else ():
        whole["report"][kind] = [cell for cell in whole["report"][kind] if cell[key] not in left_out]
    return whole


def _same_prompts(*reports: dict) -> bool:
    """Whether two reports are of one teacher and text, and their needles stand at the same depths where both asked."""
    teachers = [model["weights"] for report in reports for model in report["models"] if model["label"] == "teacher"]
    if len({*teachers}) > 1 or len({report["text_name"] for report in reports}) > 1:
        return False
    one, other = (
        {(cell["task"], cell["length"]): cell["depths"] for cell in report["needles"] if cell["model"] == "teacher"}
        for report in reports
    )
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[place] == other[place] for place in shared)


def tables(study: dict) -> str:
    """Training, needles and text of every row, and what other choices do beside heads in every layer, in Markdown."""
    report, lines = study["report"], ["# Students of one teacher", "", *_progress(study)]
    if report is None:  # all rows were interrupted
        return "\n".join(lines) + "\n"
    tasks = list(dict.fromkeys(cell["task"] for cell in report["needles"]))
    lengths = sorted({cell["length"] for cell in report["needles"]})
    needles = {(cell["model"], cell["task"], cell["length"]): cell for cell in report["needles"]}
    text = {(cell["model"], cell["length"]): cell for cell in report["text"]}
    shortest = min(length for _, length in text)
    names = list(dict.fromkeys(["teacher", *(model["label"] for model in report["models"]), *study["rows"]]))

    for task in tasks:
        lines += [f"`{task}`, {report['prompts']} prompts a cell, 95% intervals:", ""]
        lines += [f"| | trained on | {' | '.join(f'{length:,}' for length in lengths)} |"]
        lines += ["| --- " + "| ---: " * (len(lengths) + 1) + "|"]
        for name in names:
            tokens = study["rows"][name]["tokens"] if name in study["rows"] else {}
            read = ", then ".join(f"{tokens[stage] / 1e6:g}M" for stage in ("distill", "finetune") if stage in tokens)
            cells = " | ".join(share_words(needles.get((name, task, length))) for length in lengths)
            lines += [f"| {name} | {read} | {cells} |"]
        lines += [""]
    lines += [f"Text, windows of {shortest:,} tokens:", ""]
    lines += [
        "| | loss | KL | agreement | KL in the last steps of distillation |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        cell = text.get((name, shortest), {})
        values = [f"{cell[key]:.3f}" if key in cell else "" for key in ("loss", "kl", "agreement")]
        last = study["rows"][name]["steps"].get("distill", [])[-10:] if name in study["rows"] else []
        values += [f"{sum(step['kl'] for step in last) / len(last):.3f}" if last else ""]
        lines += [f"| {name} | {' | '.join(values)} |"]
    return "\n".join([*lines, "", *_beside_constrained(study, needles, tasks, lengths)]) + "\n"


def curves(study: dict) -> dict[str, dict[str, list[tuple]]]:
    """
    What a picture shows of every row: for `kl` and the watched tasks, points of millions of tokens, value, and the low
    and high end of its 95% interval. KL is the mean of ten steps.
    """
    found = {}
    for name, row in study["rows"].items():
        steps = row["steps"].get("distill", [])
        batch = (row["batch_tokens"] if "batch_tokens" in row else row["tokens"]["distill"] / len(steps)) / 1e6
        ten = [(end, [step["kl"] for step in steps[end - 10 : end]]) for end in range(10, len(steps) + 1, 10)]
        found[name] = {"kl": [(end * batch, sum(each) / 10, None, None) for end, each in ten]}
        for task in WATCHED:
            asked = [(at, step[task]) for at, step in enumerate(steps, 1) if task in step]
            prompts = row.get("niah_prompts", 0) // 2
            found[name][task] = [(at * batch, share, *wilson_interval(share, prompts)) for at, share in asked]
    return found


def _progress(study: dict) -> list[str]:
    """KL, and needles as they were asked while students learnt, over tokens of distillation."""
    found = {name: each for name, each in curves(study).items() if each["kl"]}
    return [*_kl_over_tokens(found), *_needles_over_tokens(found)]


def _kl_over_tokens(found: dict[str, dict[str, list[tuple]]]) -> list[str]:
    """A table at the marks that the longest run reached; nothing where that is none."""
    reached = max((each["kl"][-1][0] for each in found.values()), default=0)
    marks = [mark for mark in (MARKS if reached > EARLY[-1] + HALF else EARLY) if mark < reached + HALF]
    if not marks:
        return []
    lines = ["KL to the teacher, nats a token, the mean of ten steps before so many tokens of distillation:", ""]
    lines += [f"| | {' | '.join(f'{mark}M' for mark in marks)} |", "| --- " + "| ---: " * len(marks) + "|"]
    for name, each in found.items():
        before = [[value for at, value, *_ in each["kl"] if mark - 1 < at <= mark] for mark in marks]
        lines += [f"| {name} | {' | '.join(f'{values[-1]:.3f}' if values else '' for values in before)} |"]
    return [*lines, ""]


def _needles_over_tokens(found: dict[str, dict[str, list[tuple]]]) -> list[str]:
    """A table of where students were asked; nothing where none was."""
    places = sorted({round(at, 1) for each in found.values() for at, *_ in each[WATCHED[0]]})
    if not places:
        return []
    lines = [f"Needles while learning, `{'` and `'.join(WATCHED)}`:", ""]
    lines += [f"| | {' | '.join(f'{at:g}M' for at in places)} |", "| --- " + "| ---: " * len(places) + "|"]
    for name, each in found.items():
        shares = [{round(at, 1): f"{share:.2f}" for at, share, *_ in each[task]} for task in WATCHED]
        cells = [", ".join(of[at] for of in shares if at in of) for at in places]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    return [*lines, ""]


def _beside_constrained(study: dict, needles: dict, tasks: list[str], lengths: list[int]) -> list[str]:
    """What students find more than those of heads with one in every layer, same budget and tokens, same prompts."""
    alike: dict[tuple, list[str]] = {}  # but for the seed
    partly = []
    for name, row in study["rows"].items():
        found = ["scores" in needles.get((name, task, length), {}) for task in tasks for length in lengths]
        if all(found):
            read = tuple(sorted((stage, float(tokens)) for stage, tokens in row["tokens"].items()))
            about = re.sub(r"^default(, \d+:1)$", r"constrained\1", row["about"])  # as older files call it
            alike.setdefault((row["ratio"], read, about), []).append(name)
        elif any(found):
            partly.append(name)

    def scores(names: list[str], task: str) -> list[float]:
        """Of each prompt, the mean of the seeds."""
        found = [chain(*[needles[name, task, length]["scores"] for length in lengths]) for name in names]
        return [sum(each) / len(names) for each in zip(*found, strict=True)]

    def is_reference(about: str, name: str) -> bool:
        changed = any(study["rows"][name].get(what) for what in ("student", "training"))
        return about.startswith("constrained,") and not changed

    references = {
        (ratio, read): names for (ratio, read, about), names in alike.items() if is_reference(about, names[0])
    }
    lines = []
    for (ratio, read, about), names in alike.items():
        reference = references.get((ratio, read), names)
        if reference == names:
            continue
        gaps = [paired_difference(scores(names, task), scores(reference, task)) for task in tasks]
        cells = [f"{gap['difference']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})" for gap in gaps]
        trained = dict(read).get("distill", 0) / 1e6
        lines += [f"| {about}, {trained:g}M | {len(names)}, {len(reference)} | {' | '.join(cells)} |"]
    if not lines:
        return []
    return [
        "Minus heads by score with one in every layer, of the same budget and tokens, on the same prompts, the mean",
        "of seeds, all lengths as one, 95% bootstrap intervals over prompts:",
        "",
        f"| | seeds, theirs | `{'` | `'.join(tasks)}` |",
        "| --- | ---: " + "| ---: " * len(tasks) + "|",
        *lines,
        *(["", f"Not measured at every length, and left out: {', '.join(partly)}."] if partly else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="JSON", help="of one teacher, on the same prompts")
    parser.add_argument("page", type=Path, help="Markdown; pictures beside it")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these only")
    options = parser.parse_args()
    found = merged([json.loads(study.read_text()) for study in options.studies], options.rows)
    with atomic_file(options.page) as partial:
        partial.write_text(tables(found), encoding="utf-8")
    plot_students(curves(found), options.page.with_suffix(".png"))
    if found["report"]:
        draw_accuracy(found["report"], options.page.with_name(f"{options.page.stem}_needles.png"))


if __name__ == "__main__":
    with one_line_errors():
        main()
