"""
Students of one teacher on the same text, row by row: which heads, budget, position and fusion, at how many tokens.

    python benchmarks/study.py smollm2-135m-3to1 data.name=plain.jsonl data.subset=null --output runs/study
    python benchmarks/study.py smollm2-135m-3to1 … --rows groups-3to1 random-3to1 --minutes 20
    python benchmarks/students.py runs/study/study.json students.md  # tables and pictures

A row is an entry of ROWS. Rows with the same form of heads share one alignment and one score file; each then chooses
its masks and distils, to the recipe's tokens or to a share of them. All students and the teacher answer the same
prompts. A row may be a folder that `hydrahead run` made, to which `base` is a link; with its scores by all METHODS it
serves all rows of its form. What is there is not done again, what was interrupted goes on, what does not fit
`--minutes` waits for the next call, and a row that fails stops no other. Several calls with the same `--output`, one a
GPU, share the rows among them; `--dry-run` finds beforehand what can be known without weights.

`study.json` has everything that tables are made of: masks, every step, the score of every prompt.
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from filelock import FileLock, Timeout

from hydrahead.benchmarks.students import curves, tables
from hydrahead.console import Stopped, first_line, one_line_errors
from hydrahead.convert.masks import read_masks, select_to_file
from hydrahead.convert.migration import convert_to_folder
from hydrahead.convert.scoring.scores import HeadScores
from hydrahead.convert.selection import STRATEGIES, select_heads
from hydrahead.convert.teachers import Teacher, open_teacher
from hydrahead.evaluation.cells import KINDS
from hydrahead.evaluation.evaluator import Settings
from hydrahead.evaluation.figures import plot_students
from hydrahead.evaluation.report import is_measured, read_report
from hydrahead.files import atomic_folder
from hydrahead.pipeline import MEASURED, Road, Step, check_evaluation, evaluate_models, side_by_side
from hydrahead.provenance import Record
from hydrahead.training.data import token_folder
from hydrahead.training.distill import run_distill
from hydrahead.training.finetune import run_finetune
from hydrahead.training.recipe import Recipe, load_recipe
from hydrahead.training.stage import Stage
from hydrahead.usage import Usage

METHODS = ("combined", "replacement", "receiver+sender", "receiver", "attribution-qk")
SCORED = f"score.method=[{','.join(METHODS)}]"
TENTH = 0.1
WAIT = 5  # seconds, for what another call is making


def _heads(strategy: str) -> dict:
    """Options of `select` that count heads, as the paper does."""
    return {"budget_unit": "heads", "strategy": strategy}


CONSTRAINED = _heads("global-constrained")


@dataclass(frozen=True)
class Row:
    """
    One student.

    Attributes:
        about: what its row of the table says.
        ratio: of full attention, by `select`.
        select: other options of `convert.masks.select_to_file`, all that matter: a file of results outlives defaults.
        student: overrides of the recipe that change the form of heads: rows that agree in them share their alignment.
        training: other overrides of the recipe.
        share: of the recipe's tokens; 0 for a student of aligned heads that nothing was trained of. Only the whole is
            finetuned.
        seed: of the choice at random, and of the order of the text.
    """

    about: str
    ratio: float = 0.25
    select: dict = field(default_factory=lambda: dict(CONSTRAINED))
    student: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    share: float = 1.0
    seed: int = 0

    @property
    def by_score(self) -> bool:
        """Whether the choice of heads needs scores; controls do not, and need not wait for them."""
        return STRATEGIES[self.select["strategy"]].by_score

    @property
    def forms(self) -> tuple[str, ...]:
        """What of `student` decides how heads are aligned: the gate starts as the scale does."""
        return tuple(change for change in self.student if change != "student.fusion=gate")


RANDOM, LAYERWISE = _heads("global-random"), _heads("layerwise")
GROUPS = {"budget_unit": "kv_groups", "strategy": "global"}
NOPE = ("student.full_attention_position=nope",)
CHOICES = {
    "constrained": CONSTRAINED,  # the default until docs/experiments.md, 29, and so named in files older than that
    "replacement": CONSTRAINED | {"method": "replacement"},
    "random": RANDOM,
    "layerwise": LAYERWISE,
    "receiver-sender": CONSTRAINED | {"method": "receiver+sender"},
    "receiver": CONSTRAINED | {"method": "receiver"},
    "attribution": CONSTRAINED | {"method": "attribution-qk"},
    "global": _heads("global"),
    "groups": GROUPS,  # the default
    "random-groups": GROUPS | {"strategy": "global-random"},
    "even-groups": GROUPS | {"strategy": "global-even"},  # which waste nothing in vLLM
    "fixed": _heads("fixed"),
    "layer-random": _heads("layer-random"),
}
BUDGETS = {"3to1": 0.25, "7to1": 0.125}
STUDENTS = {
    "nope": NOPE,
    "nope-unscaled": (*NOPE, "student.logit_scale_base=1e30"),  # beside which the logarithm of a position is nothing
    "norm-all": ("student.fusion_norm=all",),
    "gate": ("student.fusion=gate",),
    "concat": ("student.fusion=concat",),
}


def _rows() -> Iterator[tuple[str, Row]]:
    """In the order in which they are worth a GPU's minutes."""
    whole = [(choice, seed) for seed in range(3) for choice in ("constrained", "random")]
    for choice, seed in whole:
        yield f"{choice}-3to1" + (f"-{seed}" if seed else ""), Row(f"{choice}, 3:1", select=CHOICES[choice], seed=seed)
    for choice in ("constrained", "random"):
        yield f"{choice}-7to1", Row(f"{choice}, 7:1", 0.125, CHOICES[choice])
    yield "layerwise-3to1", Row("layerwise, 3:1", select=LAYERWISE)
    for choice in ("replacement", "receiver-sender", "global", "groups", "random-groups", "even-groups"):
        for budget, ratio in BUDGETS.items():
            yield f"{choice}-{budget}", Row(f"{choice}, {budget.replace('to', ':')}", ratio, CHOICES[choice])
    yield "nope-3to1", Row("constrained, 3:1, NoPE", student=NOPE)
    yield "nope-replacement-3to1", Row("replacement, 3:1, NoPE", select=CHOICES["replacement"], student=NOPE)
    for budget, ratio in BUDGETS.items():
        yield (
            f"concat-{budget}",
            Row(f"constrained, {budget.replace('to', ':')}, concat", ratio, student=STUDENTS["concat"]),
        )
    yield "long-rows-3to1", Row("constrained, 3:1, rows of 8,192 tokens", training=("distill.length=8192",))
    for budget, ratio in BUDGETS.items():
        for choice, select in CHOICES.items():
            words = f"{choice}, {budget.replace('to', ':')}"
            yield f"{choice}-{budget}-tenth", Row(words, ratio, select, share=TENTH)
            yield f"{choice}-{budget}-aligned", Row(f"{words}, aligned only", ratio, select, share=0)
        for choice in ("random", "random-groups"):
            for seed in (1, 2):
                words = f"{choice}, {budget.replace('to', ':')}, aligned only"
                yield f"{choice}-{budget}-aligned-{seed}", Row(words, ratio, CHOICES[choice], share=0, seed=seed)
    for name, student in STUDENTS.items():
        yield f"{name}-3to1-tenth", Row(f"constrained, 3:1, {name}", student=student, share=TENTH)
    yield "groups-layer-tenth", Row("one KV group a layer", 1 / 3, GROUPS | {"strategy": "layer"}, share=TENTH)
    yield "groups-third-tenth", Row("KV groups, 1/3", 1 / 3, GROUPS, share=TENTH)
    yield "layerwise-third-tenth", Row("layerwise, 1/3", 1 / 3, LAYERWISE, share=TENTH)  # as many KV bytes as that


ROWS = dict(_rows())


class Study:
    """A folder of students of one recipe's teacher."""

    def __init__(self, recipe: str, overrides: list[str], output: Path):
        self.name, self.overrides, self.output = recipe, overrides, output

    def recipe(self, row: Row, *changes: str) -> tuple[str, list[str]]:
        """A recipe's name and overrides; what the caller asked for comes last."""
        tokens = f"data.cache={self.output / 'tokens'}"
        return self.name, [SCORED, "score.evidence=false", tokens, *row.student, *changes, *self.overrides]

    def base(self, row: Row) -> Path:
        """The folder of the alignment and scores that a row shares."""
        words = [change.removeprefix("student.").replace("=", "-") for change in row.forms]
        return self.output / "-".join(["base", *words])

    def steps(self, row: Row) -> list[Step]:
        """Alignment and, where the choice goes by them, scores, of the form of heads that a row shares with others."""
        steps = Road(*self.recipe(replace(row, student=row.forms), f"output={self.base(row)}")).steps()
        return [step for step in steps if step.name == "align" or (step.name == "score" and row.by_score)]

    @cached_property
    def teacher(self) -> Teacher:
        """The recipe's."""
        named = load_recipe(*self.recipe(Row(""))).teacher
        return open_teacher(named.name, named.revision)

    def control(self, row: Row) -> dict:
        """What the file of a choice says that no score decides."""
        teacher, shape = self.teacher, ("num_layers", "num_heads", "num_kv_heads")
        chosen = {"ratio": row.ratio, "seed": row.seed, **row.select}
        masks = select_heads(HeadScores.drawn(*(getattr(teacher.adapter, name) for name in shape)), **chosen)
        return {**teacher.identity, **chosen, "by_score": False, "kept": sum(map(sum, masks)), "masks": masks}

    def choose(self, row: Row, masks: Path) -> None:
        """Write a row's masks."""
        if not row.by_score:
            return Record(masks).write(self.control(row))
        scores = self.base(row) / "scores" / "head_scores.json"
        by = {"method": load_recipe(*self.recipe(row)).score.method[0]} | row.select
        _, lines = select_to_file([scores], masks, row.ratio, seed=row.seed, **by)
        print(*lines, sep="\n")

    def check(self, name: str) -> None:
        """
        What can be checked of a row without weights.

        Raises:
            ValueError: a step of it cannot work; one line.
        """
        row = ROWS[name]
        for step in self.steps(row):
            step.check()
        recipe = self.student_recipe(name, row)
        for stage in ("distill", "finetune") if row.share else ():
            if getattr(recipe, stage):
                Stage(recipe, stage)
        if not row.by_score:
            self.teacher.check_made_from(self.output / name, self.control(row))
        check_evaluation(load_recipe(*self.recipe(Row(""))), self.teacher)

    def make(self, name: str, row: Row) -> None:
        """Choose the heads, and train the student; its base is there."""
        base, folder = self.base(row), self.output / name
        masks = folder / "head_masks.json"
        if not masks.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self.choose(row, masks)
        recipe = self.student_recipe(name, row)
        if row.share:
            run_distill(recipe)
        elif not self.student(name).is_dir():
            forms = base / "align" / "head_forms.safetensors"
            of = {"revision": recipe.teacher.revision, "forms_file": forms}
            convert_to_folder(recipe.teacher.name, self.student(name), masks, **of)
        if recipe.finetune:
            run_finetune(recipe)

    def student_recipe(self, name: str, row: Row) -> Recipe:
        """What trains a row's student; the masks and the aligned heads are given."""
        folder = self.output / name
        given = [f"output={folder}", f"masks={folder / 'head_masks.json'}", "score=null", "select=null"]
        given += [f"run.seed={row.seed}"]
        if not (folder / "align").is_dir():  # as it is where `hydrahead run` made the row
            given += [f"distill.head_forms={self.base(row) / 'align' / 'head_forms.safetensors'}"]
        whole = load_recipe(*self.recipe(row))
        if row.share < 1:
            tokens = max(whole.distill.batch_tokens, int(row.share * whole.distill.tokens))
            steps = tokens // whole.distill.batch_tokens
            warm_up = min(whole.distill.warmup_steps, steps // 10)
            given += ["finetune=null", f"distill.tokens={tokens}", f"distill.warmup_steps={warm_up}"]
        kept = [each for each in self.overrides if not each.startswith("score.")]
        changes = [each for each in kept if row.share == 1 or not each.startswith(("distill.tokens", "finetune"))]
        base = [f"data.cache={self.output / 'tokens'}", *row.student, *row.training]
        return load_recipe(self.name, [*base, *changes, *given])

    def student(self, name: str) -> Path:
        """The folder of a row's student, made or not."""
        recipe = self.student_recipe(name, ROWS[name])
        if not ROWS[name].share:
            return self.output / name / "student"
        return self.output / name / ("finetune" if recipe.finetune else "distill") / "student"

    def evaluate(self, name: str, batch_tokens: int | None = None) -> None:
        """A row's student on the prompts and text that its teacher was asked, once for all rows."""
        recipe = load_recipe(*self.recipe(Row("")))
        models = side_by_side([str(self.teacher.fetch()), str(self.student(name))], recipe.teacher.dtype)
        models = [replace(model, label=label) for model, label in zip(models, ["teacher", name])]
        asked = {name: getattr(recipe.evaluate, name) for name in MEASURED}
        settings = Settings(**asked, batch_tokens=batch_tokens)
        where = token_folder(recipe, recipe.data, "tokens"), recipe.data.heldout_tokens
        reference, report = self.output / "teacher", self.output / name / "report"
        with self.lock("teacher"):
            evaluate_models(models[:1], settings, reference, *where)
        if not report.is_dir():
            with atomic_folder(report) as partial:
                shutil.copytree(reference, partial, dirs_exist_ok=True)
        evaluate_models(models, settings, report, *where)

    def is_done(self, name: str) -> bool:
        """Whether a row was measured at all lengths."""
        asked = load_recipe(*self.recipe(Row(""))).evaluate
        return is_measured(self.output / name / "report", name, asked.tasks, asked.lengths)

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        """Held by one call of those that share this study."""
        folder = self.output / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name, timeout=timeout)

    def do(self, name: str, batch_tokens: int | None = None) -> bool:
        """One row, unless another call is at it, or at what it is made of; whether that is so."""
        if self.is_done(name):
            return False
        row = ROWS[name]
        try:
            with self.lock(name, 0):
                if self.is_done(name):  # by the call that held the lock
                    return False
                for step in self.steps(row):
                    with self.lock(f"{self.base(row).name}-{step.name}", 0):
                        if not step.is_done():
                            timed(f"{self.base(row).name}: {step.name}", step.do)
                print(f"\n{name}: {row.about}", flush=True)
                timed(f"{name}: training", partial(self.make, name, row))
                timed(f"{name}: evaluation", partial(self.evaluate, name, batch_tokens))
                self.write()
        except Timeout:
            return True
        return False

    def write(self) -> dict:
        """`study.json` and its picture, of all that is there."""
        with self.lock("study.json"):
            found = self.collect()
            Record(self.output / "study.json").write(found)
            plot_students(curves(found), self.output / "study.png")
        return found

    def collect(self) -> dict:
        """All that tables are made of."""
        found = {}
        for name, row in ROWS.items():
            if not (self.output / name).is_dir() or not (self.student(name) / "config.json").is_file():
                continue
            recipe, folder = self.student_recipe(name, row), self.output / name
            stages = [stage for stage in ("distill", "finetune") if getattr(recipe, stage)]
            stages = [stage for stage in stages if (folder / stage / "metrics.jsonl").is_file()]
            lines = {stage: (folder / stage / "metrics.jsonl").read_text().splitlines() for stage in stages}
            found[name] = asdict(row) | {
                "tokens": {stage: getattr(recipe, stage).tokens for stage in stages},
                "batch_tokens": recipe.distill.batch_tokens,
                "niah_prompts": recipe.evaluate.niah_prompts,
                "masks": read_masks(folder / "head_masks.json", self.teacher),
                "steps": {stage: [json.loads(line) for line in each] for stage, each in lines.items()},
            }
        return {"recipe": self.name, "rows": found, "report": self.report(list(found))}

    def report(self, names: list[str]) -> dict | None:
        """The teacher's report, and in it what was measured of every row."""
        whole = read_report(self.output / "teacher")
        for name in names if whole else ():
            cells = read_report(self.output / name / "report") or {}
            for kind, key in (("models", "label"), *((kind, "model") for kind in KINDS if kind != "models")):
                whole[kind] += [cell for cell in cells.get(kind, ()) if cell[key] == name]
        return whole


def timed(what: str, work: Callable[[], object]) -> None:
    """Do it, and say what it took."""
    with Usage() as usage:
        work()
    print(f"{what} took {usage}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for all rows")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further row is begun")
    parser.add_argument("--dry-run", action="store_true", help="check all that can be checked without weights, stop")
    parser.add_argument("--batch-tokens", type=int, help="of prompts answered together; default: the evaluator's")
    options = parser.parse_intermixed_args()
    study, started, rows = Study(options.recipe, options.overrides, options.output), time.monotonic(), options.rows
    failed = []

    def tried(name: str, work: Callable[..., bool | None], *arguments) -> bool | None:
        """Of one row: whatever stops it, but the user, lets the others go on."""
        try:
            return work(name, *arguments)
        except Stopped:
            raise
        except SystemExit as error:  # of a launched process
            if error.code > 128:  # which a signal stopped
                raise
            print(f"{name}: a process of its alignment ended with status {error.code}", file=sys.stderr, flush=True)
        except Exception as error:
            print(f"{name}: {first_line(error)}", file=sys.stderr, flush=True)
            if not isinstance(error, ValueError | OSError):
                traceback.print_exception(error)
        failed.append(name)

    if options.dry_run:
        for name in rows:
            tried(name, study.check)
        print(f"{len(rows) - len(failed)} of {len(rows)} rows can be made, as far as can be known without weights")
        rows = []
    while rows and time.monotonic() - started < 60 * options.minutes:
        for name in rows:
            if not tried(name, study.do, options.batch_tokens):
                rows = [other for other in rows if other != name]
                break
        else:  # others are at all that is left
            time.sleep(WAIT)
    if rows:
        print(f"{', '.join(rows)} wait for the next call")
    if not options.dry_run:
        print(tables(study.write()))
    if failed:
        raise ValueError(f"{', '.join(failed)}: failed, each for the reason above")


if __name__ == "__main__":
    with one_line_errors():
        main()
