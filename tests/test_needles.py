"""Needle prompts: exact lengths, depths, spans that can be replaced; and the teacher that answers them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydrahead.data import mixture
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.needles import TooShort, make_niah
from hydrahead.evaluation.needles import answer, score

TEACHER = Path(mixture.__file__).parents[1] / "demo" / "teacher"
FORMS = [{}, {"num_keys": 4}, {"num_keys": 8}, {"num_keys": 4, "num_queries": 3}, {"num_values": 3}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return encode_corpus(tokenizer, load_corpus("heldout"))


@pytest.mark.parametrize("form", FORMS)
def test_length_is_exact_and_spans_hold_needles_and_values(tokenizer, haystack, form):
    for length in (400, 777):
        sample = make_niah(tokenizer, haystack, length, seed=length, **form)
        assert len(sample.input_ids) + len(sample.answer_ids) == length
        for i, (key, value) in enumerate(zip(sample.keys, sample.values)):
            start, end = sample.value_spans[i]
            assert tokenizer.decode(sample.input_ids[start:end]).strip() == value
            start, end = sample.needle_spans[i]
            needle = f"One of the special magic numbers for {key} is: {value}."
            assert tokenizer.decode(sample.input_ids[start:end]).strip() == needle
        queried = {sample.keys[i] for i in sample.query_index}
        assert len(queried) == form.get("num_queries", 1)
        assert sorted(sample.answers) == sorted(v for k, v in zip(sample.keys, sample.values) if k in queried)
        assert tokenizer.decode(sample.answer_ids) == " " + ", ".join(sample.answers)
        assert len(set(sample.keys)) == form.get("num_keys", 1)
        assert len(set(sample.values)) == len(sample.values)


def test_needles_stand_on_lines_of_their_own(tokenizer, haystack):
    text = tokenizer.decode(make_niah(tokenizer, haystack, 600, num_keys=4, seed=0).input_ids)
    assert sum(line.startswith("One of the special magic numbers") for line in text.splitlines()) == 4
    one_line = np.full(2000, tokenizer(" a", add_special_tokens=False).input_ids[0])
    sample = make_niah(tokenizer, one_line, 600, num_keys=4, seed=0)
    assert len(sample.input_ids) + len(sample.answer_ids) == 600
    lines = tokenizer.decode(sample.input_ids).splitlines()
    assert sum(line.startswith("One of the special magic numbers") for line in lines) == 4


def test_the_seed_decides_the_sample(tokenizer, haystack):
    samples = [make_niah(tokenizer, haystack, 500, num_keys=4, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


def test_impossible_prompts_are_refused(tokenizer, haystack):
    with pytest.raises(TooShort, match="too few for the header"):
        make_niah(tokenizer, haystack, 120, num_keys=8, seed=0)
    with pytest.raises(ValueError, match="the haystack has 100 tokens"):
        make_niah(tokenizer, haystack[:100], 500, seed=0)
    with pytest.raises(ValueError, match="num_queries <= num_keys"):
        make_niah(tokenizer, haystack, 500, num_queries=2, seed=0)


def test_a_text_that_is_shorter_than_a_prompt_goes_round(tokenizer, haystack):
    """From a random place of it on, every token as often as any other, give or take one."""
    text, length = haystack[:5000], 12_000
    one, other = (make_niah(tokenizer, text, length, seed=seed).input_ids for seed in (0, 1))
    assert one[:200] != other[:200] and len(one) > length - 20
    counts = np.bincount(one, minlength=len(tokenizer)) / np.bincount(text, minlength=len(tokenizer)).clip(1)
    common = np.bincount(text, minlength=len(tokenizer)) > 50
    assert np.abs(counts[common] - length / len(text)).max() < 0.5
    window = one[2000:2050]
    first, again = (start for start in range(len(one) - 50) if one[start : start + 50] == window)
    assert first == 2000 and 7000 <= again < 7050, "a needle between them, perhaps"


@pytest.mark.parametrize("form", [{}, {"num_keys": 4}, {"kind": "uuid"}])
def test_the_needle_asked_for_stands_at_the_depth_that_is_chosen(tokenizer, haystack, form):
    for depth in (0.0, 0.3, 0.9, 1.0):
        sample = make_niah(tokenizer, haystack, 2000, seed=3, depth=depth, **form)
        assert len(sample.input_ids) + len(sample.answer_ids) == 2000
        asked = sample.query_index[0]
        assert sample.values[asked] == sample.answers[0]
        start, end = sample.value_spans[asked]
        assert tokenizer.decode(sample.input_ids[start:end]).strip() == sample.answers[0]
        assert sample.needle_spans[asked][0] / 2000 == pytest.approx(depth, abs=0.08)  # header, question and lines


def test_mixture_is_seeded_and_marks_the_answers(tokenizer, haystack):
    for length in (128, 512, 1024):
        ids, weights = mixture.mixture_rows(tokenizer, haystack, length, 16, seed=3)
        again, _ = mixture.mixture_rows(tokenizer, haystack, length, 16, seed=3)
        assert ids.shape == weights.shape == (16, length)
        assert (ids == again).all()
        assert (weights[:, 0] == 0).all()
        for row, mask in zip(ids, weights == mixture.ANSWER_WEIGHT):
            for said in tokenizer.decode(row[mask]).split(tokenizer.eos_token)[:-1]:
                for value in said.rstrip(".").split(", "):
                    assert tokenizer.decode(row).count(value.strip()) >= 2


@pytest.mark.slow
def test_the_shipped_teacher_answers(tokenizer, haystack):
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    samples = [make_niah(tokenizer, haystack, 512, seed=seed) for seed in range(20)]
    answers = answer(model, tokenizer, [sample.input_ids for sample in samples], 12)
    assert np.mean([score(said, sample.answers) for said, sample in zip(answers, samples)]) >= 0.9
