"""Loss on text: what a model's own logits give, without holding them all."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from hydrahead.evaluation import text
from hydrahead.evaluation.text import read_windows, text_loss
from hydrahead.tests.families import SIZES, make_student, make_teacher, random_ids


def make_scaled(name: str):
    """A model whose logits are changed after its output embedding, by much."""
    torch.manual_seed(0)
    if name == "capped":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES | {"head_dim": 16, "final_logit_softcapping": 1.0})).eval()
    return CohereForCausalLM(CohereConfig(**SIZES | {"logit_scale": 0.1})).eval()


@pytest.mark.parametrize("make", [make_student, lambda: make_teacher("qwen3-tied"), lambda: make_teacher("phi3")])
def test_the_loss_is_that_of_whole_logits_and_no_more_of_them_exist_than_a_chunk(make, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_TOKENS", 16)
    model, ids, rows = make(), random_ids(1, 101)[0], []
    model.get_output_embeddings().register_forward_hook(lambda _, args, logits: rows.append(logits.shape[-2]))
    found = text_loss(model, ids.tolist(), 50)
    assert max(rows) == 16 and sum(rows) >= 100
    with torch.no_grad():
        logits = torch.cat([model(ids[None, start : start + 50]).logits[0] for start in (0, 50)])
    assert found == pytest.approx(F.cross_entropy(logits, ids[1:]).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["capped", "scaled"])
@torch.no_grad()
def test_logits_that_are_capped_or_scaled_after_the_embedding_are_the_models_own(name):
    model, ids = make_scaled(name), random_ids(1, 41)[0]
    logits = model(ids[None, :-1]).logits[0]
    bare = model.lm_head(model.model(ids[None, :-1]).last_hidden_state)[0]
    assert (logits - bare).abs().max() > 0.1
    assert text_loss(model, ids, 40) == pytest.approx(F.cross_entropy(logits, ids[1:]).item(), rel=1e-6)


def test_windows_that_are_read_together_say_what_they_say_alone(monkeypatch):
    monkeypatch.setattr(text, "CHUNK_TOKENS", 16)  # which ends within windows of 40
    model, reference, ids = make_student(), make_teacher("qwen3-tied"), random_ids(1, 201)[0]
    rows = []
    model.get_decoder().register_forward_hook(lambda _, args, states: rows.append(states.last_hidden_state.shape[:2]))
    alone, together = (list(read_windows(model, ids, 40, [0, 2, 4], reference, tokens)) for tokens in (1, 80))
    assert [shape for shape in rows if shape[1] == 40] == [(1, 40)] * 3 + [(2, 40), (1, 40)]
    assert len({window.losses[0] for window in alone}) == 3
    for one, other in zip(alone, together, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-6)
        assert other.kl == pytest.approx(one.kl, rel=1e-5) and other.agreed == one.agreed

    def too_large(module, args, kwargs):
        if (args[0] if args else kwargs["input_ids"]).shape[0] > 1:
            raise torch.OutOfMemoryError

    rows.clear()
    model.get_decoder().register_forward_pre_hook(too_large, with_kwargs=True)
    divided = list(read_windows(model, ids, 40, [0, 2, 4], reference, 120))
    assert divided == alone and [shape for shape in rows if shape[1] == 40] == [(1, 40)] * 3
