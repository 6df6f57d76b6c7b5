"""What is done with finished models: `evaluate`, `chat`, `card`, `push`."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..files import is_gguf, read_json
from ..hub.folder import check_student
from .options import Dtype


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
        typer.Option(
            help="Tokens of prompts answered, or windows read, together; else 4,096, on a GPU 65,536, and 262,144 of "
            "prompts to 16,384.",
            min=1,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="That models compute in; auto: their own.")] = Dtype.auto,
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
    from ..evaluation.evaluator import SUITES, Settings

    suites = SUITES if suite == "all" else tuple(suite.split(","))
    own = {"--teacher": teacher, "--revision": revision, "--scores": scores}
    _check_use(student is not None, "a lone student", own)
    _check_use(student is None, "models side by side", {"--trust-remote-code": trust_remote_code})
    _check_use("needles" in suites, "the suite needles", {"--tasks": tasks})
    _check_use("lm-eval" in suites, "the suite lm-eval", {"--harness-tasks": harness_tasks})
    settings = Settings(
        suites=suites,
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
    from ..pipeline import evaluate_models, evaluate_student, show_report, side_by_side, with_variants

    variants, where = (rope_scaling, template), (text, heldout_tokens)
    if student is not None:
        evaluate_student(student, settings, teacher, revision, dtype.value, *where, output, *variants, scores)
    else:
        columns = with_variants(side_by_side(models, dtype.value, trust_remote_code), *variants)
        evaluate_models(columns, settings, output, *where)
    show_report(output or student)
    from accelerate import PartialState

    PartialState().destroy_process_group()  # if `accelerate launch` made one: PyTorch warns where it is left


def chat(
    model: Annotated[str, typer.Argument(help="Folder of a student or of a teacher, GGUF file, Hub id, or demo.")],
    new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.", min=1)] = 512,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the most likely token; else as its generation config says.")
    ] = False,
    template: Annotated[
        bool | None, typer.Option(help="Use the tokenizer's chat template; else where it has one.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="That the model computes in; auto: its own.")] = Dtype.auto,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code of the checkpoint.")] = False,
) -> None:
    """Talk with a model, and see speed and cache as the text grows; /needle hides a number and asks for it."""
    _check_models([model])
    from ..evaluation.chat import chat
    from ..pipeline import side_by_side

    (opened,) = side_by_side([model], dtype.value, trust_remote_code)
    chat(opened, new_tokens, greedy, template)


def _check_models(names: Sequence[str]) -> None:
    """What is no folder or GGUF file and cannot be a Hub id."""
    from ..hub.metadata import is_hub_id

    for name in names:
        if is_gguf(name):
            if not Path(name).is_file():
                raise ValueError(f"{name}: no such file")
            continue
        if name == "demo" or (Path(name) / "config.json").is_file():
            continue
        if Path(name).exists() or not is_hub_id(name.partition("@")[0]):
            raise ValueError(f"{name}: no model there (no config.json), and no Hub id (OWNER/NAME)")


def _is_student(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "hydrahead"


def _check_use(is_used: bool, what: str, options: Mapping[str, object]) -> None:
    """Options that would be passed over in silence are refused instead."""
    for name, value in options.items():
        if value and not is_used:
            raise ValueError(f"{name} is for {what}: leave it out")


LICENSE = Annotated[
    str | None, typer.Option(help="As the Hub writes it, such as apache-2.0; in place of the teacher's.")
]
LANGUAGE = Annotated[list[str] | None, typer.Option(help="Code such as en; repeatable; in place of the teacher's.")]


def card(
    student: Annotated[Path, typer.Argument(help="Folder of a converted or trained student.")],
    license: LICENSE = None,
    language: LANGUAGE = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write it anew even if somebody edited it.")] = False,
) -> None:
    """Write the README of a student's folder anew, from what the folder says of itself and what was measured."""
    check_student(student)
    from ..hub.card import card_of, check_card, check_stated, state, write_card

    check_stated(license, language or [])
    check_card(student, overwrite)
    card_of(student)  # what is wrong with the folder is known before anything is written
    state(student, license, language or [])
    write_card(student, overwrite)
    typer.echo(student / "README.md")


def push(
    student: Annotated[Path, typer.Argument(help="Folder of a converted or trained student.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it is not there yet.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Of what was uploaded and checked, such as v1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Publish a student's folder on the Hub: upload, verify checksums, load it from there and compare, tag."""
    check_student(student)
    if sys.stderr.isatty():  # an upload is worth a bar
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    from ..hub.publish import publish

    publish(student, repository, private, tag, dry_run, typer.echo)
