"""A GGUF file is a teacher: its weights, its words, its name in records; and what is no such file is refused."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
import torch
from huggingface_hub import constants
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf")

from hydrahead.cli import app  # noqa: E402
from hydrahead.convert import gguf_files  # noqa: E402
from hydrahead.convert.gguf_files import open_gguf  # noqa: E402
from hydrahead.convert.teachers import open_teacher, public_name  # noqa: E402
from hydrahead.hub.folder import read_made_from  # noqa: E402
from hydrahead.tests.families import HEADS, LAYERS, LLAMA3_ROPE, random_ids  # noqa: E402
from hydrahead.tests.gguf_models import TOKENS, tiny_teacher, write_gguf  # noqa: E402

TEXT = Path(__file__).parents[1] / "README.md"  # the whole library takes seconds to encode
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
LONG_ROPE = LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
TEACHERS = {
    "llama tied": ("llama3-tied", {"rope_parameters": PLAIN_ROPE}),
    "llama untied": ("llama3-tied", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": False}),
    "llama 3.2": ("llama3-tied", {"rope_parameters": LONG_ROPE}),
    "qwen2 tied": ("qwen2-tied", {}),
    "qwen2 untied": ("qwen2-untied", {}),
    "qwen3": ("qwen3-tied", {}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where folders of GGUF files go."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hydrahead" / "gguf"


def teacher_of(kind: str):
    family, changes = TEACHERS[kind]
    return tiny_teacher(family, **changes)


@pytest.mark.parametrize("kind", TEACHERS)
def test_logits_are_those_of_the_model_with_the_same_weights(kind, tmp_path):
    model = teacher_of(kind)
    opened = open_teacher(write_gguf(tmp_path / "model.gguf", model))
    found, ids = opened.load(device="cpu"), random_ids(2, 40)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert found.config.rms_norm_eps == model.config.rms_norm_eps
    assert found.config.max_position_embeddings == model.config.max_position_embeddings


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_weights_are_what_the_quantised_ones_stand_for(kind, tmp_path):
    model = teacher_of("qwen2 untied")
    folder, facts = open_gguf(write_gguf(tmp_path / "model.gguf", model, kind))
    assert facts["quantisation"] == kind
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert found.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
    stored, type_of = dict(found.named_parameters()), gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        expected = parameter.detach()
        if parameter.ndim > 1:
            expected = torch.tensor(gguf.dequantize(gguf.quantize(expected.numpy(), type_of), type_of))
        torch.testing.assert_close(stored[name].float(), expected.to(found.dtype).float(), atol=0, rtol=0)


def test_the_folder_is_that_of_a_model_that_was_never_quantised(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf", teacher_of("llama tied"), "Q8_0")
    folder, _ = open_gguf(path)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert folder.parent == cache and (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert open_gguf(path)[0] == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    found = AutoModelForCausalLM.from_pretrained(folder)
    found.save_pretrained(tmp_path / "again")  # which a quantised model refuses
    AutoTokenizer.from_pretrained(folder)


# Words as llama.cpp splits them (src/llama-vocab.cpp). Each pattern parts what the ones before it left; what none of
# its matches covers stays together. White space is Unicode's.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PATTERNS = {
    "smollm": [
        r"\p{N}",
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^{SPACE}\p{{L}}\p{{N}}]+|[{SPACE}]+(?![^{SPACE}])",
    ],
    "qwen2": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        rf" ?[^{SPACE}\p{{L}}\p{{N}}]+[\r\n]*|[{SPACE}]*[\r\n]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    ],
}


def split_by(patterns: list[str], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        parts = [part for piece in pieces for part in regex.split(f"({pattern})", piece, flags=regex.V1)]
        pieces = [part for part in parts if part]
    return pieces


# Characters that are assigned in Python's Unicode: libraries with a newer one class others otherwise. Not the long s,
# which Qwen2's own pattern takes for an s without regard to case, and llama.cpp's does not.
LETTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="ſ")
SCRIPTS = "aZßéŁжДώאبहিคไ中あア한ⅷ²½٣५①𝟙_-.,;:!?'’\"()[]{}<>/\\|@#$%^&*+=~`…—«»€😀👩‍🚀\u0301\u200d\ufeff"
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u202f\u3000"
CORPUS = st.lists(
    st.one_of(
        st.text(st.sampled_from(SCRIPTS), max_size=6),
        st.text(st.sampled_from(SPACES), min_size=1, max_size=4),
        st.text(st.sampled_from("0123456789"), min_size=1, max_size=5),
        st.sampled_from(
            ["'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'LL", "'d", "it's", "WE'VE", " '", "''s"]
        ),
        st.text(LETTERS, max_size=4),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(("words", "kind"), [("smollm", "llama tied"), ("qwen2", "qwen2 tied"), ("qwen2", "qwen3")])
def test_text_is_split_as_llama_cpp_splits_it(words, kind, tmp_path):
    opened = open_teacher(write_gguf(tmp_path / "model.gguf", teacher_of(kind), pre=words))
    tokenizer = opened.tokenizer()
    form = None if kind == "llama tied" else "NFC"  # Qwen's own tokenizer composes first; llama.cpp's does not

    @hypothesis_settings(max_examples=1500)
    @given(CORPUS)
    @example("in 2024,  12 and\t3\n\n 45x6 7")
    @example(" 1 \u00a02\n3\r\n4 5\t\t6")
    def check(text):
        text = unicodedata.normalize(form, text) if form else text
        found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in found] == split_by(PATTERNS[words], text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    check()


def test_digits_are_tokens_of_their_own_also_after_white_space(tmp_path):
    """The vocabulary has a token `12`, which the teacher never met."""
    tokenizer = open_teacher(write_gguf(tmp_path / "model.gguf", teacher_of("llama tied"))).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 the 12").input_ids) == ["1", "2", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|>the").input_ids)[0] == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == len(TOKENS)


LICENSED = {"general__license": "apache-2.0", "general__name": "Tiny | one"}
LICENSED |= {"general__base_model__count": 1, "general__base_model__0__name": "Base"}
LICENSED |= {"general__base_model__0__organization": "Some\nLab"}


@pytest.fixture
def masks(tmp_path) -> Path:
    path = tmp_path / "masks.json"
    path.write_text(json.dumps([[1] + [0] * (HEADS - 1)] * LAYERS))
    return path


def run(*arguments) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_student_of_a_file_says_so(tmp_path, masks):
    path = write_gguf(tmp_path / "Tiny.Q8_0.gguf", teacher_of("llama tied"), "Q8_0", **LICENSED)
    run("convert", path, tmp_path / "student", "--masks", masks, "--text", TEXT, "--calibration-tokens", 64)
    made, card = read_made_from(tmp_path / "student"), (tmp_path / "student" / "README.md").read_text()
    facts = {"file": path.name, "quantisation": "Q8_0", "license": "apache-2.0", "name": "Tiny | one"}
    assert (
        made["teacher"] == path.name and made["gguf"].items() >= (facts | {"base_models": ["Some Lab Base"]}).items()
    )
    assert made["revision"] == f"sha256:{made['gguf']['sha256']}"
    assert "\nlicense: apache-2.0\n" in card and f"# HydraHead of {path.name}" in card and "base_model:" not in card
    assert "| Teacher | Tiny.Q8_0.gguf (GGUF, Q8_0), Tiny \\| one, of Some Lab Base |" in card
    assert "| Licence | apache-2.0 |" in card and str(tmp_path) not in card + json.dumps(made)

    sizes = ("--lengths", 64, "--prompts", 1, "--text-tokens", 64, "--suite", "text", "--text", TEXT)
    run("evaluate", tmp_path / "student", "--teacher", path, *sizes)
    run("evaluate", path, tmp_path / "student", "--output", tmp_path / "report", *sizes)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == [path.name, "student"]
    run("plan", path, "--ratio", 0.25)


def test_a_file_without_a_licence_gives_a_card_without_one(tmp_path, masks):
    path = write_gguf(tmp_path / "model.gguf", teacher_of("qwen2 tied"))
    run("convert", path, tmp_path / "student", "--masks", masks, "--text", TEXT, "--calibration-tokens", 64)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "license:" not in card and "| Licence | not stated |" in card


def test_the_teacher_of_a_student_is_the_file_with_its_bytes(tmp_path):
    one = open_teacher(write_gguf(tmp_path / "model.gguf", teacher_of("qwen2 tied")))
    with pytest.raises(ValueError, match="no other revision"):
        open_teacher(tmp_path / "model.gguf", "main")
    assert open_teacher(tmp_path / "model.gguf", one.revision).public_name == public_name(one.source) == "model.gguf"
    other = open_teacher(write_gguf(tmp_path / "model.gguf", teacher_of("qwen2 untied")))
    with pytest.raises(
        ValueError, match=r"made from the teacher model.gguf at sha256:.*, not from model.gguf at sha256:"
    ):
        other.check_made_from(tmp_path, one.identity)


def write_broken(path: Path, what: str) -> None:
    """A file that is no teacher."""
    model = tiny_teacher("llama-bias") if what == "bias" else teacher_of("llama tied")
    header = {
        "scaled": {"llama__rope__scaling__type": "yarn"},
        "scaled without a type": {"llama__rope__scaling__factor": 4},
        "window": {"llama__attention__sliding_window": 16},
    }.get(what, {})
    write_gguf(path, model, pre="nosuch" if what == "words" else None, **header)
    whole = path.read_bytes()
    if what == "text":
        path.write_text("version https://git-lfs.example/spec/v1\n")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "architecture":
        path.write_bytes(whole.replace(b"llama", b"lrama"))
    elif what == "rotary":  # of the little-endian number after the key
        key = b"llama.rope.dimension_count" + (4).to_bytes(4, "little")
        path.write_bytes(whole.replace(key + (16).to_bytes(4, "little"), key + (8).to_bytes(4, "little")))
    elif what == "tensor":
        path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    elif what.startswith("cut"):
        path.write_bytes(whole[: int(float(what.split()[1]) * len(whole))])


BROKEN = {
    "text": "not a GGUF file",
    "empty": "not a GGUF file",
    **{f"cut {share}": "no whole GGUF file" for share in (0.0001, 0.001, 0.005, 0.01, 0.03, 0.3, 0.9, 0.999)},
    "architecture": "lrama",
    "tensor": "its tensor blk.1.ffn_xp.weight has no place",
    "bias": r"its tensor blk.0.attn_k.bias has no place",
    "scaled": r"RoPE scaled by its header \(yarn\)",
    "scaled without a type": r"RoPE scaled by its header \(linear\)",
    "window": r"sliding-window attention \(16 positions\)",
    "rotary": "rotary embedding of 8 of 16 dimensions",
    "words": "how its tokenizer splits words .*nosuch",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_teacher_is_refused_in_one_line_and_leaves_nothing(what, tmp_path, cache):
    path = tmp_path / "model.gguf"
    write_broken(path, what)
    with pytest.raises(ValueError, match=BROKEN[what]) as refused:
        open_teacher(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    "command", [["convert", "FILE", "out", "--masks", "MASKS"], ["plan", "FILE"], ["evaluate", "FILE"]]
)
def test_commands_say_that_there_is_no_such_file(command, tmp_path, masks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [{"FILE": "a/b.gguf", "MASKS": str(masks)}.get(word, word) for word in command]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and result.stderr == "hydrahead: a/b.gguf: no such file\n"
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf_one_line_says_what_to_install(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", teacher_of("llama tied"))
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'hydrahead\[gguf\]'"):
        open_teacher(path)
    assert not cache.exists()


def test_a_folder_whose_making_was_interrupted_is_made_anew(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", teacher_of("llama tied"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "_facts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_teacher(path)
    assert [file for file in cache.iterdir() if file.is_dir()] == []
    assert open_teacher(path).load(device="cpu").num_parameters() == teacher_of("llama tied").num_parameters()


OPEN = """
import sys
from huggingface_hub import constants
constants.HF_HOME = sys.argv[2]
from hydrahead.convert.teachers import open_teacher
print(open_teacher(sys.argv[1]).load(device="cpu").dtype)
"""


@pytest.mark.slow
def test_processes_that_open_a_file_together_make_one_folder(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf", teacher_of("llama tied"))
    command = [sys.executable, "-c", OPEN, str(path), constants.HF_HOME]
    together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in together] == ["torch.float32\n"] * 2
    assert len([file for file in cache.iterdir() if file.is_dir()]) == 1
