"""Probes of a capability: pairs of prompts that differ in one fact, and the answers that tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.niah import answer_text, draw_values, encode_needle, make_niah


@dataclass(frozen=True)
class Pair:
    """
    A clean and a corrupt text of equal length, both followed by the clean answer (teacher-forced).

    Attributes:
        clean, corrupt: `T` token ids each, the answer included.
        answer_start: index of the answer's first token in both.
        answer, wrong: token ids of the right answer and of the one that the corrupt text supports, of equal length.
    """

    clean: list[int]
    corrupt: list[int]
    answer_start: int
    answer: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Probe:
    """
    Pairs that ask for the same thing in the same form.

    Attributes:
        name: what is asked, such as `niah-single`.
        capability: what it takes, such as `retrieval`; the scores of a capability's probes are averaged.
        pairs: the pairs, all usable by construction; a teacher that cannot tell a pair apart has it dropped later.
    """

    name: str
    capability: str
    pairs: tuple[Pair, ...]


def niah_probe(
    tokenizer, haystack_ids: Sequence[int], length: int, *, num_keys: int = 1, num_pairs: int = 8, seed: int = 0
) -> Probe:
    """
    RULER's NIAH with a *value* counterfactual: in the corrupt text the needle asked for holds another number, of as
    many tokens.

    Args:
        haystack_ids: token ids of the text that hides the needles, longer than `length`.
        length: tokens of a prompt with its answer.
        num_keys: needles in the text, one of which is asked for.

    Raises:
        ValueError: the length or the haystack is too short, or no number of equal token length was found in 100 draws.
    """
    pairs = []
    for index in range(num_pairs):
        sample = make_niah(tokenizer, haystack_ids, length, num_keys=num_keys, seed=seed * 100_003 + index)
        asked = sample.query_index[0]
        (start, end), needle_start = sample.value_spans[asked], sample.needle_spans[asked][0]
        rng = np.random.default_rng([seed, index])
        for _ in range(100):
            (value,) = draw_values(rng, 1)
            wrong = tokenizer(answer_text([value]), add_special_tokens=False).input_ids
            ids, _, (value_start, value_end), _ = encode_needle(tokenizer, sample.keys[asked], value)
            same_place = (needle_start + value_start, needle_start + value_end) == (start, end)
            if value not in sample.values and same_place and len(wrong) == len(sample.answer_ids):
                break
        else:
            raise ValueError(f"{tokenizer.name_or_path}: no number of {end - start} tokens found in 100 draws")
        corrupt = list(sample.input_ids)
        corrupt[start:end] = ids[value_start:value_end]
        pairs.append(
            Pair(
                clean=sample.input_ids + sample.answer_ids,
                corrupt=corrupt + sample.answer_ids,
                answer_start=len(sample.input_ids),
                answer=sample.answer_ids,
                wrong=wrong,
            )
        )
    name = "niah-single" if num_keys == 1 else f"niah-{num_keys}-keys"
    return Probe(name=name, capability="retrieval", pairs=tuple(pairs))
