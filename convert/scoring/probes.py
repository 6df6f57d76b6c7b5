"""
Probes of a capability: pairs of prompts that differ in one fact, and the answers that tell them apart.

Every built-in probe comes with two counterfactuals. *Value*: what is asked for reads otherwise; shows which heads
bring it to the answer. *Key*: what it is found by reads otherwise; shows also the heads that let others find it, on
which a value counterfactual has no effect at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...data.needles import (
    VARIABLE,
    answer_text,
    draw_keys,
    draw_values,
    encode_needle,
    least_length,
    make_niah,
    ordinary_tokens,
)

COUNTERFACTUALS = ("value", "key")
NIAH_KEYS = (1, 4)  # needles in the text of the two built-in variants
REPEATED_TOKENS, ANSWER_TOKENS = 12, 4  # of a copied stretch: how much is repeated before, and how much is asked for
FAR = 1 / 4  # of the text: a variable is defined before that
NEAR_TOKENS = 16  # what counts as near context in the text probe
_DRAWS = 200


@dataclass(frozen=True)
class Pair:
    """
    A clean and a corrupt text of equal length, both followed by the clean answer (teacher-forced).

    Attributes:
        clean, corrupt: `T` token ids each, the answer included.
        answer_start: index of the answer's first token in both.
        answer, wrong: token ids of the right answer and of one that the corrupt text supports no less, equally many.
    """

    clean: list[int]
    corrupt: list[int]
    answer_start: int
    answer: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Probe:
    """
    Pairs that ask for the same thing in the same way.

    Attributes:
        name: the variant of its capability, such as `niah-single`: κ is the share of variants in which a head is
            active; the two counterfactuals of a variant count once.
        capability: what it takes, such as `retrieval`.
        pairs: the pairs; one that a teacher cannot tell apart is dropped when scores are measured.
        counterfactual: `"value"` or `"key"`.
        resampled: candidates thrown away because texts or answers had unequal numbers of tokens.
        generated: the answer is what greedy generation should write; otherwise it need only be preferred to the wrong
            one.
    """

    name: str
    capability: str
    pairs: tuple[Pair, ...]
    counterfactual: str = "value"
    resampled: int = 0
    generated: bool = True


def _collect(draw: Callable[[np.random.Generator, int], Pair | None], num_pairs: int, seed: int, what: str):
    """`num_pairs` pairs, and how many candidates were thrown away for them; `draw` gives `None` for one that is."""
    pairs, resampled = [], 0
    for index in range(num_pairs):
        for attempt in range(_DRAWS):
            pair = draw(np.random.default_rng([seed, index, attempt]), (seed * 100_003 + index) * _DRAWS + attempt)
            if pair is not None:
                break
            resampled += 1
        else:
            raise ValueError(
                f"{what}: no pair of equal numbers of tokens in {_DRAWS} draws; try another length or text"
            )
        pairs.append(pair)
    return tuple(pairs), resampled


def check_counterfactual(counterfactual: str) -> None:
    """Raise a `ValueError` unless it is one that is known."""
    if counterfactual not in COUNTERFACTUALS:
        raise ValueError(f"counterfactual must be one of {', '.join(COUNTERFACTUALS)}, got {counterfactual!r}")


def niah_probe(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    *,
    num_keys: int = 1,
    num_pairs: int = 8,
    seed: int = 0,
    counterfactual: str = "value",
    kind: str = "number",
) -> Probe:
    """
    RULER's NIAH (arXiv 2404.06654), of `length` tokens with the answer, for any fast tokenizer.

    Value: the needle asked for holds another number. Key: with one needle its key is replaced, so that the question
    matches nothing; with several it changes places with that of another needle, whose number is then the wrong answer.

    Args:
        haystack_ids: token ids of the text that hides the needles, longer than `length`.
        num_keys: needles in the text, one of which is asked for.
        kind: `number`, or `variable`: the probe `code`, in which needles are a program's variables. One of them is
            used at the end, and defined in the first quarter of the text.

    Raises:
        ValueError: the length or the haystack is too short, or no replacement of equal token length was found.
    """
    check_counterfactual(counterfactual)
    is_code = kind == VARIABLE

    def draw(rng: np.random.Generator, sample_seed: int) -> Pair | None:
        depth = float(rng.uniform(0, FAR)) if is_code else None
        sample = make_niah(
            tokenizer, haystack_ids, length, num_keys=num_keys, seed=sample_seed, kind=kind, depth=depth
        )
        asked = sample.query_index[0]
        if counterfactual == "value":
            (value,) = draw_values(rng, 1)
            changed = {asked: (sample.keys[asked], value)}
        elif num_keys == 1:
            (value,), (key,) = draw_values(rng, 1), draw_keys(rng, 1)
            changed = {asked: (key, sample.values[asked])}
        else:
            other = int(rng.choice([index for index in range(len(sample.keys)) if index != asked]))
            value = sample.values[other]
            changed = {asked: (sample.keys[other], sample.values[asked]), other: (sample.keys[asked], value)}
        corrupt = list(sample.input_ids)
        for index, needle in changed.items():
            start = sample.needle_spans[index][0]
            ids = encode_needle(tokenizer, *needle, kind)[0]
            before = encode_needle(tokenizer, sample.keys[index], sample.values[index], kind)[0]
            if len(ids) != len(before) or corrupt[start : start + len(before)] != before:
                return None
            corrupt[start : start + len(ids)] = ids
        wrong = tokenizer(answer_text([value]), add_special_tokens=False).input_ids
        if len(wrong) != len(sample.answer_ids) or wrong == sample.answer_ids or corrupt == sample.input_ids:
            return None
        return Pair(
            clean=sample.input_ids + sample.answer_ids,
            corrupt=corrupt + sample.answer_ids,
            answer_start=len(sample.input_ids),
            answer=sample.answer_ids,
            wrong=wrong,
        )

    name = "code" if is_code else "niah-single" if num_keys == 1 else f"niah-{num_keys}-keys"
    pairs, resampled = _collect(draw, num_pairs, seed, f"{name} at {length} tokens")
    return Probe(name, "code" if is_code else "retrieval", pairs, counterfactual, resampled)


def check_length(tokenizer, length: int) -> None:
    """
    Whether prompts of `length` tokens have room for the built-in probes' needles, which need more than the others.

    Raises:
        ValueError: they have not; says which length has.
    """
    least = least_length(tokenizer, max(NIAH_KEYS))
    if length < least:
        raise ValueError(
            f"length {length} is too short for a prompt with {max(NIAH_KEYS)} needles: the least that always works "
            f"with this tokenizer is {least}"
        )


def induction_probe(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    *,
    source: str = "tokens",
    num_pairs: int = 8,
    seed: int = 0,
    counterfactual: str = "value",
) -> Probe:
    """
    A stretch of tokens occurs, and later its beginning once more: the answer is how it went on.

    Value: it went on otherwise. Key: its beginning reads otherwise where it first occurs.

    Args:
        haystack_ids: token ids of a text.
        length: tokens of a text with its answer.
        source: `"tokens"`, the text's tokens drawn at random (pure induction), or `"text"`, the text as it stands.

    Raises:
        ValueError: an unknown source, or a length or text too short.
    """
    check_counterfactual(counterfactual)
    if source not in ("tokens", "text"):
        raise ValueError(f'source must be "tokens" or "text", got {source!r}')
    header = tokenizer("").input_ids
    stretch = REPEATED_TOKENS + ANSWER_TOKENS
    room = length - len(header) - stretch
    haystack = ordinary_tokens(tokenizer, haystack_ids)
    if room < 2 * stretch or len(haystack) < room:
        raise ValueError(
            f"a copied stretch needs {len(header) + 3 * stretch} tokens and a longer text, got length={length} "
            f"and {len(haystack)} tokens of text"
        )
    tokens = np.unique(haystack)

    def draw(rng: np.random.Generator, _: int) -> Pair | None:
        if source == "tokens":
            body = rng.choice(tokens, room)
        else:
            start = int(rng.integers(len(haystack) - room + 1))
            body = haystack[start : start + room].copy()
        place = int(rng.integers(room - stretch + 1))
        middle, end = place + REPEATED_TOKENS, place + stretch
        repeated, answer, wrong = body[place:middle], body[middle:end].copy(), rng.choice(tokens, ANSWER_TOKENS)
        if (answer == wrong).any():
            return None
        corrupt = body.copy()
        if counterfactual == "value":
            corrupt[middle:end] = wrong
        else:
            corrupt[place:middle] = rng.choice(tokens, REPEATED_TOKENS)
        tail = [*repeated.tolist(), *answer.tolist()]
        return Pair(
            clean=[*header, *body.tolist(), *tail],
            corrupt=[*header, *corrupt.tolist(), *tail],
            answer_start=length - ANSWER_TOKENS,
            answer=answer.tolist(),
            wrong=wrong.tolist(),
        )

    name = "induction" if source == "tokens" else "copy"
    pairs, resampled = _collect(draw, num_pairs, seed, f"{name} at {length} tokens")
    return Probe(name, "copying", pairs, counterfactual, resampled)


def text_probe(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    *,
    num_pairs: int = 8,
    seed: int = 0,
    counterfactual: str = "value",
) -> Probe:
    """
    Plain text as a general capability: which of two tokens continues it.

    Value: the last 16 tokens are those of another place, whose continuation is the wrong answer. Key: everything
    before the last 16 tokens is that of another place; the answer is a rare token that occurs in the one context and
    not near the end, the wrong one a token that occurs in the other only.

    Args:
        haystack_ids: token ids of a text, longer than twice `length`.
        length: tokens of a text with its answer, of one token.

    Raises:
        ValueError: a length or text too short, or a text without tokens that recur.
    """
    check_counterfactual(counterfactual)
    header = tokenizer("").input_ids
    room = length - len(header) - 1
    haystack = ordinary_tokens(tokenizer, haystack_ids)
    if room < 2 * NEAR_TOKENS or len(haystack) < 2 * length:
        raise ValueError(
            f"the text probe needs {len(header) + 2 * NEAR_TOKENS + 1} tokens and a text of twice the length, "
            f"got length={length} and {len(haystack)} tokens of text"
        )
    tokens, counts = np.unique(haystack, return_counts=True)
    frequent = set(tokens[np.argsort(counts)[-len(tokens) // 10 :]].tolist())

    def draw() -> Pair | None:
        first, second = (int(start) for start in rng.integers(len(haystack) - room, size=2))
        if abs(first - second) < length:
            return None
        here, there = (haystack[start : start + room + 1].tolist() for start in (first, second))
        context, near, answer = here[: -NEAR_TOKENS - 1], here[-NEAR_TOKENS - 1 : -1], here[-1]
        if counterfactual == "value":
            corrupt, wrong = context + there[-NEAR_TOKENS - 1 : -1], there[-1]
            usable = answer != wrong
        else:
            other = there[: -NEAR_TOKENS - 1]
            corrupt, wrong = other + near, int(rng.choice(other))
            usable = answer in context and wrong not in here and not {answer, wrong} & {*near, *frequent}
            usable = usable and answer not in other
        if not usable:
            return None
        return Pair([*header, *here], [*header, *corrupt, answer], length - 1, [answer], [wrong])

    # Rare tokens that recur are one in some dozens: draw more often than where only token counts can differ.
    rng = np.random.default_rng([seed, COUNTERFACTUALS.index(counterfactual)])
    pairs, resampled = [], 0
    for _ in range(_DRAWS * 10 * num_pairs):
        pair = draw()
        if pair is None:
            resampled += 1
            continue
        pairs.append(pair)
        if len(pairs) == num_pairs:
            return Probe("text", "language", tuple(pairs), counterfactual, resampled, generated=False)
    raise ValueError(f"text at {length} tokens: too few tokens recur in this text; give a longer one")


def built_in_probes(
    tokenizer,
    haystack_ids: Sequence[int],
    length: int,
    num_pairs: int = 8,
    seed: int = 0,
    only: Sequence[str] = (),
) -> list[Probe]:
    """
    Needles (one and four keys), copying (of random tokens and of text) and plain text, each with both counterfactuals;
    where it is named also `code`: a variable that is used far below its definition, beside three others.

    Args:
        haystack_ids: token ids of a text, longer than twice `length`.
        length: tokens of every pair's text.
        only: those to make, as `NAME.COUNTERFACTUAL`, or `NAME` for both; all but `code` by default.

    Raises:
        ValueError: the length or the text is too short for one of them, or there is no such probe.
    """
    makers = {
        "niah-single": partial(niah_probe, num_keys=NIAH_KEYS[0]),
        f"niah-{NIAH_KEYS[1]}-keys": partial(niah_probe, num_keys=NIAH_KEYS[1]),
        "induction": partial(induction_probe, source="tokens"),
        "copy": partial(induction_probe, source="text"),
        "text": text_probe,
        "code": partial(niah_probe, num_keys=NIAH_KEYS[1], kind=VARIABLE),
    }
    names = {f"{name}.{kind}": (name, kind) for kind in COUNTERFACTUALS for name in makers}
    for wanted in only:
        if wanted not in (*makers, *names):
            raise ValueError(f"only: no built-in probe {wanted!r}; there is {', '.join(names)}")
    return [
        makers[name](tokenizer, haystack_ids, length, num_pairs=num_pairs, seed=seed, counterfactual=kind)
        for full_name, (name, kind) in names.items()
        if ({name, full_name} & set(only) if only else name != "code")
    ]
