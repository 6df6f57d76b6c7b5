"""RULER's synthetic tasks (arXiv 2404.06654), offline: any fast tokenizer, any length, any text to hide needles in."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import numpy as np

from .needles import (
    ADJECTIVES,
    NOUNS,
    VALUES,
    TooShort,
    answer_text,
    draw_keys,
    header_text,
    make_niah,
    needle_text,
    ordinary_tokens,
    question_text,
)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CHAIN = 4  # assignments of variables after the first
COMMON = 10  # words that are more common than all others
SHORT = 4096  # below it words occur less often
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class Prompt:
    """
    What a model is asked, and the references of its answer.

    Attributes:
        input_ids: tokens of the prompt, up to and including the beginning of the answer that RULER gives.
        question: the end of the prompt in words, that beginning included.
        prefix: that beginning: the end of `question`.
        answers: the references; the score is the share of them that the answer holds.
        depth: where the needle stands that is asked for, as a share of the prompt; `None` where there is not one.
    """

    input_ids: list[int]
    question: str
    prefix: str
    answers: list[str]
    depth: float | None = None


@dataclass(frozen=True)
class Haystack:
    """
    Text that tasks are made of.

    Attributes:
        tokenizer: a fast tokenizer.
        ids: tokens of the text, a list or an integer array; special ones are left out, such as those that end its
            documents.
    """

    tokenizer: object
    ids: Sequence[int]

    def __post_init__(self):
        object.__setattr__(self, "ids", ordinary_tokens(self.tokenizer, self.ids))

    @cached_property
    def words(self) -> list[str]:
        """Different words of four letters and more, in order of the alphabet."""
        return sorted(set(re.findall(r"\b[a-z]{4,12}\b", self.tokenizer.decode(self.ids))))

    def count(self, text: str, add_special_tokens: bool = False) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


@dataclass(frozen=True)
class Task:
    """
    A task of RULER's.

    Attributes:
        about: one line of help.
        make: a prompt from haystack, length (tokens of prompt and expected answer together), seed and depth.
        new_tokens: that RULER lets a model answer with.
        has_depth: one needle is asked for, whose depth can be chosen.
    """

    about: str
    make: Callable[[Haystack, int, int, float | None], Prompt]
    new_tokens: int = 128
    has_depth: bool = False


def make_prompts(haystack: Haystack, task: str, length: int, count: int, seed: int, depths: int = 0) -> list[Prompt]:
    """
    Prompts of one task at one length.

    Args:
        task: a key of `TASKS`.
        seed: of the first prompt; the others' follow it.
        depths: the needle asked for stands at so many depths in turn, the middles of equal parts of the text; 0 for
            random ones. For tasks that have a depth.

    Raises:
        TooShort: the length has no room for a prompt of this task.
        ValueError: the text is too short for the length.
    """
    row = TASKS[task]
    chosen = [(index % depths + 0.5) / depths if depths and row.has_depth else None for index in range(count)]
    return [row.make(haystack, length, seed + index, depth) for index, depth in enumerate(chosen)]


def check_lengths(tokenizer, tasks: Sequence[str], lengths: Sequence[int]) -> None:
    """
    Check, before any text is read, that prompts of some tasks have room in some lengths.

    Raises:
        ValueError: one has not; says which, and what is missing.
    """
    shortest = min(lengths)
    words = Haystack(tokenizer, tokenizer(" ".join((*ADJECTIVES, *NOUNS)), add_special_tokens=False).input_ids)
    for task in tasks if shortest < SHORT else ():  # which have room for all
        try:
            make_prompts(words, task, shortest, 1, seed=0)
        except TooShort as error:
            raise ValueError(f"length {shortest}: no room for a prompt of {task}: {error}") from None
        except ValueError:  # more text is needed than these words: there is room
            pass


def _niah_in_text(haystack: Haystack, length: int, seed: int, depth: float | None, **form) -> Prompt:
    sample = make_niah(haystack.tokenizer, haystack.ids, length, seed=seed, depth=depth, **form)
    plural, queries = len(sample.answers) > 1, [sample.keys[index] for index in sample.query_index]
    return _niah_prompt(
        sample.input_ids,
        question_text(queries, plural, form.get("kind", "number")),
        sample.answers,
        None if plural else sample.needle_spans[sample.query_index[0]][0],
    )


def _niah_prompt(input_ids: list[int], question: str, answers: list[str], start: int | None) -> Prompt:
    depth = None if start is None else start / len(input_ids)
    return Prompt(input_ids, question, question[question.index("? ") + 1 :], answers, depth)


def _niah_in_lines(
    haystack: Haystack, length: int, seed: int, depth: float | None, *, key_kind: str, kind: str, distractors: bool
) -> Prompt:
    """One needle among lines that all say the same, or that all are needles; the last line may leave some room."""
    rng, tokenizer = np.random.default_rng(seed), haystack.tokenizer
    draw = draw_keys if key_kind == "word" else VALUES[key_kind]
    [key], [value] = draw(rng, 1), VALUES[kind](rng, 1)
    question = question_text([key], False, kind)
    head = tokenizer(header_text(False, kind)).input_ids
    tail = tokenizer(question, add_special_tokens=False).input_ids
    needle = tokenizer(needle_text(key, value, kind) + "\n", add_special_tokens=False).input_ids
    room = length - len(head) - len(tail) - len(needle) - haystack.count(answer_text([value]))
    if room < 0:
        raise TooShort(f"{-room} tokens too few for the header, the needle and the question")
    if distractors:
        count = 2 * room // len(needle)  # more than fit
        every = len(ADJECTIVES) * len(NOUNS)
        rounds = [draw(rng, min(every, count - start)) for start in range(0, count, every)]  # long texts repeat words
        keys = list(chain.from_iterable(rounds))
        texts = [
            needle_text(other, number, kind)
            for other, number in zip(keys, VALUES[kind](rng, count))
            if other != key and number != value
        ]
        lines = tokenizer([text + "\n" for text in texts], add_special_tokens=False).input_ids if texts else []
    else:
        line = tokenizer(NOISE + "\n", add_special_tokens=False).input_ids
        lines = [line] * (room // len(line))
    ends = np.cumsum([0, *map(len, lines)])
    lines = lines[: int(np.searchsorted(ends, room, side="right")) - 1]
    place = int(rng.integers(len(lines) + 1)) if depth is None else round(depth * len(lines))
    ids = [*head, *chain.from_iterable(lines[:place])]
    start = len(ids)
    ids += [*needle, *chain.from_iterable(lines[place:]), *tail]
    return _niah_prompt(ids, question, [value], start)


def _fitted(haystack: Haystack, length: int, seed: int, _depth: None, *, write: Callable, fewest: int) -> Prompt:
    """
    The longest prompt of a task that has `length` tokens with its answer, within a hundredth.

    Args:
        write: from haystack, a source of chance, a number of parts and whether it is to be a short text, what comes
            before the question, the question, the beginning of the answer and the references.
        fewest: parts that make sense.
    """

    def written(parts: int):
        return write(haystack, np.random.default_rng(seed), parts, length < SHORT)

    def tokens(parts: int) -> int:
        *texts, answers = written(parts)
        return haystack.count("".join(texts), True) + haystack.count(" " + " ".join(answers))

    least, more = tokens(fewest), tokens(2 * fewest)
    parts = fewest + int((length - least) / (more - least) * fewest)
    while parts >= fewest and tokens(parts) > length:
        parts -= max(1, parts // 100)
    if parts < fewest:
        raise TooShort(f"{least - length} tokens too few for this task")
    context, question, prefix, answers = written(parts)
    ids = haystack.tokenizer(context + question + prefix, verbose=False).input_ids
    return Prompt(ids, question + prefix, prefix, answers)


def _variables(_: Haystack, rng: np.random.Generator, lines: int, _short: bool):
    """Variable tracking: one chain of four assignments in noise, after a short example with its answer."""

    def text(lines: int, letters: int):
        names: dict[str, None] = {}
        while len(names) < CHAIN + 1:
            names["".join(rng.choice(LETTERS, letters)).upper()] = None
        names, number = list(names), int(rng.integers(10_000, 100_000))
        sources = [str(number), *(f"VAR {name}" for name in names)]
        noise, cuts = [NOISE] * lines, np.sort(rng.integers(lines + 1, size=len(names)))
        for shift, (cut, name, source) in enumerate(zip(cuts, names, sources)):
            noise.insert(cut + shift, f"VAR {name} = {source}")
        context = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(noise)
        )
        question = f"\nQuestion: Find all variables that are assigned the value {number} in the text above."
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assgined the value {number}, they are:"  # RULER's spelling
        )
        return context, question, prefix, names

    *example, names = text(5, 3)
    context, *rest = text(lines, 5)
    return ("".join(example) + " " + " ".join(names) + "\n\n" + context, *rest)


def _common_words(haystack: Haystack, rng: np.random.Generator, words: int, short: bool):
    """
    Common words: ten words occur more often than all others in a numbered list, after a short example.

    Raises:
        ValueError: the text has not so many different words.
    """

    def text(drawn: Sequence[str], often: int, seldom: int):
        common, others = list(drawn[:COMMON]), list(drawn[COMMON:])
        listed = rng.permutation(common * often + others * seldom)
        context = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n" + _numbered(listed)
        )
        question = "\nQuestion: What are the 10 most common words in the above list?"
        return context, question, " Answer: The top 10 words that appear most often in the list are:", common

    known, needed = haystack.words, COMMON + words
    in_example = COMMON + (20 if short else 40)
    if len(known) < needed + in_example:
        needed += in_example
        raise ValueError(f"the text has {len(known)} different words, common words at this length need {needed}")
    drawn = [known[index] for index in rng.permutation(len(known))]  # whose beginning is the same for any number
    *example, common = text(drawn[-in_example:], *((3, 1) if short else (10, 3)))
    context, *rest = text(drawn[:needed], *((6, 1) if short else (30, 3)))
    return ("".join(example) + " " + _numbered(common) + "\n" + context, *rest)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, 1))


def _frequent_words(_: Haystack, rng: np.random.Generator, words: int, _short: bool):
    """Frequent words: made-up words whose counts fall with the square of their rank (Zipf); the first rank is dots."""
    counts = (words * 6 / np.pi**2 / np.arange(1, words + 1) ** 2).astype(int)
    counts = counts[counts > 0]
    drawn = ["...", *map("".join, rng.choice(LETTERS, (len(counts) - 1, 6)))]
    listed = rng.permutation(np.repeat(drawn, counts))
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. " + " ".join(listed)
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return context, question, prefix, drawn[1:4]


def _writes(about: str, write: Callable, fewest: int, new_tokens: int) -> Task:
    return Task(about, partial(_fitted, write=write, fewest=fewest), new_tokens)


def _text(about: str, **form) -> Task:
    one = form.get("num_queries", 1) == form.get("num_values", 1) == 1
    return Task(f"{about}, in text", partial(_niah_in_text, **form), has_depth=one)


def _lines(about: str, **form) -> Task:
    return Task(about, partial(_niah_in_lines, **form), has_depth=True)


TASKS = {
    "niah_single_1": _lines("a number, in lines that repeat", key_kind="word", kind="number", distractors=False),
    "niah_single_2": _text("a number"),
    "niah_single_3": _text("a UUID", kind="uuid"),
    "niah_multikey_1": _text("a number among four", num_keys=4),
    "niah_multikey_2": _lines("a number, among needles only", key_kind="word", kind="number", distractors=True),
    "niah_multikey_3": _lines("a UUID, among needles only", key_kind="uuid", kind="uuid", distractors=True),
    "niah_multivalue": _text("four numbers of one key", num_values=4),
    "niah_multiquery": _text("the numbers of four keys", num_keys=4, num_queries=4),
    "vt": _writes("the variables of one chain of assignments", _variables, fewest=5, new_tokens=30),
    "cwe": _writes("the ten most common words of a list", _common_words, fewest=10, new_tokens=120),
    "fwe": _writes("the three most frequent made-up words", _frequent_words, fewest=30, new_tokens=50),
}
"""The needles, variable tracking, common and frequent words; RULER's two question-answering tasks need data sets."""

NEEDLES = tuple(name for name in TASKS if name.startswith("niah"))
