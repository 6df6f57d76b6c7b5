"""The teacher's training mixture: needles in text, asked for in RULER's words, and plain text."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .needles import answer_text, draw_keys, draw_values, header_text, hide_needles, needle_text, question_text

PLAIN_TEXT_SHARE = 0.25
# Rows of more than one value to an answer (RULER's multiquery and multivalue), where the length has room for them.
PLURAL_SHARE = 0.125
PLURAL_LENGTH = 512
# Below this length rows have no header, which would take the room of a needle, and half of the questions only repeat
# a needle's beginning: the key then stands where it stood in the needle, and matching it is learned sooner.
HEADER_LENGTH = 512
RESTATED_SHARE = 0.5
# An answer's first digit, the only token that takes finding the needle, is one in a hundred: without its weight the
# text's gradient drowns it.
ANSWER_WEIGHT = 24.0
_MOST_KEYS = 12


def mixture_rows(
    tokenizer, corpus_ids: Sequence[int], length: int, rows: int, seed: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Draw training rows: a quarter plain text, the others text with 1 to 12 needles as `make_niah` writes them.

    A row with needles ends in one or several questions, up to one for each needle (dense supervision), each followed
    by its answer, a full stop and the end-of-text token.

    Args:
        tokenizer: A fast tokenizer with an end-of-text token.
        corpus_ids: Token ids of the text, an integer array longer than `length`.
        length: Tokens of a row, at least 96.
        rows: Number of rows.
        seed: The same seed (an integer or several, such as run and step) gives the same rows.

    Returns:
        int64 `[rows, length]` ids, and float32 `[rows, length]` loss weights: the weight of predicting the token at
        that position from those before it (0 for the first, 24 for a token of an answer, 1 else).

    Raises:
        ValueError: `length` is below 96, or the corpus too short for it.
    """
    if length < 96:
        raise ValueError(f"a row with a needle and a question needs 96 tokens, got length={length}")
    if len(corpus_ids) < length:
        raise ValueError(f"the text has {len(corpus_ids):,} tokens, rows of {length:,} need a longer one")
    rng = np.random.default_rng(seed)
    ids = np.empty((rows, length), dtype=np.int64)
    weights = np.ones((rows, length), dtype=np.float32)
    for row in range(rows):
        if rng.random() < PLAIN_TEXT_SHARE:
            start = int(rng.integers(len(corpus_ids) - length + 1))
            ids[row] = corpus_ids[start : start + length]
        else:
            ids[row], answer_positions = _needle_row(tokenizer, corpus_ids, length, rng)
            weights[row, answer_positions] = ANSWER_WEIGHT
    weights[:, 0] = 0
    return ids, weights


def _needle_row(tokenizer, corpus_ids: Sequence[int], length: int, rng: np.random.Generator):
    header_room, needle_room, question_room = _rooms(tokenizer)
    plural = length >= PLURAL_LENGTH and rng.random() < PLURAL_SHARE
    room = length - (header_room if length >= HEADER_LENGTH else 0)
    most_keys = min(_MOST_KEYS // 2 if plural else _MOST_KEYS, (room - question_room) // needle_room)
    num_keys = int(rng.integers(1, most_keys + 1))
    keys = draw_keys(rng, num_keys)
    if plural:
        needles, asked = _plural_question(keys, rng)
    else:
        needles = list(zip(keys, draw_values(rng, num_keys)))
        asked = [[keys[i]] for i in rng.permutation(num_keys)]
    needles = [needles[i] for i in rng.permutation(len(needles))]

    left = room - needle_room * len(needles)
    tail, answer_positions = [], []
    # As many questions as fit where rows are short; at length, few as well, with all of the text before them.
    count = len(asked) if length < HEADER_LENGTH else int(rng.integers(1, len(asked) + 1))
    for queries in asked[:count]:
        answers = [value for query in queries for key, value in needles if key == query]
        restated = length < HEADER_LENGTH and rng.random() < RESTATED_SHARE
        question = restatement_text(queries[0]) if restated else question_text(queries, plural)
        question = tokenizer(question, add_special_tokens=False).input_ids
        answer = tokenizer(answer_text(answers) + ".", add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        if not plural and len(tail) + len(question) + len(answer) > left:
            break
        answer_positions += range(len(tail) + len(question), len(tail) + len(question) + len(answer))
        tail += question + answer
    header = header_text(plural) if length >= HEADER_LENGTH else ""
    ids, *_ = hide_needles(tokenizer, corpus_ids, length - len(tail), needles, rng, header)
    return ids + tail, np.array(answer_positions) + len(ids)


def _plural_question(keys: list[str], rng: np.random.Generator):
    """Needles and one question, with several keys to it or several values to its key."""
    count = int(rng.integers(2, 5))
    if len(keys) >= count and rng.random() < 0.5:
        return list(zip(keys, draw_values(rng, len(keys)))), [keys[:count]]
    repeated = [keys[0]] * (count - 1) + keys
    return list(zip(repeated, draw_values(rng, len(repeated)))), [keys[:1]]


def restatement_text(key: str) -> str:
    """A needle's beginning once more, on a line of its own."""
    return "\n" + needle_text(key, "").removesuffix(" .")


@lru_cache(maxsize=4)
def _rooms(tokenizer) -> tuple[int, int, int]:
    """Tokens that a header, a needle and a question with its answer take at most (over 200 drawn ones)."""
    rng = np.random.default_rng(0)
    drawn = list(zip(draw_keys(rng, 200), draw_values(rng, 200)))
    needles = ["\n" + needle_text(key, value) + "\n" for key, value in drawn]
    questions = [question_text([key], False) + answer_text([value]) + "." for key, value in drawn]
    header, needle, question = (
        max(map(len, tokenizer(texts).input_ids)) for texts in ([header_text(True)], needles, questions)
    )
    return header, needle, question + 1
