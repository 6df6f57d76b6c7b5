"""The configuration: what it refuses, the cache layers and bytes it promises, and where it puts each head."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hydrahead import HydraHeadConfig
from hydrahead.configuration_hydrahead import HeadLayout
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    HEADS,
    LAYERS,
    MIXED,
    make_student,
    random_ids,
    random_masks,
    student_fields,
)

BAD_FIELDS = [
    ("head_masks", [[1] * HEADS], "head_masks"),
    ("head_masks", [], "head_masks"),
    ("head_masks", [[1] * HEADS] * (LAYERS + 1), "head_masks"),
    ("head_masks", [[1] * HEADS, [1] * (HEADS - 1)], r"head_masks\[1\]"),
    ("head_masks", [[1] * HEADS, [1] * (HEADS + 1)], r"head_masks\[1\]"),
    ("head_masks", [[1] * HEADS, None], r"head_masks\[1\]"),
    ("head_masks", ["1" * HEADS] * LAYERS, r"head_masks\[0\]"),
    ("head_masks", "all", "head_masks"),
    ("head_masks", 1, "head_masks"),
    ("head_masks", torch.ones(LAYERS, HEADS), "head_masks"),
    *(
        ("head_masks", [[1] * HEADS, [1, 0, value, *[0] * (HEADS - 3)]], r"head_masks\[1\]\[2\]")
        for value in (2, -1, 0.5, 1.0, "x", "1", None, [1], float("nan"))
    ),
    *(
        (field, value, field)
        for field in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "hidden_size")
        for value in (0, -2, 2.0, "x")
    ),
    ("vocab_size", 0, "vocab_size"),
    ("intermediate_size", None, "intermediate_size"),
    ("num_key_value_heads", 4, "num_key_value_heads"),
    ("num_key_value_heads", 12, "num_key_value_heads"),
    ("head_dim", 15, "head_dim"),
    ("fusion", "sum", "fusion"),
    ("fusion", None, "fusion"),
    ("fusion", ["scale"], "fusion"),
    ("fusion_norm", "full", "fusion_norm"),
    ("full_attention_position", "alibi", "full_attention_position"),
    ("full_attention_position", True, "full_attention_position"),
    *(("logit_scale_base", value, "logit_scale_base") for value in (1, 0.5, 0, -3, "64", float("nan"), float("inf"))),
    *(("short_conv_kernel_size", value, "short_conv_kernel_size") for value in (1, 0, -4, 4.0, "4", None)),
    *(
        (field, value, field)
        for field in ("full_attention_gate", "qk_norm", "attention_bias", "attention_output_bias")
        for value in ("no", None, 1)
    ),
]


@pytest.mark.parametrize(("field", "value", "named"), BAD_FIELDS)
def test_bad_field_is_refused_in_one_line_that_names_it(field, value, named):
    # Masks of the default shape would be refused first where the sizes change.
    fields = student_fields(head_masks=None) | {field: value}
    with pytest.raises(ValueError, match=rf"^{named} ") as error:
        HydraHeadConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [0, "x", None])
def test_impossible_head_count_is_refused_before_the_head_size_is_derived_from_it(heads):
    with pytest.raises(ValueError, match=r"^num_"):
        HydraHeadConfig(**student_fields(head_masks=None, head_dim=None, num_attention_heads=heads))


def test_head_size_that_comes_out_odd_is_refused():
    with pytest.raises(ValueError, match=r"^head_dim must be even"):
        HydraHeadConfig(**student_fields(head_masks=None, head_dim=None, hidden_size=HEADS - 1))


def test_defaults_are_the_unconverted_architecture():
    config = HydraHeadConfig(**student_fields(head_masks=None, num_key_value_heads=None))
    assert config.head_masks == ALL_FULL
    assert config.full_attention_share == 1.0
    assert config.layer_types == ["full_attention"] * LAYERS
    assert config.num_key_value_heads == HEADS


def test_booleans_and_tuples_in_masks_become_lists_of_integers():
    config = HydraHeadConfig(**student_fields(head_masks=tuple(tuple(map(bool, row)) for row in MIXED)))
    assert config.head_masks == MIXED
    assert json.loads(config.to_json_string())["head_masks"] == MIXED


@pytest.mark.parametrize(
    ("masks", "types"),
    [
        (ALL_FULL, ["full_attention", "full_attention"]),
        ([[1] * HEADS, [0] * HEADS], ["full_attention", "linear_attention"]),
        ([[0] * HEADS, [1] * HEADS], ["linear_attention", "full_attention"]),
        (MIXED, ["hybrid", "hybrid"]),
        # Nothing else would count tokens: see `HydraHeadModel.forward`.
        (ALL_LINEAR, ["hybrid", "linear_attention"]),
    ],
)
def test_layer_types_follow_the_masks_and_nothing_else(masks, types):
    assert HydraHeadConfig(**student_fields(head_masks=masks)).layer_types == types
    stale = ["full_attention", "sliding_attention"]
    assert HydraHeadConfig(**student_fields(head_masks=masks, layer_types=stale)).layer_types == types


def test_configuration_survives_its_own_json(tmp_path):
    config = HydraHeadConfig(**student_fields(fusion="gate", full_attention_position="rope"))
    config.save_pretrained(tmp_path / "one")
    HydraHeadConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()


@given(masks=random_masks())
@example(masks=ALL_FULL)
@example(masks=ALL_LINEAR)
@example(masks=MIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_promised_bytes_are_those_of_the_tensors_in_the_cache(dtype, masks):
    student, batch, length = make_student(head_masks=masks).to(dtype), 2, 7
    with torch.no_grad():
        cache = student(random_ids(batch, length), use_cache=True).past_key_values
    kv = state = 0
    for layer in cache.layers:
        kv += sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            state += sum(t.nbytes for t in states.values() if t is not None)
    # A model without any full-attention head counts tokens: one number in keys, one in values.
    counter = 2 * dtype.itemsize if masks == ALL_LINEAR else 0
    assert kv == batch * length * (student.config.kv_bytes_per_token(dtype.itemsize) + counter)
    assert state == batch * student.config.state_bytes(dtype.itemsize)


@st.composite
def masks_and_groups(draw):
    groups, group_size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return draw(st.lists(st.integers(0, 1), min_size=groups * group_size, max_size=groups * group_size)), groups


@given(masks_and_groups())
@example(([0, 0, 0, 0], 2))
@example(([1, 1, 1, 1], 2))
@example(([0, 1, 1, 1, 0, 0, 1, 0], 4))
def test_layout_holds_each_head_once_in_uniform_contiguous_blocks(case):
    mask, groups = case
    layout, group_size = HeadLayout.from_mask(mask, groups), len(mask) // groups
    assert sorted(layout.full_heads) == [head for head, full in enumerate(mask) if full]
    assert list(layout.linear_heads) == [head for head, full in enumerate(mask) if not full]
    # Only KV heads that some full-attention head reads, each once.
    assert sorted(layout.kv_heads) == sorted({head // group_size for head in layout.full_heads})

    # Within a block, query head i of the branch reads KV head i // size, as grouped-query kernels do.
    query_start = kv_start = 0
    for size, count in layout.blocks:
        assert size >= 1 and count >= 1
        for i, head in enumerate(layout.full_heads[query_start : query_start + size * count]):
            assert head // group_size == layout.kv_heads[kv_start + i // size]
        query_start, kv_start = query_start + size * count, kv_start + count
    assert (query_start, kv_start) == (len(layout.full_heads), len(layout.kv_heads))
    assert len({size for size, _ in layout.blocks}) == len(layout.blocks)

    order = layout.full_heads + layout.linear_heads
    assert [order[place] for place in layout.fused_to_teacher] == list(range(len(mask)))


@given(groups=st.integers(1, 5), group_size=st.integers(1, 4), data=st.data())
def test_masks_of_whole_groups_have_one_block_in_the_teachers_order(groups, group_size, data):
    chosen = data.draw(st.sets(st.integers(0, groups - 1), min_size=1))
    mask = [int(head // group_size in chosen) for head in range(groups * group_size)]
    layout = HeadLayout.from_mask(mask, groups)
    assert layout.blocks == ((group_size, len(chosen)),)
    assert layout.kv_heads == tuple(sorted(chosen))
    assert layout.full_heads == tuple(sorted(layout.full_heads))
