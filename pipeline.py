"""
One recipe walked from teacher to card (`hydrahead run`): align, score, select, distil, finetune, evaluate, card.

Every step leaves a file, and has a command that a person could type instead: the road can be left and entered
anywhere. A step whose file is there is not done again; one that was interrupted goes on.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from .configuration_hydrahead import HydraHeadConfig
from .console import printable
from .convert.forms import check_forms
from .convert.gguf_files import open_gguf
from .convert.masks import Exchange, select_to_file
from .convert.options import options_of
from .convert.scoring.command import check_settings, score_to_folder
from .convert.scoring.scores import HeadScores
from .convert.scoring.settings import ScoreSettings
from .convert.selection import Masks
from .convert.teachers import EMBEDDED_TEACHER, Teacher, open_teacher, public_name
from .data.corpus import encode_corpus, load_corpus
from .data.needles import make_niah, needle_text, ordinary_tokens
from .data.ruler import check_lengths
from .data.tokens import DataSection, check_source, find_files, is_local, open_source, read_documents
from .evaluation.cells import check_report
from .evaluation.evaluator import Settings, evaluate, text_needed
from .evaluation.models import Model
from .evaluation.report import is_measured, labels, read_report, short_table
from .files import check_writable, is_gguf
from .hub.card import card_of, is_edited, write_card
from .hub.checkpoint import answer_in_clean_process
from .hub.folder import read_made_from
from .loading import load_student_config
from .provenance import Record, digest, first_difference
from .training.align import run_align
from .training.data import check_rows, token_folder
from .training.distill import run_distill
from .training.finetune import run_finetune
from .training.plan import planned_masks, print_cost
from .training.recipe import RECIPES, STAGES, Recipe, load_recipe
from .training.stage import Stage
from .usage import Usage

ANEW = "choose another output, or have it made anew: remove"
MEASURED = ("tasks", "lengths", "prompts", "depths", "new_tokens", "text_tokens")  # of `evaluate` in a recipe
HUB_TOKENS = 1 << 20  # of a data set that is evaluated on, unless it is said how many


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
    if not dry_run:
        check_writable(road.output)
    steps = road.steps()
    for step in steps:
        step.check()
    made = [step for step in steps if step.name not in ("evaluate", "card")]  # which are part of the student's folder
    missing = next((step for step in made if not step.is_done()), None)
    for step in made[made.index(missing) + 1 :] if missing else ():
        if step.output.exists():
            raise ValueError(f"{step.output}: made before {missing.name}, which is not done; {ANEW} {step.output}")
    whole = Usage()
    with contextlib.nullcontext() if dry_run or not missing else tokens_ahead(road):
        for step in steps:
            print(f"\n{step.name}: {shlex.join(step.command)}", flush=True)
            if dry_run and step.name in STAGES:
                stage = Stage(road.recipe, step.name)
                print_cost(road.recipe, step.name, stage.adapter, road.config(stage))
            elif step.is_done():
                print(f"{step.output} is there already")
            elif not dry_run:
                with Usage() as usage:
                    step.do()
                whole += usage
                print(f"{step.name} took {usage}", flush=True)
    if whole.seconds:
        print(f"\nall of it took {whole}")
    if not dry_run and road.recipe.evaluate.lengths:
        show_report(road.student)
    return road


@contextlib.contextmanager
def tokens_ahead(road: "Road") -> Iterator[subprocess.Popen | None]:
    """
    Meanwhile another process tokenises what the stages of a recipe will read, where GPUs of this machine do their
    work: each stage waits for its part at most. Whatever stops that process, a stage does the rest itself, and says
    what is wrong. It ends with this one.
    """
    if not torch.cuda.is_available() or road.recipe.launch not in (None, "ddp", "fsdp2"):
        yield None
        return
    code = "import sys; from hydrahead.training.data import tokenise_beside as do; do(int(sys.argv[1]), sys.argv[2:])"
    command = [sys.executable, "-c", code, str(os.getpid()), "--config", *road.arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


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

    def masks(self) -> Masks | None:
        """The head masks; before they are chosen, some that the same budget could give."""
        return None if self.recipe.masks is None else planned_masks(self.recipe, self.teacher)

    def stage(self, name: str) -> Step:
        """A stage of training: in this process, or through Accelerate where the recipe says how."""
        launched, recipe = self.launched(), self.recipe
        stages = {"align": run_align, "distill": run_distill, "finetune": run_finetune}
        arguments = [*launched, "-m", f"hydrahead.training.{name}", "--config", *self.arguments]
        command = ["accelerate", "launch", *arguments] if launched else ["python", *arguments]

        def check() -> None:
            if launched and not Path(launched[1]).is_file():
                raise ValueError(f"launch: {recipe.launch}: no such file, nor one of ddp, fsdp2, ddp_cpu")
            stage = Stage(recipe, name)
            if "--num_processes" in launched:
                check_rows(recipe, name, stage.teacher.config.max_position_embeddings, int(launched[-1]))
            config = self.config(stage)
            if "forms" in stage.sources and not recipe.align:
                check_forms(recipe.forms, self.teacher, options_of(config))

        return Step(
            name,
            command,
            self.output / name / ("head_forms.safetensors" if name == "align" else "student"),
            partial(launch_stage, arguments) if launched else partial(stages[name], recipe),
            lambda: Stage(recipe, name).is_done,
            check,
        )

    def launched(self) -> list[str]:
        """How `accelerate launch` starts a step's processes: of what ships, one for each GPU here, none for one."""
        launch = self.recipe.launch
        shipped = RECIPES / "accelerate" / f"{launch}.yaml"
        if launch is None or not shipped.is_file():
            return ["--config_file", launch] if launch else []
        gpus = 0 if launch == "ddp_cpu" else torch.cuda.device_count()
        count = ["--num_processes", str(gpus)] if gpus else []
        return [] if gpus == 1 else ["--config_file", str(shipped), *count]

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
                found, now = HeadScores.load(output), {"forms": digest(recipe.forms)}
                made = found.made_from | {"method": found.method}
                now |= {"method": section.method[0]} if section.method else {}
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
        tokens = token_folder(recipe, recipe.data, "tokens")
        settings = Settings(**{name: getattr(section, name) for name in MEASURED})

        def check() -> None:
            check_evaluation(recipe, self.teacher)
            made = {"text_name": text_name(tokens), **settings.identity()}
            check_report(self.student, made, student_and_teacher(self.student, self.teacher, teacher.dtype))

        def is_done() -> bool:
            return is_measured(self.student, "student", section.tasks, section.lengths)

        more = {"teacher": teacher.name, "revision": teacher.revision, "dtype": teacher.dtype, "text": tokens}
        more |= {"heldout_tokens": recipe.data.heldout_tokens}
        scored = recipe.score is not None and recipe.masks == str(recipe.chosen_masks)
        more |= {"scores": self.scores / "head_scores.json"} if scored else {}
        measured = {name: getattr(section, name) for name in MEASURED}
        words = ["evaluate", str(self.student), *flags_of(measured | more)]
        launched = self.launched()
        arguments = [*launched, "-m", "hydrahead", *words]
        command = ["accelerate", "launch", *arguments] if launched else ["hydrahead", *words]
        do = partial(evaluate_student, self.student, settings, **more)
        do = partial(launch_stage, arguments) if launched else do
        return Step("evaluate", command, self.student / "report.json", do, is_done, check)

    def card(self) -> Step:
        """The README of the student's folder, with what was measured; one that somebody edited stays as it is."""
        file = self.student / "README.md"

        def is_done() -> bool:
            return is_edited(self.student) or (file.is_file() and file.read_text() == card_of(self.student))

        return Step("card", ["hydrahead", "card", str(self.student)], file, partial(write_card, self.student), is_done)


def check_evaluation(recipe: Recipe, teacher: Teacher) -> None:
    """
    Raises:
        ValueError: less text is held out than a recipe evaluates on, or a length has no room for a prompt.
    """
    section = recipe.evaluate
    if (needed := text_needed(section.lengths, section.text_tokens)) > recipe.data.heldout_tokens:
        raise ValueError(f"data.heldout_tokens: {recipe.data.heldout_tokens:,}, evaluate.lengths needs {needed:,}")
    check_lengths(teacher.tokenizer(), section.tasks, section.lengths)


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
    """`accelerate launch` a step; its processes save themselves when this one is asked to stop."""
    # Large checkpoints take their time: from PyTorch 2.13 on its launcher can be told to wait longer than 30 seconds.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    process, received = subprocess.Popen(command, env=environment, start_new_session=True), []

    def hand_on(number: int, _) -> None:
        received.append(number)
        os.killpg(process.pid, signal.SIGTERM)  # all: Accelerate's launcher of a single process hands nothing on

    numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # which Windows lacks
    previous = {each: signal.signal(each, hand_on) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        raise SystemExit(128 + received[0] if received else status if status > 0 else 128 - status)


def text_name(text: str | Path | None) -> str:
    """What a report calls the text that was evaluated on."""
    if text is None:
        return "the standard library"
    if (Path(text) / "tokens.bin").is_file():
        return "the training text"
    return Path(text).name if is_local(str(text)) else str(text)


def evaluation_texts(tokenizer, text: str | Path | None, tokens: int | None = None) -> dict[str, np.ndarray]:
    """
    Text to evaluate on in token ids, by domain.

    Args:
        text: the standard library's held-out part by default; a folder of training's tokens; a file, or a folder of
            files, each a domain; else a data set on the Hub, as much as is asked for.
        tokens: of each domain, the first so many; by default all, and of a data set a million.

    Raises:
        ValueError: there is no such text.
    """
    if text is None:
        return {text_name(None): encode_corpus(tokenizer, load_corpus("heldout"))[:tokens]}
    if (file := Path(text) / "tokens.bin").is_file():
        ids = np.fromfile(file, "<u4", -1 if tokens is None else tokens).astype(np.int64)
        if not len(ids) or ids.max() >= len(tokenizer):
            raise ValueError(f"{text}: holds no tokens, or those of another tokenizer; expected this teacher's")
        return {text_name(text): ids}
    files = find_files(str(text))
    tokens = tokens if files or tokens else HUB_TOKENS
    sources = {file.stem: str(file) for file in files} if files else {str(text): str(text)}
    return {name: _encode_source(tokenizer, DataSection(source), tokens) for name, source in sources.items()}


def _encode_source(tokenizer, data: DataSection, tokens: int | None) -> np.ndarray:
    """The first so many tokens of a file or data set, or all."""
    check_source(data)
    parts, count = [], 0
    for texts, _ in read_documents(open_source(data), data, None):
        parts.append(encode_corpus(tokenizer, texts))
        count += len(parts[-1])
        if tokens is not None and count >= tokens:
            break
    return np.concatenate(parts)[:tokens]


def student_and_teacher(folder: Path, teacher: Teacher, dtype: str) -> list[Model]:
    """The columns of a student's report."""
    source, name = teacher.source, teacher.public_name
    student = Model("student", str(folder), folder.name, dtype=dtype)
    return [Model("teacher", source, name, teacher.revision, dtype), student]


def side_by_side(names: Sequence[str], dtype: str, trust_remote_code: bool = False) -> list[Model]:
    """
    The columns of a report on folders, GGUF files and Hub ids, called by their own names; `REVISION` of a Hub id after
    an @.

    Raises:
        ValueError: a GGUF file cannot be read; one line.
    """
    models: list[Model] = []
    for given in names:
        source, _, revision = given.partition("@") if not Path(given).exists() else (given, "", "")
        source = str(EMBEDDED_TEACHER) if source == "demo" else source
        name = Path(source).name if is_gguf(source) else public_name(source)
        source = str(open_gguf(source)[0]) if is_gguf(source) else source
        label = printable(Path(name).name)
        count = sum(model.label.split(" (")[0] == label for model in models)
        label += f" ({count + 1})" if count else ""
        models.append(Model(label, source, name, revision or None, dtype, trust_remote_code=trust_remote_code))
    return models


def with_variants(models: Sequence[Model], rope_scaling: str | None, template: bool) -> list[Model]:
    """
    After each model, it with RoPE scaled if it is no HydraHead, and asked in its chat template if it has one.

    Raises:
        ValueError: none of them is, or has one; one line.
    """
    columns = []
    for model in models:
        columns.append(model)
        if rope_scaling and model.config().model_type != "hydrahead":
            columns.append(replace(model, label=f"{model.label}, {rope_scaling}", rope_scaling=rope_scaling))
            columns[-1].config()  # what cannot be scaled is refused now
        if template and model.tokenizer().chat_template is not None:
            columns.append(replace(model, label=f"{model.label}, template", template=True))
    if rope_scaling and not any(column.rope_scaling for column in columns):
        raise ValueError(f"rope scaling {rope_scaling}: of students only, and they are not scaled: leave it out")
    if template and not any(column.template for column in columns):
        raise ValueError("template: none of these models has a chat template: leave it out")
    return columns


def evaluate_student(
    folder: Path,
    settings: Settings,
    teacher: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    text: str | Path | None = None,
    heldout_tokens: int | None = None,
    output: Path | None = None,
    rope_scaling: str | None = None,
    template: bool = False,
    scores: Path | None = None,
) -> None:
    """
    Measure a student folder against its teacher and write the report into it (`evaluation/evaluator.py`).

    Args:
        teacher, revision: by default, what the folder says that it was made from.
        dtype: that both compute in; `auto`: each in its own.
        text, heldout_tokens: as in `evaluation_texts`.
        output: another folder for the report.
        rope_scaling, template: as in `with_variants`.
        scores: head scores that the student's heads were chosen by, for the page.

    Raises:
        ValueError: no text, another teacher, or a report made otherwise; one line.
    """
    made_from = read_made_from(folder) or {}
    opened = open_teacher(teacher or made_from.get("teacher", "demo"), revision or made_from.get("revision"))
    opened.check_made_from(folder, made_from)
    models = with_variants(student_and_teacher(folder, opened, dtype), rope_scaling, template)
    heads = heads_of(folder, scores, output or folder)
    evaluate_models(models, settings, output or folder, text, heldout_tokens, heads)


def evaluate_models(
    models: Sequence[Model],
    settings: Settings,
    output: Path,
    text: str | Path | None = None,
    heldout_tokens: int | None = None,
    heads: dict | None = None,
) -> None:
    """
    Measure models side by side on the same text, and write the report into a folder.

    Args:
        models, settings, output, heads: as in `evaluation.evaluator.evaluate`.
        text, heldout_tokens: as in `evaluation_texts`.
    """
    for model in models:
        model.check()
    check_writable(output)
    texts = evaluation_texts(models[0].tokenizer(), text, heldout_tokens)
    evaluate(models, settings, texts, output, {"text_name": text_name(text)}, heads)


def heads_of(student: Path, scores: Path | None, output: Path) -> dict | None:
    """
    What a report shows of a student's heads: which are full attention, and what they were scored.

    Args:
        scores: a score file; without, what the report in `output` or the student's folder knows.
    """
    masks = load_student_config(student).head_masks
    if scores is not None:
        return {"masks": masks} | HeadScores.load(scores).brief()
    known = (read_report(output) or {}).get("heads") or {}
    chosen = (read_made_from(student) or {}).get("masks", {})
    return known if known.get("masks") == masks else {"masks": masks} | chosen.get("scored", {})


def show_report(folder: Path) -> None:
    """Print the short table of a folder's report, where several processes made it once."""
    if not PartialState().is_main_process:
        return
    report = read_report(folder)
    title, (columns, *rows) = " / ".join(labels(report)), short_table(report)
    table = Table(*(Column(Text(printable(name)), justify="right") for name in columns), title=Text(printable(title)))
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def ask(road: Road) -> None:
    """Ask the student, in a process that cannot import hydrahead, for a needle, and print question and answer."""
    recipe, tokenizer = road.recipe, road.teacher.tokenizer()
    tokens = token_folder(recipe, recipe.data, "tokens")
    (ids,) = evaluation_texts(tokenizer, tokens, recipe.data.heldout_tokens).values()
    ids = ordinary_tokens(tokenizer, ids)
    sample = make_niah(tokenizer, ids, length := min(recipe.evaluate.lengths), seed=2_000_000)
    prompt = tokenizer.decode(sample.input_ids)
    answer = answer_in_clean_process(road.student, prompt).strip()
    found = "[green]right" if sample.answers[0] in answer else "[red]wrong"
    text = f"[dim]… {length:,} tokens of text with, somewhere in it:[/dim]\n"
    text += f"{escape(needle_text(sample.keys[0], sample.values[0]))}\n[dim]…[/dim]\n"
    text += f"{escape(prompt[prompt.index('What is the special') :])} [bold]{escape(answer)}[/bold]   {found}[/]"
    Console().print(Panel(text, title="reloaded in a fresh process without hydrahead, trust_remote_code=True"))
