"""Talking with a model: a kept cache gives what reading all anew gives, and what a terminal and a pipe show."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.console import printable
from hydrahead.convert.migration import convert_to_folder
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.ruler import Haystack, make_prompts
from hydrahead.evaluation import conversation as module
from hydrahead.evaluation.conversation import CACHE, Conversation
from hydrahead.tests.families import ALL_LINEAR, MIXED, make_student, make_teacher

VOCAB = 2048  # of the shipped teacher's tokenizer
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = CHAT.replace("message.content", "(message.content if loop.last or message.role == 'user' else '…')")
MODELS = {
    "mixed": lambda: make_student(vocab_size=VOCAB, head_masks=MIXED),
    "all linear": lambda: make_student(vocab_size=VOCAB, head_masks=ALL_LINEAR),
    "teacher": lambda: make_teacher("qwen3-tied", vocab_size=VOCAB),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)


@pytest.fixture(params=["continued", "template"])
def template(request, tokenizer, monkeypatch) -> bool:
    has_template = request.param == "template"
    monkeypatch.setattr(tokenizer, "chat_template", CHAT if has_template else None)
    return has_template


def after(conversation: Conversation, token: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one more token: behind the cache that was kept, and of all its tokens read at once."""
    model, ids = conversation.model, conversation._cached
    with torch.no_grad():
        kept = model(torch.tensor([[token]]), **{CACHE: conversation._cache}).logits[0, -1]
        anew = model(torch.tensor([[*ids, token]]), **{CACHE: DynamicCache(config=model.config)}).logits[0, -1]
    return kept, anew


def anew(conversation: Conversation, prompt: list[int], new_tokens: int) -> list[int]:
    """The greedy answer to a prompt that is read at once, by a loop of our own."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(int(conversation.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_turns_behind_a_kept_cache_are_those_of_a_full_prefill(name, tokenizer, template, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)  # texts are read in parts
    talk, read = Conversation(MODELS[name](), tokenizer, new_tokens=6, greedy=True), 0
    for line in ("import os and sys", "def read(path):", "class Reader:"):
        before = list(talk.ids)
        turn = talk.say(line)
        prompt = talk.ids[: len(talk.ids) - len(turn.ids)]
        assert prompt[: len(before)] == before
        assert turn.read == len(prompt) - max(0, len(before) - 1)  # and an answer's last token
        assert turn.ids == anew(talk, prompt, 6)
        read += turn.read
    assert read < len(talk.ids)
    kept, full = after(talk)
    torch.testing.assert_close(kept, full, atol=1e-4, rtol=1e-4)  # fp32; chunks add in another order


def test_a_template_gives_the_text_of_all_messages(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    talk = Conversation(MODELS["mixed"](), tokenizer, new_tokens=4, greedy=True)
    for line in ("one", "two"):
        talk.say(line)
    text = tokenizer.apply_chat_template(talk._messages[:-1], tokenize=False, add_generation_prompt=True)
    assert [message["role"] for message in talk._messages] == 2 * ["user", "assistant"]
    assert tokenizer.decode(talk.ids).startswith(text)


def test_a_template_that_changes_earlier_turns_has_all_read_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    talk = Conversation(MODELS["mixed"](), tokenizer, new_tokens=4, greedy=True)
    talk.say("one")
    turn = talk.say("two")
    prompt = talk.ids[: len(talk.ids) - len(turn.ids)]
    assert "…" in tokenizer.decode(prompt)
    assert turn.read == len(prompt) and turn.ids == anew(talk, prompt, 4)
    torch.testing.assert_close(*after(talk), atol=1e-4, rtol=1e-4)


def test_a_stopped_answer_is_kept_and_a_stopped_reading_is_not(tokenizer, template, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    talk = Conversation(MODELS["mixed"](), tokenizer, new_tokens=50, greedy=True)
    seen: list[int] = []
    turn = talk.say("import os and sys", lambda text, turn: seen.append(len(turn.ids)), lambda: 3 in seen)
    assert turn.is_stopped and len(turn.ids) == 4
    before, asked = list(talk.ids), []
    turn = talk.say("a long line " * 4, is_stopped=lambda: asked.append(0) or len(asked) > 2)
    assert turn.is_stopped and turn.ids == [] and talk.ids == before
    talk.new_tokens = 4
    turn = talk.say("class Reader:")
    prompt = talk.ids[: len(talk.ids) - len(turn.ids)]
    assert prompt[: len(before)] == before and "long line" not in tokenizer.decode(prompt)
    assert turn.ids == anew(talk, prompt, 4)
    torch.testing.assert_close(*after(talk), atol=1e-4, rtol=1e-4)


def test_keys_and_values_grow_by_what_the_configuration_says_and_the_state_stays(tokenizer):
    model, held = MODELS["mixed"](), []
    talk = Conversation(model, tokenizer, new_tokens=5)
    for line in ("import os", "import sys"):
        talk.say(line, lambda text, turn: held.append((turn.held, turn.kv_bytes, turn.state_bytes)))
    assert len({tokens for tokens, *_ in held}) == 10
    assert {kv / tokens for tokens, kv, _ in held} == {model.config.kv_bytes_per_token(4)}
    assert {state for *_, state in held} == {model.config.state_bytes(4)}


def test_a_model_whose_cache_cannot_be_read_on_from_reads_all_anew(tokenizer):
    model = make_teacher("phi3-longrope", vocab_size=VOCAB)
    talk = Conversation(model, tokenizer, new_tokens=8, greedy=True)
    for line in ("import os", "import sys", "def read(path):"):  # across 16 tokens its frequencies change
        turn = talk.say(line)
        assert turn.read == len(talk.ids) - len(turn.ids)
    assert turn.ids == anew(talk, talk.ids[:-8], 8)


def test_one_of_rulers_prompts_is_asked_as_an_evaluation_asks_it(tokenizer, template):
    haystack = Haystack(tokenizer, encode_corpus(tokenizer, load_corpus("heldout")[:20]))
    (prompt,) = make_prompts(haystack, "niah_single_2", 400, 1, 0)
    talk = Conversation(MODELS["mixed"](), tokenizer, new_tokens=3)
    talk.say("what came before")
    turn = talk.ask(prompt, 4)
    text = tokenizer.decode(talk.ids[: -len(turn.ids)])
    assert "what came before" not in text and prompt.answers[0] in text
    if template:
        assert text.startswith("<|user|>") and text.endswith("<|assistant|>" + prompt.prefix.lstrip())
        assert talk._messages[1]["content"].startswith(prompt.prefix.lstrip())
    else:
        assert talk.ids[: -len(turn.ids)] == prompt.input_ids
    again = talk.say("and then?")
    assert again.read < 40


def test_a_template_that_is_not_there_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^--template: this tokenizer has no chat template"):
        Conversation(MODELS["mixed"](), tokenizer, template=True)


def test_what_a_model_writes_cannot_command_a_terminal():
    assert printable("a\x1b[2Jb\r\x9b1m\tü\n\ud800👩‍💻") == "a�[2Jb��1m\tü\n�👩‍💻"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student of the shipped teacher, in whose folder the model's code would betray that it was run."""
    folder = tmp_path_factory.mktemp("chat")
    masks = folder / "masks.json"
    masks.write_text(json.dumps([[1, 1, 0, 0, 1, 1, 0, 0]] * 6))
    convert_to_folder("demo", folder / "student", masks, None, 256)
    for file in (folder / "student").glob("*.py"):
        file.write_text("raise SystemExit('the code in the folder was run')")
    return folder / "student"


def talk(folder, lines: str | bytes, *options) -> tuple[str, str]:
    """stdout and stderr of a conversation through pipes."""
    done = CliRunner().invoke(app, ["chat", str(folder), *options], input=lines, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


def test_through_pipes_stdout_has_answers_and_stderr_what_they_took(student):
    lines = "import os\n\n/needle 300\n/bogus\n/needle many\n/needle 20\n/help\n/reset\nimport os\n/quit\nnot read\n"
    answers, notes = talk(student, lines, "--greedy", "--new-tokens", 5)
    assert "hydrahead" in notes and "no chat template" in notes and "the code in the folder" not in notes
    assert answers.count("What is the special magic number for ") == 1 and "not read" not in answers
    assert re.search(r"\d{7} is hidden at \d+% of 300 tokens", notes)
    took = r"cache of \d+ tokens: KV [\d.]+ KiB, state 114.0 KiB; [\d.]+ tokens/s; \d+ read in [\d.]+ s\n"
    assert len(re.findall(took, notes)) == 3
    assert "/bogus: no such command" in notes and "/needle many: expected a number of tokens" in notes
    assert re.search(r"/needle 20: \d+ tokens too few for the header, the needles and the question", notes)
    assert "Ctrl-C stops an answer" in notes
    first = answers[: answers.index("What is the special")]
    assert first.strip() and answers.endswith(first)  # /reset began anew


def test_a_line_that_is_not_utf_8_is_not_read_and_the_next_one_is():
    answers, notes = talk("demo", b"import \xff\nimport os\n", "--greedy", "--new-tokens", 3)
    assert notes.count("this line is not UTF-8") == 1 and notes.count("tokens/s") == 1 and answers.strip()


def test_the_shipped_teacher_finds_its_needle():
    answers, notes = talk("demo", "/needle 600\n")
    number = re.search(r"(\d{7}) is hidden", notes)[1]
    assert number in answers and "\nfound\n" in notes


def test_a_strangers_code_runs_only_where_that_is_said(student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "stranger")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "stranger"}))
    refused = CliRunner().invoke(app, ["chat", str(folder)], input="hello\n")
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("hydrahead: ")
    run = CliRunner().invoke(app, ["chat", str(folder), "--trust-remote-code"], input="hello\n")
    assert run.exit_code == 1 and "the code in the folder was run" in str(run.exception) + run.output


class Terminal:
    """`hydrahead chat` at a terminal that is 60 columns wide."""

    def __init__(self, *words):
        self.main, side = pty.openpty()
        environment = os.environ | {"COLUMNS": "60", "LINES": "24", "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
        streams = {"stdin": side, "stdout": side, "stderr": side}
        command = [sys.executable, "-m", "hydrahead", "chat", *map(str, words)]
        usual = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (jobs in the background ignore it)
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True, preexec_fn=usual)
        os.close(side)
        self.said = ""

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """Read until something is said, and return all until then that was not returned before."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < until, self.said
            if select.select([self.main], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.said += os.read(self.main, 65536).decode(errors="ignore")
        part, self.said = self.said[: found.end()], self.said[found.end() :]
        return part

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C, again where it came between the prompt and readline's waiting, which then looks at the next key."""
        for _ in range(20):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, 3)
        raise AssertionError(self.said)

    def type(self, line: str) -> None:
        os.write(self.main, line.encode() + b"\n")


@pytest.mark.slow
def test_in_a_terminal_the_cache_grows_before_ones_eyes_and_ctrl_c_stops_the_answer_alone(student):
    terminal = Terminal(student, "--greedy", "--new-tokens", 4000)
    terminal.wait("> ")
    terminal.type("import os")
    grown = terminal.wait(r"cache of 90 tokens")
    assert len(set(re.findall(r"cache of (\d+) tokens", grown))) > 40
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait("; stopped")
    terminal.wait("> ")
    terminal.interrupt("/quit or Ctrl-D ends")  # at the prompt
    terminal.type("/needle 300")
    terminal.wait("is hidden at")
    terminal.wait("found")
    terminal.wait("> ")
    os.write(terminal.main, b"\x04")
    assert terminal.process.wait(20) == 0
