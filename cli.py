"""The command `hydrahead`: parses, calls, prints. Imports what a command needs when it runs, so that help is quick."""

import json
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .console import one_line_errors
from .convert.scoring.methods import DEFAULT_METHOD, METHODS
from .convert.selection import STRATEGIES
from .files import is_gguf


class _Commands(TyperGroup):
    """Every command runs quietly, and ends in one line where its user can mend what went wrong."""

    def invoke(self, ctx: typer.Context):
        with one_line_errors(ctx.params["debug"]):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Turn a pretrained transformer into a head-level hybrid of full attention and Gated DeltaNet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"hydrahead {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for every error.")] = False,
) -> None:
    pass


class Position(StrEnum):
    nope = "nope"
    rope = "rope"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class FusionNorm(StrEnum):
    all = "all"
    linear = "linear"


class Fusion(StrEnum):
    scale = "scale"
    gate = "gate"
    concat = "concat"


TEACHER = "Hub id, folder or GGUF file: Qwen3, Qwen2.5, Llama, Mistral, Phi-3."
POSITION = Annotated[
    Position | None,
    typer.Option(help="Full-attention heads without position or with RoPE; else nope, or as the forms say."),
]
FUSION_NORM = Annotated[
    FusionNorm | None, typer.Option(help="Which heads the fusion normalises; else all, or as the forms say.")
]


def _given(**options) -> dict:
    """Those of a student's options that were given: the others are the forms' own, or defaults."""
    return {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in options.items()
        if value is not None
    }


@app.command()
def score(
    teacher: Annotated[str, typer.Argument(help=TEACHER)],
    output: Annotated[Path, typer.Argument(help="Folder to write: head_scores.json, forms, pictures.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(METHODS)}; repeat to compare, the first decides. Default: {DEFAULT_METHOD}."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; else the native length, 4096 at most.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Counterfactual pairs of each built-in probe.", min=1)] = 8,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on; else Python's standard library.")
    ] = None,
    probe: Annotated[
        list[Path] | None, typer.Option(help="JSONL of clean, corrupt, answer, wrong; repeatable.")
    ] = None,
    built_in: Annotated[bool, typer.Option(help="Needles, copying and text as probes.")] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this built-in probe: NAME or NAME.COUNTERFACTUAL; repeatable.")
    ] = None,
    forms: Annotated[
        Path | None, typer.Option(help="head_forms.safetensors of hydrahead.training.align; else a quick alignment.")
    ] = None,
    align_steps: Annotated[int, typer.Option(help="Steps of the quick alignment.", min=1)] = 100,
    shortlist: Annotated[
        int | None,
        typer.Option(help="Measure the replacement effect of so many heads only, estimate the others.", min=1),
    ] = None,
    position: POSITION = None,
    logit_scale_base: Annotated[float | None, typer.Option(help="Base of the length scale with nope.")] = None,
    fusion_norm: FUSION_NORM = None,
    evidence: Annotated[bool, typer.Option(help="Measure split-half stability and knock-out curves.")] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, …; else a GPU if there is one, with off-loading.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="In which the teacher computes; auto: its own.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Revision of a teacher on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the output folder holds.")] = False,
) -> None:
    """Score every query head of a teacher: which ones does a hybrid have to keep, and how sure is that."""
    from .convert.scoring.settings import ScoreSettings, check_options
    from .files import check_free

    options = _given(full_attention_position=position, logit_scale_base=logit_scale_base, fusion_norm=fusion_norm)
    settings = ScoreSettings(
        teacher,
        methods=tuple(method or (DEFAULT_METHOD,)),
        length=length,
        pairs=pairs,
        text=text,
        probe_files=tuple(probe or ()),
        built_in=built_in,
        only=tuple(only or ()),
        forms=forms,
        options=options,
        align_steps=align_steps,
        shortlist=shortlist,
        evidence=evidence,
        device=device,
        dtype=dtype.value,
        seed=seed,
        revision=revision,
    )
    check_options(settings)
    check_free(output, overwrite)
    from .convert.scoring.command import score_to_folder

    if settings.needs_forms and forms is None:
        from .training.quick import align_for_scores

        align_for_scores(settings, output)
    scores = score_to_folder(settings, output, overwrite)
    for warning in scores.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


@app.command()
def select(
    scores: Annotated[list[Path], typer.Argument(help="head_scores.json; several of one teacher are merged.")],
    output: Annotated[Path, typer.Option(help="JSON file of head masks to write; a picture goes beside it.")],
    ratio: Annotated[float, typer.Option(help="Share of heads (or KV groups) that stay full attention.")] = 0.25,
    strategy: Annotated[
        str,
        typer.Option(help="; ".join(f"{name}: {strategy.about}" for name, strategy in STRATEGIES.items()) + "."),
    ] = "global-constrained",
    budget_unit: Annotated[
        str, typer.Option(help="heads, or kv_groups: ratio is then the share of the cache.")
    ] = "heads",
    method: Annotated[str | None, typer.Option(help="Rank by this method of the file instead of its first.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Heads to keep, as LAYER.HEAD,LAYER.HEAD.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Heads to convert, as LAYER.HEAD,LAYER.HEAD.")] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Equal shares of every layer for so many processes.", min=1)
    ] = 1,
    weight: Annotated[
        list[str] | None, typer.Option(help="Weight of a capability in the score, as NAME=NUMBER; repeatable.")
    ] = None,
    exchange: Annotated[
        int, typer.Option(help="Improve the choice by so many greedy exchanges; needs --teacher and --forms.", min=0)
    ] = 0,
    teacher: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file, for exchanges.")] = None,
    forms: Annotated[Path | None, typer.Option(help="Its head_forms.safetensors, for exchanges.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for exchanges; else Python's standard library.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a prompt in exchanges; as in score.")] = None,
    device: Annotated[str | None, typer.Option(help="For exchanges: cpu, cuda, …")] = None,
    seed: Annotated[int, typer.Option(help="Of the random controls and of the exchanges' prompts.")] = 0,
) -> None:
    """Choose the heads that stay full attention, and print what the choice keeps and costs."""
    if exchange and (teacher is None or forms is None):
        raise ValueError("--exchange converts heads of the teacher: pass --teacher and --forms as well")
    from .convert.masks import Exchange, select_to_file

    improve = (
        Exchange(teacher, length=length, text=text, forms=forms, device=device, rounds=exchange) if exchange else None
    )
    _, lines = select_to_file(
        scores,
        output,
        ratio,
        strategy,
        budget_unit,
        method=method,
        keep=keep or (),
        drop=drop or (),
        tensor_parallel=tensor_parallel,
        seed=seed,
        weights=weight or (),
        exchange=improve,
    )
    for line in lines:
        typer.echo(line)
    typer.echo(f"{output}, {output.with_suffix('.png')}")


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help=TEACHER)],
    output: Annotated[Path, typer.Argument(help="Folder to write, a valid Hub repository.")],
    masks: Annotated[Path, typer.Option(help="JSON file of head masks, as select writes it; 1 for full attention.")],
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; else Python's standard library.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of text to calibrate on.", min=2)] = 2048,
    position: POSITION = None,
    logit_scale_base: Annotated[
        float | None, typer.Option(help="Base of the length scale with nope; else the teacher's native length.")
    ] = None,
    gate: Annotated[
        bool | None, typer.Option("--gate/--no-gate", help="Output gate on full-attention heads; else with it.")
    ] = None,
    fusion: Annotated[
        Fusion | None, typer.Option(help="How the two kinds of heads meet; else scale, or as the forms say.")
    ] = None,
    fusion_norm: FUSION_NORM = None,
    forms: Annotated[
        Path | None,
        typer.Option(help="Aligned heads (head_forms.safetensors) to start from; options must agree with theirs."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a teacher on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the output folder holds.")] = False,
) -> None:
    """Convert a teacher into an untrained student: its weights, calibrated new heads, and the code that loads it."""
    from .convert.masks import read_masks
    from .files import check_free

    check_free(output, overwrite)
    read_masks(masks)
    for file in (text, forms):
        if file is not None and not file.is_file():
            raise ValueError(f"{file}: no such file")
    from rich.console import Console

    from .convert.migration import convert_to_folder

    options = _given(
        full_attention_position=position,
        logit_scale_base=logit_scale_base,
        full_attention_gate=gate,
        fusion=fusion,
        fusion_norm=fusion_norm,
    )
    console = Console()
    with console.status("reading the teacher's config") as status:
        convert_to_folder(
            teacher, output, masks, text, calibration_tokens, revision, overwrite, status.update, forms, **options
        )
    console.print(
        f"{output}: loads with AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)"
    )


OVERRIDES = typer.Argument(help="Keys of the recipe, such as score.pairs=2.", metavar="[KEY=VALUE]…")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe that ships.")],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, print the commands and what training costs, and stop.")
    ] = False,
) -> None:
    """Walk a recipe from teacher to card: align, score, select, distil, finetune, evaluate; goes on where it was."""
    _walk(recipe, overrides or (), dry_run)


def _walk(recipe: str, overrides: Sequence[str], dry_run: bool = False):
    """Read a recipe, which is quick, and then walk it."""
    from .training.recipe import load_recipe

    load_recipe(recipe, overrides)
    from .pipeline import walk

    return walk(recipe, overrides, dry_run)


NOW_KEYS = {  # of the recipe: what options of `demo` are called
    "--text": "data.name=FILE score.text=FILE",
    "--length": "score.length=N 'evaluate.lengths=[N,…]'",
    "--output": "output=FOLDER",
    "--align-steps": "align.tokens=N, 2,048 a step",
    "--distill-steps": "distill.tokens=N, 2,048 a step",
    "--samples": "evaluate.prompts=N",
}


@app.command(context_settings={"ignore_unknown_options": True})
def demo(
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    teacher: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file; else the one that ships.")] = None,
    config: Annotated[str, typer.Option(help="Recipe.")] = "demo",
) -> None:
    """Walk the demo's recipe, reload its student in a process without hydrahead, and ask it for a needle."""
    overrides = overrides or []
    for word in overrides:
        if key := NOW_KEYS.get(word.split("=")[0]):
            raise ValueError(f"{word}: a key of the recipe now, {key}")
    if teacher:
        overrides = [f"teacher.name={teacher}", f"output=runs/{config}-{Path(teacher).name}", *overrides]
    road = _walk(config, overrides)
    from .pipeline import ask

    ask(road)


@app.command()
def plan(
    teacher: Annotated[
        str | None, typer.Argument(help="Hub id, folder or GGUF file, trained as in the paper; or a recipe.")
    ] = None,
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of heads (or KV groups) that stay full attention; else the recipe's.")
    ] = None,
    budget_unit: Annotated[str | None, typer.Option(help="heads, or kv_groups; else the recipe's.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 131_072,
    batch: Annotated[int, typer.Option(help="Sequences that are prefilled and decoded together.")] = 1,
    gpus: Annotated[int, typer.Option(help="How many GPUs train.")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print what would have been said of all that was measured, and the errors.")
    ] = False,
) -> None:
    """Say what a hybrid will hold and take, and what its training costs, from the teacher's config alone."""
    if not check and teacher is None:
        raise ValueError("TEACHER is missing: expected a Hub id, a folder, a GGUF file or a recipe, or --check")
    from .training.plan import make_plan, show_check, show_plan
    from .training.speed import check_points

    found = None if check else make_plan(teacher, overrides or (), ratio, budget_unit, context, batch, gpus, gpu)
    if as_json:
        typer.echo(json.dumps(check_points() if check else found, indent=2))
    elif check:
        show_check()
    else:
        show_plan(found)


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, GGUF files or Hub ids, compared with the first; a lone student with its teacher."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for the report; else that of the lone student.")] = None,
    suite: Annotated[str, typer.Option(help="needles, text, lm-eval, or all; several with commas.")] = "needles,text",
    lengths: Annotated[list[int], typer.Option(help="Tokens of a prompt; repeatable.")] = [1024, 2048, 4096],  # noqa: B006
    tasks: Annotated[
        list[str] | None, typer.Option(help="Of RULER's tasks; repeatable. Default: the needles.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Asked of each task at each length.", min=1)] = 20,
    depths: Annotated[
        int, typer.Option(help="The needle stands at so many depths in turn; 0: at random ones.", min=0)
    ] = 0,
    new_tokens: Annotated[int | None, typer.Option(help="Of an answer; else as many as in RULER.", min=1)] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="File, folder of files (each a domain), training's folder of tokens, or data set on the Hub; else "
            "Python's standard library."
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens that the loss is measured on.", min=1)] = 16_384,
    heldout_tokens: Annotated[int | None, typer.Option(help="Use the text's first so many only.", min=1)] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(help="Measure models that are no students with scaled RoPE too, such as yarn:4.")
    ] = None,
    template: Annotated[bool, typer.Option(help="Ask chat models in their template too.")] = False,
    harness_tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-eval, or offline (default), ruler, general; repeatable. For the suite lm-eval."
        ),
    ] = None,
    harness_limit: Annotated[int | None, typer.Option(help="Questions of each of them; else all.", min=1)] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts answered together; else 65,536 on a GPU, 4,096 elsewhere.", min=1),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of models that are no students; auto: their own.")] = Dtype.auto,
    teacher: Annotated[str | None, typer.Option(help="Of a lone student; else as it says.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the teacher on the Hub; of others, ID@REVISION.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Of a lone student: head_scores.json that its heads were chosen by.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code of checkpoints.")] = False,
) -> None:
    """Measure any models side by side: RULER's needles, loss on text, cost; leaves report.json, .md and .html."""
    _check_models(models)
    if scores is not None and not scores.is_file():
        raise ValueError(f"{scores}: no such file")
    student = Path(models[0]) if len(models) == 1 and _is_student(Path(models[0])) else None
    if student is None and output is None:
        raise ValueError("--output: a folder for the report is needed; only a lone student has one of its own")
    from .evaluation.evaluator import SUITES, Settings

    settings = Settings(
        suites=SUITES if suite == "all" else tuple(suite.split(",")),
        **({"tasks": tasks} if tasks else {}),
        lengths=lengths,
        prompts=prompts,
        depths=depths,
        new_tokens=new_tokens,
        text_tokens=text_tokens,
        batch_tokens=batch_tokens,
        **({"harness_tasks": harness_tasks} if harness_tasks else {}),
        harness_limit=harness_limit,
    )
    from .pipeline import evaluate_models, evaluate_student, show_report, side_by_side, with_variants

    variants, where = (rope_scaling, template), (text, heldout_tokens)
    if student is not None:
        evaluate_student(student, settings, teacher, revision, dtype.value, *where, output, *variants, scores)
    else:
        columns = with_variants(side_by_side(models, dtype.value, trust_remote_code), *variants)
        evaluate_models(columns, settings, output, *where)
    show_report(output or student)
    from accelerate import PartialState

    PartialState().destroy_process_group()  # if `accelerate launch` made one: PyTorch warns where it is left


def _check_models(names: Sequence[str]) -> None:
    """What is no folder or GGUF file and cannot be a Hub id."""
    for name in names:
        if is_gguf(name):
            if not Path(name).is_file():
                raise ValueError(f"{name}: no such file")
            continue
        if name == "demo" or (Path(name) / "config.json").is_file():
            continue
        if Path(name).exists() or "/" not in name or name.startswith((".", "/")):
            raise ValueError(f"{name}: no model there (no config.json), and no Hub id (OWNER/NAME)")


def _is_student(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and '"model_type": "hydrahead"' in file.read_text(encoding="utf-8")


@app.command()
def card(student: Annotated[Path, typer.Argument(help="Folder of a converted or trained student.")]) -> None:
    """Write the README of a student's folder anew, from what the folder says of itself and what was measured."""
    _check_student(student)
    from .pipeline import write_card

    write_card(student)
    typer.echo(student / "README.md")


def _check_student(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no student there (no config.json)")


def main() -> None:
    """Entry point of the command. A terminated command cleans up like an interrupted one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()


if __name__ == "__main__":
    main()
