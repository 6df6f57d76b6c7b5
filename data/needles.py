"""Needle in a haystack in RULER's forms (arXiv 2404.06654), offline, for any tokenizer and any length."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ADJECTIVES = (  # noqa: SIM905
    "amber ancient blue bold brave bright broken bronze calm clever cold copper crimson curious dark distant "
    "dusty eager early empty faint famous fancy fierce gentle golden grand grey happy hidden hollow humble icy "
    "jolly keen late lively lonely loud lucky mellow misty noble pale polite proud quick quiet rapid rough rusty "
    "shiny silent silver sleepy soft tender vivid warm wild wise"
).split()
NOUNS = (  # noqa: SIM905
    "anchor apple arrow basket beacon bridge candle canyon castle cloud compass desert dragon eagle engine falcon "
    "feather forest fountain garden glacier hammer harbor hill island jacket kettle ladder lantern lemon lion "
    "maple marble meadow mirror mountain needle ocean orchard otter palace pebble pepper piano planet pocket "
    "rabbit ribbon river rocket saddle shadow ship spider temple tiger tower tunnel valley violin window winter"
).split()


class TooShort(ValueError):
    """A length that has no room for what a prompt holds beside text."""


@dataclass(frozen=True)
class NiahSample:
    """
    One prompt with needles and what it should be answered with.

    Spans are token positions `[start, end)` in `input_ids`, one for each needle in the order of the text; the tokens
    of a value's span decode to that value, up to surrounding spaces.

    Attributes:
        input_ids: The prompt, up to and including RULER's answer prefix.
        answer_ids: Tokens of the expected answer; `len(input_ids) + len(answer_ids)` is the length asked for.
        answers: The references: values of the queried keys, key by key in the order of the question.
        keys: Key of each needle, in the order of the text (a key with several values occurs several times).
        values: Value of each needle, in the order of the text.
        query_index: Indices into `keys` of the first needle of each queried key.
        needle_spans: Where each needle sentence stands.
        value_spans: Where each value stands.
    """

    input_ids: list[int]
    answer_ids: list[int]
    answers: list[str]
    keys: list[str]
    values: list[str]
    query_index: list[int]
    needle_spans: list[tuple[int, int]]
    value_spans: list[tuple[int, int]]


def ordinary_tokens(tokenizer, ids: Sequence[int]) -> np.ndarray:
    """
    Tokens of a text without special ones.

    A token that ends a document tells a model to forget what stands before it, needles too.
    """
    ids = np.asarray(ids, dtype=np.int64)
    return ids[~np.isin(ids, tokenizer.all_special_ids)]


def header_text(plural: bool, kind: str = "number") -> str:
    """RULER's opening line; `plural` if more than one value is asked for, `kind` a key of `VALUES`."""
    if kind == VARIABLE:
        return "# All variables are defined once.\n"
    what, kind = (f"Some special magic {kind}s are", f"{kind}s") if plural else (f"A special magic {kind} is", kind)
    return (
        f"{what} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )


def needle_text(key: str, value: str, kind: str = "number") -> str:
    """The sentence to be found; plural in all of RULER's forms. Of a variable, its definition."""
    if kind == VARIABLE:
        return f"{_identifier(key)} = {value}"
    return f"One of the special magic {kind}s for {key} is: {value}."


def question_text(queries: Sequence[str], plural: bool, kind: str = "number") -> str:
    """RULER's question and the prefix of its answer, on a line of their own. Of variables, a use of the first."""
    if kind == VARIABLE:
        return f"\nassert {_identifier(queries[0])} =="
    query = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + ", and " + queries[-1]
    magic = f"special magic {kind}{'s' if plural else ''} for {query} mentioned in the provided text"
    return f"\nWhat {'are all' if plural else 'is'} the {magic}? The {magic} {'are' if plural else 'is'}"


def _identifier(key: str) -> str:
    return key.replace("-", "_")


def answer_text(values: Sequence[str]) -> str:
    """The values as they follow the answer prefix."""
    return " " + ", ".join(values)


def draw_keys(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different `adjective-noun` keys; `ValueError` if there are not so many."""
    if count > len(ADJECTIVES) * len(NOUNS):
        raise ValueError(f"there are {len(ADJECTIVES) * len(NOUNS)} different keys, {count} were asked for")
    drawn = rng.choice(len(ADJECTIVES) * len(NOUNS), size=count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in drawn]


def draw_values(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different numbers of seven digits."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[str(rng.integers(1_000_000, 10_000_000))] = None
    return list(values)


def draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    """`count` random UUIDs (version 4)."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


VARIABLE = "variable"
VALUES = {"number": draw_values, "uuid": draw_uuids, VARIABLE: draw_values}
"""What a needle can hold, by RULER's word for it; a variable of a program, which is not RULER's, holds a number."""


def hide_needles(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    needles: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    header: str = "",
    kind: str = "number",
    place: tuple[int, float] | None = None,
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """
    Put needles, in the given order and at random depths, between the lines of a random stretch of the haystack.

    Args:
        tokenizer: A fast tokenizer.
        haystack_ids: Token ids of the text to hide in, a list or an integer array.
        length: Number of tokens to return.
        needles: (key, value) of each needle.
        rng: Source of every random choice.
        header: Text put first; with it come the tokens that the tokenizer starts a text with.
        kind: Of the values, a key of `VALUES`.
        place: Index of one needle, and the depth in [0, 1] of the line at which it stands.

    Returns:
        Exactly `length` ids; the needles' spans; their values' spans (see `NiahSample`).

    Raises:
        TooShort: `length` has no room for header and needles.
        ValueError: the haystack is too short for `length`, and for going round.
    """
    head = tokenizer(header).input_ids if header else []
    pieces = [encode_needle(tokenizer, key, value, kind) for key, value in needles]
    room = length - len(head) - sum(len(piece[0]) for piece in pieces)
    window = _haystack_window(haystack_ids, room, rng)
    # A needle stands on its own line: after a line end where the text has enough of them, else after one of its own.
    depths = np.flatnonzero(_ends_line(tokenizer)[window[:-1]]) + 1 if room else np.empty(0, dtype=np.int64)
    line_end: list[int] = []
    if len(depths) < len(pieces):
        line_end = tokenizer("\n", add_special_tokens=False).input_ids
        window = _haystack_window(window, room - len(line_end) * len(pieces), rng)
        depths = np.arange(len(window) + 1)
    if place is None:
        cuts = np.sort(rng.choice(depths, size=len(pieces), replace=len(depths) < len(pieces)))
    else:
        index, depth = place
        cut = depths[np.abs(depths - depth * len(window)).argmin()]
        sides = ((depths[depths <= cut], index), (depths[depths >= cut], len(pieces) - index - 1))
        before, after = (np.sort(rng.choice(side, size=count)) for side, count in sides)
        cuts = np.concatenate([before, [cut], after])

    ids, spans, start = list(head), ([], []), 0
    for cut, (piece, *offsets) in zip(cuts, pieces):
        ids += window[start:cut].tolist() + line_end
        for found, (first, last) in zip(spans, offsets):
            found.append((len(ids) + first, len(ids) + last))
        ids += piece
        start = cut
    ids += window[start:].tolist()
    return ids, *spans


def make_niah(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    *,
    num_keys: int = 1,
    num_queries: int = 1,
    num_values: int = 1,
    seed: int,
    kind: str = "number",
    depth: float | None = None,
) -> NiahSample:
    """
    Build one prompt of RULER's NIAH family at an exact length.

    `num_keys=1` is single, `num_keys=4` multikey_1, `num_queries=4` (with as many keys) multiquery, `num_values=4`
    multivalue.

    Args:
        tokenizer: A fast tokenizer.
        haystack_ids: Token ids of the text to hide in; where it is shorter than `length` it goes round.
        length: Tokens of prompt and expected answer together.
        num_keys: Different keys in the text; at least `num_queries`.
        num_queries: Keys asked for.
        num_values: Values of each queried key (the others have one).
        seed: The same seed gives the same sample.
        kind: A key of `VALUES`: `number`, of seven digits, `uuid`, or `variable`, defined and used in Python.
        depth: Where in the text the needle stands that is asked for, in [0, 1]; at random by default. The others
            stand at random depths.

    Raises:
        TooShort: `length` has no room for header, needles, question and answer.
        ValueError: a count below 1, more queries than keys, or a haystack too short for `length`.
    """
    if min(num_keys, num_queries, num_values) < 1 or num_queries > num_keys:
        raise ValueError(
            f"need 1 <= num_queries <= num_keys and num_values >= 1, got {num_queries} queries, {num_keys} keys, "
            f"{num_values} values"
        )
    if kind == VARIABLE and max(num_queries, num_values) > 1:
        raise ValueError("a variable is defined once and used alone: expected one query and one value")
    rng = np.random.default_rng(seed)
    keys = draw_keys(rng, num_keys)
    queries = keys[:num_queries]
    each = [key for key in keys for _ in range(num_values if key in queries else 1)]
    needles = list(zip(each, VALUES[kind](rng, len(each))))
    needles = [needles[i] for i in rng.permutation(len(needles))]
    place = None
    if depth is not None:  # as many others stand before the first needle asked for as would at random
        asked = needles.pop(next(i for i, (key, _) in enumerate(needles) if key == queries[0]))
        place = (int(rng.binomial(len(needles), depth)), depth)
        needles.insert(place[0], asked)
    answers = [value for query in queries for key, value in needles if key == query]

    plural = len(answers) > 1
    question = tokenizer(question_text(queries, plural, kind), add_special_tokens=False).input_ids
    answer = tokenizer(answer_text(answers), add_special_tokens=False).input_ids
    room = length - len(question) - len(answer)
    header = header_text(plural, kind)
    ids, *spans = hide_needles(tokenizer, haystack_ids, room, needles, rng, header, kind, place)
    keys, values = map(list, zip(*needles))
    return NiahSample(ids + question, answer, answers, keys, values, [keys.index(query) for query in queries], *spans)


def least_length(tokenizer, num_keys: int) -> int:
    """Tokens that a prompt of `make_niah` with one question, and its answer, take at most when no text is between."""
    keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    values = draw_values(np.random.default_rng(0), len(keys))

    def longest(texts: list[str]) -> int:
        return max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))

    needle = longest([needle_text(key, value) + "\n" for key, value in zip(keys, values)])
    question = longest([question_text([key], False) for key in keys]) + longest([answer_text([v]) for v in values])
    header = len(tokenizer(header_text(False)).input_ids)
    return header + num_keys * (needle + longest(["\n"])) + question


LEAST_TEXT = 4096  # tokens


def _haystack_window(haystack_ids: Sequence[int], room: int, rng: np.random.Generator) -> np.ndarray:
    """
    So many tokens from a random place on. A text that has fewer goes round, as RULER's essays do; one of less than
    `LEAST_TEXT` would say the same so often that the needle is what stands out.
    """
    if room < 0:
        raise TooShort(f"{-room} tokens too few for the header, the needles and the question")
    count = len(haystack_ids)
    if count < min(room, LEAST_TEXT):
        raise ValueError(f"the haystack has {count} tokens, this length needs {min(room, LEAST_TEXT)} of it")
    if count < room:
        return np.resize(np.roll(np.asarray(haystack_ids, dtype=np.int64), -int(rng.integers(count))), room)
    start = int(rng.integers(count - room + 1))
    return np.asarray(haystack_ids[start : start + room], dtype=np.int64)


def encode_needle(tokenizer, key: str, value: str, kind: str = "number"):
    """Ids of a needle's line, and the spans in it of the sentence and of the value."""
    if not tokenizer.is_fast:
        raise ValueError("a fast tokenizer is needed, which knows where each token stands in the text")
    text = needle_text(key, value, kind)
    encoded = tokenizer(text + "\n", add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    value_start, spans = text.rindex(value), []
    for start, end in ((0, len(text)), (value_start, value_start + len(value))):
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
        spans.append((inside[0], inside[-1] + 1))
    if tokenizer.decode(ids[slice(*spans[1])]).strip() != value:
        raise ValueError(f"this tokenizer joins {value!r} with its neighbours: it has no tokens of its own")
    return ids, *spans


@lru_cache(maxsize=4)
def _ends_line(tokenizer) -> np.ndarray:
    """Bool `[vocabulary]`: does the token end a line."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return np.array([piece.endswith("\n") for piece in pieces])
