"""The text that the demo reads."""

import pytest

from hydrahead.data import corpus
from hydrahead.data.corpus import load_corpus


def test_splits_are_disjoint_and_of_the_stated_size():
    train, held_out = load_corpus("train"), load_corpus("heldout")
    assert not set(train) & set(held_out)
    assert sum(map(len, train)) > 3_000_000
    share = sum(map(len, held_out)) / sum(map(len, train + held_out))
    assert 0.02 < share < 0.10


def test_documentation_of_a_held_out_file_is_held_out():
    train = "\n".join(load_corpus("train"))
    for document in load_corpus("heldout"):
        for text in corpus._docstrings(document).split("\n\n"):
            # Short ones are boilerplate that several modules share.
            assert len(text) < 400 or text not in train


def test_reading_twice_gives_the_same_documents():
    assert load_corpus("heldout") == load_corpus("heldout")


def test_a_module_stays_in_its_split_when_it_becomes_a_package():
    assert corpus._module_path(corpus.Path("zipfile.py")) == corpus._module_path(corpus.Path("zipfile/__init__.py"))


def test_only_strings_that_open_a_line_are_documentation():
    source = 'x = """\nnot this, ' + "a" * 100 + '\n"""\ndef f():\n    """Do it.\n\n    ' + "b" * 100 + '\n    """\n'
    assert corpus._docstrings(source) == "Do it.\n\n" + "b" * 100


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        load_corpus("validation")
