"""
Opening models. A folder or a repository from a stranger is data: none of its code is run, and nobody is asked whether
to run it, unless the caller trusts it; weights are safetensors, and pickles are not read.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .configuration_hydrahead import HydraHeadConfig
from .console import blaming
from .files import read_json

FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_config(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """
    The configuration of a folder or of a Hub id.

    Raises:
        ValueError: there is none, it cannot be read, or it needs code of its own that is not trusted; one line.
    """
    if Path(source).is_dir():
        read_json(Path(source) / "config.json")
    with blaming(f"{source}: its config.json cannot be read"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        config._attn_implementation = None  # a file may name a kernel on the Hub, which would be fetched and run
    return config


def load_student_config(folder: str | Path, revision: str | None = None) -> HydraHeadConfig:
    """
    The configuration of a student's folder, or of one on the Hub.

    Raises:
        ValueError: as `load_config`; or it is another kind of model's.
    """
    config = load_config(folder, revision)
    if not isinstance(config, HydraHeadConfig):
        raise ValueError(f"{folder}: no HydraHead student but a model of the family {config.model_type}")
    return config


def load_tokenizer(
    source: str | Path, config: PreTrainedConfig, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or of a Hub id; no weight is fetched for it.

    Args:
        config: of the model that is to read its tokens.

    Raises:
        ValueError: there is none, it cannot be read, is of another model, or needs code of its own that is not
            trusted; one line.
    """
    with blaming(f"{source}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        known, size = tokenizer.vocab_size, getattr(config.get_text_config(), "vocab_size", None)
    if not trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)  # or whatever it is saved into would name that code
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and not all(re.fullmatch(r"[\w-]+", name) for name in templates):
        raise ValueError(f"{source}: a chat template's name has to be a word, for a file is called by it")
    if size is not None and known > size:
        raise ValueError(f"{source}: its tokenizer is of another model: it has {known:,} tokens, the model {size:,}")
    return tokenizer


def weight_files(folder: Path) -> dict[str, Path] | Path:
    """
    Where a folder's weights are: the one file, or by a tensor's name the file that holds it.

    Raises:
        ValueError: there is no safetensors file, or the index names files outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: no {WEIGHTS}; pickled checkpoints are not read, convert them first")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise ValueError(f"{folder / INDEX}: expected a weight_map from tensors to files of this folder")
    return {tensor: folder / name for tensor, name in names.items()}


def check_checkpoint(folder: Path, config: PreTrainedConfig | None = None) -> None:
    """
    Check that a folder's weights are there and whole, reading only the headers of their files.

    Args:
        config: of the model that they are to be of.

    Raises:
        ValueError: they are not safetensors, or cut off; or the model needs others; one line, by name.
    """
    if (folder / "adapter_config.json").is_file():  # which transformers would put into the model
        raise ValueError(f"{folder}: holds an adapter beside its weights (adapter_config.json): merge or move it")
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)  # transformers passes over one that it cannot read
    where = weight_files(folder)
    shapes, kinds = {}, {}
    for path in sorted(set(where.values())) if isinstance(where, dict) else [where]:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    found = file.get_slice(name)
                    shapes[name], kinds[name] = found.get_shape(), found.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no whole safetensors file ({error}); fetch or make it again") from None
    if config is None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise ValueError(f"{folder}: its weights lack {name}, which the model of its config.json has")
        if shapes[name] != list(parameter.shape):
            raise ValueError(
                f"{folder}: its tensor {name} is {shapes[name]}, that of its config.json would be "
                f"{list(parameter.shape)}"
            )
        if kinds[name] not in FLOATS:
            raise ValueError(
                f"{folder}: its tensor {name} is {kinds[name]}; expected floating-point weights, not quantised ones"
            )


def load_model(
    source: str | Path,
    config: PreTrainedConfig,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    The causal language model of a folder or of a Hub id, in eval mode, without gradients.

    Args:
        config: as `load_config` gave it.
        dtype: `"auto"` is the checkpoint's own.
        device: where to put it, or a device map.

    Raises:
        ValueError: its weights are not all of the model's.
        OSError: it has no safetensors.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        device_map=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        # transformers draws at random what is not there, and says so where commands are quiet.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if wrong := sorted(found["missing_keys"]) or sorted(each[0] for each in found["mismatched_keys"]):
        raise ValueError(f"{source}: its weights lack {wrong[0]}, or have it in another shape, which its model needs")
    return model.eval().requires_grad_(False)
