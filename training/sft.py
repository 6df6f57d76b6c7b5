"""Fine-tune a finished student with TRL: on chats, on prompts with completions, or on plain text.

    accelerate launch -m hydrahead.training.sft --model_name_or_path student --dataset_name chats.jsonl \\
        --output_dir tuned --packing --max_length 8192 --learning_rate 1e-5
    accelerate launch -m hydrahead.training.sft --model_name_or_path student --dataset_name chats.jsonl \\
        --output_dir adapters --learning_rate 2e-4 \\
        --use_peft --lora_target_modules all-linear --lora_modules_to_save fusion

The data are a Hub id, or a JSON lines or Parquet file with `messages`, with `prompt` and `completion`, or with `text`;
the options are those of TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`. Interrupted, the same command goes on
from its last checkpoint. `OUTPUT_DIR/student` is then a folder like the student's, with a card, that `hydrahead push`
takes; `OUTPUT_DIR/adapters` one of PEFT's. A conversion itself ends with the stage `hydrahead.training.finetune`, not
with this.
"""

import importlib.util
import shutil
from pathlib import Path

from ..console import blaming, one_line_errors
from ..data.tokens import is_local
from ..files import atomic_folder, check_writable
from ..hub.card import write_card
from ..hub.folder import MADE_FROM, read_made_from
from ..kernels import use_tuned_kernels
from ..loading import check_checkpoint, load_student_config, load_tokenizer
from ..provenance import Record, environment


def load_rows(script_args, split: str, text_field: str):
    """
    The rows of a split: `dataset_name` is a Hub id or a file.

    Raises:
        ValueError: there are none, or they hold nothing that TRL trains on; one line.
    """
    from datasets import load_dataset
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    name = script_args.dataset_name
    if name is None:
        raise ValueError("no data: --dataset_name is a Hub id, or a .jsonl or .parquet file")
    if is_local(name) and not Path(name).exists():
        raise ValueError(f"{name}: no such file")
    source, options = name, {"name": script_args.dataset_config}
    if Path(name).is_file():
        source, options = "parquet" if name.endswith(".parquet") else "json", {"data_files": name}
    has_bars = Path(name).is_file() and not are_progress_bars_disabled()
    if has_bars:
        disable_progress_bars()  # a file that cannot be read ends in one line, with no bar before it
    with blaming(f"{name}: no rows to train on"):
        rows = load_dataset(source, split=split, **options)
        if not len(rows):
            raise ValueError("it is empty")
        for row in rows:
            check_row(row, text_field)
    if has_bars:
        enable_progress_bars()
    return rows


def check_row(row: dict, text_field: str) -> None:
    """
    Raises:
        ValueError: a row has nothing that TRL trains on; says what it has.
    """

    def is_chat(key: str) -> bool:
        value = row.get(key)
        is_list = isinstance(value, list) and len(value) > 0
        return is_list and all(isinstance(each, dict) and "role" in each for each in value)

    def is_text(key: str) -> bool:
        return isinstance(row.get(key), str)

    completes = all(is_chat(key) or is_text(key) for key in ("prompt", "completion"))
    if not (is_chat("messages") or completes or is_text(text_field) or "input_ids" in row):
        found = ", ".join(f"{key} {value!r:.20}" for key, value in row.items()) or "nothing"
        raise ValueError(f"expected messages, prompt and completion, or {text_field} in every row, found {found}")


def save(trainer, script_args, model_args) -> None:
    """Leave the model or its adapters in a folder of their own, with what they were made from where it is known."""
    output = Path(trainer.args.output_dir)
    saved = output / "saving"
    shutil.rmtree(saved, ignore_errors=True)
    trainer.save_model(str(saved))  # by all processes: weights may be sharded
    if not trainer.accelerator.is_main_process:
        return
    (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle
    with atomic_folder(output / ("adapters" if model_args.use_peft else "student"), overwrite=True) as folder:
        for path in saved.iterdir():
            path.rename(folder / path.name)
        made_from = made_from_of(model_args.model_name_or_path, model_args.model_revision)
        if made_from is not None:
            stages = [*made_from["stages"], stage_facts(trainer.state, script_args)]
            Record(folder / MADE_FROM).write(made_from | {"stages": stages} | environment())
        if made_from is not None and not model_args.use_peft:
            Record(folder / "head_masks.json").write(trainer.accelerator.unwrap_model(trainer.model).config.head_masks)
            write_card(folder)
    saved.rmdir()


def made_from_of(student: str, revision: str | None) -> dict | None:
    """What a student's folder, or the Hub's copy of it, says that it was made from; `None` where it does not."""
    from transformers.utils import cached_file

    if Path(student).is_dir():
        return read_made_from(Path(student))
    found = cached_file(student, MADE_FROM, revision=revision, _raise_exceptions_for_missing_entries=False)
    return read_made_from(Path(found).parent) if found else None


def check_options(script_args, training_args) -> None:
    """
    Raises:
        ValueError: an option of TRL's that nothing here would follow.
    """
    unused = {
        "--dataset_streaming": script_args.dataset_streaming,
        "--push_to_hub": training_args.push_to_hub,
        "--resume_from_checkpoint": training_args.resume_from_checkpoint,
    }
    advice = "rows are read whole, hydrahead push publishes the result, and what was interrupted goes on by itself"
    for name, value in unused.items():
        if value:
            raise ValueError(f"{name}: leave it out; {advice}")


def stage_facts(state, script_args) -> dict:
    """What a stage of training says of itself, as far as TRL's trainer knows it."""
    name = script_args.dataset_name
    rows, datasets = (Path(name).name, []) if Path(name).exists() else (name, [name])
    found = {"stage": "sft", "summary": f"{state.global_step:,} steps on {rows}, with TRL", "steps": state.global_step}
    seen = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
    return found | ({"tokens": int(seen[-1])} if seen else {}) | {"datasets": datasets}


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        run_sft(arguments)


def run_sft(arguments: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: TRL is missing, or no student, no rows or no folder to write can be had; one line, before anything
            is written.
    """
    if importlib.util.find_spec("trl") is None:
        raise ValueError("TRL is not installed: pip install 'hydrahead[train]'")
    from transformers.trainer_utils import get_last_checkpoint
    from trl import (
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("no student: --model_name_or_path is a folder or a Hub id")
    check_options(script_args, training_args)
    student, output = model_args.model_name_or_path, Path(training_args.output_dir)
    config = load_student_config(student, model_args.model_revision)
    tokenizer = load_tokenizer(student, config, model_args.model_revision)
    if Path(student).is_dir():
        check_checkpoint(Path(student), config)
        read_made_from(Path(student))
    check_writable(output)
    rows = load_rows(script_args, script_args.dataset_train_split, training_args.dataset_text_field)
    others = None
    if training_args.eval_strategy != "no":
        others = load_rows(script_args, script_args.dataset_test_split, training_args.dataset_text_field)
    use_tuned_kernels()
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        # Not what a folder names: that could be a kernel on the Hub, which would be fetched and run.
        "attn_implementation": model_args.attn_implementation or "sdpa",
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    trainer = SFTTrainer(
        student,
        args=training_args,
        train_dataset=rows,
        eval_dataset=others,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    save(trainer, script_args, model_args)


if __name__ == "__main__":
    main()
