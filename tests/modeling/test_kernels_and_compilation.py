"""Which kernels run where; torch.compile and torch.export."""

import itertools
import subprocess
import sys

import pytest
import torch

from hydrahead import modeling_hydrahead, ops_hydrahead
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, HEADS, MIXED, make_student, random_ids
from hydrahead.tests.modeling.checks import (
    NO_END,
    PACKED_LENGTHS,
    ROWS,
    assert_close,
    make_cache,
    packed_rows,
    pad_rows,
)


def test_tensors_on_the_cpu_use_the_reference_even_where_fla_is_installed(monkeypatch):
    """transformers' own wrapper would take fla's kernels for them, which cannot run there."""

    def cannot_run(*args, **kwargs):
        raise RuntimeError("0 active drivers")

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        monkeypatch.setattr(ops_hydrahead, name, cannot_run)
    student = make_student()
    ids, positions = packed_rows()
    assert student.generate(random_ids(2, 5), max_new_tokens=3, **NO_END).shape == (2, 8)
    student(ids, position_ids=positions)


def test_a_broken_installation_of_the_kernels_is_named_on_a_gpu(monkeypatch, caplog):
    """A stand-in says that it lies on a GPU; the import itself is tried in a process of its own."""
    script = (
        "import importlib.abc, sys\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fla': raise OSError('libz3.so: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from hydrahead import ops_hydrahead as m\n"
        "print(m.chunk_gated_delta_rule, m.fla_error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "None OSError: libz3.so: cannot open shared object file", done.stderr

    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", None)
    monkeypatch.setattr(ops_hydrahead, "fla_error", "OSError: libz3.so")
    monkeypatch.setattr(ops_hydrahead.logger, "propagate", True)
    q, k, v = (x.as_subclass(OnGpu) for x in torch.ones(3, 1, 4, 2, 8))
    modeling_hydrahead.gated_delta_rule(q, k, v, -torch.ones(1, 4, 2), torch.ones(1, 4, 2), None, False)
    assert "cannot be imported (OSError: libz3.so)" in caplog.text and "slow on a GPU" in caplog.text


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU: stand-ins for kernels compute on it what the kernels would."""

    is_cuda = True


def rule_inputs(batch_size: int, seq_len: int, heads: int, head_dim: int = 8) -> list[torch.Tensor]:
    """q, k and v, g, β and a state."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch_size, seq_len, heads, head_dim, generator=generator)
    g, beta = -torch.rand(batch_size, seq_len, heads, generator=generator), torch.rand(batch_size, seq_len, heads)
    return [q, k, v, g, beta, torch.randn(batch_size, heads, head_dim, head_dim, generator=generator)]


def stand_in_for_fla(q, k, v, g, beta, initial_state=None, cu_seqlens=None, cu_seqlens_cpu=None, **more):
    """What fla gives for sequences behind each other in one row: each by the reference, from its own state."""
    assert q.shape[0] == q.shape[2] == g.shape[2] == 1 and cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
    outputs, states = [], []
    for index, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        output, state = ops_hydrahead.reference_chunk_gated_delta_rule(
            *(x[:, a:b].as_subclass(torch.Tensor) for x in (q, k, v)),
            g=g[:, a:b],
            beta=beta[:, a:b],
            initial_state=None if initial_state is None else initial_state[index : index + 1],
            **more,
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if more["output_final_state"] else None


@pytest.mark.parametrize("state", ["from a state", "from zero"])
def test_a_prompt_is_one_shape_to_the_gpu_kernels_whatever_the_heads_and_rows(state, monkeypatch):
    """fla tunes for minutes where layers differ in their heads, and batches in their rows."""
    *inputs, initial = rule_inputs(2, 9, heads=5)
    initial = initial if state == "from a state" else None
    expected = ops_hydrahead.gated_delta_rule(*inputs, initial, True)
    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", stand_in_for_fla)
    found = ops_hydrahead.gated_delta_rule(*(x.as_subclass(OnGpu) for x in inputs[:3]), *inputs[3:], initial, True)
    for one, other in zip(found, expected):
        assert_close(one.as_subclass(torch.Tensor), other, 1e-5)


def test_a_token_is_one_shape_to_the_gpu_kernel_whatever_the_heads(monkeypatch):
    shapes = []

    def kernel(q, k, v, **more):
        shapes.append((q.shape[1:3], v.shape[1:3], more["g"].shape[1:], more["initial_state"].shape[1]))
        return ops_hydrahead.reference_recurrent_gated_delta_rule(q, k, v, **more)

    *inputs, state = rule_inputs(2, 1, heads=5)
    expected = ops_hydrahead.gated_delta_rule(*inputs, state, True)
    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", kernel)  # is there
    monkeypatch.setattr(ops_hydrahead, "fused_recurrent_gated_delta_rule", kernel)
    found = ops_hydrahead.gated_delta_rule(*(x.as_subclass(OnGpu) for x in inputs[:3]), *inputs[3:], state, True)
    assert shapes == [((1, 1), (1, 1), (1, 1), 1)]
    for one, other in zip(found, expected):
        assert_close(one.as_subclass(torch.Tensor), other, 1e-6)


def test_packed_rows_are_one_shape_to_the_gpu_kernels(monkeypatch):
    _, positions = packed_rows()
    *inputs, _ = rule_inputs(4, 17, HEADS)
    packing = modeling_hydrahead.find_packing(positions, None, None, is_declared=False)
    slow, _ = ops_hydrahead.gated_delta_rule(*inputs, None, False, packing)
    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", stand_in_for_fla)
    fast, _ = ops_hydrahead.gated_delta_rule(
        *(x.as_subclass(OnGpu) for x in inputs[:3]), *inputs[3:], None, False, packing
    )
    assert_close(fast.as_subclass(torch.Tensor), slow, 1e-5)
    bounds = packing.bounds_of(HEADS)[0].tolist()
    assert bounds[:6] == [0, 5, 6, 15, 17, 34] and bounds[-1] == HEADS * 4 * 17


@pytest.mark.parametrize("length", [64, 40])  # pieces or none
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_attention_in_pieces_of_the_cache_equals_it_in_one(length, masked, monkeypatch):
    """The arithmetic of a compiled step on a GPU; products are stood in for, as the CPU gives none out in fp32."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 2, 8, generator=generator)
    key, value = torch.randn(2, 2, 3, length, 8, generator=generator)
    mask = torch.rand(2, 1, 1, length, generator=generator) < 0.4 if masked else None
    expected = ops_hydrahead.attend_to_cache(query, key, value, mask)
    monkeypatch.setattr(ops_hydrahead, "matmul_fp32", torch.matmul)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = ops_hydrahead.attend_to_cache(query.as_subclass(OnGpu), key, value, mask)
    assert_close(found.as_subclass(torch.Tensor), expected, 1e-5)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masks", [MIXED, ALL_FULL, ALL_LINEAR])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_compiles_without_a_graph_break(masks, padded, fresh_dynamo):
    student = make_student(head_masks=masks)
    x = student.model.embed_tokens(random_ids(2, 9))
    positions = torch.arange(9)[None]
    inputs = {
        "position_embeddings": student.model.rotary_emb(x, positions),
        "query_scale": torch.ones(1, 9),
        "attention_mask": torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
        "padding": modeling_hydrahead.Padding.of(torch.tensor([[0] * 3 + [1] * 6, [1] * 9]), 4) if padded else None,
    }
    layer = student.model.layers[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, **inputs), layer(x, **inputs))


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_a_decoding_step_of_a_layer_compiles_without_a_graph_break(masks, fresh_dynamo):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    caches = [make_cache("static", student) for _ in range(2)]
    for cache in caches:
        student(ids[:, :8], past_key_values=cache, use_cache=True)
    x = student.model.embed_tokens(ids[:, 8:])
    layer = student.model.layers[1]
    inputs = {
        "position_embeddings": student.model.rotary_emb(x, torch.tensor([[8]])),
        "query_scale": torch.ones(1, 1),
        "attention_mask": torch.arange(40).le(8)[None, None, None],
    }
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, cache=caches[0], **inputs), layer(x, cache=caches[1], **inputs))


@pytest.mark.slow
@pytest.mark.parametrize("masks", [MIXED, ALL_FULL])
def test_the_whole_model_compiles_to_the_same_logits(masks, fresh_dynamo):
    """In one graph, with and without positions, as transformers' own hybrids do."""
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    padded, mask = pad_rows(ROWS, "left", filler_seed=0)
    positions = torch.arange(9)[None] + 3
    expected = student(padded, attention_mask=mask).logits[mask.bool()]
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert_close(compiled(ids).logits, student(ids).logits)
    assert_close(compiled(ids, position_ids=positions).logits, student(ids, position_ids=positions).logits)
    assert_close(compiled(padded, attention_mask=mask).logits[mask.bool()], expected)
    counted = (mask.cumsum(1) - 1).clamp_min(0)  # as `generate` counts them
    assert_close(compiled(padded, attention_mask=mask, position_ids=counted).logits[mask.bool()], expected)


@pytest.mark.slow
def test_a_compiled_forward_keeps_packed_rows_apart_or_fails(fresh_dynamo):
    """It cannot look at positions: packing has to be declared, and what is not is noticed when the graph runs."""
    student = make_student()
    ids, positions = packed_rows([PACKED_LENGTHS[0]])
    bounds = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    declared = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    expected = student(ids, position_ids=positions).logits
    assert torch.equal(student(ids, position_ids=positions, **declared).logits, expected)
    compiled = torch.compile(student, backend="eager")
    assert_close(compiled(ids, position_ids=positions, use_cache=False, **declared).logits, expected)
    with pytest.raises(RuntimeError, match="needs cu_seq_lens_q"):
        compiled(ids, position_ids=positions, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [MIXED, ALL_FULL])
def test_the_model_exports_with_its_positions(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    inputs = {"input_ids": ids, "position_ids": torch.arange(9)[None], "use_cache": False}
    program = torch.export.export(student, (), inputs, strict=False)
    other = inputs | {"input_ids": random_ids(2, 9, seed=5)}
    assert_close(program.module()(**other).logits, student(**other).logits)


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_a_decoding_step_of_the_model_compiles_without_a_graph_break(masks, fresh_dynamo):
    """With position ids and a static cache, as `generate` compiles it on a GPU."""
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    cache = make_cache("static", student)
    student(ids[:, :8], past_key_values=cache, use_cache=True)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    step = compiled(ids[:, 8:], position_ids=torch.full((2, 1), 8), past_key_values=cache, use_cache=True)
    assert_close(step.logits, student(ids).logits[:, 8:])
