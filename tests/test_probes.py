"""Counterfactual pairs: what differs, what must not, and what a user's own file may hold."""

import inspect
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from hydrahead.commands import heads
from hydrahead.convert.scoring.probes import (
    COUNTERFACTUALS,
    NEAR_TOKENS,
    built_in_probes,
    check_length,
    induction_probe,
    niah_probe,
    text_probe,
)
from hydrahead.convert.scoring.user_probes import jsonl_probes
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.data.corpus import encode_corpus, load_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)


@pytest.fixture(scope="module")
def haystack(tokenizer) -> np.ndarray:
    return encode_corpus(tokenizer, load_corpus("heldout")[:40])


@pytest.mark.parametrize("seed", range(3))
def test_the_least_length_that_is_named_works(tokenizer, haystack, seed):
    with pytest.raises(ValueError, match=r"least that always works with this tokenizer is \d+$") as refused:
        check_length(tokenizer, 3)
    least = int(str(refused.value).split()[-1])
    check_length(tokenizer, least)
    assert built_in_probes(tokenizer, haystack, least, num_pairs=8, seed=seed)
    with pytest.raises(ValueError, match=f"{least}$"):
        check_length(tokenizer, least - 1)


def test_the_help_of_score_names_every_built_in_probe():
    with pytest.raises(ValueError, match="no built-in probe 'x'; there is ") as refused:
        built_in_probes(None, [], 512, only=["x"])
    names = {name.split(".")[0] for name in str(refused.value).partition("there is ")[2].split(", ")}
    said = inspect.getsource(heads.score).partition("Only ")[2].partition(", or one's")[0]
    assert names == set(re.split(", | or ", said))


def differences(pair) -> list[int]:
    return [index for index, (one, other) in enumerate(zip(pair.clean, pair.corrupt)) if one != other]


@pytest.mark.parametrize("length", [256, 700])
def test_every_pair_is_exactly_long_enough_and_differs_before_its_answer(tokenizer, haystack, length):
    probes = built_in_probes(tokenizer, haystack, length, num_pairs=3, seed=1)
    forms = {(probe.name, probe.counterfactual) for probe in probes}
    names = ("niah-single", "niah-4-keys", "induction", "copy", "text")
    assert forms == {(name, kind) for name in names for kind in COUNTERFACTUALS}
    for probe in probes:
        assert len(probe.pairs) == 3 and len({tuple(pair.clean) for pair in probe.pairs}) == 3
        for pair in probe.pairs:
            assert len(pair.clean) == len(pair.corrupt) == length
            assert pair.clean[pair.answer_start :] == pair.corrupt[pair.answer_start :] == pair.answer
            assert len(pair.answer) == len(pair.wrong) and pair.answer != pair.wrong
            assert differences(pair) and max(differences(pair)) < pair.answer_start
    assert probes == built_in_probes(tokenizer, haystack, length, num_pairs=3, seed=1)
    assert probes != built_in_probes(tokenizer, haystack, length, num_pairs=3, seed=2)


def test_a_value_counterfactual_changes_the_number_and_a_key_counterfactual_the_key(tokenizer, haystack):
    value, key = (
        niah_probe(tokenizer, haystack, 300, num_pairs=6, counterfactual=kind).pairs for kind in COUNTERFACTUALS
    )
    for pair in value:
        wrong = tokenizer.decode(pair.wrong).strip()
        assert wrong not in tokenizer.decode(pair.clean)
        assert f"is: {wrong}." in tokenizer.decode(pair.corrupt)
    for pair in key:
        answer = tokenizer.decode(pair.answer).strip()
        assert f"is: {answer}." in tokenizer.decode(pair.corrupt), "the number stays where it was"
        asked = tokenizer.decode(pair.clean).split("magic number for ")[-1].split(" ")[0]
        assert f"numbers for {asked} is" in tokenizer.decode(pair.clean)
        assert f"numbers for {asked}" not in tokenizer.decode(pair.corrupt)


def test_with_several_keys_the_wrong_answer_is_the_number_that_the_key_changed_places_with(tokenizer, haystack):
    for pair in niah_probe(tokenizer, haystack, 400, num_keys=4, num_pairs=6, counterfactual="key").pairs:
        clean, corrupt = tokenizer.decode(pair.clean), tokenizer.decode(pair.corrupt)
        asked = clean.split("magic number for ")[-1].split(" ")[0]
        for text, ids in ((clean, pair.answer), (corrupt, pair.wrong)):
            assert f"numbers for {asked} is: {tokenizer.decode(ids).strip()}." in text
        assert sorted(pair.clean) == sorted(pair.corrupt)


def test_a_variable_is_defined_far_above_its_use(tokenizer, haystack):
    value, key = built_in_probes(tokenizer, haystack, 600, num_pairs=6, only=["code"])
    assert (value.name, value.capability) == (key.name, key.capability) == ("code", "code")
    for pair in value.pairs + key.pairs:
        clean, corrupt = tokenizer.decode(pair.clean), tokenizer.decode(pair.corrupt)
        assert min(differences(pair)) < 600 / 4 + 50, "at a line's end before a quarter, or the next one"
        use = re.search(r"\nassert (\w+) == (\d{7})$", clean)
        name, number = use.groups()
        assert clean.count(f"{name} = ") == 1 and f"{name} = {number}\n" in clean
        assert f"{name} = {tokenizer.decode(pair.wrong).strip()}\n" in corrupt
    assert all(sorted(pair.clean) == sorted(pair.corrupt) for pair in key.pairs), "two definitions change places"


@pytest.mark.parametrize("source", ["tokens", "text"])
def test_a_copied_stretch_occurs_twice_and_its_counterfactual_once(tokenizer, haystack, source):
    for kind in COUNTERFACTUALS:
        for pair in induction_probe(tokenizer, haystack, 200, source=source, num_pairs=4, counterfactual=kind).pairs:
            changed = differences(pair)
            repeated = pair.clean[pair.answer_start - 12 : pair.answer_start]
            stretch = repeated + pair.answer
            starts = [i for i in range(200 - 15) if pair.clean[i : i + 16] == stretch]
            assert len(starts) >= 2
            begin, middle, end = starts[0], starts[0] + 12, starts[0] + 16
            assert begin <= min(changed) and max(changed) < end
            if kind == "value":
                assert changed == list(range(middle, end))
                assert pair.corrupt[middle:end] == pair.wrong
            else:
                assert max(changed) < middle


def test_the_text_probe_swaps_near_or_far_context(tokenizer, haystack):
    near, far = (
        text_probe(tokenizer, haystack, 200, num_pairs=5, counterfactual=kind).pairs for kind in COUNTERFACTUALS
    )
    for pair in near:
        assert min(differences(pair)) >= pair.answer_start - NEAR_TOKENS
    for pair in far:
        assert max(differences(pair)) < pair.answer_start - NEAR_TOKENS
        context, other = (text[: pair.answer_start - NEAR_TOKENS] for text in (pair.clean, pair.corrupt))
        assert pair.answer[0] in context and pair.answer[0] not in other
        assert pair.wrong[0] in other and pair.wrong[0] not in context


def test_unequal_tokenisations_are_drawn_again_and_counted(tokenizer, haystack, monkeypatch):
    """Half of all numbers get a ninth digit: only pairs of equally long ones are left."""
    import hydrahead.convert.scoring.probes as module

    def draw(rng, count):
        return [str(rng.integers(10**6, 10**7)) + ("00" if rng.random() < 0.5 else "") for _ in range(count)]

    monkeypatch.setattr(module, "draw_values", draw)
    probe = niah_probe(tokenizer, haystack, 256, num_pairs=8)
    assert probe.resampled > 0
    assert all(len(pair.clean) == len(pair.corrupt) == 256 for pair in probe.pairs)
    monkeypatch.setattr(module, "draw_values", lambda rng, count: ["123456789012"] * count)
    with pytest.raises(ValueError, match="no pair of equal numbers of tokens in 200 draws"):
        niah_probe(tokenizer, haystack, 256, num_pairs=1)


def test_lengths_and_texts_that_hold_no_pair_are_refused_in_one_line(tokenizer, haystack):
    for build in (niah_probe, induction_probe, text_probe):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            build(tokenizer, haystack, 8)
    with pytest.raises(ValueError, match="haystack"):
        niah_probe(tokenizer, haystack[:50], 256)
    with pytest.raises(ValueError, match="text"):
        text_probe(tokenizer, haystack[:50], 40)
    with pytest.raises(ValueError, match="counterfactual must be one of value, key"):
        niah_probe(tokenizer, haystack, 256, counterfactual="both")


GOOD = {"clean": "x = 1\nx is", "corrupt": "x = 2\nx is", "answer": " 1", "wrong": " 2"}


def write(path, *entries) -> None:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))


def test_a_users_pairs_are_grouped_by_what_they_are_called(tokenizer, tmp_path):
    write(
        tmp_path / "mine.jsonl",
        GOOD,
        "",
        GOOD | {"capability": "arithmetic", "counterfactual": "key"},
        GOOD | {"probe": "sums", "capability": "arithmetic"},
        GOOD,
    )
    probes = jsonl_probes(tmp_path / "mine.jsonl", tokenizer)
    assert [(p.name, p.capability, p.counterfactual, len(p.pairs)) for p in probes] == [
        ("mine", "mine", "value", 2),
        ("mine", "arithmetic", "key", 1),
        ("sums", "arithmetic", "value", 1),
    ]
    pair = probes[0].pairs[0]
    assert tokenizer.decode(pair.clean) == "x = 1\nx is 1" and pair.clean[pair.answer_start :] == pair.answer


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object with the texts clean, corrupt, answer, wrong"),
        ({"clean": "a"}, "expected an object with the texts"),
        (GOOD | {"answer": ""}, "expected an object with the texts"),
        (GOOD | {"id": "7"}, "unknown field 'id'"),
        (GOOD | {"counterfactual": "both"}, "counterfactual must be one of"),
        (GOOD | {"corrupt": "x = 2 + 2 + 2\nx is"}, "clean has .* tokens and corrupt .*; they must be equally many"),
        (GOOD | {"wrong": " 2 and more"}, "answer has .* tokens and wrong .*; they must be equally many"),
        (GOOD | {"wrong": " 1"}, "answer and wrong are the same"),
        (GOOD | {"corrupt": GOOD["clean"]}, "clean and corrupt are the same"),
    ],
)
def test_a_wrong_line_is_named(tokenizer, tmp_path, entry, message):
    write(tmp_path / "mine.jsonl", GOOD, entry, entry)
    with pytest.raises(ValueError, match=rf"^mine.jsonl:2: [^\n]*{message}[^\n]*\(and 1 more lines are wrong\)$"):
        jsonl_probes(tmp_path / "mine.jsonl", tokenizer)


def test_an_empty_or_missing_file_is_refused(tokenizer, tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no pairs"):
        jsonl_probes(tmp_path / "mine.jsonl", tokenizer)
    with pytest.raises(ValueError, match="cannot be read"):
        jsonl_probes(tmp_path / "none.jsonl", tokenizer)


def test_the_name_that_the_readme_used_to_give_still_works():
    from hydrahead.convert import probes as older

    assert older.niah_probe is niah_probe and older.jsonl_probes is jsonl_probes
