"""From a teacher to an untrained student: `score`, `select`, `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import printable
from ..convert.scoring.methods import DEFAULT_METHOD, METHODS
from ..convert.selection import STRATEGIES
from .options import FUSION_NORM, POSITION, TEACHER, Dtype, Fusion, given


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
        list[str] | None,
        typer.Option(
            help="Only niah-single, niah-4-keys, induction, copy, text or code, or one's .value or .key; repeatable."
        ),
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
    from ..convert.scoring.settings import ScoreSettings, check_options
    from ..files import check_free

    options = given(full_attention_position=position, logit_scale_base=logit_scale_base, fusion_norm=fusion_norm)
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
    from ..convert.scoring.command import score_to_folder

    if settings.needs_forms and forms is None:
        from ..training.quick import align_for_scores

        align_for_scores(settings, output)
    scores = score_to_folder(settings, output, overwrite)
    for warning in scores.warnings:
        typer.echo(printable(f"warning: {warning}"), err=True)
    typer.echo(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def select(
    scores: Annotated[list[Path], typer.Argument(help="head_scores.json; several of one teacher are merged.")],
    output: Annotated[Path, typer.Option(help="JSON file of head masks to write; a picture goes beside it.")],
    ratio: Annotated[float, typer.Option(help="Share of KV groups (or heads) that stay full attention.")] = 0.25,
    strategy: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {strategy.about}" for name, strategy in STRATEGIES.items()))
    ] = "global",
    budget_unit: Annotated[
        str,
        typer.Option(
            help="kv_groups: ratio is the share of the cache, before vLLM pads it; or heads, as the paper counts."
        ),
    ] = "kv_groups",
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
    from ..convert.masks import Exchange, select_to_file

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
        typer.echo(printable(line))
    typer.echo(f"{output}, {output.with_suffix('.png')}")


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
    from ..convert.masks import read_masks
    from ..files import check_free

    check_free(output, overwrite)
    read_masks(masks)
    for file in (text, forms):
        if file is not None and not file.is_file():
            raise ValueError(f"{file}: no such file")
    from rich.console import Console

    from ..convert.migration import convert_to_folder

    options = given(
        full_attention_position=position,
        logit_scale_base=logit_scale_base,
        full_attention_gate=gate,
        fusion=fusion,
        fusion_norm=fusion_norm,
    )
    with Console().status("reading the teacher's config") as status:
        convert_to_folder(
            teacher, output, masks, text, calibration_tokens, revision, overwrite, status.update, forms, **options
        )
    typer.echo(f"{output}: loads with AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)")
