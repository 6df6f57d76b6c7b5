"""Cards: every line is recorded in the folder, nothing else is said, and what others wrote is no markup."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.convert.masks import select_to_file
from hydrahead.convert.scoring.scores import HeadScores, ProbeResult, fuse
from hydrahead.evaluation.markdown import escaped, table
from hydrahead.hub import card as card_module
from hydrahead.hub.card import card_of, state, write_card
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.hub.facts import Facts
from hydrahead.hub.heads import heads_page
from hydrahead.hub.metadata import inherited, is_hub_id
from hydrahead.tests.families import HEAD_DIM, HEADS, KV_HEADS, LAYERS, make_student

ROOT = Path(__file__).parents[1]
CONVERTED = {"teacher": "Qwen/Qwen3-1.7B", "revision": None, "masks": {}, "forms": {}, "stages": []}
SECTION = {"tokens": 4096, "length": 128, "learning_rate": 1e-3, "final_learning_rate": 1e-4, "retrieval_share": 0.5}
CLOCK = {"seconds": 7200.0, "processes": 8, "device": "cuda", "hardware": "NVIDIA H100"}
STAGE = {"recipe": SECTION, "steps": 32, "mixed_precision": "bf16", "summary": "4,096 tokens", **CLOCK}
STAGE |= {"datasets": ["HuggingFaceFW/fineweb-edu"], "metrics": {"loss": 2.5, "heldout_loss": 2.75, "grad_norm": 1.0}}
NASTY = "<script>alert(1)</script> [x](http://evil) **b** `c` | d\n---\nlicense: mit\n# $e$ @you __f__"


def scores(teacher: str = "Qwen/Qwen3-1.7B") -> HeadScores:
    """Scores of the tiny student's teacher: retrieval in layer 0, copying nowhere, language not asked."""
    effect = [[0.9, 0.5, 0.2, 0.0, 0.0, 0.0], [0.0] * HEADS]
    probes = [
        ProbeResult("niah-single", "retrieval", "value", 0, 4, 2, 2, 3, [[1.0, 0.0]] * 2, {"receiver": [effect] * 2}),
        ProbeResult("copy-random", "copying", "value", 0, 4, 0, 4, 1),
    ]
    fused = fuse(probes, "receiver")
    point = {"rho": 0.91, "rho_low": 0.8, "rho_high": 0.97, "heads": 3}
    curve = {"top": [1.0, 0.0], "bottom": [1.0, 1.0]}
    curves = {"sizes": [1, 6], "intact": 1.0, "random": [[1.0, 0.5]], "methods": {"receiver": curve}}
    return HeadScores(
        fused.scores.tolist(),
        [[0.0] * HEADS] * LAYERS,
        KV_HEADS,
        probes,
        {name: score.tolist() for name, score in fused.capabilities.items()},
        "receiver",
        teacher,
        head_dim=HEAD_DIM,
        made_from={"length": 4096, "text": "book.txt"},
        evidence={"stability": {"receiver": {"4": point}}, "ablation": {"niah-single": curves}},
        warnings=["copy-random: the teacher answers too few"],
    )


@pytest.fixture(scope="module")
def masks_file(tmp_path_factory) -> Path:
    """Masks as `select` writes them: four heads, one of them without evidence."""
    folder = tmp_path_factory.mktemp("masks")
    scores().save(folder / "scores.json")
    select_to_file([folder / "scores.json"], folder / "masks.json", 1 / 3, "global", "heads", keep=["1.5"])
    return folder / "masks.json"


def write_student(folder: Path, masks_file: Path | None = None, **made_from) -> Path:
    """A student whose heads are those of a file of masks, and which says that it was made from something."""
    choice, changes = {}, {}
    if masks_file is not None:
        choice = json.loads(masks_file.read_text())
        changes = {"head_masks": choice.pop("masks")}
    save_checkpoint(make_student(**changes), None, folder, CONVERTED | {"masks": choice} | made_from, overwrite=True)
    return folder


def report(**changes) -> dict:
    """A report on a teacher and its student at one length, which the student finds a needle more in."""
    costs = {"model_type": "qwen3", "parameters": 1, "dtype": "float32", "native_length": 64}
    costs |= {"name": "x", "revision": None, "template": False, "kv_bytes_per_token": 256, "state_bytes": 0}
    cell = {"task": "niah_single_2", "length": 256, "prompts": 4, "accuracy": 0.5, "low": 0.15, "high": 0.85}
    cell |= {"scores": [1, 0, 1, 0], "depths": [0.1, 0.4, 0.6, 0.9], "seconds": 1.0}
    text = {"domain": "book", "length": 256, "loss": 2.5, "seconds": 1.0, "by_position": [[0, 256, 2.5]]}
    found = {"difference": 0.25, "low": -0.1, "high": 0.6, "p": 0.5}
    names = ("teacher", "student")
    return {
        "prompts": 4,
        "depths": 0,
        "new_tokens": None,
        "text_tokens": 256,
        "text_name": "book.txt",
        "hardware": "CPU",
        "date": "2026-01-01",
        "models": [costs | {"label": name} for name in names],
        "needles": [cell | {"model": name} for name in names],
        "text": [text | {"model": name} for name in names],
        "batching": [],
        "lm_eval": [],
        "heads": None,
        "differences": [{"suite": "needles", "model": "student", "task": "niah_single_2", "length": 256, **found}],
    } | changes


def rows_of(card: str) -> dict[str, str]:
    """The table at the head of a card."""
    lines = card.split("## Model at a glance")[1].split("## ")[0].strip().splitlines()[2:]
    return dict(re.split(r"(?<!\\)\|", line)[1:3] for line in lines)


def glance(folder: Path) -> dict[str, str]:
    return {name.strip(): value.strip() for name, value in rows_of(card_of(folder)).items()}


def test_a_card_says_at_a_glance_how_a_student_was_made(tmp_path):
    forms = {"sha256": "0", **STAGE, "stage": "align", **CLOCK, "seconds": 3600.0}
    stages = [STAGE | {"stage": "distill"}, STAGE | {"stage": "finetune", "recipe": SECTION | {"length": 512}}]
    rows = glance(write_student(tmp_path / "s", forms=forms, stages=stages, versions={"torch": "2.13.0"}))
    config = make_student().config
    of_teacher = 4 * LAYERS * KV_HEADS * HEAD_DIM
    share = config.kv_bytes_per_token() / of_teacher
    assert rows["Teacher"] == rows["Base model"] == "Qwen/Qwen3-1.7B" and rows["Revision"] == "default"
    assert rows["Parameters"] == f"{sum(p.numel() for p in make_student().parameters()):,}"
    assert rows["Heads"] == "5 of 12 full attention (41.7%), 7 Gated DeltaNet"
    assert rows["Full-attention heads by layer"] == "4, 1"
    expected = f"{config.kv_bytes_per_token():,} bytes a token in bf16, {share:.1%} of the teacher's {of_teacher:,}"
    assert rows["KV cache"] == expected and rows["State"].startswith(f"{config.state_bytes():,} bytes")
    assert rows["Context"] == "trained on rows of up to 512 tokens; the teacher's native length is 64"
    assert rows["Precision"].startswith("weights in float32 (") and "bf16 autocast" in rows["Precision"]
    assert rows["Stages"] == "align, distill, finetune"
    assert rows["Tokens"] == "align 4,096, distill 4,096, finetune 4,096; 12,288 together"
    assert rows["Compute"] == "40 GPU-hours (NVIDIA H100), of optimiser steps"
    assert rows["Made with"] == "torch 2.13.0"


@pytest.mark.parametrize(
    ("found", "rows", "says"),
    [
        (
            {"calibrated_on": "2 tokens of book.txt"},
            {"Calibrated on": "2 tokens of book.txt", "Stages": "none: converted, not trained"},
            "None: the teacher's weights, calibrated new heads",
        ),
        (
            {"forms": {"sha256": "0", "steps": 100, "rows": 4, "length": 512, "text": "book.txt"}},
            {"Tokens": "align 204,800", "Compute": "align not recorded", "Stages": "align"},
            "- align: book.txt\n\nHeads were aligned with the teacher's, nothing was trained end to end.",
        ),
    ],
    ids=["calibrated", "aligned by score"],
)
def test_what_was_not_trained_end_to_end_says_so(found, rows, says, tmp_path):
    folder = write_student(tmp_path / "s", **found)
    assert glance(folder).items() >= rows.items() and says in card_of(folder)
    assert "It was not trained end to end" in card_of(folder)


def test_every_stage_shows_what_it_recorded(tmp_path):
    folder = write_student(tmp_path / "s", stages=[STAGE | {"stage": "distill"}])
    line = "| distill | 32 | 128 | 0.001 to 0.0001 | 16 GPU-hours | loss 2.500, heldout loss 2.750 |"
    assert line in card_of(folder) and "- distill: 4,096 tokens" in card_of(folder)
    assert "end to end" not in card_of(folder)


def test_large_numbers_are_written_out(tmp_path):
    folder = write_student(tmp_path / "s", stages=[STAGE | {"stage": "distill", "seconds": 3600 * 1234.0}])
    assert glance(folder)["Compute"].startswith("9,872 GPU-hours (")


def test_a_stage_that_says_little_is_shown_with_what_it_says(tmp_path):
    """As fine-tuning with somebody else's trainer leaves it."""
    folder = write_student(tmp_path / "s", stages=[{"stage": "sft", "summary": "9 steps on rows.jsonl, with TRL"}])
    card, rows = card_of(folder), glance(folder)
    assert "| sft | – | – | – | – | – |" in card and "- sft: 9 steps on rows.jsonl, with TRL" in card
    assert (rows["Tokens"], rows["Compute"]) == ("sft unknown", "sft not recorded")
    assert rows["Context"].startswith("trained on rows of a length that nobody recorded;")


def test_the_chosen_heads_come_with_their_evidence(masks_file, tmp_path):
    folder = write_student(tmp_path / "s", masks_file)
    card = card_of(folder)
    assert "Chosen by their receiver score, strategy global, 0.333333 of heads; kept by name: 1.5." in card
    assert "Measured on prompts of 4,096 tokens in book.txt." in card
    assert "| retrieval | niah-single | 2 of 4 | 3 of 4 | 3 of 4 |" in card.replace(" ---: ", "")
    assert "| copying | copy-random | 0 of 4 | 1 of 4 | not scored: no pair counts |" in card
    assert "**Never probed:** language, code, whatever else the teacher can do." in card
    assert "**Without evidence:** 1 of the 4 chosen heads score 0 or less" in card
    assert "agree with Spearman 0.91 (0.80 to 0.97, 95% of the splits) over 3 heads" in card
    assert "- copy-random: the teacher answers too few" in card
    for picture in ("head_map.png", "knockout_ablation.png"):
        assert f"]({picture})" in card and (folder / picture).read_bytes().startswith(b"\x89PNG")
    page = (folder / "heads.md").read_text()
    assert "Why head 0.0 stays, and every other one: [heads.md](heads.md)" in card
    assert "| 0.0 | 1.000 | 1.000 | retrieval |" in page and "| 1.5 | 0.000 | 0.000 | nothing measured; kept" in page
    assert page == heads_page(Facts.read(folder)) and len(page.splitlines()) == 10


def test_controls_are_said_to_be_controls(tmp_path):
    choice = {"strategy": "global-random", "ratio": 0.25, "budget_unit": "heads", "by_score": False}
    card = card_of(write_student(tmp_path / "s", masks=choice))
    assert "Chosen without regard to scores, as a control, strategy global-random, 0.25 of heads." in card


def test_rows_that_grew_are_as_long_as_they_became(tmp_path):
    grown = SECTION | {"curriculum": [[128, 0.5], [1024, 0.5]]}
    folder = write_student(tmp_path / "s", stages=[STAGE | {"stage": "distill", "recipe": grown}])
    assert glance(folder)["Context"].startswith("trained on rows of up to 1,024 tokens;")


def test_heads_that_nobody_scored_are_said_to_be_given(tmp_path):
    folder = write_student(tmp_path / "s")
    assert "was given by hand, or in a file that does not say" in card_of(folder)
    assert not (folder / "heads.md").exists() and not list(folder.glob("*.png"))


def test_masks_from_before_they_took_their_scores_along_say_what_they_know(masks_file, tmp_path):
    choice = json.loads(masks_file.read_text())
    for name in ("scored", "by_score", "keep", "drop"):
        del choice[name]
    (tmp_path / "masks.json").write_text(json.dumps(choice))
    card = card_of(write_student(tmp_path / "s", tmp_path / "masks.json"))
    assert "Chosen by their receiver score, strategy global, 0.333333 of heads." in card
    assert "1 of the 4 chosen heads score 0 or less" in card and "The scores are not recorded here." in card


def test_a_report_gives_tables_with_intervals_and_pictures(tmp_path):
    folder = write_student(tmp_path / "s", stages=[STAGE | {"stage": "distill"}])
    assert "Not measured: hydrahead evaluate" in card_of(folder)
    (folder / "report.json").write_text(json.dumps(report()))
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "teacher / student: 4 prompts a cell, greedy, in book.txt, held out; CPU, 2026-01-01." in card
    assert "0.50 (0.15–0.85) | 0.50 (0.15–0.85) | +0.250 (-0.100 to +0.600, p 0.5)" in card
    assert "The hybrid practised what is asked here" in card and "Nothing is known of it beyond 256 tokens" in card
    for picture in ("accuracy.png", "depths.png"):
        assert f"]({picture})" in card and (folder / picture).is_file()


def test_long_tables_are_folded_away(tmp_path):
    cells = [report()["needles"][0] | {"length": 2**step} for step in range(6, 36)]
    folder = write_student(tmp_path / "s")
    (folder / "report.json").write_text(json.dumps(report(needles=cells, differences=[])))
    assert "<details><summary>Every task and length</summary>" in card_of(folder)


def test_the_library_reads_the_metadata_offline(tmp_path):
    folder = write_student(
        tmp_path / "s",
        inherited={"license": "apache-2.0", "language": ["en", "zh"]},
        stages=[STAGE | {"stage": "distill"}],
    )
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "zh"], "Qwen/Qwen3-1.7B")
    assert (data.base_model_relation, data.library_name, data.pipeline_tag) == (
        "finetune",
        "transformers",
        "text-generation",
    )
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"] and {"hydrahead", "custom_code"} <= set(data.tags)


@pytest.mark.parametrize("teacher", ["demo", "my-model"])
def test_a_teacher_that_is_nowhere_on_the_hub_is_no_base_model(teacher, tmp_path):
    folder = write_student(tmp_path / "s", teacher=teacher)
    assert "base_model" not in card_of(folder) and glance(folder)["Base model"] == "not on the Hub"
    assert "my-model" not in card_of(folder)


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ({"_name_or_path": "Qwen/Qwen3-4B"}, None, {"base_model": "Qwen/Qwen3-4B"}),
        ({"_name_or_path": "/home/a"}, "license: mit\nbase_model: a/b", {"license": "mit", "base_model": "a/b"}),
        ({"_name_or_path": "../a"}, "base_model: [c/d]\nlanguage: [en, 7]", {"language": ["en"], "base_model": "c/d"}),
        ({}, "license: {a: b}\nlanguage: de", {"language": ["de"]}),
        ({}, "license: [unclosed", {}),
        ({}, None, {}),
    ],
)  # fmt: skip
def test_what_a_local_teacher_says_of_itself_is_inherited(config, card, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if card is not None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# Mine\n")
    assert inherited(tmp_path) == expected


def test_what_is_stated_stands_in_place_of_what_is_inherited_and_stays(tmp_path):
    folder = write_student(tmp_path / "s", inherited={"license": "mit", "language": ["en"], "license_link": "x"})
    arguments = ["card", str(folder), "--license", "apache-2.0", "--language", "de", "--language", "code"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for _ in range(2):
        data = ModelCard.load(folder / "README.md").data
        assert (data.license, data.language, data.license_link) == ("apache-2.0", ["de", "code"], None)
        write_card(folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for wrong in (["--license", "Apache 2"], ["--language", "English"]):
        result = CliRunner().invoke(app, ["card", str(folder), *wrong])
        assert result.exit_code == 1 and "expected" in result.stderr and result.stderr.count("\n") == 1
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_card_that_somebody_edited_is_overwritten_only_when_told(tmp_path):
    folder = write_student(tmp_path / "s")
    written = (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    result = CliRunner().invoke(app, ["card", str(folder), "--license", "mit"])
    assert result.exit_code == 1 and "was edited" in result.stderr and result.stderr.count("\n") == 1
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert CliRunner().invoke(app, ["card", str(folder), "--overwrite"]).exit_code == 0
    assert (folder / "README.md").read_text() == written


def test_what_a_card_no_longer_shows_is_gone(tmp_path):
    folder = write_student(tmp_path / "s")
    for name in ("heads.md", "head_map.png", "knockout_ablation.png"):
        (folder / name).write_text("of other scores")
    write_card(folder)
    assert not any((folder / name).exists() for name in ("heads.md", "head_map.png", "knockout_ablation.png"))


def test_a_card_cites_the_paper_as_the_repository_does(tmp_path):
    paper = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())["references"][0]
    card = card_of(write_student(tmp_path / "s"))
    cited = re.sub(r"[{}]", "", re.search(r"```bibtex\n(.*?)```", card, flags=re.S)[1])
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert paper["title"] in cited and authors in cited and paper["identifiers"][0]["value"][6:] in cited


def test_a_licence_in_words_is_another_one_by_that_name(tmp_path):
    gguf = {"file": "a.gguf", "quantisation": "Q8_0", "license": "Tiny Lab's licence: v2", "base_ids": ["a/b", "no"]}
    data = ModelCard(card_of(write_student(tmp_path / "s", teacher="a.gguf", gguf=gguf))).data
    assert (data.license, data.license_name, data.base_model) == ("other", "tiny-lab-s-licence-v2", "a/b")


def test_a_repository_and_its_tag_are_what_a_reader_loads(tmp_path):
    folder = write_student(tmp_path / "s")
    assert 'name = "."  # this folder' in card_of(folder)
    state(folder, repository="me/hybrid", revision="v1")
    assert 'name = "me/hybrid"\nrevision = "v1"\n' in card_of(folder)


def test_what_others_wrote_is_no_markup_in_a_card(tmp_path):
    """A teacher, its licence, data sets, texts, labels and warnings with Markdown, HTML and YAML in them."""
    gguf = {"file": f"{NASTY}.gguf", "quantisation": NASTY, "name": NASTY, "base_models": [NASTY], "license": NASTY}
    folder = write_student(
        tmp_path / "s",
        teacher=NASTY,
        revision=NASTY,
        gguf=gguf,
        inherited={"language": [NASTY], "license_name": NASTY},
        calibrated_on=NASTY,
        stages=[STAGE | {"stage": NASTY, "summary": NASTY, "hardware": NASTY, "datasets": [NASTY]}],
    )
    found = report(text_name=NASTY, hardware=NASTY)
    (folder / "report.json").write_text(json.dumps(found).replace('"student"', json.dumps(NASTY)))
    write_card(folder)
    card = card_of(folder)
    plain = write_student(tmp_path / "plain", gguf={"file": "a", "quantisation": "b"}, stages=[STAGE | {"stage": "c"}])
    (plain / "report.json").write_text(json.dumps(report()))
    assert tokens_of(card) == tokens_of(card_of(plain))
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "other" and re.fullmatch(r"[a-z0-9.\-]+", head["license_name"])
    assert set(head) <= {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert ModelCard(card).data.license == "other"


def tokens_of(card: str) -> list[str]:
    """The kinds of blocks, links, images and HTML of a card's body."""
    body = card.split("---\n", 2)[2]
    parsed = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)
    every = [each for token in parsed for each in (token, *(token.children or ()))]
    kinds = [(token.type, token.attrGet("href") or token.attrGet("src")) for token in every]
    return sorted({kind for kind in kinds if kind[0] not in ("text", "text_special", "softbreak")}, key=str)


@given(st.text())
def test_any_text_is_one_cell_and_reads_as_itself(words):
    rendered = MarkdownIt("commonmark").enable("table").render(table([["a", "b"], [words, "end"]]))
    assert rendered.count("<td") == 2 and not re.search(r"<(?!/?(table|thead|tbody|tr|th|td)\b)", rendered)
    shown = re.search(r"<td>(.*)</td>\n<td", rendered)[1] if "<td>" in rendered else None
    expected = " ".join("".join(char if char.isprintable() else " " for char in words).split())
    assert shown is not None and MarkdownIt().utils.unescapeAll(shown) == expected


@pytest.mark.parametrize("words", ["www.evil.org", "https://evil.org", "@someone", "<b>", "a_b", "_a_"])
def test_nothing_becomes_a_link_a_mention_or_emphasis(words):
    assert not re.search(r"https?://|www\.|@|<", escaped(words))
    assert MarkdownIt("commonmark").renderInline(escaped(words)).count("<") == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("made_from.json", "[]"),
        ("made_from.json", "{"),
        ("made_from.json", '{"teacher": "a/b"}'),
        ("made_from.json", json.dumps(CONVERTED | {"stages": [{"summary": "distill"}]})),
        ("made_from.json", json.dumps(CONVERTED | {"masks": {"scored": {"method": 1}}})),
        ("report.json", '{"models": 3}'),
        ("report.json", "{"),
        ("card.json", '"words"'),
        ("config.json", '{"model_type": "qwen3"}'),
        ("config.json", "[]"),
        ("model.safetensors", "no tensors"),
    ],
)
def test_records_that_are_not_ours_end_in_one_line_and_change_nothing(name, content, tmp_path):
    folder = write_student(tmp_path / "s")
    (folder / name).write_text(content)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    result = CliRunner().invoke(app, ["card", str(folder), "--license", "mit"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and str(folder) in result.stderr
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_from_before_folders_said_what_they_were_made_from_has_no_card():
    with pytest.raises(ValueError, match=r"no student that says what it was made from \(made_from.json\)"):
        card_of(ROOT / "tests" / "checkpoint_0_1")


def test_the_releases_that_a_card_names_are_those_that_are_tested():
    first, last = card_module.TESTED.split(" and ")
    project = (ROOT / "pyproject.toml").read_text()
    admitted = SpecifierSet(re.search(r'"transformers([>=].*)"', project)[1])
    pinned = re.search(r"transformers==(.*)", (ROOT / "constraints.txt").read_text())[1]
    assert admitted.contains(f"{first}.0") and not admitted.contains(f"5.{int(first.split('.')[1]) - 1}.99")
    assert pinned.startswith(f"{last}.")


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/b c", "/a", "a/", 3, None])
def test_a_hub_id_has_an_owner_and_a_name(name):
    assert is_hub_id("a/b") and not is_hub_id(name)


def test_the_card_says_how_vllm_serves_it_unless_it_cannot(tmp_path):
    folder = write_student(tmp_path / "one")
    assert "vllm serve . --dtype bfloat16" in card_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"short_conv_kernel_size": 5}))
    assert "vllm serve" not in card_of(folder)
