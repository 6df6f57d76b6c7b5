"""How fast a GPU is at this: its data sheet, times the shares of it that were measured (`hydrahead plan --check`)."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.scoring.scores import HeadScores
from ..convert.selection import select_heads
from ..data.tokens import DataSection
from .cost import Cost, decode_bytes, decode_flops, estimate, prefill_flops, weight_bytes
from .recipe import AlignSection, DistillSection, FinetuneSection, Recipe, RunSection, TeacherSection, load_recipe

# The only numbers of a plan that are neither counted nor from a data sheet: points of benchmarks/decode-cuda.json,
# benchmarks/training-cuda.json and benchmarks/smollm2/recipes.json. `python benchmarks/report.py` writes them anew;
# everything here follows.
MEASURED = json.loads(Path(__file__).with_name("measured.json").read_text())
ALIGN_LENGTH = 512  # tokens of a row where alignment's memory is measured


class Gpu(NamedTuple):
    """A GPU by its data sheet: bytes, bytes a second, and operations a second in dense bf16."""

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 80e9, 3.35e12, 989e12),
    "h200": Gpu("NVIDIA H200 SXM", 141e9, 4.8e12, 989e12),
    "a100": Gpu("NVIDIA A100 SXM 80GB", 80e9, 2.039e12, 312e12),
}


def gpu_of(hardware: str) -> Gpu:
    """The GPU that its driver calls so."""
    for name, gpu in GPUS.items():
        if name.upper() in hardware:
            return gpu
    raise ValueError(f"{hardware}: its data sheet is not known; add it to GPUS in training/speed.py")


def kind_of(config: HydraHeadConfig) -> str:
    """
    What decides how many kernels a model runs: a `teacher`, or a hybrid whose full-attention heads are one block in
    every layer that has some (`uniform`: whole KV groups) or several (`irregular`).
    """
    layouts = [config.head_layout(layer) for layer in range(config.num_hidden_layers)]
    if not any(layout.linear_heads for layout in layouts):
        return "teacher"
    return "irregular" if any(len(layout.blocks) > 1 for layout in layouts) else "uniform"


def decode_bound(config: HydraHeadConfig, context: int, batch: int, gpu: Gpu) -> float:
    """The least seconds of a step of decoding: of what it moves or, in large batches, of what it computes."""
    moving = decode_bytes(config, context, batch) / gpu.bandwidth
    return max(moving, decode_flops(config, context, batch) / gpu.flops)


def sequences_that_fit(config: HydraHeadConfig, context: int, _: int, gpu: Gpu) -> int:
    """How many sequences of a length one GPU holds beside the weights."""
    each = config.kv_bytes_per_token() * context + config.state_bytes()
    return max(0, int((gpu.memory - weight_bytes(config)) // each))


def prefill_bound(config: HydraHeadConfig, context: int, batch: int, gpu: Gpu) -> float:
    """The least seconds of a prefill."""
    return prefill_flops(config, context, batch) / gpu.flops


@dataclass(frozen=True)
class Efficiency:
    """
    What was measured, by the kind of model where that matters.

    Attributes:
        decode_share: of the bound, in a step of decoding.
        kernel_seconds, kernels: of such a step, one CUDA graph: what each kernel adds, and how many a layer has.
        launch_seconds: of an eager prefill, a layer's launches.
        prefill_share: of the bound, in a prefill too long for launches to matter.
    """

    decode_share: float
    kernel_seconds: float
    kernels: dict[str, float]
    launch_seconds: dict[str, float]
    prefill_share: dict[str, float]

    def decode(self, config: HydraHeadConfig, context: int, batch: int, gpu: Gpu) -> float | None:
        """Seconds of a step of decoding; `None` where no model of this kind was measured."""
        if (kernels := self.kernels.get(kind_of(config))) is None:
            return None
        launched = kernels * config.num_hidden_layers * self.kernel_seconds
        return decode_bound(config, context, batch, gpu) / self.decode_share + launched

    def prefill(self, config: HydraHeadConfig, context: int, batch: int, gpu: Gpu) -> float | None:
        """Seconds of a prefill; `None` where no model of this kind was measured."""
        if (share := self.prefill_share.get(kind := kind_of(config))) is None:
            return None
        launches = config.num_hidden_layers * self.launch_seconds.get(kind, 0.0)
        return max(launches, prefill_bound(config, context, batch, gpu) / share)


class Point(NamedTuple):
    """A measurement, and what a prediction of it is made from."""

    facts: dict
    config: HydraHeadConfig
    length: int
    batch: int
    gpu: Gpu

    @property
    def case(self) -> tuple[HydraHeadConfig, int, int, Gpu]:
        return self[1:]


@cache
def points() -> tuple[Point, ...]:
    """The measurements of decoding and prefill."""
    found = MEASURED["inference"]
    return tuple(
        Point(facts, config_of(found["shape"], facts), facts["length"], facts["batch"], gpu_of(facts["hardware"]))
        for facts in found["points"]
    )


def config_of(shape: dict, hybrid: dict) -> HydraHeadConfig:
    """A teacher of a shape, or a hybrid by ratio, unit and strategy, its heads drawn at random."""
    if "ratio" not in hybrid:
        return HydraHeadConfig(**shape, full_attention_position="rope", full_attention_gate=False, fusion="concat")
    sizes = (shape[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    masks = select_heads(HeadScores.drawn(*sizes), hybrid["ratio"], hybrid["strategy"], hybrid["budget_unit"])
    return HydraHeadConfig(**shape, head_masks=masks)


@cache
def efficiency() -> Efficiency:
    """What fits the measurements best."""
    fitted = [point for point in points() if point.facts["is_fitted"]]
    steps, prefills = ([p for p in fitted if p.facts["what"] == what] for what in ("decode", "prefill"))
    inverse_share, kernel_seconds = least_squares(
        (decode_bound(*point.case) / point.facts["measured"], point.facts["kernels"] / point.facts["measured"])
        for point in steps
    )
    kernels, launches, shares = {}, {}, {}
    for point in sorted(steps, key=lambda point: -point.length):  # the shortest, where they weigh most, comes last
        kernels[kind_of(point.config)] = point.facts["kernels"] / point.config.num_hidden_layers
    shortest = min(point.length for point in prefills)
    for point in prefills:
        kind, seconds = kind_of(point.config), point.facts["measured"]
        if point.length == shortest:
            launches[kind] = seconds / point.config.num_hidden_layers
        else:
            shares.setdefault(kind, []).append(prefill_bound(*point.case) / seconds)
    prefill_share = {kind: geometric_mean(found) for kind, found in shares.items()}
    return Efficiency(1 / inverse_share, kernel_seconds, kernels, launches, prefill_share)


def least_squares(rows: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """`x` and `y`, not negative, for which `a x + b y` is nearest to 1 over all rows `(a, b)`."""
    aa = ab = bb = a = b = 0.0
    for left, right in rows:
        aa, ab, bb, a, b = aa + left**2, ab + left * right, bb + right**2, a + left, b + right
    x, y = a * bb - b * ab, b * aa - a * ab
    if x < 0 or y < 0:
        return (a / aa, 0.0) if y < 0 else (0.0, b / bb)
    return x / (aa * bb - ab**2), y / (aa * bb - ab**2)


@cache
def stage_points(stage: str) -> list[tuple[float, float]]:
    """Operations a token, and the share of a GPU's peak at which a model that needs so many was trained; ascending."""
    largest = MEASURED["training"][0]
    cost = measured_stage(largest, stage, largest["rows"], largest["length"])
    found = [(cost, largest["tokens_per_second"][stage], largest["hardware"])]
    for facts in MEASURED["recipes"]:
        if facts["is_fitted"] and facts["stage"] == stage:
            found.append((recipe_stage(facts), facts["tokens_per_second"], facts["hardware"]))
    work = [cost.flops / cost.tokens for cost, _, _ in found]
    return sorted((each, speed * each / gpu_of(hardware).flops) for each, (_, speed, hardware) in zip(work, found))


def stage_share(stage: str, flops_per_token: float = math.inf) -> float:
    """
    The share of a GPU's peak at which a stage trains: between the sizes that were measured by a power law, beyond them
    as the nearest; by default that of the largest. The smaller a model, the more it waits for launches.
    """
    work, shares = zip(*stage_points(stage))
    return float(np.exp(np.interp(np.log(flops_per_token), np.log(work), np.log(shares))))


@cache
def several_share(way: str) -> float:
    """
    The share of their speed that GPUs keep where several train, `ddp` or `fsdp2`: the mean of all stages that were
    measured, in steps of as many micro-batches as were; 1 where none was.
    """
    one = {report["stage"]: report["tokens_per_second"] for report in MEASURED["scaling"] if report["way"] == "one"}
    kept = []
    for report in MEASURED["scaling"]:
        if report["way"] == way and (alone := one.get(report["stage"])):
            most = max(report["tokens_per_second"], key=int)
            kept.append(report["tokens_per_second"][most] / (report["gpus"] * alone[most]))
    return min(geometric_mean(kept), 1.0) if kept else 1.0


def stage_seconds(cost: Cost, gpu: Gpu, gpus: int = 1, way: str = "ddp") -> float:
    """How long a stage takes so many GPUs, each of which has work."""
    alone = cost.flops / (gpu.flops * stage_share(cost.stage, cost.flops / cost.tokens))
    return alone if gpus == 1 else alone / (gpus * several_share(way))


def measured_stage(
    report: dict, stage: str, rows: int, length: int, checkpointing: bool = False, micro_batches: int = 1
) -> Cost:
    """One step of a stage as the benchmarks of training measure it, with a quarter of the heads of each layer."""
    shape, tokens = report["shape"], rows * length
    section = {"tokens": tokens * micro_batches, "batch_tokens": tokens * micro_batches, "length": length}
    section |= {"learning_rate": 0.0, "final_learning_rate": 0.0}
    recipe = Recipe(
        "",
        TeacherSection(""),
        DataSection(""),
        run=RunSection(micro_batch_tokens=tokens),
        align=AlignSection(**section),
        distill=DistillSection(**section, gradient_checkpointing=checkpointing),
        finetune=FinetuneSection(**section),
    )
    student = config_of(shape, {"ratio": 0.25, "strategy": "layer", "budget_unit": "heads"})
    return estimate(recipe, stage, student, config_of(shape, {}))


def recipe_stage(facts: dict) -> Cost:
    """A stage of a recipe that was run."""
    recipe = load_recipe(facts["recipe"])
    student = config_of(facts["shape"], {"ratio": facts["ratio"], "strategy": "global", "budget_unit": "heads"})
    options = {name: value for name, value in asdict(recipe.student).items() if value is not None}
    student = HydraHeadConfig(**student.to_dict() | options)
    return estimate(recipe, facts["stage"], student, config_of(facts["shape"], {}))


def check_points() -> list[dict]:
    """What a plan would have said of everything that was measured: predicted, measured, and the error of it."""
    rows = []

    def add(what: str, case: str, predicted: float | None, measured: float, note: str = "") -> None:
        error = None if predicted is None else predicted / measured - 1
        note = "fitted to it" if error is not None and abs(error) < 1e-9 else note
        rows.append(
            {"what": what, "case": case, "predicted": predicted, "measured": measured, "error": error, "note": note}
        )

    ways = {"decode": efficiency().decode, "prefill": efficiency().prefill, "sequences": sequences_that_fit}
    for point in points():
        facts, case = point.facts, f"{point.facts['model']}, {point.batch} x {point.length:,}"
        note = facts.get("note", "") if facts["is_fitted"] else "repeats keys and values, which no plan counts"
        add(facts["what"], case, ways[facts["what"]](*point.case), facts["measured"], note)
    for report in MEASURED["training"]:
        batch, gpu = (report["rows"], report["length"]), gpu_of(report["hardware"])
        size = f"{report['shape']['num_hidden_layers']} layers of {report['shape']['hidden_size']:,}"
        for stage, speed in report["tokens_per_second"].items():
            cost = measured_stage(report, stage, *batch)
            case = "{}, {} x {:,}".format(size, *batch)
            add(f"{stage}, tokens/s", case, cost.tokens / stage_seconds(cost, gpu), speed)
        for stage, measured in report["peak_bytes"].items():
            shape = (report["align_rows"], ALIGN_LENGTH) if stage == "align" else batch
            cost = measured_stage(report, stage, *shape, checkpointing=True)
            kept, note = cost.activation_bytes + cost.cast_bytes, "above weights, gradients and optimiser"
            add(f"{stage}, bytes", "{}, {} x {:,}".format(size, *shape), kept, measured, note)
    for facts in MEASURED["recipes"]:
        cost, gpu = recipe_stage(facts), gpu_of(facts["hardware"])
        note = "" if facts["is_fitted"] else "beside others on its machine"
        predicted = cost.tokens / stage_seconds(cost, gpu, facts.get("gpus", 1))
        case = facts.get("case", facts["recipe"])
        add(f"{facts['stage']}, tokens/s", case, predicted, facts["tokens_per_second"], note)
        if "bytes" in facts:
            add(f"{facts['stage']}, bytes", case, sum(cost.memory().values()), facts["bytes"], "all that a GPU holds")
    for report in MEASURED["scaling"]:
        stage, gpus, gpu = report["stage"], report["gpus"], gpu_of(report["hardware"])
        for count, speed in report["tokens_per_second"].items():
            most = int(count) * gpus  # micro-batches
            cost = measured_stage(report, stage, report["rows"], report["length"], True, most)
            case = f"{report['way']}, {gpus} x {count} x {report['rows']} x {report['length']:,}"
            add(f"{stage}, tokens/s", case, cost.tokens / stage_seconds(cost, gpu, gpus, report["way"]), speed)
        held = sum(cost.memory(gpus, report["way"] == "fsdp2").values())
        add(f"{stage}, bytes", case, held, report["bytes"], "all that a GPU holds")
    return rows


def sources() -> str:
    """What was measured, where."""
    found = {point.gpu.name for point in points()} | {gpu_of(MEASURED["training"][0]["hardware"]).name}
    return f"one {' and one '.join(sorted(found))} at Qwen3-1.7B's shape, stages at SmolLM2-135M's too"
