"""What options of several commands are called, and may be."""

from enum import StrEnum
from typing import Annotated

import typer


class Position(StrEnum):
    nope = "nope"
    rope = "rope"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class FusionNorm(StrEnum):
    all = "all"
    linear = "linear"


class Fusion(StrEnum):
    scale = "scale"
    gate = "gate"
    concat = "concat"


TEACHER = "Hub id, folder or GGUF file: Qwen3, Qwen2.5, Llama, Mistral, Phi-3."
POSITION = Annotated[
    Position | None,
    typer.Option(help="Full-attention heads without position or with RoPE; else nope, or as the forms say."),
]
FUSION_NORM = Annotated[
    FusionNorm | None, typer.Option(help="Which heads the fusion normalises; else all, or as the forms say.")
]


def given(**options) -> dict:
    """Those of a student's options that were given: the others are the forms' own, or defaults."""
    return {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in options.items()
        if value is not None
    }
