"""What a teacher's heads do on a text, and the forms that they start from: before any training (docs/method.md §3)."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ..configuration_hydrahead import HydraHeadConfig
from ..data.corpus import encode_corpus, load_corpus
from ..files import read_utf8
from ..modeling_hydrahead import HydraHeadDecoderLayer, HydraHeadRotaryEmbedding
from .forms import Forms, HeadForms, layer_state, load_meta
from .hooks import input_device, visit_heads
from .options import full_heads_start_as_teachers, teacher_config
from .teachers import Read, TeacherAdapter, TeacherAttention, adapter_for, read_model

LEAST_SCALE = 0.05  # of a linear head that starts nowhere near its teacher: at 0 nothing of it would be trained
CALIBRATION_ROW = 512


def read_calibration_ids(tokenizer, text: Path | None, tokens: int) -> torch.Tensor:
    """
    Rows `[B, 512]` (or one shorter row) of a text's first tokens; Python's standard library where no text is given.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    documents = load_corpus("heldout") if text is None else [read_utf8(text)]
    ids = encode_corpus(tokenizer, documents)[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{text}: too short to calibrate on")
    row = min(CALIBRATION_ROW, len(ids))
    return torch.from_numpy(ids[: len(ids) // row * row]).view(-1, row)


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
    hidden_states = read("model.embed_tokens.weight")[token_ids.cpu()].float().to(device)
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


def full_forms_are_teachers(adapter: TeacherAdapter, read: Read, forms: Forms, config: HydraHeadConfig) -> bool:
    """Whether the full form of every head is the teacher's own head, bit for bit: it loses nothing, anywhere."""
    if not full_heads_start_as_teachers(config):
        return False
    for layer in range(adapter.num_layers):
        prefix = f"{layer}.full."
        held = {name.removeprefix(prefix): form for name, form in forms.items() if name.startswith(prefix)}
        gate, scale = held.pop("output_gate.weight", None), held.pop("gamma", None)
        if (gate is not None and gate.any()) or (scale is not None and (scale != 1).any()):
            return False
        own = full_forms(adapter.attention(read, layer))
        if any(not torch.equal(held[name].float().cpu(), tensor.float().cpu()) for name, tensor in own.items()):
            return False
    return True


def initial_forms(
    attention: TeacherAttention, statistics: HeadStatistics, layer: int, config: HydraHeadConfig
) -> Forms:
    """
    Both forms of every head of a layer before any training (docs/method.md §1, §3).

    The Gated DeltaNet head forgets with a half-life of the teacher head's mean attention distance and writes the more
    strongly the more focused that head's attention is (arXiv 2606.16429); its gates do not look at the token yet.
    """
    heads, dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    dtype, group_size = attention.q.dtype, heads // config.num_key_value_heads
    full = full_forms(attention)
    per_kv_head = ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
    # Query head h gets the rows of KV head h // group_size.
    linear = {n: t.repeat_interleave(group_size, 0) if n in per_kv_head else t.clone() for n, t in full.items()}

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


@torch.no_grad()
def calibrated_forms(teacher: PreTrainedModel, calibration_ids: torch.Tensor, config: HydraHeadConfig) -> Forms:
    """
    Both forms of all heads as alignment should start: `head_forms_of`, with the γ of every linear head by least
    squares against its teacher head (arXiv 2606.16429): a head that is still wrong is less wrong at less volume.

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
    running = HeadForms(config, forms, ("linear",))

    def fit(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> None:
        target = heads.float()
        (output,) = running.outputs(layer, hidden_states)
        scale = (output * target).sum((0, 1, 3)) / output.square().sum((0, 1, 3)).clamp_min(1e-12)
        gamma = forms[f"{layer}.linear.gamma"]
        gamma.mul_(scale.clamp_min(LEAST_SCALE).to(gamma.device))

    visit_heads(teacher, calibration_ids, fit)
    return forms
