"""Everything that is computed of a teacher's heads, and teachers whose layers are not all in one place."""

from pathlib import Path

import torch
from accelerate import Accelerator, dispatch_model
from transformers import PreTrainedModel

from hydrahead.convert import score_heads
from hydrahead.convert.calibration import calibrated_forms
from hydrahead.convert.forms import HeadForms
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring.evidence import with_evidence
from hydrahead.convert.scoring.methods import METHODS
from hydrahead.convert.scoring.probes import Pair, Probe
from hydrahead.convert.search import search_masks
from hydrahead.convert.teachers import adapter_for
from hydrahead.tests.families import ALL_LINEAR, MIXED, random_ids
from hydrahead.training.align import align_heads
from hydrahead.training.loop import Schedule


def split(teacher: PreTrainedModel, first: str, second: str, folder: Path | None = None) -> PreTrainedModel:
    """The teacher with embedding and layer 0 on `first`, all else on `second`, as `device_map` would have it."""
    parts = ("model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.embed_tokens": first, "model.layers.0": first} | dict.fromkeys(parts, second)
    return dispatch_model(teacher, places, offload_dir=folder)


def everything(teacher: PreTrainedModel, pairs: tuple[Pair, ...], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """
    What the calibration, the alignment, all methods, the shortlist's estimates, the evidence and the greedy exchange
    give, on the CPU.

    Raises:
        AssertionError: the alignment moved the teacher, or gave forms that are not on the CPU.
    """
    found, rows = {}, random_ids(2, 24).tolist()
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, fusion_norm="linear", logit_scale_base=64)
    start = calibrated_forms(teacher, random_ids(2, 24), config)
    found |= {f"calibrated {name}": tensor for name, tensor in start.items() if name.endswith("gamma")}

    before = [parameter.device for parameter in teacher.parameters()]
    aligned = align_heads(
        accelerator,
        teacher,
        config,
        start,
        lambda step: random_ids(2, 24, step),
        Schedule(3, 1e-3, 1e-3),
        on_step=lambda step, metrics: found.update({f"aligned {step}": torch.tensor(metrics["linear_layers"])}),
    )
    assert [parameter.device for parameter in teacher.parameters()] == before, "alignment moved the teacher"
    assert {tensor.device.type for tensor in aligned.values()} == {"cpu"}

    forms = HeadForms(config, start).requires_grad_(False)
    probe = Probe("a", "retrieval", pairs)
    scores = score_heads(teacher, None, [probe], methods=list(METHODS), head_forms=forms, text_rows=rows)
    short = score_heads(teacher, None, [probe], methods=["replacement"], head_forms=forms, text_rows=rows, shortlist=3)
    for name, result in (("all", scores), ("short", short)):
        for measured in result.probes:
            found |= {
                f"{name} {measured.name} {effect}": torch.tensor(value) for effect, value in measured.effects.items()
            }
    found["tie-break"] = torch.tensor(scores.tie_break)
    evidence = with_evidence(teacher, scores, ["replacement"], {"a": pairs}, forms).evidence
    for kind in ("ablation", "conversion"):
        found[kind] = torch.tensor(list(evidence[kind]["a"]["methods"]["replacement"].values()))
    masks, history = search_masks(teacher, forms, MIXED, pairs, rows, max_exchanges=1)
    found["exchange"] = torch.tensor(masks)
    found["converted"] = torch.tensor([list(record.values()) for record in history])
    return {name: tensor.cpu() for name, tensor in found.items()}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every difference at most `tolerance` of the largest expected value."""
    assert found.keys() == expected.keys()
    far = {
        name: f"{error:.1e} of {size:.1e}"
        for name, value in expected.items()
        if not (error := (found[name] - value).abs().max()) <= tolerance * (size := value.abs().max())
    }
    assert not far, far
