"""Fine-tune a finished student with TRL: on chats, on prompts with completions, or on plain text.

    accelerate launch -m hydrahead.training.sft --model_name_or_path student --dataset_name chats.jsonl \\
        --output_dir tuned --packing --max_length 8192 --learning_rate 1e-5
    accelerate launch -m hydrahead.training.sft --model_name_or_path student --dataset_name chats.jsonl \\
        --output_dir adapters --learning_rate 2e-4 \\
        --use_peft --lora_target_modules all-linear --lora_modules_to_save fusion

The data are a Hub id, or a JSON lines or Parquet file with `messages`, with `prompt` and `completion`, or with `text`;
the options are those of TRL's `ScriptArguments`, `SFTConfig` and `ModelConfig`. Interrupted, the same command goes on
from its last checkpoint. Writes a folder like the student's, or one of adapters. A conversion itself ends with the
stage `hydrahead.training.finetune`, not with this.
"""

import importlib.util
from pathlib import Path

from ..console import one_line_errors
from ..hub.folder import MADE_FROM, read_made_from
from ..kernels import use_tuned_kernels
from ..provenance import Record


def load_rows(script_args):
    """The rows to train on: `dataset_name` is a Hub id or a file."""
    from datasets import load_dataset

    name, split = script_args.dataset_name, script_args.dataset_train_split
    if name is None:
        raise ValueError("no data: --dataset_name is a Hub id, or a .jsonl or .parquet file")
    if Path(name).is_file():
        return load_dataset("parquet" if name.endswith(".parquet") else "json", data_files=name, split=split)
    return load_dataset(name, name=script_args.dataset_config, split=split)


def record(script_args, model_args, output: Path, steps: int) -> None:
    """Say in the folder, as every stage does, what it was made from: where the student said it too."""
    made_from = read_made_from(Path(model_args.model_name_or_path))
    if made_from is not None:
        name = script_args.dataset_name
        rows, datasets = (Path(name).name, []) if Path(name).exists() else (name, [name])
        stage = {"stage": "sft", "summary": f"{steps:,} steps on {rows}, with TRL"}
        stage |= {"steps": steps, "datasets": datasets}
        Record(output / MADE_FROM).write(made_from | {"stages": [*made_from["stages"], stage]})


def main() -> None:
    if importlib.util.find_spec("trl") is None:
        raise ValueError("TRL is not installed: pip install 'hydrahead[train]'")
    from transformers.trainer_utils import get_last_checkpoint
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    if model_args.model_name_or_path is None:
        raise ValueError("no student: --model_name_or_path is a folder or a Hub id")
    use_tuned_kernels()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(script_args),
        peft_config=get_peft_config(model_args),
    )
    output = Path(training_args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        record(script_args, model_args, output, trainer.state.global_step)


if __name__ == "__main__":
    with one_line_errors():
        main()
