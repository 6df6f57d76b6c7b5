"""From a teacher's weights and head masks to a HydraHead student.

Every query head of a teacher has two *forms*, independent of any mask: the Gated DeltaNet head and the full-attention
head that could stand in its place. A student is the teacher's other weights and, for each head, the form that its mask
chooses. Forms start as the teacher's own rows; alignment (`hydrahead.training.align`) trains them once for all masks.
"""

import copy
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ..configuration_hydrahead import HydraHeadConfig
from ..modeling_hydrahead import (
    HydraHeadAttention,
    HydraHeadDecoderLayer,
    HydraHeadForCausalLM,
    HydraHeadRotaryEmbedding,
)
from .hooks import input_device
from .teachers import (
    Read,
    TeacherAdapter,
    TeacherAttention,
    adapter_for,
    open_teacher,
    read_model,
    read_safetensors,
)

logger = logging.getLogger(__name__)

OPTIONS = (
    *("full_attention_position", "logit_scale_base", "full_attention_gate", "fusion", "fusion_norm"),
    "short_conv_kernel_size",
)
FP32_PARAMETERS = ("gates.", "fusion.")

Forms = dict[str, torch.Tensor]
"""
Both forms of every head, `{layer}.linear.{parameter}` and `{layer}.full.{parameter}`, named as in the branches.

A parameter is `[heads, rows per head, ...]`: one entry per query head, or per KV head for k and v of the full form.
Exceptions: `q_norm` and `k_norm` `[d]` serve all heads, `short_conv.weight` is `[3, H, d, kernel]` (q, k and v), and
`{layer}.linear.gamma`, `{layer}.full.gamma` `[H]` are the scales of the fusion. They hold what a student's options ask
for: no `output_gate` where it has no gate, no `gamma` where its fusion is `concat`.
"""


@dataclass
class HeadStatistics:
    """
    What a teacher's heads do on a calibration text, `[L, H]` fp32 each.

    Attributes:
        rms: root mean square of a head's output before `W_o`.
        distance: mean distance, in tokens, between a query and what it attends to.
        entropy: entropy of a head's attention as a share of uniform attention's, in [0, 1].
    """

    rms: torch.Tensor
    distance: torch.Tensor
    entropy: torch.Tensor


def repeat_heads(kv: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[G, ...]` to `[G * group_size, ...]`: query head `h` gets the rows of KV head `h // group_size`."""
    return kv.repeat_interleave(group_size, dim=0)


def full_forms(attention: TeacherAttention) -> Forms:
    """The teacher's heads as they are, in the names of the full-attention branch."""
    forms = {
        "q_proj.weight": attention.q,
        "k_proj.weight": attention.k,
        "v_proj.weight": attention.v,
        "q_proj.bias": attention.q_bias,
        "k_proj.bias": attention.k_bias,
        "v_proj.bias": attention.v_bias,
        "q_norm.weight": attention.q_norm,
        "k_norm.weight": attention.k_norm,
    }
    return {name: tensor for name, tensor in forms.items() if tensor is not None}


def initial_forms(
    attention: TeacherAttention, statistics: HeadStatistics, layer: int, config: HydraHeadConfig
) -> Forms:
    """
    Both forms of every head of a layer before any training (METHOD §1, §3).

    The Gated DeltaNet head forgets with a half-life of the teacher head's mean attention distance and writes the more
    strongly the more focused that head's attention is (arXiv 2606.16429); its gates do not look at the token yet.
    """
    heads, dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    dtype, group_size = attention.q.dtype, heads // config.num_key_value_heads
    full = full_forms(attention)
    per_kv_head = ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
    linear = {name: repeat_heads(t, group_size) if name in per_kv_head else t.clone() for name, t in full.items()}

    conv = torch.zeros(3, heads, dim, config.short_conv_kernel_size, dtype=dtype)
    conv[..., -1] = 1
    step = math.log(2) / statistics.distance[layer].clamp_min(1)  # decay per token, in nats
    writing = (1 - statistics.entropy[layer]).clamp(0.1, 0.9)
    gamma = statistics.rms[layer]
    linear |= {
        "short_conv.weight": conv,
        "gates.a_proj.weight": torch.zeros(heads, 1, hidden),
        "gates.b_proj.weight": torch.zeros(heads, 1, hidden),
        "gates.b_proj.bias": torch.logit(writing).unsqueeze(1),
        "gates.A_log": torch.zeros(heads, 1),
        "gates.dt_bias": torch.log(torch.expm1(step)).unsqueeze(1),  # softplus of it is the step
    }
    if config.full_attention_gate:
        full["output_gate.weight"] = torch.zeros(heads, dim, hidden, dtype=dtype)
    if config.fusion != "concat":
        linear["gamma"] = gamma.clone()
        full["gamma"] = gamma.clone() if config.fusion_norm == "all" else torch.ones(heads)
    return {f"{layer}.linear.{name}": tensor for name, tensor in linear.items()} | {
        f"{layer}.full.{name}": tensor for name, tensor in full.items()
    }


def attention_state(forms: Forms, layer: int, config: HydraHeadConfig) -> dict[str, torch.Tensor]:
    """State dict of the `HydraHeadAttention` of a layer under `config`'s masks, without its output projection."""
    layout = config.head_layout(layer)
    state = {}
    for branch, query_heads in (("linear", layout.linear_heads), ("full", layout.full_heads)):
        prefix = f"{layer}.{branch}."
        names = [name.removeprefix(prefix) for name in forms if name.startswith(prefix)] if query_heads else []
        for name in names:
            tensor = forms[prefix + name]
            if name == "gamma":
                continue
            if "_norm." in name:
                value = tensor.clone()
            elif name == "short_conv.weight":
                value = tensor[:, list(query_heads)].flatten(0, 2)
            else:
                per_kv_head = branch == "full" and name.startswith(("k_proj", "v_proj"))
                value = tensor[list(layout.kv_heads if per_kv_head else query_heads)].flatten(0, 1)
            state[f"{branch}_attention.{name}"] = value
    if config.fusion != "concat":
        is_full = torch.tensor(config.head_masks[layer], dtype=torch.bool)
        state["fusion.weight"] = torch.where(is_full, forms[f"{layer}.full.gamma"], forms[f"{layer}.linear.gamma"])
    if config.fusion == "gate":
        state["fusion.proj.weight"] = torch.zeros(config.num_attention_heads, config.hidden_size)
    return state


def forms_of_attention(attentions: Iterable[HydraHeadAttention], config: HydraHeadConfig, branch: str) -> Forms:
    """
    The forms in attention layers all of whose heads are of one kind: the inverse of `attention_state`.

    Args:
        attentions: the attention of each layer, from a model of `config`.
        branch: `"linear"` where all heads are Gated DeltaNet, `"full"` where all are full attention.
    """
    forms = {}
    for layer, attention in enumerate(attentions):
        for name, tensor in getattr(attention, f"{branch}_attention").state_dict().items():
            per_kv_head = branch == "full" and name.startswith(("k_proj", "v_proj"))
            heads = config.num_key_value_heads if per_kv_head else config.num_attention_heads
            if name == "short_conv.weight":
                tensor = tensor.unflatten(0, (3, heads, config.head_dim))
            elif "_norm." not in name:
                tensor = tensor.unflatten(0, (heads, -1))
            forms[f"{layer}.{branch}.{name}"] = tensor.detach().cpu().clone()
        if config.fusion != "concat":
            forms[f"{layer}.{branch}.gamma"] = attention.fusion.weight.detach().cpu().clone()
    return forms


def teacher_config(adapter: TeacherAdapter) -> HydraHeadConfig:
    """The HydraHead configuration whose model equals the teacher: nothing converted, nothing added."""
    return HydraHeadConfig(
        **adapter.student_fields(), full_attention_position="rope", full_attention_gate=False, fusion="concat"
    )


def student_config(adapter: TeacherAdapter, head_masks: list[list[int]], **options) -> HydraHeadConfig:
    """
    The configuration of a student.

    `logit_scale_base` defaults to the teacher's native length where full-attention heads have no rotary embedding,
    and to no scale where they keep it.

    Raises:
        ValueError: an unknown option, masks of a wrong shape, or a value that the model does not know.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}, expected some of {', '.join(OPTIONS)}")
    if options.get("full_attention_position", "nope") == "nope":
        options.setdefault("logit_scale_base", adapter.config.max_position_embeddings)
    return HydraHeadConfig(**adapter.student_fields(), head_masks=head_masks, **options)


def options_of(config: HydraHeadConfig) -> dict:
    """All options of a student's heads, by name, those with their defaults too."""
    return {name: getattr(config, name) for name in OPTIONS}


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


def load_meta(module: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device its weights: `dtype`, but fp32 for gates and fusion. All must be there."""
    cast = {
        name: tensor.to(torch.float32 if any(part in name for part in FP32_PARAMETERS) else dtype)
        for name, tensor in state.items()
    }
    missing, unexpected = module.load_state_dict(cast, strict=False, assign=True)
    assert not missing and not unexpected, (missing, unexpected)
    return module


@torch.no_grad()
def measure_heads(
    adapter: TeacherAdapter, read: Read, token_ids: torch.Tensor, device: torch.device | str = "cpu"
) -> HeadStatistics:
    """
    Statistics of all heads of a teacher on a calibration text, on the CPU.

    The teacher is walked layer by layer, in fp32, so that no more than one of its layers is in memory, and every row
    by itself.

    Args:
        token_ids: `[B, T]` int64.
        device: where to compute.
    """
    config = teacher_config(adapter)
    config._attn_implementation = "eager"
    hidden_states = adapter.ends(read)["model.embed_tokens.weight"][token_ids.cpu()].float().to(device)
    position_ids = torch.arange(token_ids.shape[1], device=device).unsqueeze(0)
    position_embeddings = HydraHeadRotaryEmbedding(config).to(device)(hidden_states, position_ids)
    causal_mask = create_causal_mask(config, hidden_states[:1], None, None)  # no padding, no cache
    distances = (position_ids.T - position_ids).clamp_min(0).float()  # [T, T], query minus key
    uniform_entropy = torch.log(position_ids[0] + 1.0).clamp_min(1e-6)  # [T]
    rms, distance, entropy = [], [], []
    for layer in range(adapter.num_layers):
        with init_empty_weights(include_buffers=False):
            module = HydraHeadDecoderLayer(config, layer).eval()
        attention = adapter.attention(read, layer)
        forms = {f"{layer}.full.{name}": tensor for name, tensor in full_forms(attention).items()}
        state = layer_state(adapter, read, layer, attention, forms, config)
        load_meta(module, {name: tensor.to(device) for name, tensor in state.items()}, torch.float32).to(device)

        squares, far, spread = [], [], []
        for row in hidden_states.split(1):  # attention weights are [1, H, T, T]; written in place, layer by layer
            heads, weights = module.self_attn.full_attention(
                module.input_layernorm(row), position_embeddings, attention_mask=causal_mask
            )
            squares.append(heads.pow(2).mean((1, 3)))
            far.append((weights * distances).sum(-1).mean(-1))
            spread.append((-torch.xlogy(weights, weights).sum(-1)[..., 1:] / uniform_entropy[1:]).mean(-1))
            row += module.self_attn.o_proj(heads.flatten(2))
            row += module.mlp(module.post_attention_layernorm(row))
        rms.append(torch.cat(squares).mean(0).sqrt())
        distance.append(torch.cat(far).mean(0))
        entropy.append(torch.cat(spread).mean(0))
    return HeadStatistics(*(torch.stack(each).cpu() for each in (rms, distance, entropy)))


def layer_state(
    adapter: TeacherAdapter, read: Read, layer: int, attention: TeacherAttention, forms: Forms, config: HydraHeadConfig
) -> dict[str, torch.Tensor]:
    """State dict of a `HydraHeadDecoderLayer`: heads from `forms`, everything else from the teacher."""
    prefix = f"model.layers.{layer}."
    state = attention_state(forms, layer, config) | {"o_proj.weight": attention.o}
    if attention.o_bias is not None:
        state["o_proj.bias"] = attention.o_bias
    return {f"self_attn.{name}": tensor for name, tensor in state.items()} | {
        name.removeprefix(prefix): tensor for name, tensor in adapter.rest(read, layer).items()
    }


def head_forms_of(teacher: PreTrainedModel, calibration_ids: torch.Tensor, config: HydraHeadConfig) -> Forms:
    """
    Both forms of all heads of a teacher in memory, before any training: what alignment starts from.

    Args:
        calibration_ids: `[B, T]` token ids of a text on which the heads are measured.
        config: a student's configuration; its masks do not matter.
    """
    adapter, read = adapter_for(teacher.config), read_model(teacher)
    check_calibration_ids(calibration_ids, config.vocab_size)
    statistics = measure_heads(adapter, read, calibration_ids, input_device(teacher))
    forms: Forms = {}
    for layer in range(adapter.num_layers):
        forms |= initial_forms(adapter.attention(read, layer), statistics, layer, config)
    return forms


def check_calibration_ids(token_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise a one-line `ValueError` unless heads can be measured on these: attention needs a token to look back at."""
    if not isinstance(token_ids, torch.Tensor) or token_ids.ndim != 2 or token_ids.is_floating_point():
        got = tuple(token_ids.shape) if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
        raise ValueError(f"calibration_ids must be an integer tensor [rows, tokens], got {got}")
    if token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(f"calibration_ids must hold at least 1 row of 2 tokens, got {tuple(token_ids.shape)}")
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(f"calibration_ids must be in 0 … {vocab_size - 1}, got {token_ids.min()} … {token_ids.max()}")


def random_calibration_ids(vocab_size: int) -> torch.Tensor:
    """Four rows of 256 tokens drawn uniformly: what heads are measured on where no text is given."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (4, 256), generator=generator)


def convert_model(
    teacher: PreTrainedModel | str | Path,
    head_masks: list[list[int]],
    *,
    calibration_ids: torch.Tensor | None = None,
    head_forms: Forms | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **options,
) -> HydraHeadForCausalLM:
    """
    Convert a pretrained transformer into a HydraHead student, on the CPU. Its heads are measured where the teacher is,
    or on an accelerator if there is one.

    A teacher given by name or folder is read one tensor at a time: the memory needed is that of the student and one
    layer. A teacher in memory is copied, so that training the student leaves it as it is.

    Args:
        teacher: a model, a folder, or a Hub id, of a family in `teachers.ADAPTERS`.
        head_masks: `[L][H]`, 1 for heads that stay full attention.
        calibration_ids: `[B, T]` token ids of a text on which the teacher's heads are measured, for the scales and
            gates of the new heads. Random tokens where none are given: good enough to start training from, not better.
        head_forms: trained forms of all heads (from alignment) to use instead of the teacher's rows.
        dtype: of the student; the teacher's by default. Gates and fusion are always fp32.
        revision: of a teacher given by Hub id.
        **options: fields of `HydraHeadConfig` that describe the heads (`OPTIONS`); see `student_config`.

    Returns:
        the student, in eval mode.

    Raises:
        ValueError: the teacher cannot be represented, or options, masks or forms do not fit; before any weight is
            read.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    opened = None if isinstance(teacher, PreTrainedModel) else open_teacher(teacher, revision)
    adapter = adapter_for(teacher.config) if opened is None else opened.adapter
    config = student_config(adapter, head_masks, **options)
    if calibration_ids is not None:
        check_calibration_ids(calibration_ids, config.vocab_size)
    if head_forms is not None:
        check_forms_fit(head_forms, config)

    if opened is None:
        read, device = read_model(teacher), input_device(teacher)
        generation_config = copy.deepcopy(teacher.generation_config)
    else:
        folder = opened.fetch()
        read = read_safetensors(folder)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        has_file = (folder / "generation_config.json").is_file()
        generation_config = GenerationConfig.from_pretrained(folder) if has_file else None

    needs_statistics = head_forms is None and (config.full_attention_share < 1 or config.fusion != "concat")
    if needs_statistics:
        if calibration_ids is None:
            logger.warning("No calibration text given: the new heads are scaled on random tokens.")
            calibration_ids = random_calibration_ids(config.vocab_size)
        statistics = measure_heads(adapter, read, calibration_ids, device)
    else:
        statistics = HeadStatistics(*torch.ones(3, config.num_hidden_layers, config.num_attention_heads))

    ends = adapter.ends(read)
    dtype = dtype or ends["model.norm.weight"].dtype
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        student = HydraHeadForCausalLM(config).eval()
    for layer, module in enumerate(student.model.layers):
        attention = adapter.attention(read, layer)
        forms = initial_forms(attention, statistics, layer, config) if head_forms is None else head_forms
        load_meta(module, layer_state(adapter, read, layer, attention, forms, config), dtype)
    student.load_state_dict({name: tensor.to(dtype) for name, tensor in ends.items()}, strict=False, assign=True)
    student.tie_weights()
    if generation_config is not None:
        student.generation_config = generation_config
    return student
