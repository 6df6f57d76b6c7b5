"""Model cards, made of what a student's folder records and of nothing else."""

from collections.abc import Mapping

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


def describe(config: HydraHeadConfig) -> dict[str, str]:
    """A model at a glance: head mix, cache and options, in words."""
    full = sum(map(sum, config.head_masks))
    total = config.num_hidden_layers * config.num_attention_heads
    of_teacher = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token, bf16
    share = config.kv_bytes_per_token() / of_teacher
    scale = "no length scale" if config.logit_scale_base is None else f"length scale from {config.logit_scale_base:g}"
    return {
        "Heads": f"{full} of {total} full attention ({full / total:.1%}), {total - full} Gated DeltaNet",
        "KV cache": f"{config.kv_bytes_per_token():,} bytes a token in bf16, {share:.1%} of the teacher's",
        "State": f"{config.state_bytes():,} bytes a sequence, at any length",
        "Full-attention heads": f"{config.full_attention_position}, {scale}"
        + (", output gate" if config.full_attention_gate else ""),
        "Fusion": config.fusion if config.fusion == "concat" else f"{config.fusion} ({config.fusion_norm} heads)",
    }


def origin(made_from: Mapping) -> dict[str, str]:
    """What a student was made from, in words; nothing that is not recorded."""
    teacher, masks, forms, stages = map(made_from.get, ("teacher", "masks", "forms", "stages"))
    gguf = made_from.get("gguf")
    shown = {"demo": "the one that ships with hydrahead"}.get(teacher, teacher if "/" in teacher else "a local folder")
    rows = {"Teacher": _gguf_in_words(gguf) if gguf else shown, "Revision": made_from["revision"] or "default"}
    if gguf:
        rows["Teacher's licence"] = gguf.get("license_name") or gguf.get("license") or "not stated in the file"
    if "method" in masks:
        words = f"{masks['method']} score, {masks['strategy']}, {masks['ratio']:g} of {masks['budget_unit']}"
        words += f"; {masks['without_evidence']} of {masks['kept']} without evidence (score 0 or less)"
        rows["Heads chosen by"] = words
    if "calibrated_on" in made_from:
        rows["Calibrated on"] = made_from["calibrated_on"]
    if "steps" in forms:
        rows["Align"] = forms.get("summary") or f"{forms['steps']:,} steps, {forms['text']}"
    rows |= {stage["stage"].capitalize(): stage["summary"] for stage in stages}
    if all(stage["stage"] == "align" for stage in stages):
        rows["Trained"] = "heads aligned one by one, nothing end to end" if forms else "no"
    return rows


def _gguf_in_words(gguf: Mapping) -> str:
    """A teacher that was a GGUF file: the file, how it is quantised, and what its header calls it."""
    words = f"{gguf['file']} (GGUF, {gguf['quantisation']})"
    words += f", {gguf['name']}" if "name" in gguf else ""
    return words + (f", of {', '.join(gguf['base_models'])}" if "base_models" in gguf else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def model_card(config: HydraHeadConfig, made_from: Mapping, results: str | None = None) -> str:
    """
    The README of a student.

    Args:
        made_from: as in `hub.checkpoint.save_checkpoint`.
        results: a Markdown section of measurements.
    """
    base = made_from["teacher"] if "/" in made_from["teacher"] else None  # a Hub id, and not a folder's name
    gguf = made_from.get("gguf") or {}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="finetune" if base else None,
        **{name: gguf.get(name) for name in ("license", "license_name", "license_link")},
        tags=TAGS,
    )
    rows = describe(config) | origin(made_from)
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# HydraHead of {base or gguf.get('file') or 'a local teacher'}",
        "A pretrained transformer in which some query heads of every layer stay full attention and all others became "
        "Gated DeltaNet heads with a state of constant size (HydraHead, arXiv 2606.20097; an independent code base).",
        f"## Model at a glance\n\n{table}",
        *([f"## Measured\n\n{results}"] if results else []),
        f"## Use\n\n{_USAGE}",
    ]
    return "\n\n".join(parts) + "\n"
