"""Heads replaced one by one and many at once, against whole forwards and real conversions."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hydrahead.convert.calibration import LEAST_SCALE, calibrated_forms, head_forms_of
from hydrahead.convert.forms import HeadForms, converted_heads, linear_heads, load_forms, save_forms
from hydrahead.convert.hooks import each_head_replaced, visited_heads
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring import readout
from hydrahead.convert.scoring.ablation import constant_heads, mean_heads
from hydrahead.convert.scoring.probes import Pair
from hydrahead.convert.scoring.readout import answer_measure, answers_found
from hydrahead.convert.scoring.replacement import (
    answer_effects,
    answer_estimates,
    form_changes,
    shortlisted,
    text_effects,
    text_estimates,
)
from hydrahead.convert.search import conversion_loss, search_masks
from hydrahead.convert.teachers import Teacher, adapter_for
from hydrahead.tests.counterfactuals import make_pair, measured, run
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, FAMILIES, HEADS, LAYERS, MIXED, make_teacher, random_ids

OPTIONS = {"fusion_norm": "linear", "logit_scale_base": 64}


def make_forms(teacher, **options) -> tuple[HeadForms, dict]:
    """The untrained forms of a teacher, running and as tensors."""
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, **OPTIONS | options)
    tensors = head_forms_of(teacher, random_ids(2, 24), config)
    return HeadForms(config, tensors).eval().requires_grad_(False), tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_replaced_in_its_layers_batch_equals_a_whole_forward_with_it_replaced(family):
    """Readouts within 1e-4, for every head and two kinds of replacement at once."""
    teacher, pair = make_teacher(family), make_pair()
    kinds = torch.randn(2, LAYERS, len(pair.clean), HEADS, 16, generator=torch.Generator().manual_seed(0))
    found = each_head_replaced(teacher, pair.clean, lambda layer, *_: kinds[:, layer], answer_measure(teacher, pair))
    *_, states = run(teacher, pair.clean)
    assert found.shape == (3, LAYERS, HEADS)
    assert found[0].flatten().tolist() == pytest.approx([measured(teacher, pair, states)] * 12, abs=1e-4)
    for kind in range(2):
        for layer in range(LAYERS):
            for head in range(HEADS):
                mask = torch.zeros(len(pair.clean), HEADS, dtype=torch.bool)
                mask[:, head] = True
                *_, states = run(teacher, pair.clean, {layer: (kinds[kind, layer], mask)})
                expected = measured(teacher, pair, states)
                assert found[1 + kind, layer, head].item() == pytest.approx(expected, abs=1e-4)


def test_only_wanted_heads_are_measured_and_their_own_output_changes_nothing():
    teacher, pair = make_teacher("qwen3-tied"), make_pair()
    found = each_head_replaced(
        teacher, pair.clean, lambda _, __, heads: heads[None], answer_measure(teacher, pair), {(0, 2), (1, 5)}
    )
    measured_ones = ~found[1].isnan()
    assert measured_ones.nonzero().tolist() == [[0, 2], [1, 5]]
    torch.testing.assert_close(found[1][measured_ones], found[0][measured_ones], rtol=0, atol=1e-5)


def test_eager_attention_stays_causal_when_a_model_is_entered_in_the_middle():
    pair, results = make_pair(), []
    for implementation in ("sdpa", "eager"):
        teacher = make_teacher("llama3-tied")
        teacher.set_attn_implementation(implementation)
        measure = answer_measure(teacher, pair)
        results.append(each_head_replaced(teacher, pair.clean, lambda _, __, heads: heads.flip(1)[None], measure))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)


def test_mean_ablated_heads_write_their_mean():
    teacher, ids = make_teacher("qwen2-tied"), random_ids(2, 20).tolist()
    means = mean_heads(teacher, ids)
    heads = torch.stack([run(teacher, row)[0] for row in ids])  # [2, L, T, H, d]
    torch.testing.assert_close(means, heads.mean((0, 2)), rtol=0, atol=1e-5)
    ablated = [[1, 0, 0, 0, 0, 0], [0] * HEADS]
    with visited_heads(teacher, constant_heads(means, ablated)):
        found, *_ = run(teacher, ids[0])
    torch.testing.assert_close(found[0, :, 0], means[0, 0].expand(20, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0, :, 1:], heads[0, 0, :, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"full_attention_position": "rope", "logit_scale_base": None}])
@pytest.mark.parametrize("family", ["qwen3-tied", "llama-bias", "phi3"])
@torch.no_grad()
def test_converted_heads_in_the_teacher_are_the_student(family, options):
    teacher, ids = make_teacher(family), random_ids(1, 24)
    forms, tensors = make_forms(teacher, **options)
    student = convert_model(teacher, MIXED, head_forms=tensors, **OPTIONS | options)
    with visited_heads(teacher, converted_heads(forms, MIXED)):
        found = teacher(ids).logits
    torch.testing.assert_close(found, student(ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_linear_heads_are_a_student_whose_other_heads_are_the_teachers():
    """With RoPE kept, the untrained full forms are the teacher's heads."""
    teacher, ids = make_teacher("qwen3-tied"), random_ids(1, 24)
    rope = {"full_attention_position": "rope", "logit_scale_base": None}
    forms, tensors = make_forms(teacher, **rope)
    student = convert_model(teacher, MIXED, head_forms=tensors, **OPTIONS | rope)
    converted = [[1 - kept for kept in row] for row in MIXED]
    with visited_heads(teacher, linear_heads(forms, converted)):
        found = teacher(ids).logits
    torch.testing.assert_close(found, student(ids).logits, rtol=0, atol=1e-4)
    assert (answer_effects(teacher, forms, make_pair())[1].abs() < 1e-4).all(), "the full form costs nothing"


@torch.no_grad()
def test_the_replacement_effect_is_the_readout_lost_in_a_one_head_conversion():
    teacher, pair = make_teacher("mistral"), make_pair()
    forms, _ = make_forms(teacher)
    drops = answer_effects(teacher, forms, pair)
    *_, inputs, states = run(teacher, pair.clean)
    for layer, head in [(0, 1), (1, 4)]:
        outputs = forms.outputs(layer, teacher.model.layers[layer].input_layernorm(inputs[layer]))[:, 0]
        for branch in range(2):
            mask = torch.zeros(len(pair.clean), HEADS, dtype=torch.bool)
            mask[:, head] = True
            *_, patched = run(teacher, pair.clean, {layer: (outputs[branch], mask)})
            expected = measured(teacher, pair, states) - measured(teacher, pair, patched)
            assert drops[branch, layer, head].item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_text_effects_are_the_divergence_of_all_predictions():
    teacher, ids = make_teacher("llama3-tied"), random_ids(1, 24)
    forms, _ = make_forms(teacher)
    found = text_effects(teacher, forms, ids[0].tolist())
    only = [[0] * HEADS for _ in range(LAYERS)]
    only[1][3] = 1
    clean = F.log_softmax(teacher(ids).logits[0], -1)
    with visited_heads(teacher, linear_heads(forms, only)):
        patched = F.log_softmax(teacher(ids).logits[0], -1)
    expected = F.kl_div(patched, clean, log_target=True, reduction="none").sum(-1).mean()
    assert found[0, 1, 3].item() == pytest.approx(float(expected), abs=1e-5)


def nearly(forms: HeadForms, teacher, ids, share: float) -> None:
    """Make forms write what the teacher's heads write plus a share of what they wrote beyond it."""
    changes = form_changes(teacher, forms, ids)
    heads, *_ = run(teacher, ids)
    forms.outputs = lambda layer, *_: (heads[layer] + share * changes[:, layer])[:, None]


def test_estimates_agree_with_small_effects():
    """First order for the readout (3% of the largest); second order, by draws from the teacher, for the KL (40%)."""
    teacher, pair = make_teacher("qwen3-untied"), make_pair()
    forms, _ = make_forms(teacher)
    nearly(forms, teacher, pair.clean, 1e-2)
    exact = answer_effects(teacher, forms, pair)
    estimate = answer_estimates(teacher, forms, pair)
    assert (exact - estimate).abs().max() < 0.03 * exact.abs().max()
    exact = text_effects(teacher, forms, pair.clean)
    drawn = torch.stack([text_estimates(teacher, forms, pair.clean, seed=seed) for seed in range(40)]).mean(0)
    ratio = (drawn.sum() / exact.sum()).item()
    assert 0.6 < ratio < 1.4, ratio
    correlation = torch.corrcoef(torch.stack([drawn.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.8


def test_the_shortlist_holds_the_largest_of_either_form():
    estimates = torch.zeros(2, LAYERS, HEADS)
    estimates[0, 0, 1], estimates[1, 1, 2], estimates[0, 1, 3] = 1, -5, 2
    assert shortlisted(estimates, 2) == {(1, 2), (1, 3)}


def test_greedy_exchange_keeps_the_budget_and_what_is_fixed_and_never_gets_worse():
    teacher = make_teacher("qwen3-tied")
    forms, _ = make_forms(teacher)
    pairs, rows = [make_pair(seed) for seed in (0, 10)], random_ids(1, 24).tolist()
    start = [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    masks, history = search_masks(teacher, forms, start, pairs, rows, fixed={(0, 0), (1, 0)}, max_exchanges=4)
    assert sum(map(sum, masks)) == 3 and masks[0][0] == 1 and masks[1][0] == 0
    losses = [record["answer_loss"] + record["divergence"] for record in history]
    assert len(losses) > 1, "a random choice of heads can be improved"
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert conversion_loss(teacher, forms, masks, pairs, rows)["answer_loss"] == pytest.approx(
        history[-1]["answer_loss"]
    )

    groups, _ = search_masks(teacher, forms, [[1, 1, 1, 0, 0, 0], [0] * 6], pairs, rows, unit_size=3)
    assert sum(map(sum, groups)) == 3 and all(len(set(row[i : i + 3])) == 1 for row in groups for i in (0, 3))


def test_greedy_exchange_leaves_every_layer_a_head_where_that_was_asked_for():
    teacher, start = make_teacher("qwen3-tied"), [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]
    forms, _ = make_forms(teacher)
    pairs, options = [make_pair(seed) for seed in (0, 10)], {"max_exchanges": 4}
    free, _ = search_masks(teacher, forms, start, pairs, **options)
    assert list(map(sum, free)) == [2, 0], "free to choose, it empties a layer"
    masks, history = search_masks(teacher, forms, start, pairs, every_layer=True, **options)
    assert list(map(sum, masks)) == [1, 1] and len(history) > 1


def test_conversion_loss_is_nothing_where_nothing_changes():
    """With RoPE kept, all heads full attention."""
    teacher, pair = make_teacher("qwen3-tied"), make_pair()
    forms, _ = make_forms(teacher, full_attention_position="rope", logit_scale_base=None)
    found = conversion_loss(teacher, forms, ALL_FULL, [pair], [pair.clean])
    assert found["divergence"] == pytest.approx(0, abs=1e-5)
    assert found["accuracy"] == float(answers_found(teacher, [pair])[0])
    assert math.isfinite(found["answer_loss"])


@pytest.mark.parametrize("at_once", [1, 60, 10_000])
def test_answers_asked_together_are_those_asked_one_by_one(at_once, monkeypatch):
    """Of different lengths, half of them what the model would say, with linear heads in it."""
    teacher = make_teacher("qwen3-tied")
    forms, masks = make_forms(teacher)[0], [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    pairs = []
    with visited_heads(teacher, linear_heads(forms, masks)):
        for seed in range(6):
            pair = make_pair(10 * seed, answer_tokens=1 + seed % 3)
            clean = pair.clean[: pair.answer_start - seed]
            asked = {"max_new_tokens": len(pair.answer), "do_sample": False, "use_cache": False}
            said = teacher.generate(torch.tensor([clean]), **asked)[0].tolist()
            answer = said[len(clean) :] if seed % 2 else pair.answer
            pairs.append(Pair(clean + answer, clean + answer, len(clean), answer, pair.wrong))
        monkeypatch.setattr(readout, "TOKENS_AT_ONCE", at_once)
        found = answers_found(teacher, pairs)
        assert found == [answers_found(teacher, [pair])[0] for pair in pairs]
    assert found[1::2] == [True] * 3 and not all(found[::2])


def named(teacher, name: str = "mine", revision: str | None = None) -> Teacher:
    """A teacher in memory as if it had been opened by a name."""
    return Teacher(name, revision, name, teacher.config)


def test_forms_travel_in_a_file_with_their_students_options(tmp_path):
    teacher = make_teacher("qwen3-tied")
    opened, (_, tensors) = named(teacher), make_forms(teacher)
    save_forms(tensors, OPTIONS, tmp_path / "forms.safetensors")
    found, options = load_forms(tmp_path / "forms.safetensors", opened)
    assert options == OPTIONS and all((found[name] == tensor).all() for name, tensor in tensors.items())
    assert load_forms(tmp_path / "forms.safetensors", opened, {"fusion": "gate"})[1] == OPTIONS | {"fusion": "gate"}
    for name, value in {
        "full_attention_position": "rope",
        "logit_scale_base": 65,
        "full_attention_gate": False,
        "fusion": "concat",
        "fusion_norm": "all",
    }.items():
        with pytest.raises(ValueError, match=rf"^[^\n]*aligned for {name} [^\n]*{value!r} is asked for[^\n]*$"):
            load_forms(tmp_path / "forms.safetensors", opened, {name: value})
    other = named(make_teacher("qwen3-tied", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"^[^\n]*expected 3 layers of [^\n]*, got 2 of [^\n]*$"):
        load_forms(tmp_path / "forms.safetensors", other)
    other = named(make_teacher("qwen3-tied", num_key_value_heads=1))
    with pytest.raises(ValueError, match=r"^[^\n]*heads of another teacher[^\n]*$"):
        load_forms(tmp_path / "forms.safetensors", other)
    with pytest.raises(ValueError, match="no such file"):
        load_forms(tmp_path / "none.safetensors", opened)
    save_file(tensors, tmp_path / "forms.safetensors")
    with pytest.raises(ValueError, match="does not say what its heads were aligned for"):
        load_forms(tmp_path / "forms.safetensors", opened)
    (tmp_path / "forms.safetensors").write_text("{}")
    with pytest.raises(ValueError, match=r"^[^\n]*not the aligned forms of a teacher's heads[^\n]*$"):
        load_forms(tmp_path / "forms.safetensors", opened)


def test_forms_of_another_teacher_of_the_same_shape_are_refused_by_name(tmp_path):
    teacher = make_teacher("qwen3-tied")
    _, tensors = make_forms(teacher)
    file = tmp_path / "forms.safetensors"
    save_forms(tensors, OPTIONS, file, {**named(teacher, "one", "v1").identity, "steps": 3})
    assert load_forms(file, named(teacher, "one", "v1"))[1] == OPTIONS
    for other, words in ((named(teacher, "two", "v1"), "two at v1"), (named(teacher, "one"), "not from one")):
        with pytest.raises(ValueError, match=rf"^[^\n]*made from the teacher one at v1, [^\n]*{words}[^\n]*$"):
            load_forms(file, other)


@pytest.mark.parametrize("family", ["qwen3-tied", "phi3"])
def test_alignment_starts_at_the_scale_that_brings_each_head_nearest(family):
    """No other scale of a head is nearer, and its form is otherwise what conversion starts from."""
    teacher, ids = make_teacher(family), random_ids(2, 24)
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, **OPTIONS)
    plain, fitted = head_forms_of(teacher, ids, config), calibrated_forms(teacher, ids, config)
    assert {name for name in plain if (plain[name] != fitted[name]).any()} == {"0.linear.gamma", "1.linear.gamma"}

    def error(forms: dict, layer: int, hidden_states, heads) -> torch.Tensor:
        output = HeadForms(config, forms).outputs(layer, hidden_states, ("linear",))[0]
        return (output - heads).square().sum((0, 1, 3))

    def check(layer: int, hidden_states, heads):
        least, gamma = error(fitted, layer, hidden_states, heads), f"{layer}.linear.gamma"
        free = fitted[gamma] > LEAST_SCALE * plain[gamma] * 1.001  # the others were kept from vanishing
        assert free.any()
        for factor in (0.98, 1.02):
            other = error(fitted | {gamma: fitted[gamma] * factor}, layer, hidden_states, heads)
            assert (other[free] > least[free]).all()
        return heads

    with torch.no_grad(), visited_heads(teacher, check):
        teacher.model(ids)
