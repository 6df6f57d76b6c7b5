"""Model cards made of recorded facts only."""

from huggingface_hub import ModelCardData

from ..configuration_hydrahead import HydraHeadConfig

TAGS = ["custom_code", "hybrid-attention", "linear-attention", "hydrahead"]

_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this repository
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```

Needs `pip install "transformers>=5.21"`. With `flash-linear-attention` installed, linear heads run on its kernels on a
GPU.

Not supported: assisted decoding (a recurrent state cannot be rolled back), 4-D attention masks, the transformers
backends of vLLM and SGLang."""


def describe(config: HydraHeadConfig, teacher: HydraHeadConfig) -> dict[str, str]:
    """
    A model at a glance: head mix, cache and options, in words.

    Args:
        teacher: the configuration of the unconverted teacher (`convert.migration.teacher_config`).
    """
    full = sum(map(sum, config.head_masks))
    total = config.num_hidden_layers * config.num_attention_heads
    share = config.kv_bytes_per_token() / teacher.kv_bytes_per_token()
    scale = "no length scale" if config.logit_scale_base is None else f"length scale from {config.logit_scale_base:g}"
    return {
        "Heads": f"{full} of {total} full attention ({full / total:.1%}), {total - full} Gated DeltaNet",
        "KV cache": f"{config.kv_bytes_per_token():,} bytes a token in bf16, {share:.1%} of the teacher's",
        "State": f"{config.state_bytes():,} bytes a sequence, at any length",
        "Full-attention heads": f"{config.full_attention_position}, {scale}"
        + (", output gate" if config.full_attention_gate else ""),
        "Fusion": config.fusion if config.fusion == "concat" else f"{config.fusion} ({config.fusion_norm} heads)",
    }


def model_card(
    config: HydraHeadConfig,
    teacher: HydraHeadConfig,
    teacher_name: str | None,
    facts: dict[str, str],
    results: str | None = None,
) -> str:
    """
    The README of a converted checkpoint.

    Args:
        teacher_name: Hub id of the teacher, or `None` where it has none.
        facts: further lines of the table, such as what it was trained on; nothing is added to them.
        results: a Markdown section of measurements.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=teacher_name,
        base_model_relation="finetune" if teacher_name else None,
        tags=TAGS,
    )
    rows = describe(config, teacher) | facts
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# HydraHead of {teacher_name or 'a local teacher'}",
        "A pretrained transformer in which some query heads of every layer stay full attention and all others became "
        "Gated DeltaNet heads with a state of constant size (HydraHead, arXiv 2606.20097; an independent code base).",
        f"## Model at a glance\n\n{table}",
        *([f"## Measured\n\n{results}"] if results else []),
        f"## Use\n\n{_USAGE}",
    ]
    return "\n\n".join(parts) + "\n"
