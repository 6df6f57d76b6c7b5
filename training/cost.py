"""What a stage costs, computed from shapes before anything is downloaded: an estimate, and never a measurement."""

from dataclasses import dataclass

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.options import teacher_config
from ..convert.teachers import TeacherAdapter
from .data import stage_phases
from .losses import CHUNK_TOKENS
from .recipe import Recipe, StageSection

PEAK_FLOPS = 989e12  # of one H100 SXM in dense bf16
# What is used of it, by stage: tokens per second of benchmarks/training-cuda.json (one H200, Qwen3-1.7B's shape, rows
# of 4,096 tokens) times the operations below. Alignment computes its losses and small products in fp32.
MFU = {"align": 0.11, "distill": 0.18, "finetune": 0.16}
CHUNK = 64  # of the chunked gated delta rule
LOGITS_COPIES = 5
# Of a value that is kept, bf16 or, around norms, fp32: the peaks of benchmarks/training-cuda.json within a tenth.
VALUE_BYTES = 5


@dataclass
class Cost:
    """
    An estimate of one stage.

    Attributes:
        stage, tokens, steps: which, and how long.
        trained, fixed: parameters with and without gradient and optimiser state.
        flops: of the whole stage.
        state_gb: weights, gradients and optimiser state in fp32, and the teacher, on one process with whole replicas.
        activations_gb: of one micro-batch.
        gpu_hours: at the measured share of an H100's peak.
    """

    stage: str
    tokens: int
    steps: int
    trained: int
    fixed: int
    flops: float
    state_gb: float
    activations_gb: float

    @property
    def gpu_hours(self) -> float:
        return self.flops / (PEAK_FLOPS * MFU[self.stage]) / 3600

    def __str__(self) -> str:
        return (
            f"{self.tokens / 1e9:.3g}B tokens in {self.steps:,} steps, {self.trained / 1e9:.3g}B parameters trained; "
            f"{self.state_gb:.0f} GB of weights, gradients and optimiser, "
            f"{self.activations_gb:.0f} GB of activations; "
            f"{self.gpu_hours:,.1f} GPU-hours"
        )


def branch_parameters(config: HydraHeadConfig, layer: int) -> int:
    """Parameters of a layer's heads, without the output projection; biases and norms are left out."""
    layout, dim, hidden = config.head_layout(layer), config.head_dim, config.hidden_size
    gate = len(layout.full_heads) if config.full_attention_gate else 0
    rows = len(layout.full_heads) + gate + 2 * len(layout.kv_heads) + 3 * len(layout.linear_heads)
    return rows * dim * hidden + len(layout.linear_heads) * (2 * hidden + 3 * dim * config.short_conv_kernel_size)


def body_parameters(config: HydraHeadConfig) -> int:
    """Parameters of all layers."""
    rest = config.hidden_size * (config.num_attention_heads * config.head_dim + 3 * config.intermediate_size)
    return sum(branch_parameters(config, layer) + rest for layer in range(config.num_hidden_layers))


def mixing_flops(config: HydraHeadConfig, length: int) -> float:
    """Operations per token of attention and recurrence in a forward pass over rows of `length`."""
    dim = config.head_dim
    full, total = sum(map(sum, config.head_masks)), config.num_hidden_layers * config.num_attention_heads
    return full * 2 * dim * length + (total - full) * (6 * dim**2 + 8 * CHUNK * dim)


def estimate(
    stage: str,
    section: StageSection,
    config: HydraHeadConfig,
    teacher: HydraHeadConfig,
    micro_tokens: int,
    teacher_bytes: int,
) -> Cost:
    """
    Estimate a stage.

    Args:
        config, teacher: the student's configuration and `convert.options.teacher_config`.
        micro_tokens: tokens of one forward pass on one process.
        teacher_bytes: per parameter of the teacher.
    """
    embedding = config.vocab_size * config.hidden_size
    ends = embedding * (1 if config.tie_word_embeddings else 2)
    tokens = section.tokens // section.batch_tokens * section.batch_tokens
    if stage == "align":
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        forms = [HydraHeadConfig(**config.to_dict() | {"head_masks": [[kind] * heads] * layers}) for kind in (0, 1)]
        kinds = [config] if section.mode == "layers" else forms
        trained = sum(branch_parameters(kind, layer) for kind in kinds for layer in range(layers))
        mixing = sum(mixing_flops(kind, section.length) for kind in kinds)
        forward = 2 * body_parameters(teacher) + mixing_flops(teacher, section.length)
        flops = tokens * (forward + 4 * trained + 3 * mixing)  # projections need no gradient of their input
        fixed = body_parameters(teacher) + ends
    else:
        trained, fixed = body_parameters(config) + ends, 0
        passes = 4 if section.gradient_checkpointing else 3
        flops = 0.0
        for length, steps in stage_phases(section):
            body = 2 * body_parameters(config) + mixing_flops(config, length)
            flops += steps * section.batch_tokens * (passes * body + 3 * 2 * embedding)
        if stage == "distill":
            fixed = body_parameters(teacher) + ends
            flops += tokens * (2 * body_parameters(teacher) + mixing_flops(teacher, section.length) + 2 * embedding)
    return Cost(
        stage=stage,
        tokens=tokens,
        steps=section.tokens // section.batch_tokens,
        trained=trained,
        fixed=fixed,
        flops=flops,
        state_gb=(16 * trained + teacher_bytes * fixed) / 1e9,
        activations_gb=activation_bytes(stage, section, config, micro_tokens) / 1e9,
    )


def activation_bytes(stage: str, section: StageSection, config: HydraHeadConfig, micro_tokens: int) -> float:
    """What one micro-batch keeps for its backward pass, and the logits of one chunk in fp32."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = VALUE_BYTES * (2 * hidden + 9 * heads)
    layer = attention + VALUE_BYTES * (2 * hidden + 4 * config.intermediate_size)
    if stage == "align":
        return micro_tokens * attention * (1 if section.mode == "layers" else 2)
    kept = 4 * hidden * config.num_hidden_layers + layer  # the residual stream is fp32
    per_token = kept if section.gradient_checkpointing else layer * config.num_hidden_layers
    return micro_tokens * per_token + LOGITS_COPIES * 4 * config.vocab_size * min(CHUNK_TOKENS, micro_tokens)


def print_cost(recipe: Recipe, stage: str, adapter: TeacherAdapter, config: HydraHeadConfig) -> None:
    """Print the estimate of a stage."""
    teacher_bytes = 2 if recipe.teacher.dtype == "bfloat16" else 4
    micro = recipe.run.micro_batch_tokens
    cost = estimate(stage, recipe.stage(stage), config, teacher_config(adapter), micro, teacher_bytes)
    print(f"{stage}: {cost}\ncomputed, not measured: {MFU[stage]:.1%} of an H100's {PEAK_FLOPS:.3g} FLOP/s in bf16")
