"""Score files: what goes into a ranking, what is left out and said, and how files are merged."""

import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from hydrahead.convert import HeadScores, score_heads, select_heads
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import HeadForms
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring import evidence
from hydrahead.convert.scoring.evidence import (
    average_ranks,
    knockout,
    knockout_sizes,
    knockout_warnings,
    ranking,
    spearman,
    stability,
    with_evidence,
)
from hydrahead.convert.scoring.measure import score_steps
from hydrahead.convert.scoring.methods import METHODS, Method
from hydrahead.convert.scoring.probes import Pair, Probe
from hydrahead.convert.scoring.readout import answers_found
from hydrahead.convert.scoring.receivers import receiver_effects
from hydrahead.convert.scoring.scores import ProbeResult, fuse, measured_methods
from hydrahead.convert.scoring.settings import ScoreSettings, check_options
from hydrahead.convert.teachers import adapter_for
from hydrahead.tests.counterfactuals import make_pair, null_pair
from hydrahead.tests.families import ALL_LINEAR, HEADS, KV_HEADS, LAYERS, make_teacher, random_ids


def answerable(teacher, pair: Pair) -> Pair:
    """The pair with the teacher's own greedy continuation as its answer."""
    ids = pair.clean[: pair.answer_start]
    output = teacher.generate(torch.tensor([ids]), max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    answer = output[0, len(ids) :].tolist()
    return Pair(ids + answer, pair.corrupt[: pair.answer_start] + answer, len(ids), answer, pair.wrong[:2])


def usable_pairs(teacher, count: int) -> tuple[Pair, ...]:
    """Pairs that a random teacher answers, and whose readout falls by more than a logit under corruption."""
    found = []
    for seed in range(0, 4000, 10):
        pair = answerable(teacher, make_pair(seed))
        effects = receiver_effects(teacher, pair)
        if effects.answered and effects.clean > 0 and effects.clean - effects.corrupt > 1.2:
            found.append(pair)
        if len(found) == count:
            return tuple(found)
    raise AssertionError("too few usable pairs")


@pytest.fixture(scope="module")
def teacher():
    return make_teacher("qwen3-untied", initializer_range=0.4)


@pytest.fixture(scope="module")
def pairs(teacher):
    return usable_pairs(teacher, 8)


@pytest.fixture(scope="module")
def forms(teacher) -> HeadForms:
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, fusion_norm="linear")
    return HeadForms(config, head_forms_of(teacher, random_ids(2, 24), config)).requires_grad_(False)


@pytest.mark.parametrize("shortlist", [None, 4])
def test_full_forms_that_are_the_teachers_heads_lose_nothing_and_are_not_measured(
    teacher, pairs, shortlist, monkeypatch
):
    """And linear ones lose what they lose; one weight moved, and all are measured."""
    options = {"full_attention_position": "rope", "fusion_norm": "linear"}
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, **options)
    tensors, asked = head_forms_of(teacher, random_ids(2, 24), config), []
    outputs = HeadForms.outputs
    monkeypatch.setattr(HeadForms, "outputs", lambda self, *args: asked.append(tuple(args[2])) or outputs(self, *args))

    def scores():
        forms = HeadForms(config, tensors).requires_grad_(False)
        probes, texts = [Probe("needles", "retrieval", pairs[:2])], random_ids(2, 24).tolist()
        settings = {"methods": ["replacement"], "head_forms": forms, "shortlist": shortlist}
        return score_heads(teacher, None, probes, text_rows=texts, **settings)

    found = scores()
    assert set(asked) == {("linear",)}
    tensors["1.full.k_proj.weight"][0, 0, 0] *= 1 + 1e-6
    both = scores()
    assert set(asked) == {("linear",), ("linear", "full")}
    for one, other in zip(found.probes, both.probes):
        (linear, full), (same, small) = (
            [torch.tensor(probe.effects[kind]) for kind in ("linear", "full")] for probe in (one, other)
        )
        assert not full.any() and 0 < small.abs().max() < 1e-2 * linear.abs().max()
        if shortlist is None:
            torch.testing.assert_close(linear, same, rtol=0, atol=1e-4)


def test_scores_are_scaled_counted_and_survive_a_file(teacher, pairs, tmp_path):
    probes = [Probe("a", "retrieval", (*pairs[:3], null_pair(pairs[0]))), Probe("b", "copying", pairs[:1])]
    scores = score_heads(teacher, None, probes)
    assert scores.method == "receiver+sender"
    assert [(probe.pairs, probe.used, probe.dropped, probe.answered) for probe in scores.probes] == [
        (4, 3, 1, 4),
        (1, 1, 0, 1),
    ]
    for capability in scores.capabilities.values():
        assert max(map(max, capability)) == pytest.approx(1) and min(map(min, capability)) == 0
    assert scores.num_key_value_heads == KV_HEADS and scores.seconds["receiver"] > 0
    assert any("b (value): only 1 of 1 pairs" in warning for warning in scores.warnings)
    scores.save(tmp_path / "scores.json")
    loaded = HeadScores.load(tmp_path / "scores.json")
    assert ranking(loaded.scores, loaded.tie_break) == ranking(scores.scores, scores.tie_break)
    assert loaded.using("receiver").method == "receiver"
    with pytest.raises(ValueError, match="attention was not measured on these probes; measured: receiver"):
        loaded.using("attention")


def test_every_method_gives_a_ranking_of_all_heads(teacher, pairs, forms):
    probes = [
        Probe("a", "retrieval", pairs[:2], "value"),
        Probe("a", "retrieval", pairs[2:4], "key"),
        Probe("text", "language", pairs[:2], generated=False),
    ]
    rows = random_ids(2, 24).tolist()
    calls = []
    scores = score_heads(
        teacher, None, probes, lambda: calls.append(1), methods=list(METHODS), head_forms=forms, text_rows=rows
    )
    assert scores.methods() == list(METHODS) and scores.method == "combined"
    for method in METHODS:
        found = torch.tensor(scores.using(method).scores)
        assert found.shape == (LAYERS, HEADS) and found.isfinite().all() and found.max() > 0, method
    measured = {(probe.name, probe.counterfactual): set(probe.effects) for probe in scores.probes}
    assert "linear" in measured[("a", "value")] and "linear" not in measured[("a", "key")]
    assert "linear" not in measured[("text", "value")], "the KL on text stands for language"
    assert set(measured[("plain-text", "value")]) == {"linear", "full"}
    assert len(calls) == 6 + 6 * 5 + 4 + 2 + 2  # receivers, five methods, mean ablation, replacement, text

    short = score_heads(teacher, None, probes[:1], methods=["replacement"], head_forms=forms, shortlist=3)
    exact, estimated = (torch.tensor(s.probes[0].effects["linear"]) for s in (scores, short))
    same = (exact - estimated).abs() < 1e-4
    assert (same.sum((1, 2)) >= 3).all() and not same.all()


def test_a_method_is_a_file_and_a_row_of_the_table(teacher, pairs, monkeypatch, tmp_path):
    """One more is measured, counted, fused, written, read and known to the command, and nothing else names it."""
    file = types.ModuleType("hydrahead.convert.scoring.newest")
    file.measure = lambda bench, used: (torch.full((LAYERS, HEADS), scale) for scale in used.scales)
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(METHODS, "newest", Method("newest", "the scale of a pair", "newest.measure"))
    check_options(ScoreSettings("any", ("newest",)))
    calls, probe = [], Probe("a", "retrieval", pairs[:2])
    scores = score_heads(teacher, None, [probe], lambda: calls.append(1), methods=["attention", "newest"])
    scores.save(tmp_path / "scores.json")
    assert len(calls) == score_steps([probe], ["attention", "newest"], 0) == 3 * 2
    assert HeadScores.load(tmp_path / "scores.json").methods() == ["receiver", "attention", "newest"]
    scales = [clean - corrupt for clean, corrupt in scores.probes[0].readouts]
    assert scores.probes[0].effect("newest")[1, 2] == pytest.approx(sum(scales) / 2)


def test_the_larger_counterfactual_counts_and_kappa_is_the_share_of_forms():
    def result(name, counterfactual, effect):
        effects = torch.zeros(2, 1, 3)
        effects[:, 0, :2] = torch.tensor(effect)
        return ProbeResult(name, "retrieval", counterfactual, pairs=2, used=2, effects={"receiver": effects.tolist()})

    probes = [result("a", "value", [0.4, 0.0]), result("a", "key", [0.2, 0.6]), result("b", "value", [0.4, 0.0])]
    scores, _, kappas, largest = fuse(probes, "receiver")
    assert kappas["retrieval"][0].tolist() == [1, 0.5, 0]
    assert largest[0].tolist() == pytest.approx([0.4, 0.6, 0])
    assert scores[0].tolist() == pytest.approx([1, 0.3 * 0.5 / 0.4, 0])


def test_a_full_form_that_is_worse_than_the_linear_one_scores_below_zero():
    effects = {"linear": [[[0.5, 0.1, 0.0]]], "full": [[[0.1, 0.9, 0.0]]]}
    scores = fuse([ProbeResult("a", "retrieval", pairs=1, used=1, effects=effects)], "replacement").scores
    assert scores[0].tolist() == pytest.approx([1, -2, 0])


def test_combined_is_the_mean_of_the_replacement_effect_and_the_papers_criterion():
    shared = {"receiver": [[[0.2, 0.0, 0.4]]], "sender": [[[0.0, 0.3, 0.0]]]}
    first = {"linear": [[[0.5, 0.1, 0.0]]], "full": [[[0.1, 0.1, 0.0]]]} | shared
    probes = [ProbeResult("a", "retrieval", pairs=1, used=1, effects=first)]
    probes += [
        ProbeResult("b", "copying", pairs=1, used=1, effects=shared)
    ]  # the replacement effect says nothing of it
    assert fuse(probes, "replacement").scores[0].tolist() == pytest.approx([1, 0, 0])
    assert fuse(probes, "receiver+sender").scores[0].tolist() == pytest.approx([0, 0.5, 1])
    found = fuse(probes, "combined")
    assert found.capabilities["retrieval"][0].tolist() == pytest.approx([0.5, 0.25, 0.5])
    assert found.capabilities["copying"][0].tolist() == pytest.approx([0, 0.5, 1]), "of the one that measured it"
    assert found.scores[0].tolist() == pytest.approx([0.25, 0.375, 0.75])
    assert found.largest[0].tolist() == pytest.approx([0.4, 0.3, 0.4])
    for weights, column in (({"copying": 0}, "retrieval"), ({"retrieval": 0}, "copying")):
        assert fuse(probes, "combined", weights).scores.tolist() == found.capabilities[column].tolist()
    assert probes[0].effect("combined") is None
    first["full"][0][0][0] = math.nan
    unknown = fuse(probes, "combined").scores[0].tolist()
    assert math.isnan(unknown[0]) and unknown[1:] == pytest.approx([0.375, 0.75])
    first["full"][0][0][0] = 0.1
    assert measured_methods(probes)[:3] == ["combined", "replacement", "receiver+sender"]
    with pytest.raises(ValueError, match=r"^replacement was not measured on these probes; measured: receiver\+sender"):
        fuse(probes[1:], "combined")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_effect_that_is_no_number_leaves_the_other_heads_their_scores(value, tmp_path):
    effects = {"linear": [[[0.5, value, 0.1]]], "full": [[[0.1, 0.0, 0.0]]]}
    probe = ProbeResult("a", "retrieval", pairs=1, used=1, effects=effects)
    scores = HeadScores([], [[1.0, value, 3.0]], 1, [probe], {}, "replacement", "test").using("replacement")
    assert scores.scores[0] == pytest.approx([1, math.nan, 0], nan_ok=True)
    scores.save(tmp_path / "scores.json")
    assert "NaN" not in (tmp_path / "scores.json").read_text() and "Inf" not in (tmp_path / "scores.json").read_text()
    loaded = HeadScores.load(tmp_path / "scores.json")
    for found in (loaded, loaded.using("replacement")):
        assert found.scores[0] == pytest.approx([1, math.nan, 0], nan_ok=True)
    assert loaded.tie_break[0] == pytest.approx([1, math.nan, 3], nan_ok=True)
    with pytest.raises(ValueError, match=r"^head 0\.1 has no score"):
        select_heads(loaded, 1 / 3, "global", "heads")
    assert select_heads(loaded, 1 / 3, "global", "heads", drop=[(0, 1)]) == [[1, 0, 0]]


def test_weights_decide_what_capabilities_count():
    probes = [
        ProbeResult("a", "retrieval", pairs=1, used=1, effects={"receiver": [[[1.0, 0.0]]]}),
        ProbeResult("b", "copying", pairs=1, used=1, effects={"receiver": [[[0.0, 1.0]]]}),
    ]
    assert fuse(probes, "receiver").scores[0].tolist() == pytest.approx([0.5, 0.5])
    assert fuse(probes, "receiver", {"copying": 3.0}).scores[0].tolist() == pytest.approx([0.25, 0.75])


def test_what_the_teacher_cannot_do_is_left_out_and_said(teacher, pairs):
    wrong = Pair(pairs[0].clean, pairs[0].corrupt, pairs[0].answer_start, pairs[0].wrong, pairs[0].answer)
    scores = score_heads(teacher, None, [Probe("a", "retrieval", pairs[:4]), Probe("b", "copying", (wrong,) * 3)])
    assert list(scores.capabilities) == ["retrieval"] and scores.probes[1].used == 0
    assert any("b (value): left out; of 3 pairs the teacher answers 0" in warning for warning in scores.warnings)
    with pytest.raises(ValueError, match=r"^b: the teacher answers or tells apart none of the 3 pairs[^\n]*$"):
        score_heads(teacher, None, [Probe("b", "copying", (wrong,) * 3)])


def test_nonsense_is_refused_in_one_line(teacher, pairs, tmp_path):
    probe = Probe("a", "retrieval", pairs[:1])
    for arguments, message in [
        ({"probes": []}, "no probes"),
        ({"methods": ["best"]}, "method must be one of"),
        ({"methods": ["replacement"]}, "needs aligned forms"),
    ]:
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            score_heads(teacher, None, **{"probes": [probe]} | arguments)
    for content, message in ((b"{}", "not a head score file"), (b"\xff\xfe", "byte 0 is not UTF-8")):
        (tmp_path / "scores.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"scores\.json: {message}"):
            HeadScores.load(tmp_path / "scores.json")
    scores = scores_of(torch.rand(1, LAYERS, HEADS))
    with pytest.raises(ValueError, match=r"^method must be one of [^\n]*'best'$"):
        scores.using("best")
    with pytest.raises(ValueError, match=r"^receiver: measured only on capabilities whose weight is 0[^\n]*$"):
        replace(scores, weights={"retrieval": 0}).using("receiver")
    with pytest.raises(ValueError, match="cannot be read"):
        HeadScores.load(tmp_path / "none.json")


def test_files_of_other_probes_and_other_methods_merge_into_one(teacher, pairs):
    one, two = Probe("a", "retrieval", pairs[:2]), Probe("b", "copying", pairs[2:4])
    whole = score_heads(teacher, None, [one, two], methods=["attribution", "attention"])
    parts = [score_heads(teacher, None, [probe], methods=["attribution", "attention"]) for probe in (one, two)]
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(torch.tensor(merged.scores), torch.tensor(whole.scores))
    with pytest.raises(ValueError, match="attention, attribution, receiver twice"):
        parts[0].merge(parts[0])
    other = score_heads(teacher, None, [one], methods=["attention"])
    for probe in other.probes:
        del probe.effects["receiver"]
    assert set(score_heads(teacher, None, [one], methods=["receiver"]).merge(other).methods()) >= {"attention"}
    other.teacher = "another"
    with pytest.raises(ValueError, match="different teachers"):
        parts[0].merge(other)


def test_rank_correlation_shares_the_ranks_of_ties():
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(one, one.exp()) == pytest.approx(1) and spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert spearman(one, torch.ones(4)) is None and spearman(one[:2], one[:2]) is None


def scores_of(effects: torch.Tensor, method: str = "receiver") -> HeadScores:
    """A file whose one probe has these effects `[pairs, L, H]`."""
    pairs, layers, heads = effects.shape
    result = ProbeResult("a", "retrieval", pairs=pairs, used=pairs, effects={method: effects.tolist()})
    ties = torch.zeros(layers, heads).tolist()
    return HeadScores([], ties, 2, [result], {}, method, "test").using(method)


def test_stability_is_one_for_a_ranking_without_noise_and_nothing_for_noise():
    generator = torch.Generator().manual_seed(0)
    signal = torch.rand(4, 8, generator=generator) * 0.5 + 0.2
    clear = stability(scores_of(signal.expand(16, -1, -1)), "receiver")
    assert list(clear) == ["4", "8", "12", "16"]
    assert all(found["rho"] == pytest.approx(1) and found["overlap"] == 1 for found in clear.values())
    noise = stability(scores_of(torch.rand(16, 4, 8, generator=generator)), "receiver")
    assert abs(noise["16"]["rho"]) < 0.4 and noise["16"]["rho_low"] < noise["16"]["rho"] < noise["16"]["rho_high"]
    mixed = stability(scores_of(signal + 0.2 * torch.rand(16, 4, 8, generator=generator)), "receiver")
    assert mixed["4"]["rho"] < mixed["8"]["rho"] < mixed["16"]["rho"] < 1
    two = torch.zeros(16, 4, 8)
    two[:, 1, :2] = 0.5
    assert stability(scores_of(two), "receiver")["8"]["rho"] is None, "two heads have no rank correlation"


def test_a_knockout_takes_the_best_the_worst_and_random_heads(teacher, pairs, monkeypatch):
    scores = score_heads(teacher, None, [Probe("a", "retrieval", pairs)], methods=["receiver"])
    points = []
    curves = knockout(teacher, scores, ["receiver"], pairs, on_point=lambda: points.append(1))
    assert curves["sizes"] == knockout_sizes(LAYERS * HEADS) == [1, 2, 4, 6]
    assert len(points) == (2 + 5) * 4 and len(curves["random"]) == 5
    assert curves["intact"] == 1 and curves["methods"]["receiver"]["top"][-1] < 1
    asked = []
    monkeypatch.setattr(evidence, "answers_found", lambda *args: asked.append(1) or answers_found(*args))
    everything = knockout(teacher, scores, ["receiver"], pairs, sizes=[LAYERS * HEADS])
    assert len(asked) == 2, "all heads are all in any order, and the intact teacher"
    assert len({*everything["methods"]["receiver"]["top"], *(curve[0] for curve in everything["random"])}) == 1


def test_warnings_say_what_a_knockout_says_against_a_ranking():
    fine = {"intact": 1.0, "sizes": [1, 4], "random": [[1.0, 0.6]] * 5}
    good = {"m": {"top": [0.5, 0.0], "bottom": [1.0, 0.9]}}
    bad = {"m": {"top": [1.0, 0.4], "bottom": [1.0, 0.2]}}
    assert knockout_warnings(fine | {"methods": good}, "a", "ablated", ["m"]) == []
    (warning,) = knockout_warnings(fine | {"methods": bad}, "a", "ablated", ["m"])
    assert "bottom 4 heads of m are load-bearing" in warning
    assert knockout_warnings(fine | {"methods": bad}, "a", "ablated", []) == []
    robust = {"intact": 1.0, "sizes": [1], "random": [[1.0]] * 5, "methods": {"m": {"top": [0.9], "bottom": [1.0]}}}
    assert "cannot be made to fail" in knockout_warnings(robust, "a", "ablated", ["m"])[0]
    assert "answers none" in knockout_warnings(robust | {"intact": 0.0}, "a", "ablated", ["m"])[0]


def test_a_file_carries_its_evidence(teacher, pairs, forms, tmp_path):
    probe = Probe("a", "retrieval", pairs)
    scores = score_heads(teacher, None, [probe], methods=["replacement", "receiver"], head_forms=forms)
    scores = with_evidence(teacher, scores, ["replacement", "receiver"], {"a": pairs}, forms)
    assert set(scores.evidence) == {"stability", "ablation", "conversion"}
    assert set(scores.evidence["conversion"]["a"]["methods"]) == {"replacement", "receiver"}
    scores.save(tmp_path / "scores.json")
    assert (
        json.loads((tmp_path / "scores.json").read_text())["evidence"]["stability"]["receiver"]["8"]["splits"] == 100
    )
