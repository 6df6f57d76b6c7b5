"""A recipe as a whole: `run`, `demo`, `plan`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

OVERRIDES = typer.Argument(help="Keys of the recipe, such as score.pairs=2.", metavar="[KEY=VALUE]…")


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
    from ..training.recipe import load_recipe

    load_recipe(recipe, overrides)
    from ..pipeline import walk

    return walk(recipe, overrides, dry_run)


NOW_KEYS = {  # of the recipe: what options of `demo` are called
    "--text": "data.name=FILE score.text=FILE",
    "--length": "score.length=N 'evaluate.lengths=[N,…]'",
    "--output": "output=FOLDER",
    "--align-steps": "align.tokens=N, 2,048 a step",
    "--distill-steps": "distill.tokens=N, 2,048 a step",
    "--samples": "evaluate.prompts=N",
}


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
        name = Path(config).name.removesuffix(".yaml")
        overrides = [f"teacher.name={teacher}", f"output=runs/{name}-{Path(teacher).name}", *overrides]
    road = _walk(config, overrides)
    from ..pipeline import ask

    ask(road)


def plan(
    teacher: Annotated[
        str | None, typer.Argument(help="Hub id, folder or GGUF file, trained as in the paper; or a recipe.")
    ] = None,
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of KV groups (or heads) that stay full attention; else the recipe's.")
    ] = None,
    budget_unit: Annotated[str | None, typer.Option(help="kv_groups, or heads; else the recipe's.")] = None,
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
    from ..training.plan import make_plan, show_check, show_plan
    from ..training.speed import check_points

    found = None if check else make_plan(teacher, overrides or (), ratio, budget_unit, context, batch, gpus, gpu)
    if as_json:
        typer.echo(json.dumps(check_points() if check else found, indent=2))
    elif check:
        show_check()
    else:
        show_plan(found)
