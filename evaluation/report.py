"""
The report of an evaluation: `report.json`, and what is made of it: `report.md`, `report.html` and two pictures.

`report.json` is what cards, pictures and the page read, and nothing else:

    text_name, prompts, depths, new_tokens, …           settings, as `evaluator.Settings` and its caller have them
    haystack_tokens                                     of the text that needles are hidden in; 0 where none are
    hardware, date, versions                            see `provenance.environment`
    models        one entry a column, the reference first: label; name, revision, weights (the start of a digest),
                  asked_dtype, rope_scaling, template: what was asked for; model_type, parameters, dtype,
                  native_length, kv_bytes_per_token (bf16), state_bytes: what it is
    needles       model, task, length; prompts, accuracy in [0, 1] with its 95% Wilson interval low and high, scores
                  and depths of the prompts, examples (question, expected, answer, score), seconds
    batching      of models that do not compute in fp32: model; the share of answers changed by what was answered
                  beside them, and the task and length that were asked
    text          model, domain, length; tokens, bytes, loss (nats a token), by_position [[start, end, loss]],
                  window_losses; against the reference, where the vocabulary is the same, kl (nats a token) and
                  agreement (share of positions with the same likeliest token); seconds
    lm_eval       model, task, length (null where a task has none); metrics {name: [value, standard error or null]},
                  samples, scores by the first metric, seconds
    heads         of a student, where they are known: masks; and where they were scored, method, scores, capabilities,
                  stability, knockout and warnings, as `convert.scoring.scores.HeadScores` has them
    differences   suite (one of the lists above), model, task or domain, length: against the reference; see
                  `statistics.paired_difference`

A cell that could not be measured has `error`, one line, in place of its values.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import atomic_file
from ..provenance import Record
from .figures import plot_accuracy_over_length, plot_depths
from .markdown import escaped, table
from .statistics import paired_difference

TITLES = {"niah_single_2": "single key", "niah_multikey_1": "four keys"}
FEW_TASKS = 3  # columns of their own in the short table
DEPTHS = 5  # parts of a text, where needles stand at random depths


def build_report(made: Mapping, cells: Mapping[str, Sequence[dict]], heads: Mapping | None = None) -> dict:
    """A report of all cells, as the module describes it."""
    return {**made, **cells, "differences": _differences(cells), "heads": heads}


def read_report(folder: Path) -> dict | None:
    """The report in a folder; `None` where there is none, or one from before models were evaluated side by side."""
    report = Record(folder / "report.json").read()
    return report if report and "models" in report else None


def is_measured(folder: Path, model: str, tasks: Sequence[str], lengths: Sequence[int]) -> bool:
    """Whether a folder's report has a model's needles and text at all lengths; what failed is yet to be measured."""
    report = read_report(folder) or {"needles": (), "text": ()}
    cells = [cell for kind in ("needles", "text") for cell in report[kind] if cell["model"] == model]
    found = {(cell.get("task"), cell["length"]) for cell in cells if "error" not in cell}
    return {(task, length) for task in (*tasks, None) for length in lengths} <= found


def write_report(report: Mapping, folder: Path) -> None:
    """Write a report, its tables, page and pictures; `report.json` last, because it says that all are there."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_report(report, folder)
    data = json.dumps(report, indent=1)
    for name, text in {"report.md": markdown(report), "report.html": page(report), "report.json": data + "\n"}.items():
        with atomic_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _differences(cells: Mapping[str, Sequence[dict]]) -> list[dict]:
    """Every cell of every other model against that of the reference, where both were measured."""
    if not cells["models"]:
        return []
    reference, found = cells["models"][0]["label"], []
    kinds = (("needles", "task", "scores"), ("text", "domain", "window_losses"), ("lm_eval", "task", "scores"))
    for kind, what, values in kinds:
        of_reference = {(cell[what], cell["length"]): cell for cell in cells[kind] if cell["model"] == reference}
        for cell in cells[kind]:
            other = of_reference.get((cell[what], cell["length"]), {})
            if cell["model"] == reference or values not in cell or values not in other:
                continue
            if len(cell[values]) == len(other[values]) and cell.get("bytes") == other.get("bytes"):
                names = {"suite": kind, "model": cell["model"], what: cell[what], "length": cell["length"]}
                found.append(names | paired_difference(cell[values], other[values]))
    return found


def labels(report: Mapping) -> list[str]:
    """The models, the reference first."""
    return [model["label"] for model in report["models"]]


def lengths(report: Mapping) -> list[int]:
    """All lengths at which something was measured."""
    return sorted({cell["length"] for kind in ("needles", "text") for cell in report[kind]})


def tasks(report: Mapping) -> list[str]:
    """All of RULER's tasks that were asked, in order."""
    return list(dict.fromkeys(cell["task"] for cell in report["needles"]))


def short_table(report: Mapping) -> list[list[str]]:
    """
    One row a length, heads of columns first: what every model found and predicts, and what its cache takes.

    Needles of up to three tasks have a column each, of more the mean of all.
    """
    models, asked = report["models"], tasks(report)
    domains = list(dict.fromkeys(cell["domain"] for cell in report["text"]))
    columns = [[task] for task in asked] if len(asked) <= FEW_TASKS else [asked]
    heads = [TITLES.get(task, task) for task in asked] if len(asked) <= FEW_TASKS else [f"mean of {len(asked)} tasks"]
    rows = [["tokens", *heads, *(["text loss"] if domains else []), "cache, KiB (bf16)"]]
    found = {(cell["model"], cell["task"], cell["length"]): cell.get("accuracy") for cell in report["needles"]}
    losses = {(cell["model"], cell["domain"], cell["length"]): cell.get("loss") for cell in report["text"]}
    for length in lengths(report):
        names = [[(model["label"], task, length) for task in column] for column in columns for model in models]
        shares = [_mean([found.get(name) for name in each], ".2f") for each in names]
        row = [" / ".join(shares[start : start + len(models)]) for start in range(0, len(shares), len(models))]
        if domains:
            each = [[losses.get((model["label"], domain, length)) for domain in domains] for model in models]
            row.append(" / ".join(_mean(values, ".3f") for values in each))
        caches = [model["kv_bytes_per_token"] * length + model["state_bytes"] for model in models]
        rows.append([f"{length:,}", *row, " / ".join(f"{bytes / 1024:,.0f}" for bytes in caches)])
    return rows


def goes_round(report: Mapping) -> bool:
    """Whether a prompt is longer than the text that needles are hidden in."""
    return 0 < report.get("haystack_tokens", 0) < max((cell["length"] for cell in report["needles"]), default=0)


def _mean(values: Sequence[float | None], form: str) -> str:
    return "–" if None in values or not values else f"{sum(values) / len(values):{form}}"


def markdown(report: Mapping) -> str:
    """The whole report in tables."""
    asked = "RULER's number of new tokens" if report["new_tokens"] is None else f"{report['new_tokens']} new tokens"
    depths = f"{report['depths']} depths in turn" if report["depths"] else "random depths"
    parts = [
        f"# {escaped(' / '.join(labels(report)))}",
        f"{escaped(report['hardware'])}, {escaped(report['date'])}. Text: {escaped(report['text_name'])}, held out.",
        table(_models_table(report)),
    ]
    if report["needles"]:
        words = f"{report['prompts']} prompts a cell, {asked}, greedy, {depths}; 95% Wilson intervals."
        if goes_round(report):
            words += f" The {report['haystack_tokens']:,} tokens of text go round in longer prompts."
        words += " The last columns: difference from the first model on the same prompts, with its 95% interval"
        words += " (bootstrap) and McNemar's exact p where every score is 0 or 1; seconds a prompt."
        parts += ["## Needles", words, table(needles_table(report))]
        pictures = ["accuracy", *(["depths"] if depth_maps(report) else [])]
        parts += ["\n".join(f"![{name}]({name}.png)" for name in pictures)]
    if report["batching"]:
        changed = [
            f"{cell['model']}: {cell['changed']:.0%} of {cell.get('prompts', report['prompts'])} answers to "
            f"{cell['task']} at {cell['length']:,} tokens"
            if "error" not in cell
            else f"{cell['model']}: {cell['error']}"
            for cell in report["batching"]
        ]
        words = "Answers that change when prompts are asked one by one instead of together: "
        parts += [words + escaped("; ".join(changed))]
    if report["text"]:
        words = f"Loss in nats a token, {report['text_tokens']:,} tokens a cell; differences from the first model"
        words += " over the same windows. KL and agreement of the likeliest token are against the first model."
        parts += ["## Text", words, table(text_table(report))]
        parts += ["By position in the window, at the greatest length:", table(_positions_table(report), names=2)]
    if report["lm_eval"]:
        words = "Values with lm-eval's standard errors; differences from the first model on the same questions, by the"
        words += " first metric."
        parts += ["## lm-eval", words, table(harness_table(report))]
    return "\n\n".join(parts) + "\n"


def page(report: Mapping) -> str:
    """The whole report as one HTML file, which needs no network."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", json.dumps(report).replace("<", "\\u003c"))


def _models_table(report: Mapping) -> list[list[str]]:
    rows = [["model", "of", "parameters", "computes in", "cache a token, bytes (bf16)", "state, bytes", "asked"]]
    for model in report["models"]:
        name = " at ".join(filter(None, (model["name"], model["revision"])))
        asked = "in its chat template" if model["template"] else "as plain text"
        row = [model["label"], f"{name} ({model['model_type']})", f"{model['parameters']:,}", model["dtype"]]
        rows.append([*row, f"{model['kv_bytes_per_token']:,}", f"{model['state_bytes']:,}", asked])
    return rows


def needles_table(report: Mapping) -> list[list[str]]:
    """One row a task and length: what every model found, with intervals, and how they differ from the first."""
    return _cells_table(report, "needles", "task", share_words)


def text_table(report: Mapping) -> list[list[str]]:
    """One row a domain and length: every model's loss, and how they differ from the first."""
    return _cells_table(report, "text", "domain", _loss)


def _cells_table(report: Mapping, kind: str, what: str, words) -> list[list[str]]:
    """One row for each task or domain and length; models side by side, then what they differ by and take."""
    names = labels(report)
    rows = [[what, "tokens", *names, *(f"{name} − {names[0]}" for name in names[1:]), "seconds"]]
    cells = {(cell["model"], cell[what], cell["length"]): cell for cell in report[kind]}
    each_of = [each for each in report["differences"] if each["suite"] == kind]
    differences = {(each["model"], each[what], each["length"]): each for each in each_of}
    for name, length in dict.fromkeys((cell[what], cell["length"]) for cell in report[kind]):
        row = [cells.get((model, name, length)) for model in names]
        each = [differences.get((model, name, length)) for model in names[1:]]
        took = [_seconds(cell) for cell in row]
        rows.append([name, f"{length:,}", *map(words, row), *map(_difference, each), " / ".join(took)])
    return rows


def share_words(cell: Mapping | None) -> str:
    """The share of needles in a cell, with its interval; why there is none where it could not be measured."""
    if cell is None:
        return "–"
    return cell.get("error") or f"{cell['accuracy']:.2f} ({cell['low']:.2f}–{cell['high']:.2f})"


def _loss(cell: Mapping | None) -> str:
    if cell is None:
        return "–"
    if "error" in cell:
        return cell["error"]
    against = f"; KL {cell['kl']:.3f}, agreement {cell['agreement']:.1%}" if "kl" in cell else ""
    return f"{cell['loss']:.3f}{against}"


def _difference(found: Mapping | None) -> str:
    if found is None:
        return "–"
    p = f", p {found['p']:.2g}" if found["p"] is not None else ""
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}{p})"


def _seconds(cell: Mapping | None) -> str:
    if cell is None or "error" in cell:
        return "–"
    return f"{cell['seconds'] / cell.get('prompts', 1):.2f}"


def _positions_table(report: Mapping) -> list[list[str]]:
    names, cells = labels(report), [cell for cell in report["text"] if "error" not in cell]
    longest = max((cell["length"] for cell in cells), default=0)
    rows = [["domain", "positions", *names]]
    losses = {
        (cell["domain"], start, end, cell["model"]): loss
        for cell in cells
        if cell["length"] == longest
        for start, end, loss in cell["by_position"]
    }
    for domain, start, end in dict.fromkeys(name[:3] for name in losses):
        values = [losses.get((domain, start, end, model)) for model in names]
        words = ["–" if value is None else f"{value:.3f}" for value in values]
        rows.append([domain, f"{start:,}–{end:,}", *words])
    return rows


def harness_table(report: Mapping) -> list[list[str]]:
    """lm-eval's tasks, one row a task, length and metric."""
    names = labels(report)
    cells = {(cell["model"], cell["task"], cell["length"]): cell for cell in report["lm_eval"]}
    each_of = [each for each in report["differences"] if each["suite"] == "lm_eval"]
    differences = {(each["model"], each["task"], each["length"]): each for each in each_of}
    rows = [["task", "tokens", "metric", *names, *(f"{name} − {names[0]}" for name in names[1:])]]
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in report["lm_eval"]):
        row = [cells.get((model, task, length), {}) for model in names]
        metrics = dict.fromkeys(name for cell in row for name in cell.get("metrics", {}))
        for place, metric in enumerate(metrics or ["–"]):
            values = [cell.get("metrics", {}).get(metric) for cell in row]
            words = [_metric(value) if value else cell.get("error", "–") for value, cell in zip(values, row)]
            each = [None if place else differences.get((model, task, length)) for model in names[1:]]
            rows.append([task, f"{length:,}" if length else "–", metric, *words, *map(_difference, each)])
    return rows


def _metric(found: Sequence[float | None]) -> str:
    value, error = found
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def draw_report(report: Mapping, folder: Path) -> None:
    """`accuracy.png`, needles found over length by all models, and `depths.png`, over length and depth by each."""
    if all("error" in cell for cell in report["needles"]):
        return
    draw_accuracy(report, folder / "accuracy.png")
    if maps := depth_maps(report):
        title = "Needles found, over length and the depth of the needle that is asked for"
        plot_depths(maps, lengths(report), title, folder / "depths.png")


def draw_accuracy(report: Mapping, path: Path) -> None:
    """Needles found over length by all models."""
    cells = [cell for cell in report["needles"] if "error" not in cell]
    panels = {
        TITLES.get(task, task): {
            label: [
                (cell["length"], cell["accuracy"], cell["low"], cell["high"])
                for cell in cells
                if (cell["model"], cell["task"]) == (label, task)
            ]
            for label in labels(report)
        }
        for task in tasks(report)
    }
    title = f"RULER's tasks by generation, {report['prompts']} prompts a point, 95% intervals"
    plot_accuracy_over_length(panels, report["models"][0]["native_length"], title, path)


def depth_maps(report: Mapping) -> dict[str, dict[str, list[list[float | None]]]]:
    """
    By model and task with one needle asked for, accuracy `[depths][lengths]`; `None` where nothing was asked.

    Depths are parts of the text: as many as the needles were placed at, or fifths.
    """
    parts, columns = report["depths"] or DEPTHS, lengths(report)
    maps: dict[str, dict] = {}
    for label in labels(report):
        for cell in report["needles"]:
            if cell["model"] != label or "error" in cell or None in cell["depths"]:
                continue
            grid = maps.setdefault(label, {}).setdefault(cell["task"], [[None] * len(columns) for _ in range(parts)])
            found: dict[int, list[float]] = {}
            for depth, score in zip(cell["depths"], cell["scores"]):
                found.setdefault(min(int(depth * parts), parts - 1), []).append(score)
            for part, scores in found.items():
                grid[part][columns.index(cell["length"])] = sum(scores) / len(scores)
    return maps
