"""What a model and the stages of its training cost, counted from shapes: parameters, operations and bytes."""

from dataclasses import dataclass

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.options import fitted_kinds
from .data import stage_phases
from .losses import CHUNK_TOKENS
from .recipe import Recipe, StageSection

CHUNK = 64  # tokens of the chunked gated delta rule
# Logits of a chunk that exist at once, counted in fp32 (the student's, the teacher's and their gradient, in bf16). A
# value's bytes while its layer runs, bf16 or, around norms, fp32; and while it waits for the backward pass. Peaks of
# memory that were measured on one GPU are met within a tenth (`hydrahead plan --check`).
LOGITS_COPIES = 1.5
VALUE_BYTES = 3.8
KEPT_BYTES = 2.35


def branch_parameters(config: HydraHeadConfig, layer: int) -> int:
    """Parameters of a layer's heads and of their fusion: all of its attention but the output projection."""
    layout, dim, hidden = config.head_layout(layer), config.head_dim, config.hidden_size
    full, kv, linear = map(len, (layout.full_heads, layout.kv_heads, layout.linear_heads))
    projections = (full + 2 * kv + 3 * linear) * dim * (hidden + config.attention_bias)
    gate = full * dim * hidden if config.full_attention_gate else 0
    norms = 2 * dim * ((full > 0) + (linear > 0)) if config.qk_norm else 0
    convolution = 3 * linear * dim * config.short_conv_kernel_size
    return projections + gate + norms + convolution + fp32_parameters(config, layer)


def fp32_parameters(config: HydraHeadConfig, layer: int) -> int:
    """Those of a layer that stay in fp32: the linear heads' gates, and the fusion."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    fusion = {"concat": 0, "scale": heads, "gate": heads * (1 + hidden)}[config.fusion]
    return len(config.head_layout(layer).linear_heads) * (2 * hidden + 3) + fusion


def layer_parameters(config: HydraHeadConfig, layer: int) -> int:
    """Parameters of a decoder layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    output = hidden * (heads + config.attention_output_bias)
    return branch_parameters(config, layer) + output + 3 * hidden * config.intermediate_size + 2 * hidden


def body_parameters(config: HydraHeadConfig) -> int:
    """Parameters of all layers."""
    return sum(layer_parameters(config, layer) for layer in range(config.num_hidden_layers))


def end_parameters(config: HydraHeadConfig) -> int:
    """Parameters of embedding, final norm and language-model head."""
    return config.hidden_size * (config.vocab_size * (1 if config.tie_word_embeddings else 2) + 1)


def parameters(config: HydraHeadConfig) -> int:
    """All parameters of a model, exactly."""
    return body_parameters(config) + end_parameters(config)


def weight_bytes(config: HydraHeadConfig) -> int:
    """Bytes of a model's weights in bf16, but for what stays in fp32."""
    fp32 = sum(fp32_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return 2 * (parameters(config) + fp32)


def decode_bytes(config: HydraHeadConfig, context: int, batch: int) -> float:
    """Bytes that a step of decoding moves: weights and KV cache are read, states read and written."""
    unread = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size  # an embedding's rows
    return weight_bytes(config) - unread + batch * (config.kv_bytes_per_token() * context + 2 * config.state_bytes())


def decode_flops(config: HydraHeadConfig, context: int, batch: int) -> float:
    """Operations of a step of decoding."""
    head = config.vocab_size * config.hidden_size
    return batch * (2 * (body_parameters(config) + head) + mixing_flops(config, 2 * context))


def prefill_flops(config: HydraHeadConfig, context: int, batch: int) -> float:
    """Operations of a prefill, whose logits are those of the last token only."""
    head = config.vocab_size * config.hidden_size
    return batch * (context * (2 * body_parameters(config) + mixing_flops(config, context)) + 2 * head)


def mixing_flops(config: HydraHeadConfig, length: int) -> float:
    """Operations per token of attention and recurrence in a forward pass over rows of `length`."""
    dim = config.head_dim
    full, total = sum(map(sum, config.head_masks)), config.num_hidden_layers * config.num_attention_heads
    return full * 2 * dim * length + (total - full) * (6 * dim**2 + 8 * CHUNK * dim)


@dataclass
class Cost:
    """
    An estimate of one stage.

    Attributes:
        stage, tokens, steps: which, and how long.
        micro_batches: of a step, on all GPUs together: no more GPUs than that have something to do.
        trained: parameters with gradient and optimiser state; weights, gradients and both moments are fp32.
        flops: of the whole stage.
        teacher_bytes: of the teacher, which stands whole on every GPU.
        activation_bytes: of one micro-batch.
        cast_bytes: of the weights in bf16 that autocast keeps until a forward pass ends, sharded or not.
        gathered_bytes: what sharded training holds beside its shards: weights and gradients of embedding and head,
            weights of two layers and gradients of one.
    """

    stage: str
    tokens: int
    steps: int
    micro_batches: int
    trained: int
    flops: float
    teacher_bytes: int
    activation_bytes: float
    cast_bytes: int
    gathered_bytes: int

    def memory(self, gpus: int = 1, sharded: bool = False) -> dict[str, float]:
        """
        Bytes on each GPU by what they hold, at the peak of a step.

        Args:
            sharded: weights, gradients and optimiser are divided (FSDP2); else every GPU has a whole replica (DDP).
        """
        # Accelerate divides gradients when a step's last micro-batch has been accumulated, not before.
        divided = gpus if sharded and self.micro_batches <= gpus else 1
        return {
            "weights and optimiser": 12 * self.trained / (gpus if sharded else 1),
            "gradients": 4 * self.trained / divided,
            "gathered layers": self.gathered_bytes if sharded else 0,
            "weights in bf16": self.cast_bytes,
            "activations": self.activation_bytes,
            "teacher": self.teacher_bytes,
        }


def estimate(recipe: Recipe, stage: str, config: HydraHeadConfig, teacher: HydraHeadConfig) -> Cost:
    """
    Estimate a stage of a recipe.

    Args:
        config, teacher: the student's configuration and `convert.options.teacher_config`.
    """
    section, layers = recipe.stage(stage), config.num_hidden_layers
    steps, head = section.tokens // section.batch_tokens, config.vocab_size * config.hidden_size
    tokens = steps * section.batch_tokens
    if stage == "align":
        fitted = range(len(fitted_kinds(config)))
        kinds = [config] if section.mode == "layers" else [of_one_kind(config, kind) for kind in fitted]
        units = [sum(branch_parameters(kind, layer) for kind in kinds) for layer in range(layers)]
        trained, ends = sum(units), 0
        mixing = sum(mixing_flops(kind, section.length) for kind in kinds)
        forward = 2 * body_parameters(teacher) + mixing_flops(teacher, section.length)
        flops = tokens * (forward + 4 * trained + 3 * mixing)  # projections need no gradient of their input
    else:
        units = [layer_parameters(config, layer) for layer in range(layers)]
        trained, ends = parameters(config), end_parameters(config)
        passes = 4 if section.gradient_checkpointing else 3
        flops = 0.0
        for length, count in stage_phases(section):
            body = 2 * body_parameters(config) + mixing_flops(config, length)
            flops += count * section.batch_tokens * (passes * body + 3 * 2 * head)
            if stage == "distill":
                body = 2 * body_parameters(teacher) + mixing_flops(teacher, length)
                flops += count * section.batch_tokens * (body + 2 * head)
    teacher_bytes = 2 if recipe.teacher.dtype == "bfloat16" else 4
    return Cost(
        stage=stage,
        tokens=tokens,
        steps=steps,
        micro_batches=section.batch_tokens // recipe.run.micro_batch_tokens,
        trained=trained,
        flops=flops,
        teacher_bytes=teacher_bytes * parameters(teacher) if stage != "finetune" else 0,
        activation_bytes=activation_bytes(stage, section, config, recipe.run.micro_batch_tokens),
        cast_bytes=0 if recipe.run.mixed_precision == "no" else 2 * (max(units) if stage == "align" else trained),
        gathered_bytes=4 * (2 * ends + 3 * max(units)),
    )


def of_one_kind(config: HydraHeadConfig, kind: int) -> HydraHeadConfig:
    """The same student with all heads linear (0) or full attention (1)."""
    masks = [[kind] * config.num_attention_heads] * config.num_hidden_layers
    return HydraHeadConfig(**config.to_dict() | {"head_masks": masks})


def activation_bytes(stage: str, section: StageSection, config: HydraHeadConfig, tokens: int) -> float:
    """What a micro-batch keeps for its backward pass, the logits of one chunk, and the head's gradient beside them."""
    hidden = config.hidden_size
    attention = VALUE_BYTES * (2 * hidden + 9 * config.num_attention_heads * config.head_dim)
    if stage == "align":
        return tokens * attention * (1 if section.mode == "layers" else len(fitted_kinds(config)))
    layer = attention + VALUE_BYTES * (2 * hidden + 4 * config.intermediate_size)
    per_token = layer * KEPT_BYTES / VALUE_BYTES * config.num_hidden_layers
    if section.gradient_checkpointing:
        per_token = 4 * hidden * config.num_hidden_layers + layer  # the residual stream is fp32
    return tokens * per_token + 4 * config.vocab_size * (hidden + LOGITS_COPIES * min(CHUNK_TOKENS, tokens))
