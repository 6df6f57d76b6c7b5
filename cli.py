"""The command `hydrahead`. What its commands import when they run is not imported for its help."""

import signal
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from .commands.heads import convert, score, select
from .commands.models import card, chat, evaluate, push
from .commands.recipes import demo, plan, run
from .console import one_line_errors


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
for command in (score, select, convert, run):
    app.command()(command)
app.command(context_settings={"ignore_unknown_options": True})(demo)  # which says what has become of old ones
for command in (plan, evaluate, chat, card, push):
    app.command()(command)


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


def main() -> None:
    """Entry point of the command. A terminated command cleans up like an interrupted one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()


if __name__ == "__main__":
    main()
