"""
Both forms of every head of a teacher: the Gated DeltaNet head and the full-attention head that can stand in its place.

Forms are independent of any mask. A student is the teacher's other weights and, for each head, the form that its mask
chooses. They start as the teacher's own rows (`calibration`); alignment trains them once for all masks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..configuration_hydrahead import HydraHeadConfig
from ..files import atomic_file
from ..loading import FLOATS
from ..modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding, log_position_scale
from .hooks import Visit, replaced_heads
from .options import BRANCHES, options_of, student_config
from .selection import Masks
from .teachers import Read, Teacher, TeacherAdapter, TeacherAttention

FP32_PARAMETERS = ("gates.", "fusion.")

Forms = dict[str, torch.Tensor]
"""
Both forms of every head, `{layer}.linear.{parameter}` and `{layer}.full.{parameter}`, named as in the branches.

A parameter is `[heads, rows per head, ...]`: one entry per query head, or per KV head for k and v of the full form.
Exceptions: `q_norm` and `k_norm` `[d]` serve all heads, `short_conv.weight` is `[3, H, d, kernel]` (q, k and v), and
`{layer}.linear.gamma`, `{layer}.full.gamma` `[H]` are the scales of the fusion. They hold what a student's options ask
for: no `output_gate` where it has no gate, no `gamma` where its fusion is `concat`.
"""


def _branch_heads(layer: int, config: HydraHeadConfig) -> Iterator[tuple[str, list[int], list[int]]]:
    """The branches that a layer's attention has under `config`'s masks: name, query heads, and KV heads of its own."""
    layout = config.head_layout(layer)
    for branch, heads in zip(BRANCHES, (layout.linear_heads, layout.full_heads)):
        if heads:
            yield branch, list(heads), list(layout.kv_heads if branch == "full" else heads)


def _to_branch(name: str, form: torch.Tensor, heads: list[int], kv_heads: list[int]) -> torch.Tensor:
    """A branch's parameter from all heads' forms of it; `_from_branch` is the way back."""
    if "_norm." in name:
        return form.clone()
    if name == "short_conv.weight":
        return form[:, heads].flatten(0, 2)
    return form[kv_heads if name.startswith(("k_proj", "v_proj")) else heads].flatten(0, 1)


def _from_branch(name: str, form: torch.Tensor, heads: list[int], kv_heads: list[int], value: torch.Tensor) -> None:
    """Write a branch's parameter into all heads' forms of it."""
    if "_norm." in name:
        form.copy_(value)
    elif name == "short_conv.weight":
        form[:, heads] = value.unflatten(0, (3, len(heads), -1))
    else:
        places = kv_heads if name.startswith(("k_proj", "v_proj")) else heads
        form[places] = value.unflatten(0, (len(places), -1))


def attention_state(forms: Forms, layer: int, config: HydraHeadConfig) -> dict[str, torch.Tensor]:
    """State dict of the `HydraHeadAttention` of a layer under `config`'s masks, without its output projection."""
    state = {}
    for branch, *heads in _branch_heads(layer, config):
        prefix = f"{layer}.{branch}."
        for name in (key.removeprefix(prefix) for key in forms if key.startswith(prefix)):
            if name != "gamma":
                state[f"{branch}_attention.{name}"] = _to_branch(name, forms[prefix + name], *heads)
    if config.fusion != "concat":
        is_full = torch.tensor(config.head_masks[layer], dtype=torch.bool)
        state["fusion.weight"] = torch.where(is_full, forms[f"{layer}.full.gamma"], forms[f"{layer}.linear.gamma"])
    if config.fusion == "gate":
        state["fusion.proj.weight"] = torch.zeros(config.num_attention_heads, config.hidden_size)
    return state


def read_attention(forms: Forms, layer: int, config: HydraHeadConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write the heads of an attention layer under `config`'s masks into `forms`: the inverse of `attention_state`."""
    for branch, heads, kv_heads in _branch_heads(layer, config):
        prefix = f"{branch}_attention."
        for name in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
            _from_branch(name, forms[f"{layer}.{branch}.{name}"], heads, kv_heads, state[prefix + name].cpu())
        if config.fusion != "concat":
            forms[f"{layer}.{branch}.gamma"][heads] = state["fusion.weight"].cpu()[heads]


def layer_state(
    adapter: TeacherAdapter, read: Read, layer: int, attention: TeacherAttention, forms: Forms, config: HydraHeadConfig
) -> dict[str, torch.Tensor]:
    """State dict of a `HydraHeadDecoderLayer`: heads from `forms`, everything else from the teacher."""
    prefix = f"model.layers.{layer}."
    state = attention_state(forms, layer, config) | {"o_proj.weight": attention.o}
    if attention.o_bias is not None:
        state["o_proj.bias"] = attention.o_bias
    return {f"self_attn.{name}": tensor for name, tensor in state.items()} | {
        name.removeprefix(prefix): tensor for name, tensor in adapter.norms_and_mlp(read, layer).items()
    }


def load_meta(module: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device its weights: `dtype`, but fp32 for gates and fusion. All must be there."""
    cast = {
        name: tensor.to(torch.float32 if any(part in name for part in FP32_PARAMETERS) else dtype)
        for name, tensor in state.items()
    }
    missing, unexpected = module.load_state_dict(cast, strict=False, assign=True)
    assert not missing and not unexpected, (missing, unexpected)
    return module


def check_forms_fit(forms: Forms, config: HydraHeadConfig) -> None:
    """
    Check that a student has a place for everything that forms hold, and that they hold all that it needs.

    Raises:
        ValueError: gates or γ would be dropped, or are missing.
    """
    for name, option, wanted in (
        ("full.output_gate.weight", "full_attention_gate", config.full_attention_gate),
        ("linear.gamma", "fusion", config.fusion != "concat"),
    ):
        held = f"0.{name}" in forms
        if held != wanted:
            raise ValueError(
                f"head_forms {'hold' if held else 'lack'} {name}, which {option}={getattr(config, option)!r} "
                f"{'would drop' if held else 'needs'}: convert with the {option} that they were aligned under"
            )


def with_masks(config: HydraHeadConfig, masks: Masks) -> HydraHeadConfig:
    """The same student under other masks, for modules that run outside a model."""
    config = HydraHeadConfig(**config.to_dict() | {"head_masks": masks})
    config._attn_implementation = "sdpa"
    return config


class FormLayer(nn.Module):
    """The forms of one layer: what is moved, sharded and gathered as one."""

    def __init__(self, branches: dict[str, HydraHeadAttention]):
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, hidden_states: torch.Tensor, positions: dict, names: Sequence[str] = ()) -> torch.Tensor:
        """What all branches, or those of some names, write when they read `[B, T, D]`: `[branches, B, T, H, d]`."""
        outputs = (self.branches[name].head_outputs(hidden_states, **positions) for name in names or self.branches)
        return torch.stack(list(outputs))


class HeadForms(nn.Module):
    """
    Forms that run: the attention layers of students, without a model around them or output projections, in fp32.

    A layer's forms live where what they read does: they follow a teacher that is split over devices or off-loaded.

    Args:
        config: a student's configuration.
        masks: of the students, by name; those of `BRANCHES` convert every head and none.
    """

    _no_split_modules = ["FormLayer"]

    def __init__(self, config: HydraHeadConfig, forms: Forms, masks: Mapping[str, Masks] | Sequence[str] = BRANCHES):
        super().__init__()
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        self.config, self.start = config, forms
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        if not isinstance(masks, Mapping):
            masks = {name: [[BRANCHES.index(name)] * heads] * layers for name in masks}
        self.configs = {name: with_masks(config, each) for name, each in masks.items()}
        self.layers = nn.ModuleList(
            FormLayer({name: self._attention(each, layer) for name, each in self.configs.items()})
            for layer in range(layers)
        )

    def _attention(self, config: HydraHeadConfig, layer: int) -> HydraHeadAttention:
        with init_empty_weights(include_buffers=False):
            attention = HydraHeadAttention(config, layer)
        attention.o_proj = nn.Identity()
        attention = load_meta(attention, attention_state(self.start, layer, config), torch.float32)
        if config.fusion == "gate":
            attention.fusion.proj.requires_grad_(False)  # it weighs heads against each other: no form's
        return attention

    def positions(self, hidden_states: torch.Tensor) -> dict:
        """Keywords of `head_outputs` for rows `[B, T, D]` that start at position 0."""
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        return {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
            "query_scale": log_position_scale(self.config, position_ids),
        }

    def outputs(self, layer: int, hidden_states: torch.Tensor, names: Sequence[str] = ()) -> torch.Tensor:
        """What forms of a layer write when it reads `[B, T, D]`: `[branches, B, T, H, d]` fp32, on the same device."""
        hidden_states = hidden_states.float()
        return self.layers[layer].to(hidden_states.device)(hidden_states, self.positions(hidden_states), names)

    def forms(self) -> Forms:
        """All forms on the CPU: those that run as they are now, the others as they were."""
        forms = {name: tensor.float().clone() for name, tensor in self.start.items()}
        for layer, module in enumerate(self.layers):
            for name, config in self.configs.items():
                read_attention(forms, layer, config, module.branches[name].state_dict())
        return forms


def converted_heads(forms: HeadForms, masks: Masks) -> Visit:
    """The heads of the student that `masks` `[L][H]` make, in the teacher: conversion without building it."""
    full = torch.tensor(masks, dtype=torch.bool)

    def replace(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        linear_output, full_output = forms.outputs(layer, hidden_states)
        return torch.where(full[layer][:, None].to(heads.device), full_output, linear_output)

    return replace


def linear_heads(forms: HeadForms, masks: Masks) -> Visit:
    """The linear forms in place of the heads that `masks` `[L][H]` names, all others the teacher's own."""
    return replaced_heads(masks, lambda layer, states, _: forms.outputs(layer, states, ("linear",))[0])


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
        return _said(path, file.metadata(), "made_from")


def _said(path: Path, metadata: dict[str, str] | None, key: str) -> dict:
    """What the header of a file of forms says under a key; nothing, where it says nothing."""
    try:
        found = json.loads((metadata or {}).get(key, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: its header holds no object under {key}; align the heads again")
    return found


def form_shapes(config: HydraHeadConfig) -> dict[str, list[int]]:
    """The shapes of a layer's forms, by their names without the layer."""
    heads, groups, shapes = config.num_attention_heads, config.num_key_value_heads, {}
    for kind, branch in enumerate(BRANCHES):
        masks = [[kind] * heads] * config.num_hidden_layers
        with torch.device("meta"):
            attention = HydraHeadAttention(with_masks(config, masks), 0)
        for name, tensor in getattr(attention, f"{branch}_attention").state_dict().items():
            if name == "short_conv.weight":
                tensor = tensor.unflatten(0, (3, heads, -1))
            elif "_norm." not in name:
                per_group = branch == "full" and name.startswith(("k_proj", "v_proj"))
                tensor = tensor.unflatten(0, (groups if per_group else heads, -1))
            shapes[f"{branch}.{name}"] = list(tensor.shape)
        if config.fusion != "concat":
            shapes[f"{branch}.gamma"] = [heads]
    return shapes


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
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            layers = {int(name.split(".")[0]) for name in slices}
            shapes = {name: each.get_shape() for name, each in slices.items() if each.get_dtype() in FLOATS}
            found = [shapes[name] for name in ("0.linear.q_proj.weight", "0.full.k_proj.weight")]
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: not the aligned forms of a teacher's heads ({error}); hydrahead score and "
            "hydrahead.training.align write them as head_forms.safetensors"
        ) from None
    teacher.check_made_from(path, _said(path, metadata, "made_from"))
    if len(layers) != adapter.num_layers or found != expected:
        raise ValueError(
            f"{path}: heads of another teacher, expected {adapter.num_layers} layers of query and KV heads "
            f"{expected}, got {len(layers)} of {found}; align this teacher's"
        )
    if "student" not in metadata:
        raise ValueError(f"{path}: does not say what its heads were aligned for; align them again")
    aligned = _said(path, metadata, "student")
    config = student_config(adapter, adapter.blank_masks, **aligned)
    wanted, of_file = form_shapes(config), options_of(config)
    for layer in range(adapter.num_layers):
        for name, shape in wanted.items():
            if (held := shapes.get(f"{layer}.{name}")) != shape:
                raise ValueError(
                    f"{path}: its {layer}.{name} is {held or 'missing'}, expected floating-point numbers {shape}: "
                    "align the heads again"
                )
    for name, here in of_file.items():
        asked = options.get(name, here)
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
