"""What the documents name is there: files, modules, commands and their options."""

import importlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from hydrahead import HydraHeadConfig
from hydrahead.benchmarks import anatomy, budgets, outlook, report, students
from hydrahead.cli import app
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.scoring.scores import THRESHOLD
from hydrahead.evaluation.statistics import paired_difference
from hydrahead.provenance import digest
from hydrahead.serving.heads import Pages

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MADE = {"build", "dist", "runs"}  # by commands that documents name, such as `make demo`: not in a clone
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - MADE
ALL_AGAIN = "all_32_recorded_again_s"
COMMANDS = typer.main.get_command(app).commands

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@every_document
def test_files_that_a_document_names_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    words = {word.split("::")[0] for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    paths = [word.rstrip("/,") for word in words if "/" in word and word.split("/")[0] in FOLDERS]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = [word for word in words if re.fullmatch(r"\w+\.py", word)]
    assert [name for name in names if not any(ROOT.glob(f"{name}")) and not any(ROOT.glob(f"[!.]*/**/{name}"))] == []


@every_document
def test_modules_and_what_is_imported_from_them_exist(document):
    text = document.read_text()
    for name in set(re.findall(r"\bhydrahead(?:\.[a-z_]+)+", text)):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # a function of a module
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
    for module, names in re.findall(r"^from (hydrahead\S*) import (.+)$", text, flags=re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), name


@every_document
def test_commands_that_a_document_shows_have_the_options_that_it_gives_them(document):
    text = document.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    for line in [*lines, *re.findall(r"`(hydrahead [^`\n]+)`", text)]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["hydrahead"] and not words[1].startswith("-"):
            known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}, line


def test_the_page_of_benchmarks_says_what_the_files_of_results_hold():
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    assert written == report.document(), "run `python benchmarks/report.py`"


def test_the_experiments_say_what_the_study_measured():
    """In every row of needles, text and training, whatever the page calls the models."""
    page = (ROOT / "docs" / "experiments.md").read_text()

    kinds = re.compile(r"\| (teacher|default|random|layer|replacement|receiver|nope|concat|gate|yarn)[^|]* \|")

    def table(*names: str) -> list[str]:
        found = [json.loads((ROOT / "benchmarks" / "smollm2" / name).read_text()) for name in names]
        return [line for line in students.tables(students.merged(found)).splitlines() if kinds.match(line)]

    def rows(name: str) -> list[str]:
        return [line for line in table(name) if ":1, " not in line]

    _, *measured = rows("rope-3to1.json")
    assert len(measured) == 6
    for row in measured[:4]:
        assert row.split("|", 3)[3] in page
    for row in measured[4:]:
        assert "|".join(row.split("|")[2:5]) in page
    assert len(learnt := rows("whole-3to1-7to1.json")) == 8 and all(row in page for row in learnt)
    scored = [row.split("| 16M |")[-1] for row in rows("scores-16m.json") if " (" in row]
    assert len(scored) == 10 and all(row.split("|  |")[-1].strip(" |") in page for row in scored)
    found = [row for row in rows("recipes.json") if " (" in row]
    assert len(found) == 8 and all(row in page for row in found)
    found = [row for row in rows("position-budget-16m.json") if row.count("|") == 6 and ", " not in row]
    assert len(found) == 21 and all(row in page for row in found)
    both = table("position-budget-16m.json", "choices-16m.json")
    beside = [row for row in both if ":1, " in row]
    assert len(beside) == 13 and all(row in page for row in beside)
    found = [row for row in rows("choices-16m.json") if row.count("|") == 6 and ", " not in row and " – " not in row]
    found = [row for row in found if "teacher" not in row and "receiver-7to1" not in row]
    assert len(found) == 45 and all(row in page for row in found)
    found = [row for name in ("long-context.json", "yarn-hybrid.json") for row in rows(name) if " (" in row]
    assert len(found) == 12 and all(row in page for row in found)


def test_the_experiments_say_what_controls_and_the_larger_teachers_hybrids_found():
    """Rows as `students.py` makes them, and beside those of one key the bytes of KV cache."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    files = (
        (25, "smollm2/controls-tenth", 31),
        (27, "smollm2/controls-3to1", 33),
        (26, "qwen2.5-coder/hybrids-6m", 10),
        (29, "smollm2/units-strategies", 16),
        (30, "qwen2.5-coder/groups-6m", 8),
        (31, "qwen2.5-coder/groups-controls", 10),
        (31, "smollm2/groups-random-tenth", 6),
        (32, "qwen2.5-coder/groups-random-7to1", 4),
        (32, "smollm2/groups-random-7to1-tenth", 4),
    )
    for section, name, count in files:
        study = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        text = re.split(r"^## \d", page[page.index(f"## {section}. ") + 3 :], flags=re.MULTILINE)[0]
        for model in study["report"]["models"]:
            assert f"| {model['label']} | {model['kv_bytes_per_token']:,} |" in text
        text = re.sub(r"^(\| [\w-]+ \|) [\d,]+ \|", r"\1", text, flags=re.MULTILINE)
        rows = re.findall(r"^\| \S.* \(.*\|$", students.tables(study), flags=re.MULTILINE)
        rows = [row for row in rows if ":1, 6M" not in row]  # said in words
        assert len(rows) == count and not [row for row in rows if row not in text]
        for label, curve in students.curves(study).items() if "qwen" in name else ():
            learnt = zip(*(curve[task] for task in ("niah_single_2", "niah_multikey_1")))
            assert f"| {label} | {' | '.join(f'{one[1]:.2f}, {four[1]:.2f}' for one, four in learnt)} |" in text
            asked = [
                step["heldout_loss"] for step in study["rows"][label]["steps"]["distill"] if "heldout_loss" in step
            ]
            assert re.search(rf"^\| {label} \|.* {curve['kl'][-1][1]:.3f} \| {asked[-1]:.3f} \|$", text, re.MULTILINE)


def test_the_experiments_say_what_students_lose_by_domain_and_find_beyond_their_rows():
    """And how the text of a student of YaRN holds beyond its teacher's own length."""
    page, folder = (ROOT / "docs" / "experiments.md").read_text(), ROOT / "benchmarks" / "smollm2"
    keys = ("loss", "kl", "agreement")
    report = json.loads((folder / "domains.json").read_text())["report"]
    text = {(cell["model"], cell["domain"]): cell for cell in report["text"]}
    needles = {(cell["model"], cell["task"], cell["length"]): cell for cell in report["needles"]}
    for name in (model["label"] for model in report["models"]):
        cells = [text[name, domain] for domain in ("documents", "code")]
        numbers = [f"{cell[key]:.3f}" if key in cell else "" for cell in cells for key in keys]
        assert f"| {name} | {' | '.join(numbers)} |" in page, name
        cells = [
            needles.get((name, task, length))
            for task in ("niah_single_2", "niah_multikey_1")
            for length in (8192, 16384)
        ]
        if all(cells):
            found = [f"{cell['accuracy']:.2f} ({cell['low']:.2f}–{cell['high']:.2f})" for cell in cells]
            assert f"| {name} | {' | '.join(found)} |" in page, name
    report = json.loads((folder.with_name("qwen2.5-coder") / "groups-beyond.json").read_text())["report"]
    text = {(cell["model"], cell["domain"]): cell for cell in report["text"]}
    for name in (model["label"] for model in report["models"]):
        cells = [text[name, domain] for domain in ("documents", "code")]
        numbers = [f"{cell[key]:.3f}" if key in cell else "" for cell in cells for key in keys]
        numbers += [
            f"{c['accuracy']:.2f} ({c['low']:.2f}–{c['high']:.2f})" for c in report["needles"] if c["model"] == name
        ]
        assert len(numbers) == 8 and f"| {name} | {' | '.join(numbers)} |" in page, name
    report = json.loads((folder.with_name("qwen2.5-coder") / "groups-far.json").read_text())["report"]
    for name in (model["label"] for model in report["models"]):
        cells = sorted((c for c in report["needles"] if c["model"] == name), key=lambda cell: cell["length"])
        found = [f"{cell['accuracy']:.2f} ({cell['low']:.2f}–{cell['high']:.2f})" for cell in cells]
        assert len(found) == 4 and f"| {name} | {' | '.join(found)} |" in page, name
    report = json.loads((folder / "recipe-groups.json").read_text())["report"]
    found = {(cell["model"], cell["task"], cell["length"]): f"{cell['accuracy']:.2f}" for cell in report["needles"]}
    for model, title in zip(report["models"], ("teacher", "groups-3to1, 28M"), strict=True):
        cells = [
            f"{found[model['label'], 'niah_single_2', at]} / {found[model['label'], 'niah_multikey_1', at]}"
            for at in (1024, 2048, 4096, 8192, 16384, 32768)
        ]
        assert f"| {title} | {model['kv_bytes_per_token']:,} | {' | '.join(cells)} |" in page
    report = json.loads((folder / "aligned-strategies.json").read_text())["report"]
    for model, text in zip(report["models"], report["text"], strict=True):
        found = [cell["accuracy"] for cell in report["needles"] if cell["model"] == model["label"]]
        numbers = [f"{value:.2f}" for value in found] + [f"{text[key]:.3f}" if key in text else "" for key in keys]
        assert f"| {model['label']} | {model['kv_bytes_per_token']:,} | {' | '.join(numbers)} |" in page
    text = json.loads((folder / "yarn-hybrid.json").read_text())["report"]["text"]
    for model, key, title in (
        ("teacher, yarn:4", "loss", "teacher, yarn:4: loss"),
        ("yarn-3to1", "loss", "yarn-3to1: loss"),
        ("yarn-3to1", "kl", "KL"),
        ("yarn-3to1", "agreement", "agreement"),
    ):
        assert f"| {title} | {' | '.join(f'{cell[key]:.3f}' for cell in text if cell['model'] == model)} |" in page


def test_the_readme_says_what_the_larger_teachers_hybrids_find():
    page = (ROOT / "README.md").read_text()
    for file in ("hybrids-6m", "groups-controls", "groups-random-7to1"):
        study = json.loads((ROOT / "benchmarks" / "qwen2.5-coder" / f"{file}.json").read_text())
        found = {(cell["model"], cell["task"], cell["length"]): cell for cell in study["report"]["needles"]}
        teacher_loss = next(cell["loss"] for cell in study["report"]["text"] if cell["length"] == 4096)
        for model in study["report"]["models"]:
            name, held = model["label"], model["kv_bytes_per_token"]
            is_teacher = name == "teacher"
            steps = [{"heldout_loss": teacher_loss}] if is_teacher else study["rows"][name]["steps"]["distill"]
            cells = [
                " / ".join(
                    f"{found[name, task, length]['accuracy']:.2f}" if (name, task, length) in found else "not measured"
                    for task in ("niah_single_2", "niah_multikey_1")
                )
                for length in (4096, 16384, 32768)
            ]
            unit, loss = " bytes" if is_teacher else "", steps[-1]["heldout_loss"]
            assert f"| {held:,}{unit} | {' | '.join(cells)} | {loss:.3f} |" in page, name


def test_the_pages_say_what_a_byte_of_cache_buys():
    """Each row of the table is a run's; none of those that chose anywhere by score is missing."""
    page = (ROOT / "docs" / "method.md").read_text()
    table = page[page.index("| all of it: SmolLM2-135M") :].split("\n\n")[0].splitlines()
    shares = {1 / 4: "a quarter", 1 / 8: "an eighth", 1 / 3: "a third"}
    wanted, possible = set(), set()
    for name in budgets.TEACHERS:
        every, teacher = budgets.points(name)
        for one in (teacher, *every):
            title, tokens = f"all of it: {name}", ""
            if one is not teacher:
                title = f"{shares[one['ratio']]}, {one['kind']}"
                tokens = f"{one['tokens']:g}M"
            found = " | ".join(f"{budgets.share(one, task):.2f}" for task in budgets.TASKS)
            possible.add(row := f"| {title} | {one['bytes']:,} | {tokens} | {found} |")
            if one.get("kind") in ("KV groups by score", "heads by score"):
                wanted.add(row)
    assert wanted < set(table) <= possible


def test_the_experiments_say_by_how_much_units_and_strategies_differ():
    """Pairs of students over all prompts of a task, in the words of the page."""
    page = " ".join((ROOT / "docs" / "experiments.md").read_text().replace("−", "-").split())
    section = {
        number: page[page.index(f"## {number}. ") :].split(f" ## {number + 1}. ")[0] for number in (29, 30, 31, 32)
    }
    units, earlier = "smollm2/units-strategies", "smollm2/controls-3to1"
    groups, heads = "qwen2.5-coder/groups-6m", "qwen2.5-coder/hybrids-6m"
    controls, eighth = "qwen2.5-coder/groups-controls", ("qwen2.5-coder/groups-random-7to1", "random-groups-7to1")
    for number, one, other in (
        (29, (units, "global-3to1-tenth"), (earlier, "default-3to1-tenth")),
        (29, (units, "global-7to1-tenth"), ("smollm2/controls-tenth", "default-7to1-tenth")),
        (29, (units, "global-7to1"), ("smollm2/position-budget-16m", "default-7to1")),
        (29, (units, "global-7to1"), ("smollm2/choices-16m", "layerwise-3to1")),
        (29, (earlier, "groups-3to1"), (units, "global-3to1")),
        (29, (units, "global-7to1"), (earlier, "groups-7to1")),
        (29, (earlier, "groups-3to1"), (units, "global-7to1")),
        (29, (earlier, "default-3to1-tenth"), (units, "norm-all-3to1-tenth")),
        (30, (groups, "groups-3to1"), (groups, "default-3to1-1")),
        (30, (groups, "groups-3to1"), (heads, "random-3to1")),
        (30, (groups, "groups-7to1"), (heads, "default-7to1")),
        (31, (controls, "groups-3to1-again"), (controls, "random-groups-3to1")),
        (31, (controls, "groups-7to1-again"), (controls, "random-groups-3to1")),
        (31, (controls, "groups-3to1-again"), (controls, "even-groups-3to1")),
        (31, (controls, "even-groups-3to1"), (groups, "default-3to1-1")),
        (31, (controls, "groups-7to1-again"), (groups, "groups-7to1")),
        (31, (controls, "groups-3to1-again"), (groups, "groups-3to1")),
        (31, (heads, "random-3to1"), (controls, "random-groups-3to1")),
        (31, (units, "groups-3to1-tenth"), ("smollm2/groups-random-tenth", "even-groups-3to1-tenth")),
        (32, (groups, "groups-7to1"), eighth),
        (32, (controls, "groups-7to1-again"), eighth),
        (32, (controls, "random-groups-3to1"), eighth),
    ):
        for task in ("niah_single_2", "niah_multikey_1"):
            scores = []
            for file, name in (one, other):
                cells = json.loads((ROOT / "benchmarks" / f"{file}.json").read_text())["report"]["needles"]
                asked = [cell["scores"] for cell in cells if (cell["model"], cell["task"]) == (name, task)]
                scores.append([score for each in asked for score in each])
            gap = paired_difference(*scores)
            words = f"{abs(gap['difference']):.2f} ({gap['low']:.2f} to {gap['high']:.2f})"
            in_brackets = words.replace(" (", ", ").removesuffix(")")
            assert words in section[number] or in_brackets in section[number], (one, other, task, words)


def test_the_page_on_serving_says_what_uneven_masks_cost():
    page = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    head_dims = {"smollm2": 64, "qwen2.5-coder": 128}
    for file, name, groups, words in (
        ("qwen2.5-coder/groups-6m", "groups-7to1", 2, "keeps {:,} bytes a token for {:,}, having one group"),
        ("qwen2.5-coder/groups-6m", "groups-3to1", 2, "a quarter {:,} for {:,}"),
        ("smollm2/controls-3to1", "groups-7to1", 3, "of SmolLM2-135M {:,} for {:,}"),
        ("smollm2/controls-3to1", "groups-3to1", 3, "and {:,} for {:,}"),
    ):
        masks = json.loads((ROOT / "benchmarks" / f"{file}.json").read_text())["rows"][name]["masks"]
        shape = {"num_hidden_layers": len(masks), "num_attention_heads": len(masks[0]), "num_key_value_heads": groups}
        pages = Pages.of(HydraHeadConfig(**shape, head_dim=head_dims[file.split("/")[0]], head_masks=masks))
        assert words.format(pages.kv_bytes_per_token, pages.kv_bytes_needed) in page, name
    scores = HeadScores.load(ROOT / "benchmarks" / "qwen2.5-coder" / "scores-4096.json")
    masks = select_heads(scores, 1 / 4, "global-even")
    shape = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128}
    pages = Pages.of(HydraHeadConfig(**shape, head_masks=masks))
    assert pages.kv_bytes_per_token == pages.kv_bytes_needed
    assert f"a quarter of Qwen2.5-Coder-1.5B's then keeps its {pages.kv_bytes_needed:,}." in page


def test_what_is_extrapolated_is_what_the_pages_say():
    points = {which: [outlook.point(*run) for run in runs] for which, runs in outlook.RUNS.items()}
    powers = [power for budget in outlook.BUDGETS for power in outlook.slopes(points[outlook.SMALL, budget])]
    large = points[outlook.LARGE, "7to1"]
    low, high = outlook.drawn_on(large[0], powers, outlook.FAR)
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert f"a KL of {large[0][1]:.2f} in the last steps" in page
    assert f"a KL of {low:.2f} or {high:.2f} at the recipe's billion tokens" in page
    halved = outlook.slopes([(1e6, 0.4), (1e6, 0.4), (4e6, 0.2)])  # runs of as many tokens count as one
    assert halved == [-0.5] and outlook.drawn_on((4e6, 0.2), [-0.5, 0.0], 16e6) == (0.1, 0.2)


def test_the_experiments_say_what_the_heads_of_the_larger_teacher_are_like():
    """And what they were read from is the file beside it, byte for byte."""
    page, folder = (ROOT / "docs" / "experiments.md").read_text(), ROOT / "benchmarks" / "qwen2.5-coder"
    found = json.loads((folder / "anatomy.json").read_text())
    assert list(found["scores"].values()) == [digest(folder / "scores-4096.json")]
    section = page[page.index("## 23. ") : page.index("## 24. ")]
    for row in found["few"]["4096"].values():
        halves = row["stability"]["8"]["rho"]
        cells = f"| {row['critical']:.1%} | {row['convertible']:.1%} | {row['gini']:.2f} | {halves:.2f} |"
        assert cells in section


def test_the_experiments_say_how_rankings_hold_at_four_times_the_length():
    """Of the probes that both lengths have; the last column is said of seconds."""
    page, folder = (ROOT / "docs" / "experiments.md").read_text(), ROOT / "benchmarks" / "qwen2.5-coder"
    section, short = page[page.index("## 32. ") :], HeadScores.load(folder / "scores-4096.json")
    for file in ("scores-16384-8", "replacement-16384-8"):
        long = HeadScores.load(folder / f"{file}.json")
        asked = {(probe.name, probe.counterfactual) for probe in long.probes}
        same = replace(short, probes=[each for each in short.probes if (each.name, each.counterfactual) in asked])
        for method in long.methods():
            one, other = same.using(method), long.using(method)
            agreed, (before, after) = anatomy.agreement(one, other), map(anatomy.few, (one, other))
            halves = " | ".join(f"{each['stability']['8']['rho']:.2f}" for each in (before, after))
            shares = f"{after['critical']:.1%} | {after['convertible']:.1%} | {after['gini']:.2f}"
            row = f"| {method} | {agreed['rho']:.2f} | {agreed['overlap']:.0%} | {halves} | {shares} |"
            assert row in section, row


def test_the_experiments_say_what_senders_cost_and_which_are_missed():
    page, file = (ROOT / "docs" / "experiments.md").read_text(), ROOT / "benchmarks" / "qwen2.5-coder" / "senders.json"
    section, rows = " ".join(page[page.index("## 32. ") :].split()), json.loads(file.read_text())["rows"]
    needles = [row for row in rows if "every" in row]
    after, before = ([sum(row[key] for row in part) for part in (rows, needles)] for key in ("sender_s", ALL_AGAIN))
    assert (
        f"{after[0]:.0f} s for {before[0]:.0f} with all 32 recorded again, {after[1]:.0f} for {before[1]:.0f}"
        in section
    )
    whole = [total + sum(row["receiver_s"] for row in part) for total, part in zip(after, (rows, needles))]
    assert f"With receivers {whole[0]:.0f} s for ten sets, {whole[1]:.0f} for the four of needles" in section
    for row in rows:
        assert not [new for new, old in effects(row, "new", "old") if new <= THRESHOLD < old]
    missed = [
        [every for new, every in effects(row, "new_on_3", "every") if new <= THRESHOLD < every] for row in needles
    ]
    senders = [sum(every > THRESHOLD for _, every in effects(row, "new_on_3", "every")) for row in needles]
    assert (senders, [len(each) for each in missed]) == ([6, 6, 33, 24], [0, 0, 7, 4])
    assert f"the largest at {max(missed[2]):.3f} and {max(missed[3]):.3f}" in section


def effects(row: dict, *names: str) -> list[tuple[float, ...]]:
    return [heads for layers in zip(*(row[name] for name in names)) for heads in zip(*layers)]


def test_the_experiments_say_what_the_demos_teachers_and_hybrids_find():
    page = (ROOT / "docs" / "experiments.md").read_text()
    for file in ("demo.json", "demo-yarn.json"):
        report = json.loads((ROOT / "benchmarks" / file).read_text())
        found = {(cell["model"], cell["task"], cell["length"]): cell["accuracy"] for cell in report["needles"]}
        loss = {(cell["model"], cell["length"]): cell["loss"] for cell in report["text"]}
        lengths = sorted({length for _, length in loss})
        for model in ("teacher", "student"):
            needles = [
                [found[model, f"niah_{task}", length] for task in ("single_2", "multikey_1")] for length in lengths
            ]
            cells = [
                f"{one:.2f} / {four:.2f}; {loss[model, length]:.3f}" for (one, four), length in zip(needles, lengths)
            ]
            assert f" | {' | '.join(cells)} |" in page, (file, model)


def test_the_experiments_say_how_long_the_steps_of_a_recipe_took():
    page = (ROOT / "docs" / "experiments.md").read_text()
    runs = json.loads((ROOT / "benchmarks" / "smollm2" / "recipes.json").read_text())["rows"].values()
    for step in ("align", "score", "distill", "finetune", "evaluate", "all"):
        assert " | ".join(f"{run['seconds'][step]:,.0f} | {run['busy'][step]:.0%}" for run in runs) in page, step


def test_the_experiments_say_what_aligned_heads_find():
    page = (ROOT / "docs" / "experiments.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "smollm2" / "aligned-only.json").read_text())["report"]
    for text in report["text"]:
        found = [cell["accuracy"] for cell in report["needles"] if cell["model"] == text["model"]]
        numbers = [f"{value:.2f}" for value in found] + [f"{text['loss']:.3f}"]
        numbers += [f"{text[key]:.3f}" if key in text else "" for key in ("kl", "agreement")]
        assert f" | {' | '.join(numbers)} |" in page, text["model"]
