"""Teacher families: which tensors of a pretrained transformer are its attention heads, norms and MLP."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import align_module_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..console import first_line
from ..files import is_gguf, read_json
from ..loading import check_checkpoint, load_config, load_model, load_tokenizer, weight_files
from .gguf_files import FACTS, open_gguf

Read = Callable[[str], torch.Tensor]
"""Gives the tensor of a name in the teacher's checkpoint, as memory of the caller's own."""

EMBEDDED_TEACHER = Path(__file__).parents[1] / "demo" / "teacher"
SHARED_FIELDS = (  # of a config, which a student has as its teacher has them
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("rms_norm_eps", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_dropout"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


@dataclass
class TeacherAttention:
    """Attention weights of one layer, by head: `H` query heads, `G` KV heads, head size `d`, hidden size `D`."""

    q: torch.Tensor  # [H, d, D]
    k: torch.Tensor  # [G, d, D]
    v: torch.Tensor  # [G, d, D]
    o: torch.Tensor  # [D, H * d]
    q_bias: torch.Tensor | None = None  # [H, d]
    k_bias: torch.Tensor | None = None  # [G, d]
    v_bias: torch.Tensor | None = None  # [G, d]
    o_bias: torch.Tensor | None = None  # [D]
    q_norm: torch.Tensor | None = None  # [d]
    k_norm: torch.Tensor | None = None  # [d]


class TeacherAdapter:
    """
    What a family of decoders shares with a HydraHead student, and where its checkpoint differs.

    The base class describes the Llama layout: RMSNorm before attention and MLP, separate q, k, v and o projections,
    SwiGLU, rotary embedding over the whole head. A family is a subclass that says what is different.
    """

    model_type: ClassVar[str]
    qk_norm: ClassVar[bool] = False
    biases: ClassVar[tuple[bool, bool] | None] = None
    """Whether q, k and v have biases, and whether o has; `None`: both or neither, as the config says."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self.bias, self.output_bias = self.biases or 2 * (bool(getattr(config, "attention_bias", False)),)
        self.check()

    def check(self) -> None:
        """Raise a one-line `ValueError` that names what a HydraHead student cannot represent."""
        rotary = (self.config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if rotary != 1.0:
            raise ValueError(f"{self.model_type}: partial rotary embedding ({rotary}) is not supported, only 1.0")
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"]  # without: every layer
        if window is not None and "sliding_attention" in kinds and window < self.config.max_position_embeddings:
            raise ValueError(
                f"{self.model_type}: sliding-window attention ({window} of "
                f"{self.config.max_position_embeddings} positions) is not supported, only full attention"
            )
        if getattr(self.config, "quantization_config", None):
            raise ValueError(
                f"{self.model_type}: quantised weights (quantization_config) are not supported, only plain and GGUF"
            )
        if getattr(self.config, "mlp_bias", False):
            raise ValueError(f"{self.model_type}: a bias in the MLP (mlp_bias) is not supported")

    @property
    def blank_masks(self) -> list[list[int]]:
        """Masks `[L][H]` that convert every head: for a config whose masks do not matter."""
        return [[0] * self.num_heads] * self.num_layers

    def student_fields(self) -> dict:
        """The fields of a `HydraHeadConfig` that the teacher decides."""
        config = self.config
        return {name: getattr(config, name) for name in SHARED_FIELDS} | {
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": dict(config.rope_parameters),
            "qk_norm": self.qk_norm,
            "attention_bias": self.bias,
            "attention_output_bias": self.output_bias,
        }

    def attention(self, read: Read, layer: int) -> TeacherAttention:
        """Attention weights of layer `layer`."""
        prefix = f"model.layers.{layer}.self_attn."
        rows = {}
        for name in ("q", "k", "v"):
            rows[name] = read(f"{prefix}{name}_proj.weight").unflatten(0, (-1, self.head_dim))
            if self.bias:
                rows[f"{name}_bias"] = read(f"{prefix}{name}_proj.bias").unflatten(0, (-1, self.head_dim))
        if self.output_bias:
            rows["o_bias"] = read(f"{prefix}o_proj.bias")
        if self.qk_norm:
            rows |= {name: read(f"{prefix}{name}.weight") for name in ("q_norm", "k_norm")}
        return TeacherAttention(o=read(f"{prefix}o_proj.weight"), **rows)

    def norms_and_mlp(self, read: Read, layer: int) -> dict[str, torch.Tensor]:
        """Norms and MLP of layer `layer`, under the student's names."""
        prefix = f"model.layers.{layer}."
        names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        names += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        return {prefix + name: read(prefix + name) for name in names}

    def embedding_and_head(self, read: Read) -> dict[str, torch.Tensor]:
        """Embedding, final norm and, unless tied, the language-model head, under the student's names."""
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        names += [] if self.config.tie_word_embeddings else ["lm_head.weight"]
        return {name: read(name) for name in names}


class LlamaTeacher(TeacherAdapter):
    """Llama 3.x and its descendants; the rope scaling travels in `rope_parameters`."""

    model_type = "llama"


class MistralTeacher(TeacherAdapter):
    model_type = "mistral"
    biases = (False, False)


class Qwen2Teacher(TeacherAdapter):
    """Qwen2 and Qwen2.5: a bias on q, k and v."""

    model_type = "qwen2"
    biases = (True, False)


class Qwen3Teacher(TeacherAdapter):
    """Qwen3, dense: q and k normalised per head."""

    model_type = "qwen3"
    qk_norm = True


class Phi3Teacher(TeacherAdapter):
    """Phi-3 and Phi-3.5: q, k and v in one matrix, gate and up in another."""

    model_type = "phi3"
    biases = (False, False)

    def attention(self, read: Read, layer: int) -> TeacherAttention:
        prefix = f"model.layers.{layer}.self_attn."
        heads = read(f"{prefix}qkv_proj.weight").unflatten(0, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads])
        return TeacherAttention(q=q, k=k, v=v, o=read(f"{prefix}o_proj.weight"))

    def norms_and_mlp(self, read: Read, layer: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{layer}."
        gate, up = read(f"{prefix}mlp.gate_up_proj.weight").chunk(2)
        names = ["input_layernorm.weight", "post_attention_layernorm.weight", "mlp.down_proj.weight"]
        return {prefix + name: read(prefix + name) for name in names} | {
            f"{prefix}mlp.gate_proj.weight": gate.clone(),
            f"{prefix}mlp.up_proj.weight": up.clone(),
        }


ADAPTERS = {
    adapter.model_type: adapter for adapter in (Qwen3Teacher, Qwen2Teacher, LlamaTeacher, MistralTeacher, Phi3Teacher)
}


def unknown_family(model_type: str | None) -> ValueError:
    """The error for a family without an adapter."""
    return ValueError(f"{model_type}: unknown teacher family, expected one of {', '.join(sorted(ADAPTERS))}")


def adapter_for(config: PreTrainedConfig) -> TeacherAdapter:
    """
    The adapter of a teacher's family.

    Raises:
        ValueError: the family, or an option that this teacher uses, cannot be represented; one line, by name.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type}: encoder-decoder models are not supported, only decoders")
    experts = next((n for n in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(config, n)), None)
    if experts is not None:
        raise ValueError(
            f"{config.model_type}: mixture-of-experts models ({experts}) are not supported, only dense ones"
        )
    if config.model_type not in ADAPTERS:
        raise unknown_family(config.model_type)
    return ADAPTERS[config.model_type](config)


class Teacher:
    """
    A pretrained transformer that has been found and can be represented; `open_teacher` gives it.

    Attributes:
        name, revision: as asked for: a folder, a GGUF file, a Hub id, or `demo`; and a revision on the Hub, or the
            SHA-256 of the file.
        public_name: its name in records, which travel: a Hub id, a folder's or a file's own name, or `demo`.
        source: a folder or a Hub id.
        config, adapter: read from its config alone.
        gguf: what a GGUF file says of itself (`gguf_files.open_gguf`); `None` for any other teacher.
    """

    def __init__(
        self, name: str, revision: str | None, source: str, config: PreTrainedConfig, gguf: dict | None = None
    ):
        self.name, self.revision, self.config = name, revision, config
        self.adapter, self.public_name = adapter_for(config), gguf["file"] if gguf else public_name(source)
        self.source, self.gguf = source, gguf

    @property
    def identity(self) -> dict:
        """What files that are made from it say of it."""
        named = {"teacher": self.public_name, "revision": self.revision}
        return named | ({"gguf": self.gguf} if self.gguf else {})

    def check_made_from(self, file: Path, made_from: Mapping) -> None:
        """
        Raises:
            ValueError: a file says that it was made from another teacher. What says nothing is taken as it is.
        """
        found = {key: made_from.get(key) for key in ("teacher", "revision")}
        wanted = {"teacher": self.public_name, "revision": self.revision}
        if found["teacher"] and found != wanted:
            of, asked = (" at ".join(filter(None, each.values())) for each in (found, wanted))
            raise ValueError(f"{file}: made from the teacher {of}, not from {asked}: choose that one, or make it anew")

    def fetch(self) -> Path:
        """
        Folder of the checkpoint, which is brought to this machine first where it is not here yet.

        Raises:
            ValueError: its weights are not those of its config; one line.
        """
        if not Path(self.source).is_dir():
            self.source = snapshot_download(self.source, revision=self.revision, allow_patterns=CHECKPOINT_FILES)
        check_checkpoint(Path(self.source), self.config)
        return Path(self.source)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; no weight is fetched for it. Raises as `load_tokenizer`."""
        return load_tokenizer(self.source, self.config, self.revision)

    def load(self, dtype: str | torch.dtype = "auto", device: str | torch.device | dict | None = None):
        """
        The `PreTrainedModel` in eval mode, without gradients.

        Args:
            dtype: `"auto"` is the checkpoint's own.
            device: where to put it, or a device map; by default a GPU if there is one, off-loading what does not fit.
        """
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        device = device or ("auto" if torch.cuda.is_available() else "cpu")
        return load_model(self.fetch(), self.config, dtype, device)


def open_teacher(name: str | Path, revision: str | None = None) -> Teacher:
    """
    Find a teacher by name; only its config is read, so that one which cannot be converted costs no download. A GGUF
    file is dequantised the first time (`gguf_files.open_gguf`).

    Args:
        name: a folder or a file `….gguf`, else a Hub id; `demo` is the teacher that ships with the package.
        revision: on the Hub; of a GGUF file only its own, `sha256:` and its digest.

    Raises:
        ValueError: there is no such model, the folder or file holds none, or it cannot be represented; one line.
    """
    if is_gguf(name):
        folder, facts = open_gguf(name, check=adapter_for)
        own = f"sha256:{facts['sha256']}"
        if revision not in (None, own):
            raise ValueError(f"{name}: is {own}, asked for was {revision}; a GGUF file has no other revision")
        return Teacher(str(name), own, str(folder), load_config(folder), facts)
    source = str(EMBEDDED_TEACHER) if name == "demo" else str(name)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path}: not a model folder (no config.json)")
    if not path.is_dir() and (path.is_absolute() or source.startswith(".")):
        raise ValueError(f"{path}: no such folder")
    if path.is_dir():
        model_type = read_json(path / "config.json").get("model_type")
    else:
        try:
            model_type = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name}: no folder here, and not to be had from the Hub ({first_line(error)}) Check the spelling; "
                "offline, only what was downloaded before is found; a gated model needs `hf auth login`"
            ) from None
    if model_type == "hydrahead":
        raise ValueError(f"{name}: a HydraHead student; pass the pretrained transformer that it was made from")
    if model_type not in CONFIG_MAPPING:  # transformers would ask whether to run the checkpoint's own code
        raise unknown_family(model_type)
    return Teacher(str(name), revision, source, load_config(source, revision))


def public_name(name_or_path: str) -> str:
    """
    A Hub id as it is; of a folder its own name only, `demo` for the teacher that ships with the package, and of the
    folder that a GGUF file became the file's name.
    """
    path = Path(name_or_path)
    if not name_or_path or not path.is_dir():  # a model that was never saved has no name
        return name_or_path
    if (path / FACTS).is_file():
        return str(read_json(path / FACTS).get("file"))
    return "demo" if path.resolve() == EMBEDDED_TEACHER.resolve() else path.resolve().name


def read_model(model: PreTrainedModel) -> Read:
    """
    Reads from a model in memory. Tensors are copies: training the student must not change the teacher.

    Raises:
        ValueError: the model is no language model.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__}: has no language-model head, expected a ...ForCausalLM")

    def read(name: str) -> torch.Tensor:
        module, _, parameter = name.rpartition(".")
        owner = model.get_submodule(module)
        with align_module_device(owner):  # accelerate may have off-loaded it
            return getattr(owner, parameter).detach().cpu().clone()

    return read


def read_safetensors(folder: Path) -> Read:
    """
    Reads one tensor at a time from the safetensors files of a checkpoint folder.

    Raises:
        ValueError: the folder has no safetensors files.
    """
    where = weight_files(folder)
    if not isinstance(where, dict):
        with safe_open(where, framework="pt") as file:
            where = dict.fromkeys(file.keys(), where)

    def read(name: str) -> torch.Tensor:
        if name not in where:
            raise ValueError(f"{folder}: the checkpoint has no tensor {name}")
        # Opened anew each time: an open file keeps every page it has read mapped into memory. Copied, because what it
        # gives is mapped too: a checkpoint that is written over later would take the student with it.
        with safe_open(where[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    return read
