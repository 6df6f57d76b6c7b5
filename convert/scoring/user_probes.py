"""A user's own probes, from a file."""

import json
from pathlib import Path

from ...files import read_utf8
from .probes import Pair, Probe, check_counterfactual

FIELDS = ("clean", "corrupt", "answer", "wrong")


def jsonl_probes(path: str | Path, tokenizer) -> list[Probe]:
    """
    A user's own probes: one JSON object a line with the texts `clean`, `corrupt`, `answer`, `wrong`, and, if wanted,
    `probe`, `capability` (both the file's name by default) and `counterfactual` (`"value"`).

    `clean` and `corrupt` are prompts without the answer, to which `answer` is appended; they must be equally many
    tokens, and so must `answer` and `wrong`.

    Returns:
        one probe for each different (probe, capability, counterfactual), in order of occurrence.

    Raises:
        ValueError: the file is empty or missing, or a line is wrong; names the first such line and how many there are.
    """
    path = Path(path)
    lines = [(number, line) for number, line in enumerate(read_utf8(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no pairs; expected a JSON object a line with {', '.join(FIELDS)}")
    groups: dict[tuple[str, str, str], list[Pair]] = {}
    errors = []
    for number, line in lines:
        try:
            place, pair = _read_line(line, tokenizer, path.stem)
            groups.setdefault(place, []).append(pair)
        except ValueError as error:
            errors.append(f"{path.name}:{number}: {error}")
    if errors:
        raise ValueError(errors[0] + (f" (and {len(errors) - 1} more lines are wrong)" if len(errors) > 1 else ""))
    return [
        Probe(name, capability, tuple(pairs), kind, generated=False)
        for (name, capability, kind), pairs in groups.items()
    ]


def _read_line(line: str, tokenizer, default: str) -> tuple[tuple[str, str, str], Pair]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    known = (*FIELDS, "probe", "capability", "counterfactual")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) and entry[name] for name in FIELDS):
        raise ValueError(f"expected an object with the texts {', '.join(FIELDS)}")
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}, expected some of {', '.join(known)}")
    check_counterfactual(entry.get("counterfactual", "value"))
    clean, corrupt = (tokenizer(entry[name]).input_ids for name in FIELDS[:2])
    answer, wrong = (tokenizer(entry[name], add_special_tokens=False).input_ids for name in FIELDS[2:])
    for (name, ids), (other, other_ids) in (
        (("clean", clean), ("corrupt", corrupt)),
        (("answer", answer), ("wrong", wrong)),
    ):
        if len(ids) != len(other_ids):
            raise ValueError(f"{name} has {len(ids)} tokens and {other} {len(other_ids)}; they must be equally many")
        if ids == other_ids:
            raise ValueError(f"{name} and {other} are the same")
    place = tuple(str(entry.get(name, default)) for name in ("probe", "capability"))
    pair = Pair(clean + answer, corrupt + answer, len(clean), answer, wrong)
    return (*place, entry.get("counterfactual", "value")), pair
