"""What a hybrid of a teacher will hold, take and cost: `hydrahead plan`, from the teacher's config and nothing else.

Parameters and bytes are counted, exactly; times are what counted bytes and operations take at the shares of a GPU's
bandwidth and peak that were measured (`speed`), and what that says of everything measured is `hydrahead plan --check`.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.masks import parse_heads, read_masks
from ..convert.options import student_config, teacher_config
from ..convert.scoring.scores import HeadScores
from ..convert.selection import STRATEGIES, Masks, select_heads
from ..convert.teachers import Teacher, TeacherAdapter, open_teacher
from .cost import Cost, estimate, parameters, weight_bytes
from .data import check_rows, stage_lengths
from .recipe import STAGES, Recipe, SelectSection, load_recipe, shipped_recipes
from .speed import (
    GPUS,
    MEASURED,
    Gpu,
    check_points,
    decode_bound,
    efficiency,
    measured_stage,
    prefill_bound,
    sequences_that_fit,
    sources,
    stage_seconds,
    stage_share,
)

LONG_WARMUP = 0.25  # of a stage's steps; more is worth a word
PAPER = "llama3.2-1b-7to1"  # whose stages a teacher gets that is asked for by name


def make_plan(
    name: str,
    overrides: Sequence[str] = (),
    ratio: float | None = None,
    budget_unit: str | None = None,
    context: int = 131_072,
    batch: int = 1,
    gpus: int = 1,
    gpu: str = "h100",
) -> dict:
    """
    Plan a hybrid: what it is beside its teacher, on one GPU, and what training it takes, on several.

    Args:
        name: a Hub id or a folder, to be trained as in the paper; or a recipe, by its name or file.
        overrides: `key=value` of the recipe.
        ratio, budget_unit: as in `select_heads`; the recipe's by default.
        context: tokens of each sequence before the one that is decoded.
        batch: sequences that are prefilled and decoded together.
        gpus, gpu: how many train, and which, by its name in `GPUS`.

    Returns:
        what `hydrahead plan --json` prints: parameters, bytes, seconds and tokens of both models and of each stage,
        and in words what to know of them.

    Raises:
        ValueError: no such recipe, teacher or GPU, or sizes that do not fit together; one line.
    """
    for option, value in (("context", context), ("batch", batch), ("gpus", gpus)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    recipe, teacher = find_recipe(name, overrides)
    if ratio is not None or budget_unit is not None:
        recipe.masks, recipe.select = None, recipe.select or SelectSection()
        recipe.select.ratio = recipe.select.ratio if ratio is None else ratio
        recipe.select.budget_unit = budget_unit or recipe.select.budget_unit
    options = {key: value for key, value in vars(recipe.student).items() if value is not None}
    hybrid = student_config(teacher.adapter, planned_masks(recipe, teacher), **options)
    configs = {"teacher": teacher_config(teacher.adapter), "hybrid": hybrid}
    models = {key: plan_model(config, context, batch, GPUS[gpu]) for key, config in configs.items()}
    stages = {}
    for stage in (stage for stage in STAGES if getattr(recipe, stage) is not None):
        check_rows(recipe, stage, hybrid.max_position_embeddings)
        cost = estimate(recipe, stage, hybrid, configs["teacher"])
        lengths = stage_lengths(recipe.stage(stage))
        stages[stage] = {"length": lengths[-1], "lengths": lengths} | plan_stage(cost, gpus, GPUS[gpu])
    return {
        "teacher": teacher.public_name,
        "context": context,
        "batch": batch,
        "gpu": gpu,
        "gpus": gpus,
        "models": models,
        "stages": stages,
        "notes": [
            *notes_on_heads(recipe, hybrid),
            *notes_on_use(models, hybrid, context, batch),
            *notes_on_stages(recipe, stages, gpus, GPUS[gpu]),
        ],
    }


def find_recipe(name: str, overrides: Sequence[str]) -> tuple[Recipe, Teacher]:
    """A recipe and its teacher; for a teacher's name the paper's stages, in rows that this teacher can read."""
    if name in shipped_recipes() or Path(name).suffix in (".yaml", ".yml"):
        recipe = load_recipe(name, overrides)
        return recipe, open_teacher(recipe.teacher.name, recipe.teacher.revision)
    recipe = load_recipe(PAPER, overrides)  # before the teacher is looked for: mistakes in them are quicker to find
    teacher = open_teacher(name, recipe.teacher.revision)
    paper, shorter = load_recipe(PAPER), []
    for stage in STAGES[:-1]:  # the teacher does not read the rows of finetuning
        length = paper.stage(stage).length
        while length > teacher.config.max_position_embeddings:
            length //= 2
        shorter.append(f"{stage}.length={length}")
    recipe = load_recipe(PAPER, [*shorter, *overrides])
    if recipe.masks == str(recipe.chosen_masks):
        recipe.masks = None  # what lies there was chosen for the recipe's own teacher
    return recipe, teacher


def is_chosen(recipe: Recipe) -> bool:
    """Whether there are masks, and not only a budget for them."""
    return recipe.masks is not None and (recipe.masks != str(recipe.chosen_masks) or recipe.chosen_masks.is_file())


def planned_masks(recipe: Recipe, teacher: Teacher) -> Masks:
    """
    The masks of a recipe; before they are chosen, those of heads drawn at random under its budget.

    Raises:
        ValueError: the recipe has neither; or as `read_masks` and `select_heads`.
    """
    if is_chosen(recipe):
        return read_masks(Path(recipe.masks), teacher) if isinstance(recipe.masks, str) else recipe.masks
    chosen, adapter = recipe.select, teacher.adapter
    if chosen is None:
        raise ValueError("masks: missing from the recipe, and no section select says how many heads stay")
    return select_heads(
        HeadScores.drawn(adapter.num_layers, adapter.num_heads, adapter.num_kv_heads),
        chosen.ratio,
        chosen.strategy,
        chosen.budget_unit,
        keep=parse_heads(chosen.keep),
        drop=parse_heads(chosen.drop),
        tensor_parallel=chosen.tensor_parallel,
    )


def plan_model(config: HydraHeadConfig, context: int, batch: int, gpu: Gpu) -> dict:
    """What a model holds in bf16, and how long one GPU takes for a prefill and for a step of decoding."""
    layouts = [config.head_layout(layer) for layer in range(config.num_hidden_layers)]
    return {
        "parameters": parameters(config),
        "full_attention_heads": sum(len(layout.full_heads) for layout in layouts),
        "kv_heads": sum(len(layout.kv_heads) for layout in layouts),
        "weight_bytes": weight_bytes(config),
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes": config.kv_bytes_per_token() * context,
        "state_bytes": config.state_bytes(),
        "sequences_that_fit": sequences_that_fit(config, context, batch, gpu),
        "decode_seconds": efficiency().decode(config, context, batch, gpu),
        "decode_bound_seconds": decode_bound(config, context, batch, gpu),
        "prefill_seconds": efficiency().prefill(config, context, batch, gpu),
        "prefill_bound_seconds": prefill_bound(config, context, batch, gpu),
    }


def plan_stage(cost: Cost, gpus: int, gpu: Gpu) -> dict:
    """What a stage takes, on as many GPUs as a step's micro-batches can be divided among: DDP's time where it fits."""
    working = max(count for count in range(1, min(gpus, cost.micro_batches) + 1) if cost.micro_batches % count == 0)
    memory = {"replicas": cost.memory(working)} | ({"sharded": cost.memory(working, True)} if gpus > 1 else {})
    fits = [way for way, held in memory.items() if sum(held.values()) <= gpu.memory]
    hours = stage_seconds(cost, gpu, working, "ddp" if "replicas" in fits else "fsdp2") / 3600
    return {
        "tokens": cost.tokens,
        "steps": cost.steps,
        "micro_batches": cost.micro_batches,
        "trained_parameters": cost.trained,
        "bytes_per_gpu": memory,
        "fits": fits,
        "gpus": working,
        "tokens_per_second": cost.tokens / hours / 3600,
        "hours": hours,
        "gpu_hours": hours * working,
    }


def notes_on_heads(recipe: Recipe, config: HydraHeadConfig) -> list[str]:
    """Which heads a plan stands for, where they are not chosen yet."""
    if is_chosen(recipe):
        return []
    budget, layers, groups = recipe.select, config.num_hidden_layers, config.num_key_value_heads
    every_layer = STRATEGIES[budget.strategy].every_layer
    said = f"heads: {budget.ratio:.4g} of the {budget.budget_unit} by {budget.strategy}, drawn at random"
    heads, size = sum(map(sum, config.head_masks)), config.num_attention_heads // groups
    least, most = max(-(-heads // size), every_layer * layers), min(heads, layers * groups)
    if budget.budget_unit == "kv_groups" or budget.strategy == "layerwise" or least == most:
        return [said]
    kept = sum(len(config.head_layout(layer).kv_heads) for layer in range(layers))
    return [
        f"{said}: they read {kept} of {layers * groups} KV heads, where so many heads may read {least} to {most}; "
        "masks=FILE plans those that select wrote"
    ]


def notes_on_use(models: dict, config: HydraHeadConfig, context: int, batch: int) -> list[str]:
    """What a context and a batch ask for that is not there."""
    native, notes = config.max_position_embeddings, []
    if context > native:
        notes.append(f"context: {context / native:.3g} times the teacher's native length of {native:,} tokens")
    for name, model in models.items():
        if model["sequences_that_fit"] < batch:
            needed = model["weight_bytes"] + batch * (model["kv_bytes"] + model["state_bytes"])
            notes.append(
                f"{name}: weights and {batch} x {context:,} tokens take {in_bytes(needed)}, more than one GPU"
            )
        if model["decode_seconds"] is None or model["prefill_seconds"] is None:
            notes.append(f"{name}: where a time is missing, no model of its kind was measured")
    return notes


def notes_on_stages(recipe: Recipe, stages: dict, gpus: int, gpu: Gpu) -> list[str]:
    """What keeps stages from a GPU's memory, or GPUs from work."""
    notes, fitted = [], load_recipe(MEASURED["recipes"][0]["recipe"]).run.micro_batch_tokens
    for name, stage in stages.items():
        if stage["gpus"] < gpus:
            batch = -(-stage["micro_batches"] // gpus) * gpus * recipe.run.micro_batch_tokens
            notes.append(
                f"{name}: a step's {stage['micro_batches']} micro-batches of {recipe.run.micro_batch_tokens:,} tokens "
                f"give {stage['gpus']} of {gpus} GPUs work; {name}.batch_tokens={batch} gives all"
            )
        if not stage["fits"]:
            least = min(stage["bytes_per_gpu"].values(), key=lambda held: sum(held.values()))
            parts = ", ".join(f"{what} {in_bytes(held)}" for what, held in least.items() if held)
            notes.append(f"{name}: more than {in_bytes(gpu.memory)} at the least: {parts}")
        small = measured_stage(MEASURED["training"][-1], name, 1, 1).trained
        fewer = stage["trained_parameters"] <= 2 * small and recipe.run.micro_batch_tokens < fitted
        if stage["trained_parameters"] < small / 2 or fewer:
            notes.append(f"{name}: so small a model waits for launches, which its time leaves out")
        if unread := unread_length(recipe, name):
            notes.append(unread)
        if getattr(recipe.stage(name), "lora", None):
            notes.append(f"{name}: counted as if all weights were trained, not adapters")
    return notes


def amount(count: float, units: Sequence[str] = ("", "K", "M", "B", "T")) -> str:
    """A number as people read it: parameters and tokens by default."""
    for unit in units:
        if count < 999.5 or unit == units[-1]:
            return f"{count:,.0f}{unit}" if count >= 999.5 else f"{count:.3g}{unit}"
        count /= 1000


def in_bytes(count: float) -> str:
    return amount(count, (" B", " KB", " MB", " GB", " TB"))


def in_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else amount(seconds, (" s",))


SHOWN = {"bytes": in_bytes, "tokens/s": "{:,.0f}".format, "sequences": str}


def show_plan(plan: dict) -> None:
    """Print a plan as two tables, of use and of training, and what to know of them."""
    console, gpu = Console(), GPUS[plan["gpu"]]
    console.print(models_table(plan, gpu))
    if plan["stages"]:
        console.print(stages_table(plan, gpu))
    for note in plan["notes"]:
        console.print(note, highlight=False, markup=False)
    console.print(
        "Computed: models' parameters and bytes exactly, times and training's memory after what was measured on "
        f"{sources()} (hydrahead plan --check); several GPUs are taken to be as many times as fast.",
        highlight=False,
    )


def models_table(plan: dict, gpu: Gpu) -> Table:
    """Teacher and hybrid beside each other."""
    context, batch = plan["context"], plan["batch"]
    table = Table(
        Column(f"{context:,} tokens, batch {batch}"),
        *(Column(name, justify="right") for name in ("teacher", "hybrid", "hybrid / teacher")),
        title=escape(f"{plan['teacher']} and its hybrid, on one {gpu.name}"),
    )
    for label, key, shown in (
        ("parameters", "parameters", amount),
        ("full-attention heads", "full_attention_heads", str),
        ("KV heads", "kv_heads", str),
        ("weights in bf16", "weight_bytes", in_bytes),
        ("KV cache of a token", "kv_bytes_per_token", in_bytes),
        ("KV cache of a sequence", "kv_bytes", in_bytes),
        ("states of a sequence", "state_bytes", in_bytes),
        ("sequences that fit beside the weights", "sequences_that_fit", "{:,}".format),
        ("a step of decoding, compiled", "decode_seconds", in_seconds),
        ("  at the GPU's bandwidth or peak", "decode_bound_seconds", in_seconds),
        ("prefill", "prefill_seconds", in_seconds),
        ("  at the GPU's peak", "prefill_bound_seconds", in_seconds),
    ):
        teacher, hybrid = (plan["models"][name][key] for name in ("teacher", "hybrid"))
        table.add_row(label, shown(teacher), shown(hybrid), f"{hybrid / teacher:.3g}" if teacher and hybrid else "")
    return table


def stages_table(plan: dict, gpu: Gpu) -> Table:
    """The stages beside each other."""
    stages = plan["stages"]
    table = Table(
        Column("training"),
        *(Column(name, justify="right") for name in stages),
        title=f"{plan['gpus']} x {gpu.name}, {in_bytes(gpu.memory)} each",
    )

    def memory(way: str):
        def shown(stage: dict) -> str:
            held = in_bytes(sum(stage["bytes_per_gpu"][way].values()))
            return held if way in stage["fits"] else f"{held}, too much"

        return shown

    for label, shown in (
        ("tokens", lambda stage: amount(stage["tokens"])),
        ("tokens of a row", lambda stage: ", ".join(f"{length:,}" for length in stage["lengths"])),
        ("steps", lambda stage: f"{stage['steps']:,}"),
        ("parameters trained", lambda stage: amount(stage["trained_parameters"])),
        ("GPUs that work", lambda stage: str(stage["gpus"])),
        ("memory of each, whole replicas (DDP)" if plan["gpus"] > 1 else "memory", memory("replicas")),
        *([("memory of each, sharded (FSDP2)", memory("sharded"))] if plan["gpus"] > 1 else []),
        ("tokens a second", lambda stage: f"{stage['tokens_per_second']:,.0f}"),
        ("hours", lambda stage: amount(stage["hours"], ("",))),
        ("GPU-hours", lambda stage: amount(stage["gpu_hours"], ("",))),
    ):
        table.add_row(label, *(shown(stage) for stage in stages.values()))
    return table


def checked() -> list[tuple[str, ...]]:
    """What was measured, of what, predicted, measured, error and a note: `check_points` as cells of a table."""
    rows = []
    for row in check_points():
        shown = SHOWN.get(row["what"].split(", ")[-1], in_seconds)
        predicted, error = "–", "–"
        if row["predicted"] is not None:
            predicted, error = shown(row["predicted"]), f"{round(row['error'], 4) + 0.0:+.1%}"
        rows.append((row["what"], row["case"], predicted, shown(row["measured"]), error, row["note"]))
    return rows


def show_check() -> None:
    """Print what was predicted beside what was measured."""
    found, console = efficiency(), Console()
    table = Table("", "", *(Column(name, justify="right") for name in ("predicted", "measured", "error")), "")
    for row in checked():
        table.add_row(*row)
    console.print(table)
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found.prefill_share.items())
    stages = ", ".join(f"{stage} {stage_share(stage, 1):.0%} to {stage_share(stage):.0%}" for stage in STAGES)
    console.print(
        f"Fitted, on {sources()}: decoding {found.decode_share:.0%} of its bound and {1e6 * found.kernel_seconds:.2f} "
        f"µs a kernel; long prefills {shares} of the peak; stages {stages}.",
        highlight=False,
    )


def print_cost(recipe: Recipe, stage: str, adapter: TeacherAdapter, config: HydraHeadConfig) -> None:
    """Print what a stage costs on H100s; `hydrahead plan` says it of other and of more GPUs."""
    cost, gpu = estimate(recipe, stage, config, teacher_config(adapter)), GPUS["h100"]
    memory, hours = in_bytes(sum(cost.memory().values())), stage_seconds(cost, gpu) / 3600
    share, warmup = stage_share(stage, cost.flops / cost.tokens), recipe.stage(stage).warmup_steps
    print(
        f"{stage}: {amount(cost.tokens)} tokens in {cost.steps:,} steps, {amount(cost.trained)} parameters trained; "
        f"{memory} on one GPU; {amount(hours, ('',))} GPU-hours\n"
        f"computed, not measured: {share:.0%} of an H100's {gpu.flops:.3g} FLOP/s in bf16"
    )
    if warmup > LONG_WARMUP * cost.steps:
        print(f"warning: {warmup} of {cost.steps:,} steps warm up; lower {stage}.warmup_steps or {stage}.batch_tokens")
    if unread := unread_length(recipe, stage):
        print(f"warning: {unread}")


def unread_length(recipe: Recipe, stage: str) -> str | None:
    """That a stage's length is none of its curriculum's, in words."""
    section, lengths = recipe.stage(stage), stage_lengths(recipe.stage(stage))
    if section.length in lengths:
        return None
    rows = " and ".join(f"{length:,}" for length in lengths)
    return f"{stage}.length is not read: rows are of {rows} tokens; {stage}.curriculum=null removes the curriculum"
