"""Model cards, made of what a student's folder records and of nothing else: of `convert`, of each stage, of `run`."""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..console import first_line
from ..evaluation.markdown import escaped, table
from ..evaluation.report import (
    depth_maps,
    draw_report,
    harness_table,
    labels,
    needles_table,
    short_table,
    text_table,
)
from ..files import atomic_file
from ..provenance import Record, digest
from ..serving import RELEASE
from ..serving.heads import check_served
from .facts import Facts
from .folder import STATED
from .heads import PAGE, chosen_heads, draw_heads, heads_page, heads_section
from .metadata import base_models, check_stated, datasets, is_hub_id, metadata, terms

CARD = "README.md"
TESTED = "5.21 and 5.24"  # releases of transformers that the model's tests run on: the lowest and the newest
FEW_ROWS = 24  # of a table that is not folded away
PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
HOW_FAST = ("grad_norm", "learning_rate")  # of a stage's last numbers: how it learned, not what
CITATION = """```bibtex
@misc{tan2026hydrahead,
  title         = {{HydraHead}: From Head-Level Functional Heterogeneity to Specialized Attention Hybridization},
  author        = {Tan, Zhentao and Chen, Wei and Shen, Jingyi and Liu, Yao and Shen, Xu and Wu, Yue and Ye, Jieping},
  year          = {2026},
  eprint        = {2606.20097},
  archivePrefix = {arXiv},
}
```"""


def state(folder: Path, license: str | None = None, language: Sequence[str] = (), **more: str | None) -> None:
    """
    Keep with a student's folder what no record of it says, and its card shall: in `card.json`.

    Args:
        license: as the Hub writes it; in place of the teacher's.
        language: codes of ISO 639; in place of the teacher's.
        **more: `license_name` and `license_link` of one that the Hub has no name for; `repository` and `revision`,
            under which the folder is published.

    Raises:
        ValueError: a licence or language that the Hub would not know as one.
    """
    check_stated(license, list(language))
    given = {"license": license, "language": list(language), **more}
    given = {name: value for name, value in given.items() if value}
    if given:
        record = Record(folder / STATED)
        record.write((record.read() or {}) | given)


def card_of(folder: Path) -> str:
    """
    The card of a student's folder, as Markdown with metadata.

    Raises:
        ValueError: the folder is no student's, does not say what it was made from, or its records are not what
            hydrahead writes; one line.
    """
    facts = Facts.read(folder)
    with _our_records(folder):
        return model_card(facts)


def write_card(folder: Path, overwrite: bool = False) -> None:
    """
    Write the card of a student's folder, the page on its heads, and the pictures of both; what those were of before
    goes.

    Args:
        overwrite: a card that somebody edited, too.

    Raises:
        ValueError: as `card_of`, or the card was edited; nothing is written then.
    """
    check_card(folder, overwrite)
    facts = Facts.read(folder)
    with _our_records(folder):
        texts = {PAGE: heads_page(facts), CARD: model_card(facts)}
        draw_heads(facts, folder)
        if facts.report:
            draw_report(facts.report, folder)
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_file(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
    Record(folder / STATED).write({**facts.stated, "written": digest(folder / CARD)})


def check_card(folder: Path, overwrite: bool = False) -> None:
    """
    Raises:
        ValueError: the card was edited, and may not be overwritten.
    """
    if is_edited(folder) and not overwrite:
        raise ValueError(
            f"{folder / CARD}: was edited since hydrahead wrote it; --overwrite of hydrahead card replaces it"
        )


def is_edited(folder: Path) -> bool:
    """Whether a folder has a card that is not as `write_card` left it."""
    stated = Record(folder / STATED).read() or {}
    return (folder / CARD).is_file() and stated.get("written") != digest(folder / CARD)


@contextlib.contextmanager
def _our_records(folder: Path) -> Iterator[None]:
    """Have records that hydrahead did not write, in whatever they differ, end in one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{folder}: made_from.json, card.json or report.json does not hold what hydrahead writes there "
            f"({reason}); make the folder anew, or put the file back"
        ) from error


def model_card(facts: Facts) -> str:
    """The card of a student, from what is known of it."""
    made_from, config = facts.made_from, facts.config
    heads = config.num_hidden_layers * config.num_attention_heads
    sections = {
        "Model at a glance": [table([["", ""], *at_a_glance(facts).items()], names=2)],
        "Heads": heads_section(facts),
        "Training": _training(facts),
        "Teacher against hybrid": _measured(facts),
        "Use": _usage(facts),
        "Limitations": ["\n".join(f"- {line}" for line in _limitations(facts))],
        "Citation": [
            "The method is HydraHead's (arXiv 2606.20097); the code that made this model is an independent "
            "implementation. Cite the teacher as its own card asks.",
            CITATION,
        ],
    }
    parts = [
        f"---\n{metadata(made_from, facts.stated).to_yaml()}\n---",
        f"# HydraHead of {escaped(_name(made_from))}",
        f"{escaped(_teacher(made_from))}, converted into a hybrid inside each layer: {len(chosen_heads(facts)):,} of "
        f"its {heads:,} query heads stay full attention, all others became Gated DeltaNet heads with a state of "
        "constant size.",
    ]
    for title, paragraphs in sections.items():
        parts += [f"## {title}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def _name(made_from: Mapping) -> str:
    """The teacher's name in a title."""
    if made_from["teacher"] == "demo":
        return "the demo's teacher"
    return made_from["teacher"] if is_hub_id(made_from["teacher"]) or made_from.get("gguf") else "a local teacher"


def _teacher(made_from: Mapping) -> str:
    """The teacher in words; nothing of this machine but a folder's own name, and not even that."""
    if gguf := made_from.get("gguf"):
        words = f"{gguf['file']} (GGUF, {gguf['quantisation']})" + (f", {gguf['name']}" if "name" in gguf else "")
        return words + (f", of {', '.join(gguf['base_models'])}" if "base_models" in gguf else "")
    if made_from["teacher"] == "demo":
        return "The teacher that ships with hydrahead"
    return made_from["teacher"] if is_hub_id(made_from["teacher"]) else "A local folder"


def at_a_glance(facts: Facts) -> dict[str, str]:
    """What a reader compares models by, in words."""
    config, made_from, licence = facts.config, facts.made_from, terms(facts.made_from, facts.stated)
    layers, per_layer = config.num_hidden_layers, [sum(row) for row in config.head_masks]
    heads, full = layers * config.num_attention_heads, sum(per_layer)
    of_teacher = 4 * layers * config.num_key_value_heads * config.head_dim  # bytes a token, bf16
    kv, native = config.kv_bytes_per_token(), config.max_position_embeddings
    scale = "no length scale" if config.logit_scale_base is None else f"length scale from {config.logit_scale_base:g}"
    whole, own = of_teacher * native / 2**20, (kv * native + config.state_bytes()) / 2**20
    rows = {
        "Teacher": _teacher(made_from),
        "Revision": made_from["revision"] or "default",
        "Base model": ", ".join(base_models(made_from)) or "not on the Hub",
        "Licence": licence.get("license_name") or licence.get("license") or "not stated",
        "Languages": ", ".join(licence.get("language", ())) or "not stated",
        "Parameters": f"{sum(facts.parameters.values()):,}",
        "Heads": f"{full} of {heads} full attention ({full / heads:.1%}), {heads - full} Gated DeltaNet",
        "Full-attention heads by layer": ", ".join(map(str, per_layer)),
        "KV cache": f"{kv:,} bytes a token in bf16, {kv / of_teacher:.1%} of the teacher's {of_teacher:,}",
        "State": f"{config.state_bytes():,} bytes a sequence, at any length",
        "Cache and state together": f"{_short(own)} MiB at {native:,} tokens, the teacher's {_short(whole)} MiB",
        "Full attention": f"{config.full_attention_position}, {scale}"
        + (", output gate" if config.full_attention_gate else ""),
        "Fusion": config.fusion if config.fusion == "concat" else f"{config.fusion} ({config.fusion_norm} heads)",
        "Context": f"trained on {_context(facts)}; the teacher's native length is {native:,}",
        "Precision": _precision(facts),
        "Stages": ", ".join(entry["stage"] for entry in facts.trained) or "none: converted, not trained",
    }
    if "calibrated_on" in made_from:
        rows["Calibrated on"] = made_from["calibrated_on"]
    if facts.trained:
        rows |= {"Tokens": _tokens(facts), "Compute": _compute(facts)}
    versions = made_from.get("versions", {})
    known = [name for name in ("hydrahead", "transformers", "torch") if name in versions]
    rows["Made with"] = ", ".join(f"{name} {versions[name]}" for name in known) or "versions that nobody recorded"
    return rows


def _short(number: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _tokens_of(entry: Mapping) -> int | None:
    """Of a stage; a quick alignment says rows, their length, and steps."""
    if "recipe" in entry:
        return entry["recipe"]["tokens"]
    if "tokens" in entry:
        return entry["tokens"]
    sizes = [entry.get(name) for name in ("steps", "rows", "length")]
    return None if None in sizes else sizes[0] * sizes[1] * sizes[2]


def _length_of(entry: Mapping) -> int | None:
    """Tokens of a stage's longest rows."""
    recipe = entry.get("recipe", entry)
    return max((length for length, _ in recipe.get("curriculum") or ()), default=recipe.get("length"))


def _context(facts: Facts) -> str:
    lengths = [length for length in map(_length_of, facts.trained) if length]
    if not facts.trained:
        return "nothing"
    return f"rows of up to {max(lengths):,} tokens" if lengths else "rows of a length that nobody recorded"


def _precision(facts: Facts) -> str:
    """Of the weights, and of the training."""
    counts = sorted(facts.parameters.items(), key=lambda item: -item[1])
    words = [f"{PRECISIONS.get(name, name)} ({count:,})" for name, count in counts]
    used = {entry["mixed_precision"] for entry in facts.trained if "mixed_precision" in entry}
    trained = {frozenset(): "", frozenset({"no"}): "; trained in float32"}.get(
        frozenset(used), "; trained in bf16 autocast over float32 weights"
    )
    return f"weights in {', '.join(words)}{trained}"


def _tokens(facts: Facts) -> str:
    parts = [(entry["stage"], _tokens_of(entry)) for entry in facts.trained]
    words = ", ".join(f"{stage} {'unknown' if count is None else f'{count:,}'}" for stage, count in parts)
    return words if len(parts) == 1 else f"{words}; {sum(count or 0 for _, count in parts):,} together"


def _hours(entry: Mapping) -> str:
    """Device-hours of a stage's optimiser steps; `–` where nobody recorded them."""
    if "seconds" not in entry:
        return "–"
    hours = _short(entry["seconds"] * entry["processes"] / 3600)
    return f"{hours} {DEVICES.get(entry['device'], entry['device'])}-hours"


def _compute(facts: Facts) -> str:
    """What all stages took, by the hardware that they ran on."""
    totals: dict[tuple[str, str], float] = {}
    for entry in facts.trained:
        if "seconds" in entry:
            kind = (DEVICES.get(entry["device"], entry["device"]), entry["hardware"])
            totals[kind] = totals.get(kind, 0) + entry["seconds"] * entry["processes"] / 3600
    words = [f"{_short(hours)} {kind}-hours ({hardware})" for (kind, hardware), hours in totals.items()]
    missing = [entry["stage"] for entry in facts.trained if "seconds" not in entry]
    words += [f"{', '.join(missing)} not recorded"] if missing else []
    return ", ".join(words) + (", of optimiser steps" if totals else "")


def _training(facts: Facts) -> list[str]:
    """What every stage read, how fast it learned, and the numbers that it recorded last."""
    if not facts.trained:
        return ["None: the teacher's weights, calibrated new heads. Train it before use (hydrahead run)."]
    read, rows = [], [["stage", "steps", "rows of", "learning rate", "time", "at its end"]]
    for entry in facts.trained:
        recipe, length = entry.get("recipe", {}), _length_of(entry)
        rate = f"{recipe['learning_rate']:g} to {recipe['final_learning_rate']:g}" if recipe else "–"
        metrics = {name: value for name, value in entry.get("metrics", {}).items() if name not in HOW_FAST}
        ends = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items()) or "–"
        sizes = ["–" if size is None else f"{size:,}" for size in (entry.get("steps"), length)]
        rows.append([entry["stage"], *sizes, rate, _hours(entry), ends])
        read.append(f"- {escaped(entry['stage'])}: {escaped(entry.get('summary') or entry.get('text', 'unknown'))}")
    parts = [table(rows), "Read:\n\n" + "\n".join(read)]
    if all(entry["stage"] == "align" for entry in facts.trained):
        parts += ["Heads were aligned with the teacher's, nothing was trained end to end."]
    return parts


def _measured(facts: Facts) -> list[str]:
    """The report's tables and pictures, with intervals."""
    report = facts.report
    if report is None:
        return ["Not measured: hydrahead evaluate writes a report into the folder, and hydrahead card this section."]
    practised = any(entry.get("recipe", {}).get("retrieval_share") for entry in facts.made_from["stages"])
    words = f"{escaped(' / '.join(labels(report)))}: {report['prompts']} prompts a cell, greedy, in "
    words += f"{escaped(report['text_name'])}, held out; {escaped(report['hardware'])}, {escaped(report['date'])}."
    words += " The hybrid practised what is asked here: training rows held needles." if practised else ""
    parts = [words, table(short_table(report), names=0)]
    if report["needles"]:
        words = "Needles with 95% Wilson intervals; the difference from the first model on the same prompts with its "
        words += "95% bootstrap interval and McNemar's exact p:"
        parts += [_folded("Every task and length", words, _without_seconds(needles_table(report)))]
        parts += ["![Needles found over length, with intervals](accuracy.png)"]
        parts += ["![Needles found over length and depth](depths.png)"] if depth_maps(report) else []
    if report["text"]:
        words = "Loss on text in nats a token, and the difference over the same windows with its interval:"
        parts += [_folded("Every domain and length", words, _without_seconds(text_table(report)))]
    if report["lm_eval"]:
        parts += [_folded("lm-eval", "Values with lm-eval's standard errors:", harness_table(report))]
    return [*parts, "All of it, with the models' own answers: [report.md](report.md), [report.html](report.html)."]


def _without_seconds(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Without the last column: how long an evaluation took is no property of the model."""
    return [row[:-1] for row in rows]


def _folded(title: str, words: str, rows: Sequence[Sequence[str]]) -> str:
    """A table with its words, folded away where it is long."""
    text = f"{words}\n\n{table(rows)}"
    return text if len(rows) <= FEW_ROWS else f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _usage(facts: Facts) -> list[str]:
    """How to load and generate, with what is stated of the repository."""
    repository, revision = map(facts.stated.get, ("repository", "revision"))
    name = json.dumps(repository or ".") + ("" if repository else "  # this folder")
    is_pinned = not repository or (revision or "main") != "main"
    pinned = json.dumps(revision or "main") + ("" if is_pinned else "  # a commit in its place pins code and weights")
    served = shlex.quote(repository or ".")
    if repository and revision:
        served += f" --revision {shlex.quote(revision)}"
    if facts.has_template:
        prompt = 'messages = [{"role": "user", "content": "What is full attention good for?"}]\n'
        prompt += "inputs = tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, "
        prompt += 'return_dict=True, return_tensors="pt"\n)'
    else:
        words = '"The first thing to know is", return_tensors="pt", return_token_type_ids=False'
        prompt = f"inputs = tokenizer({words})"
    code = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
revision = {pinned}
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
{prompt}
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
    lines = [
        code,
        f'`pip install "transformers>=5.21"` is all it needs; tested on transformers {TESTED}. With hydrahead '
        "installed, `import hydrahead` stands in place of `trust_remote_code=True`.",
        'With `pip install flash-linear-attention`, linear heads run on its kernels on a GPU (`device_map="cuda"`). '
        "Without it, and on a CPU, they run on transformers' PyTorch reference: the same function, slower.",
    ]
    with contextlib.suppress(ValueError):  # nothing is said of what the plug-in refuses
        check_served(facts.config)
        lines += [
            f"vLLM {RELEASE} serves it on an NVIDIA GPU through hydrahead's plug-in, without remote code:",
            f"```bash\npip install 'hydrahead[vllm]'\nvllm serve {served} --dtype bfloat16\n```",
        ]
    return lines


def _limitations(facts: Facts) -> list[str]:
    made_from, report = facts.made_from, facts.report
    lines = ["What the teacher does wrong or is biased in, this model inherits; its licence binds here as well."]
    if all(entry["stage"] == "align" for entry in facts.trained):
        lines += ["It was not trained end to end, and is of no use as it is."]
    lengths = sorted({cell["length"] for kind in ("needles", "text") for cell in (report or {}).get(kind, ())})
    lines += [f"Nothing is known of it beyond {lengths[-1]:,} tokens." if lengths else "Nobody has measured it."]
    lines += ["A state of constant size forgets: of what they read, linear heads keep what fits it."]
    if scored := facts.scored:
        probed = ", ".join(map(escaped, scored["capabilities"]))
        lines += [
            f"Heads were chosen for {probed or 'nothing'}; abilities that lean on other heads may have suffered."
        ]
    if names := datasets(made_from):
        lines += [f"Trained on {', '.join(map(escaped, names))}: see their cards for what they hold."]
    return [
        *lines,
        "Not supported: assisted decoding (a recurrent state cannot be rolled back), 4-D attention masks, continuous "
        "batching, prefix tuning, a bare `DynamicCache()` (`DynamicCache(config=model.config)` is right), attention "
        "sharded by transformers' tensor parallelism, the transformers backends of vLLM and SGLang.",
    ]
