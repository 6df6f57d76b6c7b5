"""RULER's tasks: of the length asked for, answerable from their own text, the same for every model."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.needles import TooShort, make_niah
from hydrahead.data.ruler import NEEDLES, TASKS, Haystack, check_lengths, make_prompts


@pytest.fixture(scope="module")
def haystack():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    return Haystack(tokenizer, encode_corpus(tokenizer, load_corpus("heldout")))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length_and_hold_their_answers(haystack, task):
    length = 1600
    prompts = make_prompts(haystack, task, length, 3, seed=7)
    assert prompts == make_prompts(haystack, task, length, 3, seed=7)
    assert len({prompt.answers[0] for prompt in prompts}) == 3
    for prompt in prompts:
        text = haystack.tokenizer.decode(prompt.input_ids)
        assert text.endswith(prompt.question) and prompt.question.endswith(prompt.prefix)
        expected = haystack.count(" " + ", ".join(prompt.answers))
        room = length - len(prompt.input_ids) - expected
        assert -8 <= room < 120, room  # commas; a line, or a hundredth of the parts
        before = text.removesuffix(prompt.question)
        assert all(answer in before for answer in prompt.answers)


@pytest.mark.parametrize("task", [name for name in NEEDLES if TASKS[name].has_depth])
def test_needles_stand_at_depths_in_turn(haystack, task):
    depths = [prompt.depth for prompt in make_prompts(haystack, task, 3000, 4, seed=0, depths=2)]
    assert depths == pytest.approx([0.25, 0.75, 0.25, 0.75], abs=0.06)


def test_needles_in_text_are_the_samples_that_the_demo_is_measured_on(haystack):
    for task, keys in (("niah_single_2", 1), ("niah_multikey_1", 4)):
        prompts = make_prompts(haystack, task, 600, 2, seed=5)
        samples = [make_niah(haystack.tokenizer, haystack.ids, 600, num_keys=keys, seed=seed) for seed in (5, 6)]
        assert [prompt.input_ids for prompt in prompts] == [sample.input_ids for sample in samples]


def text_of(haystack, task: str, length: int):
    (prompt,) = make_prompts(haystack, task, length, 1, seed=1)
    return haystack.tokenizer.decode(prompt.input_ids), prompt.answers


def test_variables_are_those_of_one_chain(haystack):
    text, answers = text_of(haystack, "vt", 2000)
    value = re.search(r"assigned the value (\d+) in the text above\. Answer: [^:]*:$", text)[1]
    held = {value}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text.split("\n\n")[-1], flags=re.M):
        held |= {name} if source in held else set()
    assert held - {value} == set(answers) and len(answers) == 5


@pytest.mark.parametrize(("task", "count"), [("cwe", 10), ("fwe", 3)])
def test_the_words_asked_for_are_the_most_frequent(haystack, task, count):
    text, answers = text_of(haystack, task, 3000)
    context = text.split("Memorize the ones that appear most often.")[-1] if task == "cwe" else text
    words = re.findall(r"[a-z]{4,12}", context[context.index("\n" if task == "cwe" else "coded words. ") :])
    words = words[: words.index("uestion") if "uestion" in words else None]
    counts = {word: words.count(word) for word in set(words)}
    assert set(sorted(counts, key=counts.get, reverse=True)[:count]) == set(answers)
    assert sorted(counts.values(), reverse=True)[count - 1] > sorted(counts.values(), reverse=True)[count]


def test_what_cannot_be_made_is_refused_in_one_line(haystack):
    with pytest.raises(TooShort, match=r"^\d+ tokens too few for this task$"):
        make_prompts(haystack, "vt", 500, 1, seed=0)
    with pytest.raises(ValueError, match=r"^the text has \d+ different words, common words at this length need \d+$"):
        make_prompts(Haystack(haystack.tokenizer, haystack.ids[:2000]), "cwe", 3000, 1, seed=0)
    with pytest.raises(TooShort, match="too few for the header"):
        make_prompts(haystack, "niah_multikey_3", 90, 1, seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_for_a_task_is_known_before_there_is_a_text(haystack, task):
    for length in (1, 5, 60):
        with pytest.raises(ValueError, match=rf"^length {length}: no room for a prompt of {task}: \d+ tokens too few"):
            check_lengths(haystack.tokenizer, [task], (4096, length))
    check_lengths(haystack.tokenizer, [task], (1600, 4096))
    with pytest.raises(TooShort):
        make_prompts(haystack, task, 60, 1, seed=0)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1", "niah_multikey_2"])
def test_no_prompt_has_tokens_that_end_documents(haystack, task):
    """A model takes what stands before one for another text, and does not look for needles there."""
    tokenizer, end = haystack.tokenizer, haystack.tokenizer.eos_token_id
    separated = Haystack(tokenizer, np.insert(haystack.ids, np.arange(50, len(haystack.ids), 50), end))
    prompts = make_prompts(separated, task, 512, 2, 0)
    assert prompts == make_prompts(haystack, task, 512, 2, 0)
    assert not any(end in prompt.input_ids for prompt in prompts)
