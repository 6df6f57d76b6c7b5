"""The models of a report: any causal language model, opened in one way, and what its cache costs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..loading import check_checkpoint, load_config, load_model, load_tokenizer
from ..provenance import digest

ROPE_SCALINGS = ("yarn", "linear", "dynamic")


@dataclass(frozen=True)
class Model:
    """
    One column of a report.

    Attributes:
        label: heads the column.
        source: folder or Hub id.
        name: what the report calls it: it travels, so that a folder has no more than its own name.
        revision: on the Hub.
        dtype: in which it computes; `auto` is the checkpoint's own.
        rope_scaling: such as `yarn:4`: RoPE scaled by that factor, without any training.
        template: asked in its chat template.
        trust_remote_code: run the code of the checkpoint.
    """

    label: str
    source: str
    name: str
    revision: str | None = None
    dtype: str = "auto"
    rope_scaling: str | None = None
    template: bool = False
    trust_remote_code: bool = False

    def identity(self) -> dict:
        """What decides its numbers."""
        weights = digest(Path(self.source))[:16] if Path(self.source).is_dir() else None
        options = {"rope_scaling": self.rope_scaling, "template": self.template}
        return {"name": self.name, "revision": self.revision, "weights": weights, "asked_dtype": self.dtype} | options

    def config(self) -> PreTrainedConfig:
        """
        Its configuration, with RoPE scaled.

        Raises:
            ValueError: there is no such model, or its RoPE cannot be scaled that way; one line.
        """
        config = load_config(self.source, **self._where)
        if self.rope_scaling:
            scale_rope(config, self.rope_scaling)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source, self.config(), **self._where)

    def check(self) -> None:
        """
        Check what of a folder can be known to be wrong before weights are read.

        Raises:
            ValueError: its configuration, tokenizer or weights cannot be read, or do not fit each other; one line.
        """
        config, folder = self.config(), Path(self.source)
        self.tokenizer()
        if folder.is_dir():
            check_checkpoint(folder, config if config.model_type == "hydrahead" else None)

    def load(self, device: torch.device | None = None) -> PreTrainedModel:
        """
        The model in eval mode, without gradients.

        Args:
            device: by default a GPU if there is one, off-loading what does not fit.
        """
        config = self.config()
        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        where = device or ("auto" if torch.cuda.is_available() else "cpu")
        return load_model(self.source, config, dtype, where, **self._where)

    @property
    def _where(self) -> dict:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def scale_rope(config: PreTrainedConfig, scaling: str) -> None:
    """
    Scale the rotary embedding of a model that was trained without.

    Args:
        scaling: `KIND:FACTOR`, the kind one of `ROPE_SCALINGS`.

    Raises:
        ValueError: another kind, no factor above 1, or a model whose RoPE is scaled already or is not one of its own.
    """
    kind, _, factor = scaling.partition(":")
    if kind not in ROPE_SCALINGS or not factor.replace(".", "", 1).isdigit() or float(factor) <= 1:
        raise ValueError(
            f"rope scaling {scaling}: expected KIND:FACTOR, such as yarn:4, of {', '.join(ROPE_SCALINGS)}"
        )
    rope = getattr(config, "rope_parameters", None)
    if not rope or rope.get("rope_type") != "default":
        raise ValueError(f"rope scaling {scaling}: {config.model_type} has no plain rotary embedding to scale")
    native = config.max_position_embeddings
    config.rope_parameters = rope | {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        config.rope_parameters |= {"original_max_position_embeddings": native}
        config.max_position_embeddings = round(native * float(factor))


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a model with a table of learned positions can read; `None` where positions are computed."""
    limit = getattr(model.config, "max_position_embeddings", None)
    embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    others = [each.num_embeddings for each in embeddings if each is not model.get_input_embeddings()]
    # Some tables begin with a few rows that stand for no position; others than of positions have a vocabulary's.
    return limit if limit and any(limit <= rows < limit + 8 for rows in others) else None


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """
    Raises:
        ValueError: so many are more than a model with learned positions can read.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens:,} tokens, and the model has positions for {limit:,}")


def facts(model: PreTrainedModel) -> dict:
    """What a report says of a model: its kind and size, its dtype, and what a sequence costs in cache."""
    kv, state = cache_costs(model)
    config = model.config
    return {
        "model_type": config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "native_length": getattr(config, "max_position_embeddings", None),
        "kv_bytes_per_token": kv,
        "state_bytes": state,
    }


@torch.no_grad()
def cache_costs(model: PreTrainedModel) -> tuple[int, int]:
    """
    Bytes of cache in bf16 that a token adds, and bytes of state that a sequence holds at any length.

    A HydraHead says so in its configuration. Of another model the cache of two short texts is measured: what grows is
    counted in bf16, what does not is counted as it is held.
    """
    if model.config.model_type == "hydrahead":
        return model.config.kv_bytes_per_token(), model.config.state_bytes()
    sizes = []
    for length in (32, 64):
        output = model(torch.ones(1, length, dtype=torch.long, device=model.device), use_cache=True)
        caches = [value for value in output.values() if isinstance(value, Cache)]
        tensors = [tensor for cache in caches for layer in cache.layers for tensor in _tensors(vars(layer))]
        sizes.append([(tensor.numel(), tensor.element_size()) for tensor in tensors])
    pairs = list(zip(*sizes))
    grown = sum(after - before for (before, _), (after, _) in pairs)
    return grown // 32 * 2, sum(before * width for (before, width), (after, _) in pairs if before == after)


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache holds, as it holds them: keys and values, and everything else."""
    kv = state = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            held = sum(tensor.nbytes for tensor in _tensors(value))
            kv, state = (kv + held, state) if name in ("keys", "values") else (kv, state + held)
    return kv, state


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in values for tensor in _tensors(each)]
