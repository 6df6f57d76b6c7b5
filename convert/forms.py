"""Both forms of every head of a teacher, running: what stands in a head's place when it is converted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..files import atomic_file
from ..modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding, log_position_scale
from .hooks import Visit, visit_heads
from .migration import Forms, attention_state, head_forms_of, load_meta, options_of, student_config
from .teachers import Teacher

BRANCHES = ("linear", "full")
LEAST_SCALE = 0.05  # of a linear head that starts nowhere near its teacher: at 0 nothing of it would be trained


def build_attention(
    config: HydraHeadConfig, layer: int, forms: Forms, output: torch.Tensor | None = None
) -> HydraHeadAttention:
    """The attention of a layer with heads from `forms`, in fp32; without an output projection unless one is given."""
    with init_empty_weights(include_buffers=False):
        attention = HydraHeadAttention(config, layer)
    state = attention_state(forms, layer, config)
    if output is None:
        attention.o_proj = nn.Identity()
    else:
        attention.o_proj = nn.Linear(*output.shape[::-1], bias=False, device="meta")
        state["o_proj.weight"] = output
    attention = load_meta(attention, state, torch.float32)
    if config.fusion == "gate":
        attention.fusion.proj.requires_grad_(False)  # forms are of single heads, it weighs heads against each other
    return attention


def with_masks(config: HydraHeadConfig, masks: Sequence[Sequence[int]]) -> HydraHeadConfig:
    """The same student under other masks, for modules that run outside a model."""
    config = HydraHeadConfig(**config.to_dict() | {"head_masks": masks})
    config._attn_implementation = "sdpa"
    return config


class FormOutputs(nn.Module):
    """
    The attention layers of two students, one of Gated DeltaNet heads only and one of full-attention heads only,
    without their output projections, in fp32.

    A layer's forms live where what they read does: they follow a teacher that is split over devices or off-loaded.
    """

    def __init__(self, config: HydraHeadConfig, forms: Forms):
        super().__init__()
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        self.configs = {
            branch: with_masks(config, [[value] * heads] * layers) for value, branch in enumerate(BRANCHES)
        }
        self.branches = nn.ModuleDict(
            {
                branch: nn.ModuleList(build_attention(each, layer, forms) for layer in range(layers))
                for branch, each in self.configs.items()
            }
        )

    def outputs(self, layer: int, hidden_states: torch.Tensor, branches: Sequence[str] = BRANCHES) -> torch.Tensor:
        """What forms of a layer write when it reads `[B, T, D]`: `[branches, B, T, H, d]` fp32, on the same device."""
        hidden_states = hidden_states.float()
        attentions = [self.branches[branch][layer].to(hidden_states.device) for branch in branches]
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        positions = {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
            "query_scale": log_position_scale(self.configs["full"], position_ids),
        }
        return torch.stack([attention.head_outputs(hidden_states, **positions) for attention in attentions])


@torch.no_grad()
def calibrated_forms(teacher: PreTrainedModel, calibration_ids: torch.Tensor, config: HydraHeadConfig) -> Forms:
    """
    Both forms of all heads as alignment should start: `migration.head_forms_of`, with the γ of every linear head by
    least squares against its teacher head (arXiv 2606.16429): a head that is still wrong is less wrong at less volume.

    Args:
        teacher: where it should run; off-loaded by accelerate or not.
        calibration_ids: `[B, T]` token ids of a text.
        config: a student's configuration; its masks do not matter.

    Returns:
        the forms, on the CPU.
    """
    forms = head_forms_of(teacher, calibration_ids, config)
    if config.fusion == "concat":
        return forms
    linear = with_masks(config, [[0] * config.num_attention_heads] * config.num_hidden_layers)
    rotary = HydraHeadRotaryEmbedding(config)

    def fit(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> None:
        states, target = hidden_states.float(), heads.float()
        position_ids = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        attention = build_attention(linear, layer, forms).to(states.device)
        output = attention.head_outputs(states, position_embeddings=rotary(states, position_ids))
        scale = (output * target).sum((0, 1, 3)) / output.square().sum((0, 1, 3)).clamp_min(1e-12)
        gamma = forms[f"{layer}.linear.gamma"]
        gamma.mul_(scale.clamp_min(LEAST_SCALE).to(gamma.device))

    visit_heads(teacher, calibration_ids, fit)
    return forms


def converted_heads(forms: FormOutputs, masks: Sequence[Sequence[int]]) -> Visit:
    """The heads of the student that `masks` `[L][H]` make, in the teacher: conversion without building it."""
    full = torch.tensor(masks, dtype=torch.bool)

    def replace(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        linear_output, full_output = forms.outputs(layer, hidden_states)
        return torch.where(full[layer][:, None].to(heads.device), full_output, linear_output)

    return replace


def linear_heads(forms: FormOutputs, ablated: Sequence[Sequence[int]]) -> Visit:
    """The linear forms in place of the heads that `ablated` `[L][H]` names, all others the teacher's own."""
    masks = torch.tensor(ablated, dtype=torch.bool)

    def replace(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        if not masks[layer].any():
            return heads
        (linear,) = forms.outputs(layer, hidden_states, ("linear",))
        return torch.where(masks[layer][:, None].to(heads.device), linear.to(heads.dtype), heads)

    return replace


def save_forms(forms: Forms, options: dict, path: Path, made_from: Mapping = MappingProxyType({})) -> None:
    """
    Write forms, whole or not at all (safetensors).

    Args:
        options: of the student, that they were aligned under.
        made_from: the teacher (`Teacher.identity`) and whatever else decided them.
    """
    metadata = {"student": json.dumps(options), "made_from": json.dumps(dict(made_from), default=str)}
    with atomic_file(path) as partial:
        save_file(forms, partial, metadata=metadata)


def forms_made_from(path: Path) -> dict:
    """What a file of forms says that they were made from; nothing, where it is from before files said so."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("made_from", "{}"))


def check_forms(path: Path, teacher: Teacher, options: Mapping = MappingProxyType({})) -> dict:
    """
    The options of a student made of the forms in a file: those that they were aligned under; no tensor is read.

    Args:
        options: asked for by name. They may repeat the file's, and choose between `scale` and `gate` fusion, which
            start as the same.

    Raises:
        ValueError: the file is missing, holds something else, belongs to another teacher, or was aligned under another
            value of one of `options`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; alignment writes it (hydrahead.training.align)")
    adapter = teacher.adapter
    size = [adapter.head_dim, adapter.config.hidden_size]
    expected = [[adapter.num_heads, *size], [adapter.num_kv_heads, *size]]
    try:
        with safe_open(path, framework="pt") as file:
            layers = {int(name.split(".")[0]) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            found = [file.get_slice("0.linear.q_proj.weight").get_shape()]
            if len(layers) == adapter.num_layers and found == expected[:1]:
                found.append(file.get_slice("0.full.k_proj.weight").get_shape())
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path}: not the aligned forms of a teacher's heads ({error}); hydrahead score and "
            "hydrahead.training.align write them as head_forms.safetensors"
        ) from None
    teacher.check_made_from(path, json.loads(metadata.get("made_from", "{}")))
    if len(layers) != adapter.num_layers or found != expected:
        raise ValueError(
            f"{path}: heads of another teacher, expected {adapter.num_layers} layers of query and KV heads "
            f"{expected}, got {len(layers)} of {found}; align this teacher's"
        )
    if "student" not in metadata:
        raise ValueError(f"{path}: does not say what its heads were aligned for; align them again")
    aligned = json.loads(metadata["student"])
    of_file = options_of(student_config(adapter, adapter.blank_masks, **aligned))
    for name in (name for name in of_file if name in options):
        here, asked = of_file[name], options[name]
        if asked != here and not (name == "fusion" and "concat" not in (asked, here)):
            raise ValueError(
                f"{path}: its heads were aligned for {name} {here!r}, and {asked!r} is asked for: ask for {here!r} or "
                "align them again"
            )
    return aligned | dict(options)


def load_forms(path: Path, teacher: Teacher, options: Mapping = MappingProxyType({})) -> tuple[Forms, dict]:
    """
    Forms, and the options of a student made of them.

    Raises:
        ValueError: see `check_forms`.
    """
    options = check_forms(path, teacher, options)
    return load_file(path), options
