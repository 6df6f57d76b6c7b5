"""Which kernels run where; torch.compile and torch.export."""

import subprocess
import sys

import pytest
import torch

from hydrahead import modeling_hydrahead
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
        monkeypatch.setattr(modeling_hydrahead, name, cannot_run)
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
        "from hydrahead import modeling_hydrahead as m\n"
        "print(m.chunk_gated_delta_rule, m.fla_error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "None OSError: libz3.so: cannot open shared object file", done.stderr

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(modeling_hydrahead, "chunk_gated_delta_rule", None)
    monkeypatch.setattr(modeling_hydrahead, "fla_error", "OSError: libz3.so")
    monkeypatch.setattr(modeling_hydrahead.logger, "propagate", True)
    q, k, v = (x.as_subclass(OnGpu) for x in torch.ones(3, 1, 4, 2, 8))
    modeling_hydrahead.gated_delta_rule(q, k, v, -torch.ones(1, 4, 2), torch.ones(1, 4, 2), None, False)
    assert "cannot be imported (OSError: libz3.so)" in caplog.text and "slow on a GPU" in caplog.text


@pytest.mark.parametrize("seq_len", [1, 9])
def test_every_number_of_heads_is_one_shape_to_the_gpu_kernels(seq_len, monkeypatch):
    """fla tunes for minutes where layers differ in their heads; stand-ins run the reference on what they are given."""
    shapes = []

    def stand_in(reference):
        def kernel(q, k, v, **more):
            shapes.append((q.shape[2], v.shape[2], more["g"].shape[2], more["initial_state"].shape[1]))
            return reference(q, k, v, **more)

        return kernel

    class OnGpu(torch.Tensor):
        is_cuda = True

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        reference = getattr(modeling_hydrahead, "reference_" + name.removeprefix("fused_"))
        monkeypatch.setattr(modeling_hydrahead, name, stand_in(reference))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, seq_len, 5, 8, generator=generator)
    g, beta = -torch.rand(2, seq_len, 5, generator=generator), torch.rand(2, seq_len, 5, generator=generator)
    state = torch.randn(2, 5, 8, 8, generator=generator)
    expected = modeling_hydrahead.gated_delta_rule(q, k, v, g, beta, state, True)
    found = modeling_hydrahead.gated_delta_rule(*(x.as_subclass(OnGpu) for x in (q, k, v)), g, beta, state, True)
    assert shapes == [(1, 1, 1, 1)]
    for one, other in zip(found, expected):
        assert_close(one.as_subclass(torch.Tensor), other, 1e-6)


def test_packed_rows_reach_the_gpu_kernel_as_one_row_with_bounds(monkeypatch):
    """fla's `cu_seqlens` path, with a stand-in that runs each sequence by the reference."""
    reference, seen = modeling_hydrahead.reference_chunk_gated_delta_rule, []

    def varlen(q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens):
        assert q.shape[0] == q.shape[2] == g.shape[0] == g.shape[2] == 1  # one row, one head
        seen.append(cu_seqlens.tolist())
        pieces = [
            reference(*(x[:, a:b] for x in (q, k, v)), g=g[:, a:b], beta=beta[:, a:b], use_qk_l2norm_in_kernel=True)[0]
            for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])
        ]
        return torch.cat(pieces, dim=1), None

    generator = torch.Generator().manual_seed(0)
    _, positions = packed_rows()
    q, k, v = torch.randn(3, 4, 17, HEADS, 8, generator=generator)
    g, beta = -torch.rand(4, 17, HEADS, generator=generator), torch.rand(4, 17, HEADS, generator=generator)
    packing = modeling_hydrahead.find_packing(positions, None, None, is_declared=False)
    slow = modeling_hydrahead._packed_gated_delta_rule(q, k, v, g, beta, packing, use_fla=False)
    monkeypatch.setattr(modeling_hydrahead, "chunk_gated_delta_rule", varlen)
    fast = modeling_hydrahead._packed_gated_delta_rule(q, k, v, g, beta, packing, use_fla=True)
    assert_close(fast, slow, 1e-5)
    assert seen[0][:6] == [0, 5, 6, 15, 17, 34] and seen[0][-1] == HEADS * 4 * 17


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
