"""GGUF files: each becomes, once, a folder of dequantised weights, which is read like that of any other model."""

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..console import blaming
from ..files import atomic_folder
from ..loading import load_config, load_tokenizer
from ..provenance import Record, digest

HUB = "https://huggingface.co/"
FACTS = "gguf.json"  # in the folder: what the file says of itself
# Pre-tokenizers of llama.cpp (src/llama-vocab.cpp) that transformers does not know: GPT-2's, and it with digits apart.
GPT2_WORDS = {"gpt-2", "mpt", "olmo", "jais", "trillion"}
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}  # of every Llama 3.1 to 3.3: only the factor differs


def open_gguf(
    path: str | Path, check: Callable[[PreTrainedConfig], object] = lambda config: None
) -> tuple[Path, dict]:
    """
    The folder of a GGUF file, in Hugging Face's cache: configuration, tokenizer, and safetensors in fp32 (bf16 where
    the file's are). It is made where it is not there yet, whole or not at all, by one process while others wait.

    Args:
        check: raises where a model of this configuration is not wanted, before its weights are read.

    Returns:
        the folder, and what the file says of itself: `file` (its own name), `sha256`, `quantisation` in words such as
        Q4_1, and, where its header states them, `name`, `license`, `license_name`, `license_link`,
        `base_models` in words and `base_ids` on the Hub.

    Raises:
        ValueError: no such file, no GGUF file, one cut off, or a model, option or tokenizer that it cannot be turned
            into; one line, and nothing is written.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    sha256 = digest(path)
    folder = Path(constants.HF_HOME) / "hydrahead" / "gguf" / sha256[:16]
    if not (folder / FACTS).is_file():
        _make_folder(path, sha256, folder, check)
    check(load_config(folder))
    return folder, Record(folder / FACTS).read() | {"file": path.name}


def _make_folder(path: Path, sha256: str, folder: Path, check: Callable[[PreTrainedConfig], object]) -> None:
    reader = _read(path)
    config = _read_config(path, reader)
    check(config)
    tokenizer = _read_tokenizer(path, reader)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{path.name}: dequantised once, into {folder}", file=sys.stderr, flush=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if (folder / FACTS).is_file():  # another process was quicker
            return
        with atomic_folder(folder, overwrite=True) as partial:
            _read_model(path, config).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _check_words(path, tokenizer, load_tokenizer(partial, config))
            Record(partial / FACTS).write(_facts(path, sha256, reader))
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner can read


def _read(path: Path):
    """The `gguf.GGUFReader` of a file; raises where it is none, or not a whole one."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path}: a GGUF file needs the package gguf: pip install 'hydrahead[gguf]'")
    import gguf

    with blaming(f"{path}: no whole GGUF file, fetch it again"):
        reader = gguf.GGUFReader(path)
    if _field(reader, "general.architecture") is None or not reader.tensors:
        raise ValueError(f"{path}: holds no model (no general.architecture, or no tensors)")
    return reader


def _field(reader, key: str):
    """The value of a key of the header; `None` where it has none."""
    return reader.fields[key].contents() if key in reader.fields else None


def _line(reader, key: str) -> str | None:
    """A text of the header in one line: whoever made the file wrote it, and it goes into records and cards."""
    value = _field(reader, key)
    return " ".join(value.split()) if isinstance(value, str) else None


def _facts(path: Path, sha256: str, reader) -> dict:
    """What a file says of itself, as `open_gguf` gives it."""
    import gguf

    kind = _field(reader, "general.file_type")
    words = {str(each.value): each.name.split("_", 1)[1] for each in gguf.LlamaFileType if each.name != "GUESSED"}
    sizes = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    facts = {"file": path.name, "sha256": sha256, "quantisation": words.get(str(kind)) or sizes.most_common(1)[0][0]}
    keys = {"name": "name", "license": "license", "license_name": "license.name", "license_link": "license.link"}
    facts |= {name: _line(reader, f"general.{key}") for name, key in keys.items()}
    names = [key for key in reader.fields if re.fullmatch(r"general\.base_model\.\d+\.name", key)]
    bases = [key.removesuffix(".name") for key in names]
    named = [[_line(reader, f"{base}.{key}") for key in ("organization", "name")] for base in bases]
    facts["base_models"] = [" ".join(filter(None, words)) for words in named if any(words)]
    urls = [_line(reader, f"{base}.repo_url") or "" for base in bases]
    facts["base_ids"] = [url.removeprefix(HUB) for url in urls if url.startswith(HUB)]
    return {name: value for name, value in facts.items() if value}


def _read_config(path: Path, reader) -> PreTrainedConfig:
    """
    The configuration of a file's model.

    Raises:
        ValueError: transformers does not know its architecture, or the file has tensors or a RoPE that this model has
            not, or lacks some that it has.
    """
    architecture = _field(reader, "general.architecture")
    with blaming(f"{path}: no model that transformers can read, {architecture}"):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    vars(config).pop("_model_name_or_path", None)  # the header's general.name, which is no path
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = _shortest(config.rms_norm_eps)
    head_dim = _field(reader, f"{architecture}.attention.key_length")
    if head_dim and hasattr(config, "head_dim"):  # which transformers takes for its default in some families
        config.head_dim = head_dim
    _check_header(path, reader, config)
    frequencies = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if frequencies is not None:
        config.rope_parameters = _llama3_rope(path, config, torch.tensor(frequencies))
    with blaming(f"{path}: no language model that transformers can read, {architecture}"):
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    _check_tensors(path, reader, model)
    config.architectures = [type(model).__name__]
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    config.dtype = torch.bfloat16 if kinds == {"BF16"} else torch.float32
    return config


def _check_header(path: Path, reader, config: PreTrainedConfig) -> None:
    """
    transformers reads nothing of what a header says here, and would give another model without a word.

    Raises:
        ValueError: the header scales RoPE, rotates a part of each head only, or has a sliding window.
    """
    prefix = _field(reader, "general.architecture")
    keys = ("scaling.type", "scaling.factor", "scale_linear", "dimension_count")
    kind, factor, linear, rotated = (_field(reader, f"{prefix}.rope.{key}") for key in keys)
    if kind not in (None, "none") or factor not in (None, 0, 1) or linear not in (None, 0, 1):
        raise ValueError(f"{path}: RoPE scaled by its header ({kind or 'linear'}) is not supported in a GGUF file")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rotated not in (None, head_dim):
        raise ValueError(
            f"{path}: rotary embedding of {rotated} of {head_dim} dimensions is not supported, only of all"
        )
    window = _field(reader, f"{prefix}.attention.sliding_window")
    if window and window < config.max_position_embeddings and not getattr(config, "sliding_window", None):
        raise ValueError(
            f"{path}: sliding-window attention ({window} positions) is not supported, only full attention"
        )


def _shortest(number: float) -> float:
    """What a 32-bit number of the header was written for: 1e-05, not 9.999999747378752e-06."""
    return float(f"{number:.7g}")


def _llama3_rope(path: Path, config: PreTrainedConfig, frequencies: torch.Tensor) -> dict:
    """
    The RoPE scaling that `rope_freqs.weight` (`[d / 2]`, what frequencies are divided by) was computed from.

    Raises:
        ValueError: it is none of Llama 3's.
    """
    plain = config.rope_parameters
    scaled = plain | LLAMA3_ROPE | {"factor": _shortest(float(frequencies.max()))}
    config.rope_parameters = scaled
    inverse = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    dims = torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies))
    if len(inverse) != len(frequencies) or not torch.allclose(
        1 / plain["rope_theta"] ** dims / inverse, frequencies, rtol=1e-3
    ):
        raise ValueError(f"{path}: its RoPE frequencies (rope_freqs.weight) are not those of Llama 3")
    return scaled


def _check_tensors(path: Path, reader, model: PreTrainedModel) -> None:
    """
    transformers drops tensors that it knows no place for, and draws at random those that it misses.

    Raises:
        ValueError: a file's tensors, or their shapes, are not those of a model of its configuration; names one.
    """
    import gguf

    architecture = _field(reader, "general.architecture")
    key = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if key is None:
        raise ValueError(f"{path}: {architecture} is an architecture that the package gguf does not know; update it")
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    expected = {
        names.get_name(name, (".weight", ".bias")) or name: list(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    found = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    found.pop("rope_freqs.weight", None)
    kind = type(model).__name__
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: its tensor {more[0]} has no place in a {kind}")
    if less := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{path}: has no tensor {less[0]}, which a {kind} needs")
    if other := sorted(name for name, shape in found.items() if shape != expected[name]):
        name = other[0]
        raise ValueError(f"{path}: its tensor {name} is {found[name]}, that of its {kind} would be {expected[name]}")


def _read_tokenizer(path: Path, reader) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a file. It splits text into words as llama.cpp does for the pre-tokenizer that the header names.

    Raises:
        ValueError: there is no tokenizer, or one that neither transformers nor we know how to split words for.
    """
    with blaming(f"{path}: no tokenizer that transformers can read"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    kind, words = (_field(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if words in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif json.loads(backend.to_str())["pre_tokenizer"]["type"] == "ByteLevel" and words not in GPT2_WORDS:
        raise ValueError(f"{path}: nobody here knows how its tokenizer splits words (tokenizer.ggml.pre: {words})")
    return tokenizer


def _check_words(path: Path, tokenizer: PreTrainedTokenizerBase, loaded: PreTrainedTokenizerBase) -> None:
    """
    Some classes of tokenizers split words in their own way, whatever their folder says.

    Raises:
        ValueError: the class that transformers loads does so otherwise than the file's tokenizer.
    """
    one, other = (json.loads(each.backend_tokenizer.to_str())["pre_tokenizer"] for each in (tokenizer, loaded))
    if one != other:
        raise ValueError(f"{path}: {type(loaded).__name__} splits words otherwise than its tokenizer.ggml.pre says")


def _read_model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The dequantised model of a file, as one that was never quantised."""
    options = {"config": config, "dtype": config.dtype, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):  # else weights stay packed where the package kernels is installed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model
