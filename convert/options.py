"""The options of a student's heads, and the configurations that they and a teacher decide."""

from ..configuration_hydrahead import HydraHeadConfig
from .teachers import TeacherAdapter

BRANCHES = ("linear", "full")  # the kinds of forms that a mask's 0 and 1 choose
OPTIONS = (
    *("full_attention_position", "logit_scale_base", "full_attention_gate", "fusion", "fusion_norm"),
    "short_conv_kernel_size",
)


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


def full_heads_start_as_teachers(config: HydraHeadConfig) -> bool:
    """Whether the full form of a head starts as the teacher's own head: there is nothing to align, nothing is lost."""
    same_place = config.full_attention_position == "rope" and config.logit_scale_base is None
    return same_place and (config.fusion == "concat" or config.fusion_norm == "linear")


def fitted_kinds(config: HydraHeadConfig) -> tuple[str, ...]:
    """The kinds of forms that alignment by heads fits: of those that start as the teacher's heads, none."""
    return BRANCHES[:1] if full_heads_start_as_teachers(config) else BRANCHES


def options_of(config: HydraHeadConfig) -> dict:
    """All options of a student's heads, by name, those with their defaults too."""
    return {name: getattr(config, name) for name in OPTIONS}
