"""A conversation with a model in the terminal, which shows what its text costs in memory (`hydrahead chat`)."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..console import printable
from ..data.corpus import encode_corpus, load_corpus
from ..data.needles import TooShort
from ..data.ruler import Haystack, make_prompts
from ..kernels import use_tuned_kernels
from .conversation import Conversation, Turn
from .models import Model
from .needles import FIRST_SEED, score

HELP = """\
/needle [LENGTH]  begin anew with a text of LENGTH tokens that hides a number, and ask for it
/reset            begin anew
/help             this
/quit             end, as Ctrl-D does; Ctrl-C stops an answer"""
NEEDLE = "niah_single_2"  # of RULER's tasks: a number, in text
NEEDLE_TOKENS = 16  # of an answer that is a number
USUAL_LENGTH = 4096  # of a text with a needle, at most, where none is given


def chat(model: Model, new_tokens: int = 512, greedy: bool = False, template: bool | None = None) -> None:
    """
    Talk with a model until its user ends it: lines from stdin, answers to stdout.

    In a terminal the speed and the bytes of the cache are shown as the text grows; elsewhere in one line on stderr
    after each answer.

    Args:
        new_tokens, greedy, template: as in `evaluation.conversation.Conversation`.

    Raises:
        ValueError: as `Model.check`; one line.
    """
    use_tuned_kernels()
    screen = Screen()
    with screen.waiting(f"loading {model.name}"):
        model.check()
        tokenizer = model.tokenizer()
        loaded = model.load()
    room = Room(Conversation(loaded, tokenizer, template, new_tokens, greedy), screen)
    screen.note(describe(model.name, loaded, room.conversation.has_template) + "; /help tells of commands")
    for line in screen.lines():
        try:
            if not room.hear(line):
                return
        except ValueError as error:  # a needle in too short a text, a text too long for the model: the talk goes on
            screen.note(str(error))


def describe(name: str, model: PreTrainedModel, has_template: bool) -> str:
    """A model, and how it is talked to, in a line."""
    size, dtype = model.num_parameters() / 1e6, str(model.dtype).removeprefix("torch.")
    how = "chat template" if has_template else "no chat template: it continues your text"
    return f"{name}: {model.config.model_type}, {size:,.1f}M parameters, {dtype} on {model.device}; {how}"


class Room:
    """What a line of the user's does."""

    def __init__(self, conversation: Conversation, screen: "Screen"):
        self.conversation, self.screen, self._needles = conversation, screen, 0

    def hear(self, line: str) -> bool:
        """
        Do what a line asks for.

        Returns:
            whether the conversation goes on.

        Raises:
            ValueError: an unknown command, one that cannot be done, or a line that is no text; one line.
        """
        if any("\ud800" <= each <= "\udfff" for each in line):
            raise ValueError("this line is not UTF-8: it was not read")
        word, *rest = line.split() or [""]
        if word == "/quit":
            return False
        if word == "/help":
            self.screen.note(HELP)
        elif word == "/reset":
            self.conversation.reset()
            self.screen.note("begun anew: the cache is empty")
        elif word == "/needle":
            self._needle(rest)
        elif word.startswith("/"):
            raise ValueError(f"{word}: no such command; /help shows those there are")
        elif word:
            with self.screen.answer() as (show, is_stopped):
                turn = self.conversation.say(line, show, is_stopped)
            self.screen.note(in_words(turn))
        return True

    def _needle(self, words: list[str]) -> None:
        conversation = self.conversation
        native = getattr(conversation.model.config, "max_position_embeddings", None) or USUAL_LENGTH
        given = words[0].replace(",", "").replace("_", "") if words else str(min(native, USUAL_LENGTH))
        if len(words) > 1 or not given.isdecimal():
            raise ValueError(f"/needle {' '.join(words)}: expected a number of tokens, such as /needle 8192")
        length, seed = int(given), FIRST_SEED + self._needles
        with self.screen.waiting("hiding a needle"):
            ids = np.resize(self.haystack.ids, max(length, len(self.haystack.ids)))  # a longer text says it again
            try:
                (prompt,) = make_prompts(Haystack(conversation.tokenizer, ids), NEEDLE, length, 1, seed)
            except TooShort as error:
                raise ValueError(f"/needle {length}: {error}") from None
        self._needles += 1
        (number,) = prompt.answers
        self.screen.note(f"{number} is hidden at {prompt.depth:.0%} of {length:,} tokens of Python's library")
        self.screen.say(prompt.question.strip())
        with self.screen.answer() as (show, is_stopped):
            turn = conversation.ask(prompt, NEEDLE_TOKENS, show, is_stopped)
        answer = conversation.tokenizer.decode(turn.ids, skip_special_tokens=True)
        if not turn.is_stopped:
            self.screen.note("found" if score(answer, prompt.answers) else "not found")
        self.screen.note(in_words(turn))

    @cached_property
    def haystack(self) -> Haystack:
        """Text that our training does not read."""
        tokenizer: PreTrainedTokenizerBase = self.conversation.tokenizer
        return Haystack(tokenizer, encode_corpus(tokenizer, load_corpus("heldout")))


def in_words(turn: Turn) -> str:
    """What a turn has taken so far, and what the cache holds."""
    kv, state = (f"{count / 1024:,.1f} KiB" for count in (turn.kv_bytes, turn.state_bytes))
    words = f"cache of {turn.held:,} tokens: KV {kv}, state {state}"
    if turn.is_stopped:
        words += "; stopped"
    elif not turn.ids:
        words += f"; reading {turn.read:,} tokens"
    if turn.ids:
        words += f"; {turn.tokens_per_second:.1f} tokens/s; {turn.read:,} read in {turn.read_seconds:.1f} s"
    return words


class Screen:
    """Where the conversation is shown: a terminal, or pipes, where stdout has the answers and nothing else."""

    def __init__(self):
        self.console = Console(highlight=False, markup=False)
        self.is_watched = self.console.is_terminal

    def lines(self) -> Iterator[str]:
        """What the user types, line by line."""
        if not (sys.stdin.isatty() and self.is_watched):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 does not end the conversation
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):  # which Windows lacks: lines cannot be edited there
            import readline  # noqa: F401
        while True:
            try:
                yield input("\n> ")
            except KeyboardInterrupt:
                self.note("\n/quit or Ctrl-D ends the conversation")
            except EOFError:
                return

    def note(self, text: str) -> None:
        """Show something that the model did not say."""
        if self.is_watched:
            self.console.print(Text(text, style="dim"))
        else:
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show something that belongs to the conversation."""
        if self.is_watched:
            self.console.print(Text(text))
        else:
            print(text, flush=True)

    def waiting(self, what: str):
        """While something takes long."""
        return self.console.status(what) if self.is_watched else contextlib.nullcontext()

    @contextlib.contextmanager
    def answer(self) -> Iterator[tuple[Callable[[str, Turn], None], Callable[[], bool]]]:
        """
        Show an answer while it grows; meanwhile Ctrl-C stops it.

        Returns:
            `on_token` and `is_stopped` of a `Conversation`.
        """
        stops: list[int] = []
        before = signal.getsignal(signal.SIGINT)
        if before != signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
        shown = _OnTerminal(self.console) if self.is_watched else _InPipe()
        try:
            with shown:
                yield shown.show, lambda: bool(stops)
        finally:
            signal.signal(signal.SIGINT, before)


class _InPipe(contextlib.AbstractContextManager):
    """Writes what is new."""

    def __init__(self):
        self.written = ""

    def show(self, text: str, turn: Turn) -> None:
        text = printable(text).removesuffix("\ufffd")  # the first bytes of a character
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text

    def __exit__(self, *_) -> None:
        print(flush=True)


class _OnTerminal(contextlib.AbstractContextManager):
    """Lines that are complete, and below them, drawn anew all the time, the one that grows and what it has taken."""

    def __init__(self, console: Console):
        self.console, self.live = console, Live(console=console, transient=True, auto_refresh=False)
        self.printed, self.text = 0, ""

    def __enter__(self) -> "_OnTerminal":
        self.live.start()
        return self

    def show(self, text: str, turn: Turn) -> None:
        self.text = printable(text)
        while (line := self._complete_line()) is not None:
            self.console.print(Text(line.rstrip("\n")))
            self.printed += len(line)
        growing = Text(self.text[self.printed :].removesuffix("\ufffd"))
        status = Text(in_words(turn), style="dim", no_wrap=True, overflow="ellipsis")
        self.live.update(Group(growing, status), refresh=True)

    def _complete_line(self) -> str | None:
        """The next line of the answer, ended by itself or by the terminal's width."""
        rest, width = self.text[self.printed :], self.console.width
        if 0 <= (end := rest.find("\n")) < width:
            return rest[: end + 1]
        if len(rest) <= width:
            return None
        return rest[: rest.rfind(" ", 0, width) + 1 or width]

    def __exit__(self, *_) -> None:
        self.live.stop()
        if rest := self.text[self.printed :]:
            self.console.print(Text(rest))
