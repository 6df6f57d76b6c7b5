"""Tiny teachers of every family and tiny students, random in every parameter, for tests of model and conversion."""

import random

import torch
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 6, 2, 16, 96
GROUP = HEADS // KV_HEADS
NATIVE_LENGTH = 64

# A spread of 0.2 makes attention sharp: with the usual 0.02 every head averages and most mistakes do not show.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": NATIVE_LENGTH,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + i for i in range(HEAD_DIM // 2)],
}
FAMILIES = {
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": HEAD_DIM}),
    "qwen3-untied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"tie_word_embeddings": False, "head_dim": HEAD_DIM, "attention_bias": True},
    ),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "hidden_size": HEADS * HEAD_DIM}),
    "qwen2-untied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False, "hidden_size": HEADS * HEAD_DIM}),
    "llama3-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "head_dim": HEAD_DIM, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-bias": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": False, "hidden_size": HEADS * HEAD_DIM, "attention_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": HEAD_DIM, "sliding_window": None}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"hidden_size": HEADS * HEAD_DIM, "tie_word_embeddings": False}),
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "hidden_size": HEADS * HEAD_DIM,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
        },
    ),
}
ANCHOR = {"full_attention_position": "rope", "fusion": "concat", "full_attention_gate": False}
# Same operations in the same order: the difference is 0 where measured. The house promises 1e-5 in fp32.
ANCHOR_TOLERANCE = 1e-5
ALL_FULL = [[1] * HEADS] * LAYERS
ALL_LINEAR = [[0] * HEADS] * LAYERS
# One irregular layer (3 and 1 readers of the two KV heads), one with a single full-attention head.
MIXED = [[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0]]


@torch.no_grad()
def randomize_vectors(model: nn.Module) -> None:
    """Give norms and biases values that matter: fresh models have ones and zeros there."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)


def make_teacher(family: str, **changes) -> PreTrainedModel:
    """A teacher of `family` with random weights, in eval mode."""
    model_class, config_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | fields | changes)).eval()
    randomize_vectors(model)
    return model


def bf16_teacher(family: str, folder) -> PreTrainedModel:
    """The same teacher in bf16, saved to `folder` and loaded: a `.to` would round its rotary frequencies too."""
    teacher = make_teacher(family)
    teacher.save_pretrained(folder)
    return type(teacher).from_pretrained(folder, dtype=torch.bfloat16).eval()


def student_fields(**changes) -> dict:
    """Fields of the configuration of a tiny student."""
    return SIZES | {"head_dim": HEAD_DIM, "head_masks": MIXED, "logit_scale_base": NATIVE_LENGTH} | changes


def make_student(seed: int = 0, **changes) -> HydraHeadForCausalLM:
    """A student none of whose parameters has its neutral initial value, in eval mode."""
    torch.manual_seed(seed)
    student = HydraHeadForCausalLM(HydraHeadConfig(**student_fields(**changes))).eval()
    randomize_vectors(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "short_conv" in name or "output_gate" in name or "fusion.proj" in name:
                parameter.normal_(0, 0.4)
            elif "fusion.weight" in name:
                parameter.uniform_(0.3, 1.5)
            elif "A_log" in name or "dt_bias" in name:
                parameter.uniform_(-3, 0)
    return student


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `[batch, length]`, special tokens left out."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_masks(layers: int = LAYERS, heads: int = HEADS) -> st.SearchStrategy:
    """Head masks `[layers][heads]`; all-full and all-linear layers come up often."""
    any_row = st.lists(st.integers(0, 1), min_size=heads, max_size=heads)
    row = st.one_of(st.just([0] * heads), st.just([1] * heads), any_row)
    return st.lists(row, min_size=layers, max_size=layers)


def mask_examples(count: int, seed: int = 0) -> list[list[list[int]]]:
    """The masks that every behaviour has to hold for, and `count` random ones."""
    rng = random.Random(seed)
    random_ones = [[[rng.randint(0, 1) for _ in range(HEADS)] for _ in range(LAYERS)] for _ in range(count)]
    return [MIXED, ALL_FULL, ALL_LINEAR, [[0] * HEADS, [1] * HEADS], *random_ones]


CALIBRATION = random_ids(4, 100, seed=1)


def same_weights(one: HydraHeadForCausalLM, other: HydraHeadForCausalLM) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def head_inputs_of_o_proj(model, ids) -> list[torch.Tensor]:
    """What each layer's output projection reads, `[B, T, H, d]`."""
    seen, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].unflatten(-1, (HEADS, HEAD_DIM)))
            )
        )
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen
