"""What was measured, as one document: docs/benchmarks.md and docs/decode.png, from the JSON files beside this script.

    python benchmarks/report.py

Writes training/measured.json too, the points that `hydrahead plan` computes with.

`report.md` is the document with places for tables and figures; no number of a table is written by hand, and what no
file holds yet is "not measured".
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator

from hydrahead.benchmarks.decode import BEST_TEACHER, LAYERWISE, TEACHER
from hydrahead.benchmarks.decode import MODELS as CPU_MODELS
from hydrahead.benchmarks.measured import OUTPUT, measured
from hydrahead.benchmarks.serving import LENGTHS as SERVED_LENGTHS
from hydrahead.benchmarks.serving import MODELS as SERVED_MODELS
from hydrahead.convert.scoring.scores import THRESHOLD
from hydrahead.evaluation import markdown
from hydrahead.evaluation.figures import BLUE, GREEN, GREY, RED, plt, save_picture
from hydrahead.evaluation.report import short_table
from hydrahead.files import atomic_file
from hydrahead.provenance import Record

FOLDER = Path(__file__).parent
DOCUMENTS = FOLDER.parent / "docs"
GROUPS, HEADS = "12.5% kv_groups", "12.5% heads"
MODELS = (TEACHER, BEST_TEACHER, GROUPS, HEADS, LAYERWISE)
K = 1024
LENGTHS = (2 * K, 32 * K, 128 * K, 512 * K)
TITLES = {
    TEACHER: "teacher as transformers compiles it",
    BEST_TEACHER: "teacher, attention in pieces",
    GROUPS: "12.5% of KV groups",
    HEADS: "12.5% of heads",
    LAYERWISE: "layer-wise (Qwen3.5)",
    "25% heads": "25% of heads",
}
COLORS = {TEACHER: GREY, BEST_TEACHER: "black", GROUPS: RED, HEADS: BLUE, LAYERWISE: GREEN}


class Found:
    """
    A value of a JSON file, or the lack of one, which says so wherever it is written.

    Attributes:
        hardware: that it was measured on, where that is known: nothing is compared across two kinds.
    """

    def __init__(self, value=None, lack: str = "not measured", hardware: str | None = None):
        self.value, self.hardware = value, hardware
        self.lack = value["error"] if isinstance(value, dict) and "error" in value else lack

    def __getitem__(self, key) -> "Found":
        return Found(self.value.get(str(key)) if isinstance(self.value, dict) else None, self.lack, self.hardware)

    def __truediv__(self, other: "Found") -> "Found":
        if self.value is None or other.value is None:
            return Found(lack=(self if self.value is None else other).lack)
        places = {self.hardware, other.hardware} - {None}
        if len(places) > 1:
            return Found(lack="not on one kind of GPU")
        return Found(self.value / other.value, hardware=next(iter(places), None))

    def __bool__(self) -> bool:
        return self.value is not None

    def __format__(self, spec: str) -> str:
        return self.lack if self.value is None else format(self.value, spec)


def read(name: str):
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


FILES = {name.replace("-", "_"): read(name) for name in (
    *("decode-cpu", "scoring-cpu", "scoring-cuda", "training-cpu", "training-cuda", "training-cuda-135m"),
    *("scaling-cuda", "scaling-cuda-quiet", "demo", "serving-cuda", "serving-tokens"),
)}  # fmt: skip
FOUND = {name: Found(value) for name, value in FILES.items()}
PARTS = read("decode-cuda")["parts"]
ROWS = {
    (row["what"], row["tokens"], row["model"]): row | {"hardware": part["hardware"]}
    for part in PARTS.values()
    for row in part["rows"]
}
PASSES = {(run["tuned"], run["backward"], run.get("cache", "a new cache")): run for run in read("kernels-cuda")}


def row(what: str, tokens: int, model: str) -> Found:
    """What the GPUs' file says of one model."""
    found = ROWS.get((what, tokens, model))
    return Found(found, hardware=found and found.get("hardware"))


def best_teacher(what: str, tokens: int) -> Found:
    """The teacher's quicker row, once the one with the best attention is there."""
    rows = [row(what, tokens, name) for name in (BEST_TEACHER, TEACHER)]
    if not rows[0]["tokens_per_second"] or not rows[1]["tokens_per_second"]:
        return rows[0]
    return max(rows, key=lambda one: one["tokens_per_second"].value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table in Markdown; the first `names` columns are text."""
    line = [" --- "] * names + [" ---: "] * (len(header) - names)
    cells = [f"| {' | '.join(header)} |", f"|{'|'.join(line)}|"]
    return "\n".join(cells + [f"| {' | '.join(each)} |" for each in rows])


class Notes:
    """Remarks on rows, numbered, to stand below a table."""

    def __init__(self):
        self.texts: list[str] = []

    def mark(self, one: Found) -> str:
        if not one["note"]:
            return ""
        text = one["note"].value
        if text not in self.texts:
            self.texts.append(text)
        return f" ({self.texts.index(text) + 1})"

    def __str__(self) -> str:
        return "".join(f"\n\n({number}) {text}." for number, text in enumerate(self.texts, 1))


def speed_of_prefill(tokens: int, model: str) -> Found:
    return row("eager", tokens, TEACHER)["prefill_seconds"] / row("eager", tokens, model)["prefill_seconds"]


def first_pass(backward: bool, cache: str) -> Found:
    return Found(PASSES.get((True, backward, cache)))["1 x 14 heads"]["seconds"]


def targets() -> str:
    """The aims and what was measured, over the best teacher and, where that is another, over transformers'."""
    from hydrahead.training.speed import stage_share  # reads the points, which have to be there

    groups = row("decode", 2 * K, GROUPS)
    batches = row("batches", 32 * K, GROUPS)["tokens_per_second"]
    sequences = [row("sequences", 128 * K, name)["sequences"] for name in (GROUPS, BEST_TEACHER)]
    cpu = FOUND["decode_cpu"]["results"]["512"]
    training = FOUND["training_cuda"]["speed"]
    aims = [
        (
            "decoding, 2K: time over the teacher's",
            "≤",
            1.15,
            *(Found(1) / x for x in speeds_of_decoding(2 * K, GROUPS)),
        ),
        *(
            (f"decoding, {tokens // K}K: speed", "≥", least, *speeds_of_decoding(tokens, GROUPS))
            for tokens, least in zip(LENGTHS[1:], (1.4, 2.6, 4.5))
        ),
        ("decoding, 128K, 12.5% of heads: speed", "≥", 1.8, *speeds_of_decoding(128 * K, HEADS)),
        ("decoding, 128K: share of bandwidth", "≥", 0.6, row("decode", 128 * K, GROUPS)["share_of_bandwidth"]),
        *(
            (
                *(f"decoding, {tokens // K}K, Qwen2.5-Coder-1.5B on an H200: speed", "≥", least),
                *(real_speed(tokens, "7to1"), real_step(tokens, TEACHER) / real_step(tokens, "7to1")),
            )
            for tokens, least in ((128 * K, 1.4), (512 * K, 2.4))
        ),
        (
            *("decoding, 32K, largest batches: tokens/s", "≥", 3.0),
            *(batches / one["tokens_per_second"] for one in teachers("batches", 32 * K)),
        ),
        ("sequences of 128K that fit", "≥", 6.0, sequences[0] / sequences[1]),
        *(
            (f"prefill, {tokens // K}K: speed", "≥", least, speed_of_prefill(tokens, GROUPS))
            for tokens, least in zip(LENGTHS, (0.87, 1.3, 2.6))
        ),
        (
            *("kernels a decoded token, 2K", "≤", 1.2),
            *(groups["kernels_per_token"] / one["kernels_per_token"] for one in teachers("decode", 2 * K)),
        ),
        ("first forward pass, empty cache, s", "≤", 20, first_pass(False, "a new cache")),
        ("first backward pass, empty cache, s", "≤", 20, first_pass(True, "a new cache")),
        ("both from a kept cache, s", "≤", 3, first_pass(True, "the cache that the run before left")),
        ("distillation, 1.7B: share of peak", "≥", 0.35, Found(stage_share("distill"))),
        ("alignment: tokens/s, teacher's passes", "≥", 1.0, training["relative_to_teacher"]["align"]),
        (
            *("distillation, SmolLM2-135M: tokens/s", "≥", 200_000),
            FOUND["training_cuda_135m"]["speed"]["tokens_per_second"]["distill"],
        ),
        *(
            (f"CPU, 512 tokens, {TITLES[name]}: time of decoding", "≤", 1.1, Found(1) / cpu[name][SPEED])
            for name in ("25% heads", GROUPS)
        ),
    ]
    rows = []
    for what, sign, limit, value, *plain in aims:
        other = f"{plain[0]:,.3g}" if plain and plain[0] else ""
        digits = ",.0f" if value and value.value >= 1000 else ",.3g"
        rows.append((what, f"{sign} {limit:,}", f"{value:{digits}}", verdict(value, sign, limit), other))
    return table(
        ("over the teacher's", "target", "measured", "", "over the teacher as transformers compiles it"), rows
    )


def teachers(what: str, tokens: int) -> tuple[Found, Found]:
    """The best teacher's row, and the one of transformers' own."""
    return best_teacher(what, tokens), row(what, tokens, TEACHER)


def speeds_of_decoding(tokens: int, model: str) -> list[Found]:
    """How many times faster a compiled step is than those of both teachers."""
    ms = row("decode", tokens, model)["ms_per_token"]
    return [teacher["ms_per_token"] / ms for teacher in teachers("decode", tokens)]


SPEED = "decode_speed_over_teacher"


def verdict(value: Found, sign: str, limit: float) -> str:
    if not value:
        return ""
    return "met" if (value.value <= limit if sign == "≤" else value.value >= limit) else "missed"


def decoding() -> str:
    """Compiled steps of one sequence."""
    notes, rows = Notes(), []
    for tokens in LENGTHS:
        for name in MODELS:
            one = row("decode", tokens, name)
            rows.append(
                (
                    *(f"{tokens:,}", TITLES[name] + notes.mark(one), f"{one['ms_per_token']:.2f}"),
                    *(f"{speeds_of_decoding(tokens, name)[0]:.2f}", f"{one['kernels_per_token']:,}"),
                    *(f"{one['share_of_bandwidth']:.0%}", f"{one['ms_in_kernels']:.2f}"),
                )
            )
    header = ("tokens", "model", "ms a token", "speed", "kernels", "share of bandwidth", "ms in kernels")
    return table(header, shorter(rows), names=2) + str(notes)


def shorter(rows: list[tuple[str, ...]]) -> list[list[str]]:
    """The same, what is not measured, or why, said once in a row, and once for all rows of a length."""
    kept = []
    lengths = Counter(each[0] for each in rows)
    unknown = Counter(each[0] for each in rows if each[2] == "not measured")
    for each in rows:
        if lengths[each[0]] > 1 and lengths[each[0]] == unknown[each[0]]:
            each = (each[0], "all", *each[2:])
        cells = [cell if cell not in each[:place] or re.search(r"\d", cell) else "" for place, cell in enumerate(each)]
        if cells not in kept:
            kept.append(cells)
    return kept


def eager() -> str:
    """Prefills and eager steps."""
    notes, rows = Notes(), []
    for tokens in LENGTHS[:3]:
        for name in (TEACHER, GROUPS, HEADS, LAYERWISE):
            one = row("eager", tokens, name)
            beside = one["prefill_bytes"]
            rows.append(
                (
                    *(f"{tokens:,}", ("teacher" if name == TEACHER else TITLES[name]) + notes.mark(one)),
                    *(f"{one['prefill_seconds']:.3f}", f"{speed_of_prefill(tokens, name):.2f}"),
                    *(f"{one['prefill_kernels']:,}", f"{beside / Found(2**30):.1f}"),
                    *(f"{one['decode_ms_per_token']:.1f}", f"{one['kernels_per_token']:,}"),
                )
            )
    header = ("tokens", "model", "prefill, s", "speed", "kernels", "peak, GiB", "eager step, ms", "kernels")
    return table(header, shorter(rows), names=2) + str(notes)


def batches() -> str:
    """The largest batches at 32K, and how many sequences of 128K fit."""
    notes, rows = Notes(), []
    teacher = best_teacher("batches", 32 * K)["tokens_per_second"]
    for name in MODELS:
        one, fit = row("batches", 32 * K, name), row("sequences", 128 * K, name)
        rows.append(
            (
                *(TITLES[name] + notes.mark(one), f"{one['batch']}", f"{one['ms_per_token']:.2f}"),
                *(f"{one['tokens_per_second']:,.0f}", f"{one['tokens_per_second'] / teacher:.2f}"),
                *(f"{one['share_of_bandwidth']:.0%}", "" if name == TEACHER else f"{fit['sequences']}"),
                "" if name == TEACHER else f"{fit['by_arithmetic']:.1f}",
            )
        )
    header = (
        *("model", "batch at 32K", "ms a step", "tokens/s", "over the teacher's", "share of bandwidth"),
        *("128K sequences that fit", "by arithmetic"),
    )
    return table(header, shorter(rows)) + str(notes)


REAL = read("qwen2.5-coder/speed")
REAL_ROWS = {
    (row["what"], row["tokens"], row["model"]): row | {"hardware": part["hardware"]}
    for name, part in REAL["parts"].items()
    for row in part["rows"]
    if "error" not in row and not name.startswith("generate")  # which have two of a model
}
REAL_TITLES = {
    TEACHER: "teacher as transformers compiles it",
    BEST_TEACHER: "teacher, attention in pieces",
    "3to1": "a quarter of the heads",
    "7to1": "an eighth of the KV groups",
}


def real(what: str, tokens: int, model: str) -> Found:
    """What the file of the real teacher and its hybrids says of one model."""
    found = REAL_ROWS.get((what, tokens, model))
    return Found(found, hardware=found and found["hardware"])


def real_step(tokens: int, model: str) -> Found:
    return real("decode", tokens, model)["ms_per_token"]


def real_speed(tokens: int, model: str) -> Found:
    """How many times faster than the teacher's quicker one a compiled step of the real hybrid is."""
    teachers = [real_step(tokens, name) for name in (BEST_TEACHER, TEACHER)]
    best = min(filter(None, teachers), key=lambda each: each.value, default=teachers[0])
    return best / real_step(tokens, model)


def real_models() -> str:
    """Decoding and prefill of the 1.5B teacher and its hybrids."""
    rows = []
    for tokens in (4 * K, 32 * K, 128 * K, 512 * K):
        for name, title in REAL_TITLES.items():
            one, eager = real("decode", tokens, name), real("eager", tokens, name)
            if not one:
                continue
            prefill = real("eager", tokens, TEACHER)["prefill_seconds"] / eager["prefill_seconds"]
            rows.append(
                (
                    *(f"{tokens:,}", title, f"{one['ms_per_token']:.2f}", f"{real_speed(tokens, name):.2f}"),
                    *(f"{one['kernels_per_token']:,}", f"{one['share_of_bandwidth']:.0%}"),
                    f"{one['cache_bytes'] / Found(2**30):.2f}",
                    *((f"{eager['prefill_seconds']:.3f}", f"{prefill:.2f}") if eager else ("", "")),
                )
            )
    header = ("tokens", "model", "ms a token", "speed", "kernels", "share of bandwidth", "cache, GiB")
    return table((*header, "prefill, s", "speed"), rows, names=2)


def generation() -> str:
    """`generate` of the 1.5B teacher and its hybrids: as it comes, its step compiled, and kernel by kernel."""
    rows = []
    for part, titles in (
        *((f"generate-{tokens}K", REAL_TITLES) for tokens in (4, 32)),
        ("generate-32K-groups", {"groups": "a quarter of the KV groups"}),
    ):
        calls = {(one["model"], one["cache"]): one for one in REAL["parts"][part]["rows"]}
        for name, title in titles.items():
            static, dynamic = (calls[name, cache] for cache in ("static", "dynamic"))
            default = calls.get((name, "default"), dynamic)
            row = [f"{default['tokens']:,}", title, f"{default['first_token_seconds']:.3f}"]
            for one in (default, static):
                row += [f"{one['ms_per_token']:.1f}", f"{one['tokens_per_second']:.0f}"]
            rows.append([*row, f"{static['first_call_seconds']:.0f}", f"{dynamic['ms_per_token']:.1f}"])
    header = (
        "tokens",
        "model",
        "first token, s",
        "ms a token",
        "tokens/s",
        "compiled: ms",
        "tokens/s",
        "first call, s",
    )
    return table((*header, "by kernels, ms"), rows, names=2)


def chunks() -> str:
    """Prefill in chunks."""
    rows = []
    for tokens in (128 * K, 512 * K):
        one = row("chunks", tokens, GROUPS)
        numbers = [one[key] / Found(2**30) for key in ("bytes_beside_cache", "cache_bytes")]
        rows.append((f"{tokens:,}", f"{one['seconds']:.1f}", *(f"{number:.2f}" for number in numbers)))
    return table(("tokens", "s", "peak beside weights and cache, GiB", "cache, GiB"), shorter(rows))


def longest_kernels() -> str:
    """Where a step goes."""
    rows = []
    for tokens in (2 * K, 128 * K):
        found = row("decode", tokens, GROUPS)["ms_of_longest_kernels"]
        for kernel, ms in (found.value or {"not measured": None}).items():
            rows.append((f"{tokens:,}", f"`{kernel[:70]}`" if found else kernel, f"{ms:.3f}" if found else ""))
    return table(("tokens", "kernel", "ms a token"), rows, names=2)


def measured_on() -> str:
    """Where and when the parts of the GPUs' file were measured."""
    places: dict[str, list[str]] = {}
    for name, part in PARTS.items():
        versions = ", ".join(
            f"{package} {number}" for package, number in part["versions"].items() if package != "python"
        )
        places.setdefault(f"{part['hardware']}, {versions}, {part['date']}", []).append(name)
    return "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items())


def cpu_decoding() -> str:
    rows = []
    for tokens, found in FILES["decode_cpu"]["results"].items():
        for name in CPU_MODELS:
            one = Found(found.get(name))
            rows.append(
                (
                    *(f"{int(tokens):,}", TITLES[name] if name != TEACHER else "teacher"),
                    *(f"{one['prefill_seconds']:.2f}", f"{one['decode_ms_per_token']:.1f}", f"{one[SPEED]:.2f}"),
                    *(f"{one['cache_bytes'] / Found(2**20):.1f}", f"{one['cache_share_of_teacher']:.3f}"),
                )
            )
    header = ("tokens", "model", "prefill, s", "ms a token", "speed", "cache, MB", "share")
    return table(header, shorter(rows), names=2)


def demo() -> str:
    return markdown.table(short_table(FILES["demo"]), names=0)


def scoring() -> str:
    names = {
        "two plain forwards": ("two plain forwards",),
        "receivers": ("receivers, all heads",),
        "receivers + senders": ("receivers and two rounds of senders",),
        "naive receivers": ("receivers, one forward per head",),
        "replacement, all heads": ("replacement effect, both forms of all heads",),
        "replacement, estimates": ("replacement effect, estimates",),
    }
    rows = []
    for name, title in names.items():
        cpu, gpu = (FOUND[f"scoring_{device}"]["measured"] for device in ("cpu", "cuda"))
        times = [found[name]["seconds"] / found["two plain forwards"]["seconds"] for found in (cpu, gpu)]
        cells = (f"{times[0]:.3g}", f"{times[1]:.3g}", f"{gpu[name]['seconds']:.3g}", f"{gpu[name]['peak_gib']:.3g}")
        rows.append((*title, *("" if cell == "not measured" else cell for cell in cells)))
    return table(("", "CPU, ×", "GPU, ×", "GPU, s", "GPU, peak GiB"), rows)


def operation_counts() -> str:
    counted = FILES["scoring_cuda"]["computed_at_4096"]
    keys = ("receivers", "senders", "replacement", "naive")
    rows = ((name, *(f"{found[key]:,.3g}" if found[key] < 100 else f"{found[key]:,.0f}" for key in keys))
            for name, found in counted.items())  # fmt: skip
    return table(
        ("forwards, by operation counts", "receivers", "senders", "replacement", "one forward per head"), rows
    )


def real_senders() -> str:
    """What senders of the 1.5B teacher cost, and which are left out."""
    rows = []
    for one in read("qwen2.5-coder/senders")["rows"]:
        above = {key: np.array(one[key]) > THRESHOLD for key in ("old", "new_on_3", "every") if key in one}
        missed = f"{(above['every'] & ~above['new_on_3']).sum()} of {above['every'].sum()}" if "every" in above else ""
        seconds = (f"{one[key]:.1f}" for key in ("receiver_s", "sender_s", "all_32_recorded_again_s"))
        counts = (str(one["receivers"]), str(above["old"].sum()))
        rows.append((f"{one['probe']}, {one['counterfactual']}", *counts, *seconds, missed))
    header = ("probe, counterfactual", "receivers", "senders", "receivers, s", "senders, s", "all 32 again, s")
    return table((*header, "left out"), rows)


def shortlists() -> str:
    errors = FILES["scoring_cpu"]["shortlist_errors"]
    rows = []
    for count, found in errors["replacement"].items():
        senders = errors["senders"][count]
        rows.append(
            (
                *(count, f"{found['spearman']:.2f}", f"{found['overlap_of_best_quarter']:.2f}"),
                *(f"{found['seconds_over_exact']:.2f}", f"{senders['missed']} of {senders['senders']}"),
            )
        )
    header = ("heads measured", "Spearman with all measured", "overlap of the best quarter", "time", "senders missed")
    return table(header, rows)


def training() -> str:
    lines = {
        "distillation, 152K vocabulary: peak memory, chunked over naive (target ≤ 0.5)": (
            *("distillation_peak_bytes", "chunked_over_naive"),
        ),
        "– time (target ≤ 1.1)": ("distillation_seconds", "chunked_over_naive"),
        "alignment: peak memory, 32 layers over 2 (target: flat)": (
            *("alignment_peak_bytes", "layer_by_layer", "most_over_fewest_layers"),
        ),
        "– the same with one graph over all layers": (
            *("alignment_peak_bytes", "one_graph", "most_over_fewest_layers"),
        ),
        "tokens per second over the teacher's forward and backward pass: align": (
            *("speed", "relative_to_teacher", "align"),
        ),
        "– distil": ("speed", "relative_to_teacher", "distill"),
        "– finetune (gradient checkpointing)": ("speed", "relative_to_teacher", "finetune"),
    }
    rows = []
    for title, keys in lines.items():
        cells = []
        for device in ("cpu", "cuda"):
            found = FOUND[f"training_{device}"]
            for key in keys:
                found = found[key]
            cells.append(f"{found:.2f}")
        rows.append((title, *cells))
    return table(("", "CPU", "GPU"), rows)


def scaling() -> str:
    """Tokens per second of all GPUs, their share of as many times one GPU's, and the memory of one of them."""
    found, rows = FOUND["scaling_cuda"], []
    for stage in ("align", "distill", "finetune"):
        one, *several = (found["runs"][way][stage] for way in ("one", "ddp", "fsdp2"))
        for micro in (1, 4):
            cells = [f"{one['tokens_per_second'][micro]:,.0f}"]
            for way, run in zip(("ddp", "fsdp2"), several):
                share = found["scaling"][stage][way]["efficiency"][micro]
                cells.append(f"{run['tokens_per_second'][micro]:,.0f}" + (f" ({share:.0%})" if share else ""))
            rows.append((f"{stage}, {micro} micro-batch{'es' if micro > 1 else ''} a step", *cells))
        memory = [f"{run['memory_gb']:.0f}" for run in (one, *several)]
        rows.append((f"{stage}, peak GB of a GPU", *memory))
    return table(("tokens/s (share of the ideal)", "one GPU", "DDP", "FSDP2"), rows)


def first_passes() -> str:
    rows = []
    for (is_tuned, backward, cache), run in PASSES.items():
        passes = [one for one in run.values() if isinstance(one, dict)]
        title = "forward and backward" if backward else "forward"
        title += ", with the tables, " + cache if is_tuned else ", fla tunes (before there was one shape)"
        seconds = [f"{one['seconds']}" for one in passes]
        rows.append((title, *seconds, ", ".join(str(one["configurations"]) for one in passes)))
    return table(("", "first pass, s", "other heads and rows after it, s", "configurations timed"), rows)


def serving() -> str:
    """A teacher and its hybrid in vLLM."""
    held, rows = FILES["serving_cuda"]["cells"], []
    for kind, lengths in SERVED_LENGTHS.items():
        for tokens in lengths:
            pair = [held[f"{name} {kind} {tokens}"] for name in SERVED_MODELS]
            gain = pair[1]["tokens_per_second"] / pair[0]["tokens_per_second"]
            rows.append(
                (
                    *(f"{tokens:,}", " / ".join(dict.fromkeys(str(one["sequences"]) for one in pair))),
                    " / ".join(f"{one['ms_per_token']:.2f}" for one in pair),
                    " / ".join(f"{one['ms_in_kernels']:.2f}" for one in pair if kind == "one"),
                    *(" / ".join(f"{one['tokens_per_second']:,.0f}" for one in pair), f"{gain:.2f}"),
                    " / ".join(f"{one['prompt_tokens_per_second'] / 1e3:.0f}" for one in pair),
                )
            )
    header = ("tokens", "sequences", "ms a step", "in kernels", "tokens/s", "over the teacher's")
    return table((*header, "prompt tokens/s, thousands"), rows)


def served_real() -> str:
    """The 1.5B teacher and an eighth of its KV groups in vLLM, one sequence."""
    held, rows = read("qwen2.5-coder/serving")["cells"], []
    for tokens in (2 * K, 32 * K, 128 * K):
        pair = [held[f"{name} one {tokens}"] for name in SERVED_MODELS]
        keys = (("first_token_seconds", ".3f"), ("ms_per_token", ".2f"), ("ms_in_kernels", ".2f"))
        rows.append((f"{tokens:,}", *(" / ".join(f"{one[key]:{form}}" for one in pair) for key, form in keys)))
    return table(("tokens", "first token, s", "ms a step", "in kernels"), rows)


def served_full() -> str:
    """A full cache of the 1.5B teacher and its hybrids in vLLM."""
    held, rows = read("qwen2.5-coder/serving")["cells"], []
    titles = {"teacher": "teacher", "hybrid": "an eighth of the KV groups", "groups": "a quarter of the KV groups"}
    for name, title in titles.items():
        one = held[f"{name} full {32 * K}"]
        numbers = (f"{one['ms_per_token']:.1f}", *(f"{one[key]:,.0f}" for key in ("tokens_per_second",)))
        read_at = f"{one['prompt_tokens_per_second'] / 1e3:.0f}"
        rows.append((title, one["environment"]["hardware"], str(one["sequences"]), *numbers, read_at))
    return table(("model", "card", "sequences", "ms a step", "tokens/s", "prompt tokens/s, thousands"), rows, names=2)


def served_needles() -> str:
    """Needles that a trained student of the 1.5B teacher finds in vLLM and in transformers."""
    rows = []
    for name, one in read("qwen2.5-coder/serving")["cells"].items():
        if name.startswith("needles") and (other := one.get("transformers")):
            same = sum(answer == beside for answer, beside in zip(one["answers"], other["answers"], strict=True))
            found = (f"{each['score'] * one['count']:.0f} of {one['count']}" for each in (one, other))
            rows.append((f"{one['tokens']:,}", *found, f"{same} of {one['count']}"))
    return table(("tokens", "found in vLLM", "in transformers", "answers equal"), rows)


def served_kernels() -> str:
    """The longest kernels of a step of one sequence in vLLM at 2K, of both models."""
    found: dict[str, list[float]] = {}
    for place, name in enumerate(SERVED_MODELS):
        for kernel, ms in FILES["serving_cuda"]["cells"][f"{name} one {2 * K}"]["ms_of_longest_kernels"].items():
            found.setdefault(kernel[:70], [0.0, 0.0])[place] += ms
    rows = sorted(found.items(), key=lambda item: -max(item[1]))[:12]
    cells = [(f"`{kernel}`", *(f"{ms:.3f}" if ms else "" for ms in pair)) for kernel, pair in rows]
    return table(("kernel", "teacher, ms", "hybrid, ms"), cells)


def served_tokens() -> str:
    """vLLM's tokens and log-probabilities against transformers'."""
    rows = []
    for model, held in FILES["serving_tokens"].items():
        for part, one in held["parts"].items():
            for name, turn in one["result"].items():
                if not isinstance(turn, dict) or "equal" not in turn:
                    continue
                errors = [turn.get(key) for key in ("mean_error", "mean_error_of_transformers")]
                rows.append(
                    (
                        *(model, f"{part}{', again' if name == 'turn 2' else ''}"),
                        *(f"{turn['equal']} of {turn['prompts']}", f"{turn['widest_margin']:.3g}"),
                        *(("" if each is None else f"{each:.3f}") for each in errors),
                    )
                )
    header = ("model", "part", "equal", "widest margin", "error", "transformers' in bf16")
    return table(header, rows, names=2)


def predictions() -> str:
    """What `hydrahead plan --check` says."""
    from hydrahead.training.plan import checked  # reads the points, which have to be there

    notes, rows = Notes(), []
    for what, case, *numbers, note in checked():
        rows.append((what, case + notes.mark(Found({"note": note} if note else None)), *numbers))
    return table(("", "", "predicted", "measured", "error"), rows, names=2) + str(notes)


TABLES = (
    targets, decoding, eager, batches, real_models, generation, chunks, longest_kernels, measured_on, cpu_decoding,
    demo, scoring, operation_counts, shortlists, real_senders, training, scaling, first_passes, predictions,
    serving, served_real, served_full, served_needles, served_kernels, served_tokens,
)  # fmt: skip


def document() -> str:
    """docs/benchmarks.md, as the files make it."""
    template = (FOLDER / "report.md").read_text()
    tables = {f"{make.__name__}_table": make() for make in TABLES}
    return template.format(**tables, **FOUND)


def draw(path: Path) -> None:
    """Seconds a token and of a prefill over the context, for the teacher and its hybrids; hollow on a rarer GPU."""
    used = Counter(each["hardware"] for each in ROWS.values() if "hardware" in each)
    rarer = [hardware for hardware, _ in used.most_common()[1:]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    kinds = (("decode", "ms_per_token", "ms a token, compiled"), ("eager", "prefill_seconds", "prefill, s"))
    for plot, (what, key, label) in zip(axes, kinds):
        for name in MODELS:
            found = [(tokens, row(what, tokens, name)[key]) for tokens in LENGTHS]
            points = [(tokens, value.value) for tokens, value in found if value]
            other = [(tokens, value.value) for tokens, value in found if value and value.hardware in rarer]
            if points:
                plot.plot(*zip(*points), "o-", color=COLORS[name], label=TITLES[name], linewidth=1.5, markersize=4)
            if other:
                plot.plot(*zip(*other), "o", color=COLORS[name], markerfacecolor="white", markersize=4)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xticks(LENGTHS, [f"{tokens // K}K" for tokens in LENGTHS])
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_major_formatter("{x:g}")
        plot.minorticks_off()
        plot.set_xlabel("context, tokens")
        plot.set_ylabel(label)
        plot.grid(alpha=0.25)
    if rarer:
        figure.suptitle(f"filled: {used.most_common(1)[0][0]}; hollow: {', '.join(rarer)}", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_picture(figure, path)


def main() -> None:
    Record(OUTPUT).write(measured())
    with atomic_file(DOCUMENTS / "benchmarks.md") as partial:
        partial.write_text(document())
    draw(DOCUMENTS / "decode.png")
    print("written: docs/benchmarks.md, docs/decode.png, training/measured.json")


if __name__ == "__main__":
    main()
