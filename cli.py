"""The command `hydrahead`: parses, calls, prints. Imports what a command needs when it runs, so that help is quick."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Turn a pretrained transformer into a head-level hybrid of full attention and Gated DeltaNet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    pass


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input ends in one line on stderr and exit code 1, not in a traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (ValueError, OSError, RuntimeError, HfHubHTTPError) as error:
        lines = str(error).strip().splitlines()
        typer.echo(f"hydrahead: {lines[0] if lines else type(error).__name__}", err=True)
        raise typer.Exit(1) from None


def _quiet() -> None:
    """The libraries say only what went wrong: the command has its own progress."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Position(str, Enum):
    nope = "nope"
    rope = "rope"


class FusionNorm(str, Enum):
    all = "all"
    linear = "linear"


class Fusion(str, Enum):
    scale = "scale"
    gate = "gate"
    concat = "concat"


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder: Qwen3, Qwen2.5, Llama, Mistral, Phi-3.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, a valid Hub repository.")],
    masks: Annotated[Path, typer.Option(help="JSON file of head masks [layers][heads], 1 for full attention.")],
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; else Python's standard library.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of text to calibrate on.", min=2)] = 2048,
    position: Annotated[Position, typer.Option(help="Position signal of full-attention heads.")] = Position.nope,
    logit_scale_base: Annotated[
        float | None, typer.Option(help="Base of the length scale with nope; else the teacher's native length.")
    ] = None,
    gate: Annotated[bool, typer.Option(help="Output gate on full-attention heads.")] = True,
    fusion: Annotated[Fusion, typer.Option(help="How the two kinds of heads meet.")] = Fusion.scale,
    fusion_norm: Annotated[FusionNorm, typer.Option(help="Which heads the fusion normalises.")] = FusionNorm.all,
    revision: Annotated[str | None, typer.Option(help="Revision of a teacher on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the output folder holds.")] = False,
) -> None:
    """Convert a teacher into an untrained student: its weights, calibrated new heads, and the code that loads it."""
    with _one_line_errors():
        _quiet()
        from rich.console import Console

        from .convert.folder import convert_to_folder

        options = {
            "full_attention_position": position.value,
            "full_attention_gate": gate,
            "fusion": fusion.value,
            "fusion_norm": fusion_norm.value,
        }
        if logit_scale_base is not None:
            options["logit_scale_base"] = logit_scale_base
        console = Console()
        with console.status("reading the teacher's config") as status:
            convert_to_folder(
                teacher, output, masks, text, calibration_tokens, revision, overwrite, status.update, **options
            )
        console.print(
            f"{output}: loads with AutoModelForCausalLM.from_pretrained({str(output)!r}, trust_remote_code=True)"
        )


@app.command()
def demo(
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder. Default: the embedded teacher.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train and evaluate on.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a prompt at 1x.", min=64)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    align_steps: Annotated[int, typer.Option(help="Steps of alignment.", min=1)] = 100,
    distill_steps: Annotated[int, typer.Option(help="Steps of distillation.", min=1)] = 200,
    samples: Annotated[int, typer.Option(help="Prompts per length and task of the evaluation.", min=1)] = 20,
) -> None:
    """Run the whole job on a small scale: score, align, select, convert, distil, evaluate, save, reload, answer."""
    with _one_line_errors():
        _quiet()
        from rich.console import Console

        from .demo.run import Demo, DemoSettings

        if text is not None and not text.is_file():
            raise ValueError(f"{text}: no such file")
        chosen = {"teacher": teacher} if teacher else {}
        settings = DemoSettings(
            **chosen,
            text=text,
            length=length,
            align_steps=align_steps,
            distill_steps=distill_steps,
            samples=samples,
        )
        Demo(settings, output, Console()).run()


def main() -> None:
    """Entry point of the command. A terminated command cleans up like an interrupted one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()


if __name__ == "__main__":
    main()
