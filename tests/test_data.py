"""Text to rows: the same rows for a step whoever reads them, whenever, and however often it was interrupted."""

import fcntl
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.data import tokens as tokens_module
from hydrahead.data.batches import Batch, Rows, document_positions
from hydrahead.data.mixture import mixture_rows
from hydrahead.data.tokens import DataSection, TokenFile, open_source, read_documents
from hydrahead.tests.training_runs import make_inputs, write_recipe
from hydrahead.training.data import public_source, stage_batches, stage_phases
from hydrahead.training.recipe import load_recipe


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return load_recipe(write_recipe(folder, make_inputs(folder)))


def texts(count: int) -> list[str]:
    return [f"Page {index} of " + "many words " * (index % 7 + 1) for index in range(count)]


def write_texts(folder, kind: str) -> str:
    rows = texts(40)
    folder = folder / "pages"
    folder.mkdir()
    if kind == "txt":
        for index, text in enumerate(rows):
            (folder / f"{index:03}.txt").write_text(text)
        return str(folder)
    name = folder / f"pages.{kind}"
    if kind == "jsonl":
        name.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in rows))
    else:
        datasets.Dataset.from_dict({"text": rows}).to_parquet(name)
    return str(name)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_of_any_kind_gives_the_same_tokens(kind, tmp_path, tokenizer):
    data = DataSection(name=write_texts(tmp_path, kind))
    file = TokenFile(tmp_path / "tokens", data, tokenizer)
    file.fill(10**9)
    ids = file.read()
    end = tokenizer.eos_token_id
    expected = [token for text in texts(40) for token in [*tokenizer(text).input_ids, end]]
    assert ids.tolist() == expected and file.state()["complete"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_an_interrupted_token_file_goes_on_where_it_was(kind, tmp_path, tokenizer, monkeypatch):
    """Killed between the tokens and their count, and between two documents."""
    monkeypatch.setattr(tokens_module, "DOCUMENTS_AT_A_TIME", 3)
    data = DataSection(name=write_texts(tmp_path, kind))
    whole = TokenFile(tmp_path / "whole", data, tokenizer)
    whole.fill(10**9)
    file = TokenFile(tmp_path / "tokens", data, tokenizer)
    file.fill(200)
    done = file.state()["tokens"]
    assert 200 <= done < whole.state()["tokens"]
    with (file.folder / "tokens.bin").open("ab") as torn:
        torn.write(b"half a token is left")
    read = []
    monkeypatch.setattr(
        tokens_module,
        "read_documents",
        lambda *arguments: (read.append(part) or part for part in read_documents(*arguments)),
    )
    TokenFile(tmp_path / "tokens", data, tokenizer).fill(10**9)
    assert file.read().tolist() == whole.read().tolist()
    assert sum(len(part) for part, _ in read) < 40  # what was done is not done again


def test_whoever_needs_tokens_that_another_process_writes_waits_for_no_more_of_them(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_module, "DOCUMENTS_AT_A_TIME", 3)
    monkeypatch.setattr(tokens_module, "WAIT", 0.01)
    data, told = DataSection(name=write_texts(tmp_path, "jsonl")), []
    writer = TokenFile(tmp_path / "tokens", data, tokenizer)
    writer.fill(10)
    other = TokenFile(tmp_path / "tokens", data, tokenizer)
    waiting = threading.Thread(target=other.fill, args=(200, told.append))
    with (writer.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = writer.state()["tokens"]
        waiting.start()
        deadline = time.monotonic() + 60
        while len(told) < 2 and time.monotonic() < deadline:  # it has looked, and looks again
            time.sleep(0.01)
        assert waiting.is_alive() and not writer.holds(200)
        writer._write(200, lambda count: None)
        waiting.join(60)
        assert not waiting.is_alive(), "the writer still holds the lock, and may go on for hours"
    assert sum(told) == writer.state()["tokens"] - before > 0
    other.fill(10**9)
    assert other.state()["complete"], "and goes on where no other writes"


def test_a_token_file_of_another_source_or_tokenizer_is_refused(tmp_path, tokenizer):
    data = DataSection(name=write_texts(tmp_path, "jsonl"))
    TokenFile(tmp_path / "tokens", data, tokenizer).fill(10)
    with pytest.raises(ValueError, match=r"^[^\n]*made with another source [^\n]*choose another data.cache$"):
        TokenFile(tmp_path / "tokens", replace(data, name="demo"), tokenizer)
    other = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    other.add_tokens(["<another>"])
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenFile(tmp_path / "tokens", data, other)


def a_tokenizer(special: list[str], end: str) -> PreTrainedTokenizerFast:
    """Whole words, some of which are special tokens; `end` is what its own texts or turns end in."""
    vocabulary = ["[unk]", *("Page of many words " + " ".join(map(str, range(40)))).split(), "<|endoftext|>"]
    words = tokenizers.Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[unk]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, unk_token="[unk]")


@pytest.mark.parametrize(
    ("special", "end", "asked", "expected"),
    [
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", None, "<|endoftext|>"),  # Qwen3, chat
        (["<|endoftext|>", "<|im_end|>"], "<|endoftext|>", None, "<|endoftext|>"),  # Qwen3, base
        (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", None, "<|end_of_text|>"),  # Llama 3, chat
        (["</s>"], "</s>", None, "</s>"),  # <|endoftext|> is a word like any other
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>", "<|im_end|>"),
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "words", "words"),
    ],
    ids=["qwen chat", "qwen", "llama chat", "mistral", "asked for", "a word"],
)
def test_documents_end_in_the_token_for_it_and_not_in_that_of_a_turn(special, end, asked, expected, tmp_path):
    tokenizer, data = a_tokenizer(special, end), DataSection(write_texts(tmp_path, "jsonl"), separator=asked)
    file = TokenFile(tmp_path / "tokens", data, tokenizer)
    file.fill(10**9)
    plain = [tokenizer(text).input_ids for text in texts(40)]
    token = tokenizer.convert_tokens_to_ids(expected)
    assert file.read().tolist() == [each for ids in plain for each in (ids if ids[-1] == token else [*ids, token])]
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["separator"] == expected


def test_a_token_file_separated_by_another_token_is_refused(tmp_path):
    """One from before the separator was recorded, too: it was the tokenizer's own end token."""
    chat = a_tokenizer(["<|endoftext|>", "<|im_end|>"], "<|im_end|>")
    data = DataSection(write_texts(tmp_path, "jsonl"))
    TokenFile(tmp_path / "tokens", data, chat).fill(10)
    turns, line = replace(data, separator="<|im_end|>"), r"another separator \('{}', now '{}'\); choose another"
    with pytest.raises(ValueError, match=line.format("<.endoftext.>", "<.im_end.>")):
        TokenFile(tmp_path / "tokens", turns, chat)
    record = tmp_path / "tokens" / "tokens.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "separator"}))
    TokenFile(tmp_path / "tokens", turns, chat)
    with pytest.raises(ValueError, match=line.format("<.im_end.>", "<.endoftext.>")):
        TokenFile(tmp_path / "tokens", data, chat)


def test_a_separator_that_the_tokenizer_does_not_know_is_refused_by_name(tmp_path):
    data = DataSection(write_texts(tmp_path, "jsonl"), separator="<|eod|>")
    line = r"^data.separator: '<.eod.>' is not in the tokenizer's vocabulary; leave it out for '<.endoftext.>'$"
    with pytest.raises(ValueError, match=line):
        TokenFile(tmp_path / "tokens", data, a_tokenizer(["<|endoftext|>", "<|im_end|>"], "<|im_end|>"))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"name": "nowhere/pages.jsonl"}, "no such file"),
        ({"name": "./empty"}, "no such file"),
        ({"column": "body"}, r"has no body, only text"),
    ],
)
def test_a_missing_file_or_column_is_one_line(changes, line, tmp_path, tokenizer):
    name = write_texts(tmp_path, "parquet")
    with pytest.raises(ValueError, match=rf"^data[^\n]*{line}[^\n]*$"):
        open_source(DataSection(**{"name": name} | changes))


def test_a_source_is_named_without_folders_also_when_its_files_are_gone_by_then():
    """Tokens may have been made elsewhere: a stage that has trained must not fail where it says on what."""
    names = ["./pages/book.jsonl", "/data/pages", "pages/*.txt", "pages/book.md", "HuggingFaceFW/fineweb-edu", "demo"]
    found = ["book.jsonl", "pages", "*.txt", "book.md", "HuggingFaceFW/fineweb-edu", "the Python standard library"]
    assert list(map(public_source, names)) == found


def test_every_row_is_read_once_an_epoch_and_rows_overlap_by_one_token():
    tokens = np.arange(1000, dtype=np.uint32)
    rows = Rows(tokens, first=100, wanted=512, heldout=100, length=32, seed=[0, 1])
    assert rows.count == 16
    epochs = [[int(rows[epoch * 16 + index][0]) for index in range(16)] for epoch in range(3)]
    assert all(sorted(starts) == list(range(100, 612, 32)) for starts in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows[5].tolist() == list(range(int(rows[5][0]), int(rows[5][0]) + 33))


def test_a_text_too_short_for_every_stage_is_read_whole_by_each_but_what_is_held_out():
    tokens = np.arange(300, dtype=np.uint32)
    rows = Rows(tokens, first=5000, wanted=10**6, heldout=40, length=32, seed=[0])
    assert rows.count == 8
    assert min(int(rows[index].min()) for index in range(8)) == 40
    with pytest.raises(ValueError, match=r"^data: 300 tokens, 290 of them held out: [^\n]*$"):
        Rows(tokens, first=5000, wanted=10**6, heldout=290, length=32, seed=[0])


def test_a_stage_says_when_it_has_no_text_of_its_own(recipe, tokenizer, caplog):
    """24 pages: enough for the first stages, not for all, and not for long rows of their own."""
    held = len(stage_batches(recipe, "align", tokenizer).phases[0].rows.tokens)
    assert caplog.messages == []
    greedy = replace(recipe, distill=replace(recipe.distill, tokens=10 * 2048, long_share=0.5), long_data=recipe.data)
    stage_batches(greedy, "distill", tokenizer)
    said, name = [message.split(": rows are read again")[0] for message in caplog.messages], recipe.data.name
    assert [line.split(" to read")[0] for line in said] == [
        f"distill: long_data ({name}) has {held:,} tokens, 10,241 are needed",
        f"distill: data ({name}) has {held:,} tokens, {512 + 2048 + 10 * 2048 + 1:,} are needed",
    ]
    assert not any("\n" in message for message in caplog.messages)


def test_a_text_shorter_than_a_row_of_the_mixture_is_one_line(tokenizer):
    with pytest.raises(ValueError, match=r"^the text has 100 tokens, rows of 128 need a longer one$"):
        mixture_rows(tokenizer, np.arange(100), 128, 1, 0)


@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
def test_a_step_has_the_same_rows_however_they_are_divided(stage, recipe, tokenizer):
    def rows_of(step, micro_tokens, processes):
        stage_data = stage_batches(
            replace(recipe, run=replace(recipe.run, micro_batch_tokens=micro_tokens)), stage, tokenizer
        )
        batches = [batch for each in range(processes) for batch in stage_data.micro_batches(step, each, processes)]
        assert len(batches) * micro_tokens == 256
        assert all(batch.token_ids.shape[0] * stage_data.phases[-1].rows.length >= 32 for batch in batches)
        return sorted(map(tuple, torch.cat([batch.token_ids for batch in batches]).tolist()))

    for step in (0, 3, 7):
        expected = rows_of(step, 256, 1)
        assert (
            rows_of(step, 32, 1) == rows_of(step, 64, 2) == rows_of(step, 128, 2) == rows_of(step, 32, 8) == expected
        )
    assert rows_of(0, 256, 1) != rows_of(1, 256, 1)


def test_stages_read_text_of_their_own_and_none_the_held_out(recipe, tokenizer):
    seen = {}
    for stage in ("align", "distill"):
        stage_data = stage_batches(recipe, stage, tokenizer)
        rows = stage_data.phases[0].rows
        seen[stage] = (rows.first, rows.first + rows.count * rows.length)
        assert len(stage_data.heldout) == recipe.data.heldout_tokens
    assert seen["align"] == (512, 2560) and seen["distill"] == (2560, 4608)


def test_the_curriculum_grows_the_length_at_equal_tokens(recipe, tokenizer):
    assert stage_phases(recipe.finetune) == [(16, 4), (32, 4)]
    stage_data = stage_batches(recipe, "finetune", tokenizer)
    shapes = [[tuple(batch.token_ids.shape) for batch in stage_data.micro_batches(step)] for step in (3, 4)]
    assert shapes == [[(4, 17)] * 4, [(2, 33)] * 4]
    grown = replace(recipe, distill=replace(recipe.distill, curriculum=[[16, 0.25], [32, 0.75]]))
    steps = recipe.distill.tokens // recipe.distill.batch_tokens
    assert stage_phases(grown.distill) == [(16, steps // 4), (32, steps - steps // 4)]


def test_positions_restart_after_the_end_of_a_document():
    positions = document_positions(np.array([5, 6, 0, 7, 8, 9, 0, 0, 4]), end_token=0)
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]


def test_separate_documents_restart_and_nothing_is_predicted_across_them(recipe, tokenizer):
    apart = replace(recipe, data=replace(recipe.data, separate_documents=True))
    batch = stage_batches(apart, "distill", tokenizer).micro_batches(0)[0]
    whole = stage_batches(recipe, "distill", tokenizer).micro_batches(0)[0]
    assert torch.equal(batch.token_ids, whole.token_ids) and whole.position_ids is None
    ends = batch.token_ids[:, :-1] == tokenizer.eos_token_id
    assert ends.any() and not batch.weights[:, 1:][ends].any() and batch.weights[:, 1:][~ends].all()
    assert not batch.position_ids[:, 1:][ends[:, :-1]].any()
    aligned = stage_batches(apart, "align", tokenizer).micro_batches(0)[0]
    assert aligned.position_ids is None and aligned.token_ids.shape[1] == 32


def test_positions_restart_at_the_separator_of_the_text_that_a_row_is_from(recipe, tokenizer, tmp_path):
    """Long documents may end in another token than the others: each kind of row restarts at its own."""
    data = replace(recipe.data, separate_documents=True)
    mixed = replace(
        recipe,
        output=str(tmp_path),
        data=data,
        long_data=replace(data, separator=tokenizer.pad_token),
        finetune=replace(recipe.finetune, long_share=0.5, curriculum=None),
    )
    seen, steps = set(), stage_batches(mixed, "finetune", tokenizer)
    for batch in (batch for step in range(8) for batch in steps.micro_batches(step)):
        inputs = batch.token_ids[:, :-1]
        ends = (inputs == tokenizer.eos_token_id) | (inputs == tokenizer.pad_token_id)
        assert torch.equal(batch.position_ids[:, 1:] == 0, ends[:, :-1])
        assert torch.equal(batch.weights[:, 1:] == 0, ends)
        seen |= set(inputs[ends].tolist())
    assert seen == {tokenizer.eos_token_id, tokenizer.pad_token_id}


def test_the_numbers_of_rows_stay_where_reading_them_waits_for_no_device():
    """The cache of the teacher's likeliest tokens asks for them in every forward pass."""
    batch = Batch(torch.ones(2, 3).long(), torch.ones(2, 3), samples=torch.arange(2)).to(torch.device("meta"))
    assert batch.token_ids.is_meta and batch.weights.is_meta and batch.position_ids is None
    assert batch.samples.tolist() == [0, 1]


def test_shares_of_retrieval_and_long_rows_are_what_the_recipe_says(tmp_path, tokenizer):
    """Off by default; where on, a row's kind is drawn from its number, so every reader draws the same."""
    values = make_inputs(tmp_path)
    values["finetune"] |= {"length": 128, "batch_tokens": 128 * 200, "tokens": 128 * 200, "curriculum": None}
    values["finetune"] |= {"retrieval_share": 0.3, "long_share": 0.2, "answer_weight": 3}
    values["run"]["micro_batch_tokens"] = 128 * 200
    (tmp_path / "long.txt").write_text("zebra " * 5000)
    values["long_data"] = {"name": str(tmp_path / "long.txt"), "heldout_tokens": 0}
    (batch,) = stage_batches(load_recipe(write_recipe(tmp_path, values)), "finetune", tokenizer).micro_batches(0)
    texts = tokenizer.batch_decode(batch.token_ids)
    needles = sum("magic number" in text for text in texts) / 200
    long = sum("zebra zebra" in text for text in texts) / 200
    for found, share in ((needles, 0.3 * 3 / 4), (long, 0.2)):
        assert abs(found - share) < 3 * (share * (1 - share) / 200) ** 0.5  # standard deviations
    assert batch.weights.max() == 3
    plain = {"retrieval_share": 0.0, "long_share": 0.0}
    values["finetune"] |= plain
    (batch,) = stage_batches(load_recipe(write_recipe(tmp_path, values)), "finetune", tokenizer).micro_batches(0)
    assert not any("magic number" in text or "zebra" in text for text in tokenizer.batch_decode(batch.token_ids))


def test_rows_of_long_documents_stay_where_they_are_when_their_file_grows(tmp_path, tokenizer, monkeypatch):
    """An extension, or another run on the same file, tokenises more: what was begun reads on as it began."""
    monkeypatch.setattr(tokens_module, "DOCUMENTS_AT_A_TIME", 2)
    values = make_inputs(tmp_path)
    values["long_data"] = values["data"] | {"heldout_tokens": 0}
    values["distill"] |= {"long_share": 0.5}
    found = []
    for tokens, parts in ((2048, [8]), (6144, [8, 16]), (2048, [8])):
        values["distill"]["tokens"] = tokens
        batches = stage_batches(load_recipe(write_recipe(tmp_path, values)), "distill", tokenizer, parts)
        found.append([batch.token_ids for step in range(8) for batch in batches.micro_batches(step)])
    assert all(torch.equal(*each) for later in found[1:] for each in zip(found[0], later))


# The libraries need these two on Linux: only hydrahead does not find them.
WITHOUT_LOCKS = """
import builtins, sys
find = builtins.__import__
def import_(name, globals=None, *args, **kwargs):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("hydrahead"):
        raise ModuleNotFoundError(name)
    return find(name, globals, *args, **kwargs)
builtins.__import__ = import_
from accelerate import Accelerator
from hydrahead.training import data, loop, quick
assert loop._memory_gb(Accelerator(cpu=True)) == 0
data.main(["--config", sys.argv[1]])
"""


@pytest.mark.slow
def test_where_files_cannot_be_locked_only_training_is_refused(tmp_path):
    """Windows, which has neither fcntl nor resource: what scores and converts is imported all the same."""
    recipe = write_recipe(tmp_path, make_inputs(tmp_path))
    done = subprocess.run([sys.executable, "-c", WITHOUT_LOCKS, str(recipe)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("hydrahead: training locks the file of tokens with fcntl")
    assert "Traceback" not in done.stderr
