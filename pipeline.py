"""
One recipe walked from teacher to card (`hydrahead run`): align, score, select, distil, finetune, evaluate, card.

Every step leaves a file, and has a command that a person could type instead: the road can be left and entered
anywhere. A step whose file is there is not done again; one that was interrupted goes on.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from .configuration_hydrahead import HydraHeadConfig
from .console import progress
from .convert.forms import check_forms
from .convert.masks import Exchange, parse_heads, read_masks, select_to_file
from .convert.options import options_of, teacher_config
from .convert.scoring.command import check_settings, score_to_folder
from .convert.scoring.probes import check_length
from .convert.scoring.scores import HeadScores
from .convert.scoring.settings import ScoreSettings
from .convert.selection import Masks, select_heads
from .convert.teachers import Teacher, open_teacher
from .data.corpus import encode_corpus, load_corpus
from .data.needles import make_niah, needle_text
from .evaluation.needles import TASKS
from .evaluation.report import draw_report, evaluate_at, report_rows, text_needed
from .files import atomic_file, read_utf8
from .hub.card import model_card
from .hub.checkpoint import answer_in_clean_process, read_made_from
from .kernels import use_tuned_kernels
from .modeling_hydrahead import HydraHeadForCausalLM
from .provenance import Record, digest, environment, first_difference
from .training.align import run_align
from .training.cost import print_cost
from .training.data import token_folder
from .training.distill import run_distill
from .training.finetune import run_finetune
from .training.recipe import RECIPES, STAGES, load_recipe
from .training.stage import Stage

ANEW = "choose another output, or have it made anew: remove"


@dataclass
class Step:
    """
    One step of the road: its name in a recipe, the command that a person could type instead, and the file or folder
    that it leaves; `check` raises a one-line `ValueError` where it cannot work or was done otherwise, and `do` goes on
    with what was interrupted.
    """

    name: str
    command: list[str]
    output: Path
    do: Callable[[], object]
    is_done: Callable[[], bool]
    check: Callable[[], object] = lambda: None


def walk(name: str, overrides: Sequence[str] = (), dry_run: bool = False) -> "Road":
    """
    Do every step of a recipe that has not been done.

    Args:
        name, overrides: as in `load_recipe`.
        dry_run: check all that can be checked, print the commands and what training costs, and stop.

    Raises:
        ValueError: a step cannot work, or its folder holds another recipe's; one line, before anything is done.
    """
    road = Road(name, overrides)
    steps = road.steps()
    for step in steps:
        step.check()
    made = [step for step in steps if step.name not in ("evaluate", "card")]  # which are part of the student's folder
    missing = next((step for step in made if not step.is_done()), None)
    for step in made[made.index(missing) + 1 :] if missing else ():
        if step.output.exists():
            raise ValueError(f"{step.output}: made before {missing.name}, which is not done; {ANEW} {step.output}")
    for step in steps:
        print(f"\n{step.name}: {shlex.join(step.command)}", flush=True)
        if dry_run and step.name in STAGES:
            stage = Stage(road.recipe, step.name)
            print_cost(road.recipe, step.name, stage.adapter, road.config(stage))
        elif step.is_done():
            print(f"{step.output} is there already")
        elif not dry_run:
            step.do()
    if not dry_run and road.recipe.evaluate.lengths:
        show_report(road.student)
    return road


class Road:
    """The steps of a recipe, in order."""

    def __init__(self, name: str, overrides: Sequence[str] = ()):
        self.arguments = [name, *overrides]
        self.recipe = load_recipe(name, overrides)
        teacher, self.output = self.recipe.teacher, Path(self.recipe.output)
        self.teacher = open_teacher(teacher.name, teacher.revision)
        self.scores = self.output / "scores"

    @property
    def student(self) -> Path:
        """The folder that the last stage writes."""
        return self.output / ("finetune" if self.recipe.finetune else "distill") / "student"

    def steps(self) -> list[Step]:
        """
        The steps that the recipe has sections for.

        Raises:
            ValueError: a section is missing.
        """
        recipe = self.recipe
        chooses = recipe.select is not None and recipe.masks == str(recipe.chosen_masks)
        if chooses and recipe.score is None:
            raise ValueError("the recipe has a section select and no section score: add one, or masks")
        steps = [self.stage("align")] if recipe.align else []
        steps += [self.score(), self.select()] if chooses else []
        steps += [self.stage(name) for name in ("distill", "finetune") if getattr(recipe, name)]
        if recipe.evaluate.lengths:
            if not (recipe.distill or recipe.finetune):
                raise ValueError("evaluate.lengths: there is no student without a section distill or finetune")
            steps += [self.evaluate(), self.card()]
        return steps

    def masks(self) -> Masks:
        """The head masks; before they are chosen, some that the same budget could give."""
        recipe, chosen = self.recipe, self.recipe.select
        if recipe.masks != str(recipe.chosen_masks) or recipe.chosen_masks.is_file():
            return read_masks(Path(recipe.masks)) if isinstance(recipe.masks, str) else recipe.masks
        adapter = self.teacher.adapter
        blank = [[0.0] * adapter.num_heads] * adapter.num_layers
        return select_heads(
            HeadScores(blank, blank, adapter.num_kv_heads, [], {}, "", ""),
            chosen.ratio,
            chosen.strategy,
            chosen.budget_unit,
            keep=parse_heads(chosen.keep),
            drop=parse_heads(chosen.drop),
            tensor_parallel=chosen.tensor_parallel,
        )

    def stage(self, name: str) -> Step:
        """A stage of training: in this process, or through Accelerate where the recipe says how."""
        launch, recipe = self.recipe.launch, self.recipe
        stages = {"align": run_align, "distill": run_distill, "finetune": run_finetune}
        arguments = ["-m", f"hydrahead.training.{name}", "--config", *self.arguments]
        shipped = RECIPES / "accelerate" / f"{launch}.yaml"
        if launch:
            arguments = ["--config_file", str(shipped if shipped.is_file() else launch), *arguments]

        def check() -> None:
            if launch and not Path(arguments[1]).is_file():
                raise ValueError(f"launch: {launch}: no such file, nor one of ddp, fsdp2, ddp_cpu")
            stage = Stage(recipe, name)
            config = self.config(stage)
            if "forms" in stage.sources and not recipe.align:
                check_forms(recipe.forms, self.teacher, options_of(config))

        return Step(
            name,
            ["accelerate", "launch", *arguments],
            self.output / name / ("head_forms.safetensors" if name == "align" else "student"),
            partial(launch_stage, arguments) if launch else partial(stages[name], recipe),
            lambda: Stage(recipe, name).is_done,
            check,
        )

    def config(self, stage: Stage) -> HydraHeadConfig:
        """Configuration of the student that a stage trains."""
        needs_masks = stage.name != "align" or stage.section.mode == "layers"
        return stage.config(self.masks() if needs_masks else None)

    def score(self) -> Step:
        """What keeping each head is worth."""
        recipe, section, teacher = self.recipe, self.recipe.score, self.recipe.teacher
        settings = ScoreSettings(
            teacher.name,
            tuple(section.method),
            length=section.length,
            pairs=section.pairs,
            text=Path(section.text) if section.text else None,
            probe_files=tuple(map(Path, section.probe)),
            built_in=section.built_in,
            only=tuple(section.only),
            forms=recipe.forms,
            shortlist=section.shortlist,
            evidence=section.evidence,
            dtype=teacher.dtype,
            seed=recipe.run.seed,
            revision=teacher.revision,
        )
        more = {"forms": recipe.forms, "dtype": teacher.dtype, "seed": recipe.run.seed, "revision": teacher.revision}
        command = ["hydrahead", "score", teacher.name, str(self.scores), *flags(section), *flags_of(more)]
        output = self.scores / "head_scores.json"

        def check() -> None:
            options = {key: value for key, value in asdict(recipe.student).items() if value is not None}
            check_settings(replace(settings, forms=None if recipe.align else recipe.forms, options=options))
            if output.is_file() and recipe.forms.is_file():
                made, now = json.loads(output.read_text()).get("made_from") or {}, {"forms": digest(recipe.forms)}
                now |= {key: getattr(section, key) for key in ("pairs", "built_in", "only", "shortlist")}
                now |= {"length": section.length} if section.length else {}
                if changed := first_difference({key: made.get(key, now[key]) for key in now}, now):
                    raise ValueError(f"{self.scores}: made with another {changed}; {ANEW} {self.scores}")

        return Step("score", command, output, partial(score_to_folder, settings, self.scores), output.is_file, check)

    def select(self) -> Step:
        """Which heads stay full attention."""
        recipe, section, teacher = self.recipe, self.recipe.select, self.recipe.teacher
        more = {"seed": recipe.run.seed}
        exchange = None
        if section.exchange:
            exchange = Exchange(
                teacher.name,
                length=recipe.score.length,
                forms=recipe.forms,
                revision=teacher.revision,
                rounds=section.exchange,
            )
            more |= {"teacher": teacher.name, "forms": recipe.forms, "length": recipe.score.length}
        scores = self.scores / "head_scores.json"
        command = ["hydrahead", "select", str(scores), "--output", str(recipe.chosen_masks)]
        command += [*flags(section), *flags_of(more)]

        def do() -> None:
            settings = asdict(section) | {"seed": recipe.run.seed, "exchange": exchange}
            _, lines = select_to_file([scores], recipe.chosen_masks, weights=settings.pop("weight"), **settings)
            print(*lines, sep="\n")

        def check() -> None:
            made = {name: getattr(section, name) for name in ("ratio", "strategy", "budget_unit")}
            Record(recipe.chosen_masks).check(made | {"seed": recipe.run.seed}, f"{ANEW} {recipe.chosen_masks}")
            self.masks()

        return Step("select", command, recipe.chosen_masks, do, recipe.chosen_masks.is_file, check)

    def evaluate(self) -> Step:
        """The student against its teacher on held-out text."""
        recipe, section, teacher = self.recipe, self.recipe.evaluate, self.recipe.teacher
        settings = {
            "teacher": teacher.name,
            "revision": teacher.revision,
            "dtype": teacher.dtype,
            "lengths": section.lengths,
            "prompts": section.prompts,
            "text": token_folder(recipe, recipe.data, "tokens"),
            "text_tokens": section.text_tokens,
            "heldout_tokens": recipe.data.heldout_tokens,
        }

        def check() -> None:
            if (needed := text_needed(section.lengths, section.text_tokens)) > recipe.data.heldout_tokens:
                raise ValueError(
                    f"data.heldout_tokens: {recipe.data.heldout_tokens:,}, evaluate.lengths needs {needed:,}"
                )
            check_length(self.teacher.tokenizer(), min(section.lengths))
            known = report_settings(self.teacher, section.prompts, section.text_tokens, settings["text"])
            Record(self.student / "report.json").check(known, f"{ANEW} report.json")

        def is_done() -> bool:
            report = Record(self.student / "report.json").read()
            return report is not None and set(section.lengths) <= set(report["lengths"])

        command = ["hydrahead", "evaluate", str(self.student), *flags_of(settings)]
        do = partial(evaluate_student, self.student, **settings)
        return Step("evaluate", command, self.student / "report.json", do, is_done, check)

    def card(self) -> Step:
        """The README of the student's folder, with what was measured."""
        file, picture = self.student / "README.md", self.recipe.chosen_masks.with_suffix(".png")

        def do() -> None:
            if picture.is_file():
                shutil.copyfile(picture, self.student / "head_map.png")
            write_card(self.student)

        def is_done() -> bool:
            return file.is_file() and file.read_text() == card_of(self.student)

        return Step("card", ["hydrahead", "card", str(self.student)], file, do, is_done)


def flags(section) -> list[str]:
    """A section as options of the command of its name: those that are not the default."""
    defaults = asdict(type(section)())
    return flags_of({name: value for name, value in asdict(section).items() if value != defaults[name]})


def flags_of(values: dict) -> list[str]:
    """Options of a command line; those without a value are left out."""
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif value is not None:
            words += [word for each in (value if isinstance(value, list) else [value]) for word in (option, str(each))]
    return words


def launch_stage(arguments: list[str]) -> None:
    """`accelerate launch` a stage; its processes save themselves when this one is asked to stop."""
    process = subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *arguments])
    # A terminal interrupts the processes by itself; a second signal would kill them before they have saved.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda number, _: process.send_signal(number)}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def heldout_ids(tokenizer, text: Path | None, tokens: int | None = None) -> np.ndarray:
    """
    Token ids of text to evaluate on.

    Args:
        text: a UTF-8 file, or a folder of training's tokens; the standard library's held-out part by default.
        tokens: the first so many; all by default.
    """
    if text is None:
        ids = encode_corpus(tokenizer, load_corpus("heldout"))
    elif (file := text / "tokens.bin").is_file():
        ids = np.fromfile(file, "<u4", -1 if tokens is None else tokens).astype(np.int64)
    else:
        ids = encode_corpus(tokenizer, [read_utf8(text)])
    return ids[:tokens]


def report_settings(teacher: Teacher, prompts: int, text_tokens: int, text: Path | None) -> dict:
    """What decides the numbers of a report."""
    text_name = "the standard library" if text is None else "the training text" if text.is_dir() else text.name
    return {**teacher.identity, "text": text_name, "prompts": prompts, "text_tokens": text_tokens}


def evaluate_student(
    folder: Path,
    teacher: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    lengths: Sequence[int] = (1024, 2048, 4096),
    prompts: int = 20,
    text: Path | None = None,
    text_tokens: int = 16_384,
    heldout_tokens: int | None = None,
) -> dict:
    """
    Measure a student folder against its teacher, write `report.json` into it, and print the table.

    Interrupted, the same call goes on after the last length; with further lengths, it measures those.

    Args:
        teacher, revision: by default, what the folder says that it was made from.
        dtype: of the teacher; the student computes in its own.
        lengths, prompts, text_tokens: as in `EvaluateSection`.
        text, heldout_tokens: as in `heldout_ids`.

    Returns:
        the report: by model (`teacher`, `student`) and length, what `evaluate_at` gives and bytes of cache in bf16.

    Raises:
        ValueError: no text, too short a text or length, another teacher, or a report made otherwise; one line.
    """
    if text is not None and not text.exists():
        raise ValueError(f"{text}: no such file")
    made_from = read_made_from(folder) or {}
    opened = open_teacher(teacher or made_from.get("teacher", "demo"), revision or made_from.get("revision"))
    opened.check_made_from(folder, made_from)
    tokenizer = opened.tokenizer()
    check_length(tokenizer, min(lengths))
    ids = heldout_ids(tokenizer, text, heldout_tokens)
    if len(ids) < (needed := text_needed(lengths, text_tokens)):
        raise ValueError(f"the text has {len(ids):,} tokens, lengths up to {max(lengths):,} need {needed:,}")
    settings = report_settings(opened, prompts, text_tokens, text)
    report, unfinished = Record(folder / "report.json"), Record(folder / ".report.json")
    report.check(settings, f"{ANEW} report.json")
    found = report.read() or (unfinished.matches(settings) and unfinished.read()) or {}
    results = found.get("results", {"teacher": {}, "student": {}})

    def load_student() -> HydraHeadForCausalLM:
        device = "auto" if torch.cuda.is_available() else "cpu"
        return HydraHeadForCausalLM.from_pretrained(folder, dtype="auto", device_map=device).eval()

    use_tuned_kernels()
    configs = {"teacher": teacher_config(opened.adapter), "student": HydraHeadConfig.from_pretrained(folder)}
    for name, load in (("teacher", lambda: opened.load(dtype)), ("student", load_student)):
        todo = [length for length in lengths if str(length) not in results[name]]
        model = None  # the one before it leaves the GPU first
        model = load() if todo else None
        with progress(f"evaluate the {name}", len(todo) * len(TASKS)) as advance:
            for length in todo:
                cell = evaluate_at(model, tokenizer, ids, length, prompts, text_tokens, advance)
                cell["cache_bytes"] = configs[name].kv_bytes_per_token() * length + configs[name].state_bytes()
                results[name][str(length)] = cell
                unfinished.write(settings | {"results": results})
    made = settings | {"lengths": sorted(map(int, results["student"]))} | environment() | {"results": results}
    if made["lengths"] != found.get("lengths"):
        report.write(made)
    unfinished.path.unlink(missing_ok=True)
    return made


def show_report(folder: Path) -> None:
    """Print the table of a student's report."""
    report = Record(folder / "report.json").read()
    columns, *rows = report_rows(report)
    table = Table(*(Column(name, justify="right") for name in columns), title=f"{report['teacher']} / {folder}")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def card_of(folder: Path) -> str:
    """
    The card of a student folder, with what was measured where there is a report.

    Raises:
        ValueError: the folder does not say what it was made from.
    """
    made_from, report, results = read_made_from(folder), Record(folder / "report.json").read(), None
    if made_from is None:
        raise ValueError(f"{folder}: no student that says what it was made from (made_from.json)")
    if report:
        columns, *rows = report_rows(report)
        lines = [f"| {' | '.join(row)} |" for row in (columns, ["---:"] * len(columns), *rows)]
        practised = any(stage["recipe"]["retrieval_share"] for stage in made_from["stages"])
        results = "\n".join(
            [
                f"Teacher / student; {report['prompts']} prompts a cell, greedy, in {report['text']}, held out; "
                f"{report['hardware']}, {report['date']}."
                + (" The student practised what is asked here: see the rows above." if practised else ""),
                "",
                *lines,
                "",
                *(f"![{file.stem}]({file.name})" for file in sorted(folder.glob("*.png"))),
            ]
        )
    return model_card(HydraHeadConfig.from_pretrained(folder), made_from, results)


def write_card(folder: Path) -> None:
    """Write the card of a student folder, and the picture of what was measured; raises as `card_of`."""
    card_of(folder)
    if report := Record(folder / "report.json").read():
        native = HydraHeadConfig.from_pretrained(folder).max_position_embeddings
        draw_report(report, native, folder / "accuracy.png")
    with atomic_file(folder / "README.md") as partial_file:
        partial_file.write_text(card_of(folder))


def ask(road: Road) -> None:
    """Ask the student, in a process that cannot import hydrahead, for a needle, and print question and answer."""
    recipe, tokenizer = road.recipe, road.teacher.tokenizer()
    ids = heldout_ids(tokenizer, token_folder(recipe, recipe.data, "tokens"), recipe.data.heldout_tokens)
    sample = make_niah(tokenizer, ids, length := min(recipe.evaluate.lengths), seed=2_000_000)
    prompt = tokenizer.decode(sample.input_ids)
    answer = answer_in_clean_process(road.student, prompt).strip()
    found = "[green]right" if sample.answers[0] in answer else "[red]wrong"
    text = f"[dim]… {length:,} tokens of text with, somewhere in it:[/dim]\n"
    text += f"{escape(needle_text(sample.keys[0], sample.values[0]))}\n[dim]…[/dim]\n"
    text += f"{escape(prompt[prompt.index('What is the special') :])} [bold]{escape(answer)}[/bold]   {found}[/]"
    Console().print(Panel(text, title="reloaded in a fresh process without hydrahead, trust_remote_code=True"))
