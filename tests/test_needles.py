"""Needle prompts: exact lengths, spans that can be replaced, RULER's scoring, and the teacher that answers them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hydrahead.data import mixture
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.needles import make_niah
from hydrahead.evaluation.needles import answer_cell, evaluate_niah, niah_cells

TEACHER = Path(mixture.__file__).parents[1] / "demo" / "teacher"
FORMS = [{}, {"num_keys": 4}, {"num_keys": 8}, {"num_keys": 4, "num_queries": 3}, {"num_values": 3}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return encode_corpus(tokenizer, load_corpus("heldout"))


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


class StubModel:
    """Continues each prompt with the given texts."""

    training = False
    device = "cpu"

    def __init__(self, tokenizer, answers):
        self.continuations = iter([tokenizer(answer, add_special_tokens=False).input_ids for answer in answers])

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, **options):
        return torch.stack([torch.cat([row, torch.tensor(next(self.continuations))]) for row in input_ids])


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
    with pytest.raises(ValueError, match="too few for the header"):
        make_niah(tokenizer, haystack, 120, num_keys=8, seed=0)
    with pytest.raises(ValueError, match="the haystack has 100 tokens"):
        make_niah(tokenizer, haystack[:100], 500, seed=0)
    with pytest.raises(ValueError, match="num_queries <= num_keys"):
        make_niah(tokenizer, haystack, 500, num_queries=2, seed=0)


def test_scoring_finds_references_as_substrings(tokenizer, haystack):
    samples = [make_niah(tokenizer, haystack, 300, seed=seed) for seed in range(3)]
    texts = [f" {samples[0].answers[0]}.", f" 12 and {samples[1].answers[0]}", " none"]
    model = StubModel(tokenizer, texts)
    result = evaluate_niah(model, samples, tokenizer, batch_size=1)
    assert result["per_sample"] == [1.0, 1.0, 0.0]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["exact"] == pytest.approx(1 / 3)
    assert result["answers"] == texts

    several = make_niah(tokenizer, haystack, 400, num_keys=4, num_queries=4, seed=0)
    model = StubModel(tokenizer, [" " + several.answers[2]])
    assert evaluate_niah(model, [several], tokenizer)["accuracy"] == 0.25


def test_a_cell_counts_its_answers_and_asks_every_model_the_same(tokenizer, haystack):
    cells = niah_cells(tokenizer, haystack, [300, 400], 3)
    assert cells == niah_cells(tokenizer, haystack, [300, 400], 3)
    assert [(cell.task, cell.length) for cell in cells] == [
        (task, length) for length in (300, 400) for task in ("niah_single", "niah_four")
    ]
    for cell, keys in zip(cells, (1, 4, 1, 4)):
        assert [len(sample.keys) for sample in cell.samples] == [keys] * 3
        assert all(len(s.input_ids) + len(s.answer_ids) == cell.length for s in cell.samples)
        values = [sample.answers[0] for sample in cell.samples]
        model = StubModel(tokenizer, [f" {values[0]}.", " none", f" {values[2]}"])
        assert answer_cell(model, tokenizer, cell, batch_tokens=1) == 2


def test_a_padded_batch_answers_like_single_prompts(tokenizer, haystack, random_model):
    samples = [make_niah(tokenizer, haystack, length, seed=length) for length in (200, 260, 320)]
    together = evaluate_niah(random_model, samples, tokenizer, batch_size=3, max_new_tokens=6)
    alone = evaluate_niah(random_model, samples, tokenizer, batch_size=1, max_new_tokens=6)
    assert together["answers"] == alone["answers"]


def test_mixture_is_seeded_and_marks_the_answers(tokenizer, haystack):
    for length in (128, 512, 1024):
        ids, weights = mixture.mixture_rows(tokenizer, haystack, length, 16, seed=3)
        again, _ = mixture.mixture_rows(tokenizer, haystack, length, 16, seed=3)
        assert ids.shape == weights.shape == (16, length)
        assert (ids == again).all()
        assert (weights[:, 0] == 0).all()
        for row, mask in zip(ids, weights == mixture.ANSWER_WEIGHT):
            for answer in tokenizer.decode(row[mask]).split(tokenizer.eos_token)[:-1]:
                for value in answer.rstrip(".").split(", "):
                    assert tokenizer.decode(row).count(value.strip()) >= 2


@pytest.mark.slow
def test_the_shipped_teacher_answers(tokenizer, haystack):
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    samples = [make_niah(tokenizer, haystack, 512, seed=seed) for seed in range(20)]
    assert evaluate_niah(model, samples, tokenizer, batch_size=10, max_new_tokens=12)["exact"] >= 0.9
