"""Recipes: one YAML file that says how a teacher becomes a student, in sections that the three stages share."""

import argparse
import io
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from ..convert.scoring.methods import DEFAULT_METHOD
from ..data.ruler import NEEDLES
from ..data.tokens import DataSection
from ..files import read_utf8

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("align", "distill", "finetune")
MOST_PARTS = 100_000  # of a recipe, masks among them
# What does not decide a stage's numbers: `retrieval_share` does, where it has become the stage's own.
NOT_A_STAGES = (*STAGES, "output", "evaluate", "launch", "score", "select", "retrieval_share")


@dataclass
class TeacherSection:
    """
    Attributes:
        name: Hub id, folder or GGUF file; `demo` is the teacher that ships with the package.
        revision: of a Hub id.
        dtype: in which the teacher computes.
    """

    name: str
    revision: str | None = None
    dtype: typing.Literal["float32", "bfloat16"] = "bfloat16"


@dataclass
class StudentSection:
    """What full-attention heads and the fusion look like; see `HydraHeadConfig`."""

    full_attention_position: str = "nope"
    logit_scale_base: float | None = None
    full_attention_gate: bool = True
    fusion: str = "scale"
    fusion_norm: str = "all"


@dataclass
class RunSection:
    """
    Attributes:
        micro_batch_tokens: tokens of one forward pass on one process; the rest of a batch is accumulated.
        mixed_precision: `bf16` computes in bf16 under autocast; weights and optimiser are fp32 either way.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
        spike_factor: a loss of so many times the median of the last 50 steps stops the run.
        report_to: a tracker that Accelerate knows, such as `tensorboard` or `wandb`.
        save_dtype: of the student that distillation and finetuning write.
    """

    seed: int = 0
    micro_batch_tokens: int = 8192
    mixed_precision: typing.Literal["no", "bf16"] = "bf16"
    save_every: int = 500
    keep: int = 2
    spike_factor: float = 5.0
    report_to: str | None = None
    save_dtype: typing.Literal["float32", "bfloat16"] = "float32"


@dataclass
class EvaluateSection:
    """
    During training:

    Attributes:
        every: steps between evaluations; 0 for none.
        length: tokens of a prompt and of a window of text; the stage's own by default.
        niah_prompts: needles asked for, half of them among four keys; 0 for none. Not in alignment.
        text_windows: windows of held-out text.

    After it, against the teacher (`hydrahead evaluate`):

    Attributes:
        lengths: tokens of a prompt, one after the other; none for no such evaluation.
        tasks, prompts, depths, new_tokens, text_tokens: as in `evaluation.evaluator.Settings`.
    """

    every: int = 0
    length: int | None = None
    niah_prompts: int = 0
    text_windows: int = 16
    lengths: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(NEEDLES))
    prompts: int = 20
    depths: int = 0
    new_tokens: int | None = None
    text_tokens: int = 16_384


@dataclass
class ScoreSection:
    """How heads are scored: the options of `hydrahead score`, by their names."""

    method: list[str] = field(default_factory=lambda: [DEFAULT_METHOD])
    length: int | None = None
    pairs: int = 8
    only: list[str] = field(default_factory=list)
    text: str | None = None
    probe: list[str] = field(default_factory=list)
    built_in: bool = True
    shortlist: int | None = None
    evidence: bool = True


@dataclass
class SelectSection:
    """Which heads stay full attention: the options of `hydrahead select`, by their names."""

    ratio: float = 0.25
    strategy: str = "global"
    budget_unit: str = "kv_groups"
    method: str | None = None
    keep: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    tensor_parallel: int = 1
    weight: list[str] = field(default_factory=list)
    exchange: int = 0


@dataclass
class LoraSection:
    """Low-rank adapters instead of all weights (PEFT), merged into the student when it is saved."""

    r: int = 16
    alpha: int = 32
    target_modules: typing.Any = "all-linear"
    modules_to_save: list = field(default_factory=lambda: ["fusion"])


@dataclass
class StageSection:
    """
    Attributes:
        tokens, batch_tokens: of the whole stage, and of one optimiser step.
        length: tokens of a row.
        learning_rate, final_learning_rate: after warm-up, and at the end of a cosine.
        retrieval_share: share of rows from the demo's mixture, three in four of which hide needles and ask for them.
        answer_weight: what a token of such an answer weighs in the loss; a token of text weighs 1.
        long_share: share of rows from `long_data`.
    """

    tokens: int
    batch_tokens: int
    length: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int = 50
    retrieval_share: float = 0.0
    answer_weight: float = 1.0
    long_share: float = 0.0


@dataclass
class AlignSection(StageSection):
    """
    Attributes:
        mode: `heads` fits the forms of every head before `W_o`, for all masks at once; `layers` (the paper) fits each
            layer's attention under the masks.
    """

    mode: typing.Literal["heads", "layers"] = "heads"
    calibration_tokens: int = 8192


@dataclass
class TeacherCacheSection:
    """
    Attributes:
        folder: where the teacher's likeliest tokens are kept, for further epochs and other students.
        top_k: tokens per position; the vocabulary size is exact.
    """

    folder: str
    top_k: int = 64


@dataclass
class DistillSection(StageSection):
    """
    Attributes:
        head_forms: aligned forms; those of the alignment in the output by default.
        student: a student folder to train on instead of converting the teacher.
        curriculum: `[length, share of the tokens]` one after the other; `length` throughout by default.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.1
    temperature: float = 1.0
    gradient_checkpointing: bool = False
    head_forms: str | None = None
    student: str | None = None
    teacher_cache: TeacherCacheSection | None = None
    curriculum: list | None = None
    lora: LoraSection | None = None


@dataclass
class FinetuneSection(StageSection):
    """
    Attributes:
        student: a student folder; the one that distillation wrote into the output by default.
        curriculum: as of distillation.
    """

    gradient_checkpointing: bool = True
    student: str | None = None
    curriculum: list | None = None
    lora: LoraSection | None = None


@dataclass
class Recipe:
    """
    Attributes:
        output: folder; each stage writes one of its own name.
        masks: JSON file of head masks `[layers][heads]`, or the masks themselves; what `select` writes by default.
            Alignment by heads needs none.
        long_data: long documents, for stages with a `long_share`.
        retrieval_share: as in `StageSection`, of all stages at once; else each has its own.
        launch: file for `accelerate launch --config_file`, or `ddp`, `fsdp2` or `ddp_cpu`, which ship: how
            `hydrahead run` starts stages of several processes; with those of GPUs one for each GPU there is.
    """

    output: str
    teacher: TeacherSection
    data: DataSection
    masks: typing.Any = None
    student: StudentSection = field(default_factory=StudentSection)
    long_data: DataSection | None = None
    run: RunSection = field(default_factory=RunSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    retrieval_share: float | None = None
    launch: str | None = None
    align: AlignSection | None = None
    score: ScoreSection | None = None
    select: SelectSection | None = None
    distill: DistillSection | None = None
    finetune: FinetuneSection | None = None

    @property
    def forms(self) -> Path:
        """Aligned heads that scoring and distillation read."""
        given = self.distill.head_forms if self.distill else None
        return Path(given or Path(self.output) / "align" / "head_forms.safetensors")

    @property
    def chosen_masks(self) -> Path:
        """Masks that `select` writes."""
        return Path(self.output) / "head_masks.json"

    def stage(self, name: str) -> StageSection:
        """The section of a stage; `ValueError` where the recipe has none."""
        section = getattr(self, name)
        if section is None:
            raise ValueError(f"the recipe has no section {name}, which this stage needs")
        return section


def read_arguments(arguments: list[str] | None, description: str) -> tuple[Recipe, bool]:
    """
    Recipe from a command line `--config RECIPE [key=value …] [--dry-run]`, and whether to print the plan only.

    Raises:
        ValueError: see `load_recipe`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--config", required=True, help=f"YAML file, or one of {', '.join(shipped_recipes())}")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print what it costs, and stop")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.seed=1 or distill.tokens=1e9")
    options = parser.parse_intermixed_args(arguments)
    return load_recipe(options.config, options.overrides), options.dry_run


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """
    A recipe from a file, or from the package by its name alone, with `key=value` overrides.

    Raises:
        ValueError: no such file, no YAML, an unknown or missing key, a value of a wrong kind; one line.
    """
    path = RECIPES / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name}: no such recipe; expected a YAML file or one of {', '.join(shipped_recipes())}")
    for item in overrides:
        if "=" not in item:
            raise ValueError(f"{item}: expected key=value")
    text, recipe, key = read_utf8(path), OmegaConf.structured(Recipe), ""
    try:
        content = yaml.safe_load(text)
        if next(islice(_parts(content), MOST_PARTS, None), None):
            raise ValueError(f"{name}: more than {MOST_PARTS:,} values, of anchors within anchors: write them out")
        if not content or not isinstance(content, dict):
            raise ValueError(f"{name}: expected a mapping of keys to values")
        given = OmegaConf.load(io.StringIO(text))
        for values in (given, OmegaConf.from_dotlist(list(overrides))):
            for key, value in _plain(OmegaConf.to_container(values)).items():
                recipe.merge_with({key: value})  # in place: `merge` copies the whole for every key
    except (yaml.YAMLError, OSError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    except TypeError as error:  # OmegaConf's, of a mapping where a list belongs
        raise ValueError(f"{key}: {error}") from None
    except OmegaConfBaseException as error:
        known = f"; known: {', '.join(error.parent_node)}" if isinstance(error, ConfigKeyError) else ""
        raise ValueError(f"{error.full_key or key}: {str(error).splitlines()[0]}{known}") from None
    if missing := OmegaConf.missing_keys(recipe):
        raise ValueError(f"{min(missing)}: missing from the recipe")
    recipe = OmegaConf.to_object(recipe)
    _check_numbers(asdict(recipe))
    if recipe.retrieval_share is not None:
        for section in filter(None, (recipe.align, recipe.distill, recipe.finetune)):
            section.retrieval_share = recipe.retrieval_share
    if recipe.masks is None and recipe.select is not None:
        recipe.masks = str(recipe.chosen_masks)
    return recipe


LEAST = {  # of numbers in recipes, by their keys, whichever section they are in
    **dict.fromkeys(("learning_rate", "final_learning_rate", "warmup_steps", "answer_weight", "spike_factor"), 0),
    **dict.fromkeys(("retrieval_share", "long_share", "kl_weight", "ce_weight", "temperature"), 0),
    **dict.fromkeys(("seed", "heldout_tokens", "every", "niah_prompts", "depths", "exchange"), 0),
    **dict.fromkeys(("tokens", "batch_tokens", "length", "micro_batch_tokens", "save_every", "keep"), 1),
    **dict.fromkeys(("text_windows", "lengths", "prompts", "new_tokens", "text_tokens", "pairs", "shortlist"), 1),
    **dict.fromkeys(("tensor_parallel", "top_k", "r", "alpha"), 1),
    "calibration_tokens": 2,
}


def _parts(value) -> Iterator[bool]:
    """One of each value in YAML, as often as it is referred to."""
    yield True
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(each)


def _check_numbers(values: dict, section: str = "") -> None:
    """Raise a `ValueError` that names the first number of a recipe that is too small, or is none."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{section}{key}.")
        if isinstance(value, list) and key not in ("curriculum", "masks"):  # which are lists of lists
            for each in value:
                if isinstance(each, (list, dict)):
                    raise ValueError(f"{section}{key}: {each}, expected one value")
        for number in (value if isinstance(value, list) else [value]) if key in LEAST else ():
            if number is not None and not LEAST[key] <= number < float("inf"):
                raise ValueError(f"{section}{key}: {number}, expected {LEAST[key]} or more")


def _plain(value, key: str = ""):
    """
    A value as its writer meant it: `8e8` may be a whole number, and `no` in YAML is not always false.

    Raises:
        ValueError: it asks to be replaced by another value, which could be one of the environment.
    """
    if isinstance(value, dict):
        return {name: _plain(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{key}: {value}: recipes do not replace ${{…}}; write the value itself")
    if key == "mixed_precision" and value is False:
        return "no"
    return int(value) if isinstance(value, float) and value.is_integer() else value


def stage_record(recipe: Recipe, stage: str) -> dict:
    """What decides the numbers of a stage: its recipe without the other stages and without how it is watched."""
    record = {key: value for key, value in asdict(recipe).items() if key not in NOT_A_STAGES}
    for key in ("save_every", "keep", "spike_factor", "report_to", "micro_batch_tokens"):
        record["run"].pop(key)
    for section in ("data", "long_data"):
        if record[section]:
            record[section].pop("cache")
    return record | {stage: asdict(recipe.stage(stage))}
