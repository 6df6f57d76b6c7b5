"""Cards: every line is recorded somewhere, and nothing that is not recorded is said."""

import pytest

from hydrahead.hub.card import describe, model_card, origin
from hydrahead.tests.families import make_student

CONVERTED = {"teacher": "Qwen/Qwen3-1.7B", "revision": None, "masks": {}, "forms": {}, "stages": []}
QUICK = {"sha256": "0", "steps": 100, "text": "book.txt"}
STAGES = [{"stage": "distill", "summary": "8 tokens"}, {"stage": "finetune", "summary": "9 tokens"}]


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        ({"calibrated_on": "2 tokens of book.txt"}, {"Calibrated on": "2 tokens of book.txt", "Trained": "no"}),
        (
            {"forms": QUICK},
            {"Align": "100 steps, book.txt", "Trained": "heads aligned one by one, nothing end to end"},
        ),
        (
            {"forms": QUICK | {"stage": "align", "summary": "7 tokens"}, "stages": STAGES},
            {"Align": "7 tokens", "Distill": "8 tokens", "Finetune": "9 tokens"},
        ),
    ],
    ids=["calibrated", "aligned by score", "trained"],
)
def test_a_card_says_how_a_student_was_made(found, rows):
    assert origin(CONVERTED | found) == {"Teacher": "Qwen/Qwen3-1.7B", "Revision": "default"} | rows


def test_only_a_teacher_on_the_hub_is_the_base_model():
    config = make_student().config
    for teacher, shown in (("demo", "the one that ships with hydrahead"), ("my-model", "a local folder")):
        card = model_card(config, CONVERTED | {"teacher": teacher})
        assert "base_model" not in card and f"| Teacher | {shown} |" in card
    card = model_card(config, CONVERTED, "one table")
    assert "base_model: Qwen/Qwen3-1.7B" in card and "## Measured\n\none table" in card


def test_the_share_of_the_cache_is_that_of_the_kv_heads_that_are_still_read():
    config = make_student().config
    read = sum(len(config.head_layout(layer).kv_heads) for layer in range(config.num_hidden_layers))
    share = read / (config.num_hidden_layers * config.num_key_value_heads)
    assert describe(config)["KV cache"].endswith(f", {share:.1%} of the teacher's")
