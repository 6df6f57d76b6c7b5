"""Decode speed, prefill time and cache size of a teacher and its hybrids on a CPU, interleaved, with random weights.

    python benchmarks/decode.py     # fp32: 512 … 32K tokens, a small Qwen3 shape, as PyTorch comes

Writes `decode-cpu.json` beside itself; `gpu.py` measures the same models on GPUs. Speed does not depend on the values
of the weights, nor on which head of a layer is kept, only on how many.

Beside hybrids inside each layer stands the usual one of whole layers: transformers' own Qwen3.5 of the same width and
depth, with as many layers of full attention as come nearest to the KV cache of an eighth of the KV groups.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.modeling_hydrahead import CACHE
from hydrahead.ops_hydrahead import attend_to_cache
from hydrahead.provenance import Record, environment

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
TEACHER, BEST_TEACHER, LAYERWISE = "teacher", "teacher, in pieces", "layer-wise GDN"
BUDGETS = {  # share of full attention, in which unit
    "25% heads": (0.25, "heads"),
    "12.5% kv_groups": (0.125, "kv_groups"),
    "12.5% heads": (0.125, "heads"),
}
MODELS = (TEACHER, "25% heads", "12.5% kv_groups", LAYERWISE)
LENGTHS = (512, 2048, 8192, 32768)
TURNS, STEPS = 40, 5  # every model decodes so many tokens in a turn


def attention_in_pieces(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention, but for single tokens: those read the cache as a HydraHead does."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])
    return attend_to_cache(grouped, key, value, attention_mask).flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(IN_PIECES := "in_pieces", attention_in_pieces)
AttentionMaskInterface.register(IN_PIECES, sdpa_mask)


def config_of(name: str, shape: dict) -> PreTrainedConfig:
    """The configuration of a model by its name in the tables; heads are drawn at random."""
    if name in (TEACHER, BEST_TEACHER):
        return Qwen3Config(**shape)
    layers, heads, groups = (shape[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    if name == LAYERWISE:
        interval = layers // max(1, round(layers / 8))
        linear = {f"linear_num_{what}_heads": heads for what in ("key", "value")}
        linear |= {f"linear_{what}_head_dim": shape["head_dim"] for what in ("key", "value")}
        types = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(layers)]
        return Qwen3_5TextConfig(**shape, **linear, layer_types=types)
    ratio, unit = BUDGETS[name]
    scores = HeadScores(
        scores=torch.rand(layers, heads, generator=torch.Generator().manual_seed(0)).tolist(),
        tie_break=[[0.0] * heads] * layers,
        num_key_value_heads=groups,
        probes=[],
        capabilities={},
        method="random",
        teacher="random",
    )
    # In KV groups as serving wants them: the same number in every layer, where that is possible.
    strategy = "layer" if unit == "kv_groups" and groups * ratio >= 1 else "global"
    masks = select_heads(scores, ratio, strategy=strategy, budget_unit=unit)
    return student_config(adapter_for(Qwen3Config(**shape)), masks)


def build(name: str, shape: dict, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model with random weights, in the dtypes that loading gives its parameters."""
    torch.manual_seed(0)
    config = config_of(name, shape)
    # By name: a module of transformers that imports fla has to wait for hydrahead, which sets how fla is tuned.
    attention = IN_PIECES if name in (BEST_TEACHER, LAYERWISE) else "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    if isinstance(model, HydraHeadForCausalLM):
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in model._keep_in_fp32_modules_strict):
                parameter.data = parameter.data.float()
        model.pack_projections()
    return model


def load(folder: str, dtype: torch.dtype, device: str, attention: str) -> PreTrainedModel:
    """A real model, from its folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).eval()
    if isinstance(model, HydraHeadForCausalLM):
        model.pack_projections()
    return model


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes by which the KV cache of a sequence grows with every token, by arithmetic."""
    if isinstance(config, HydraHeadConfig):
        return config.kv_bytes_per_token(dtype.itemsize)
    layers = config.layer_types.count("full_attention") if hasattr(config, "layer_types") else config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * layers * config.num_key_value_heads * head_dim * dtype.itemsize


def state_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Constant bytes of a sequence, by arithmetic: recurrent states in fp32 and the convolutions' inputs."""
    if isinstance(config, HydraHeadConfig):
        return config.state_bytes(dtype.itemsize)
    layers = getattr(config, "layer_types", []).count("linear_attention")
    if not layers:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return layers * (
        4 * values * config.linear_key_head_dim + (2 * keys + values) * config.linear_conv_kernel_dim * dtype.itemsize
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forward(model: PreTrainedModel, ids: torch.Tensor, place: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits `[B, 1, V]` of the last of tokens `[B, T]`, the first of which stands at `place` `[B, 1]`."""
    places = place + torch.arange(ids.shape[1], device=ids.device)
    return model(ids, position_ids=places, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits


class Run:
    """One model at one length, eager: prefills of one sequence, steps that go on from the last, and their seconds."""

    def __init__(self, model: PreTrainedModel, length: int):
        self.model, self.length = model, length
        self.ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
        self.place = torch.tensor([[length]], device=model.device)
        self.cache: DynamicCache | None = None
        self.prefills: list[float] = []
        self.turns: list[list[float]] = []

    def prefill(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        start = torch.zeros_like(self.place)
        self.prefills.append(seconds_of(lambda: forward(self.model, self.ids, start, self.cache), self.model.device))

    def step(self) -> None:
        forward(self.model, self.ids[:, :1], self.place, self.cache)

    def rewind(self) -> None:
        """Forget what steps have cached. Recurrent states stay: their values do not matter here."""
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]

    def turn(self, steps: int) -> None:
        self.rewind()
        self.turns.append([seconds_of(self.step, self.model.device) for _ in range(steps)])

    def row(self) -> dict:
        return {
            "prefill_seconds": statistics.median(self.prefills),
            "decode_ms_per_token": 1e3 * statistics.median(seconds for turn in self.turns for seconds in turn),
            "cache_bytes": cache_bytes(self.cache),
        }


def speed_over(first: Run, other: Run) -> float:
    """How many times faster `other` decodes: the median over turns, each beside the other's, of the ratio."""
    pairs = zip(first.turns, other.turns)
    return statistics.median(statistics.median(one) / statistics.median(two) for one, two in pairs)


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], length: int, prefills: int, turns: int, steps: int) -> dict[str, Run]:
    """Runs of every model at one length; models take turns, so that a slow moment of the machine hits all alike."""
    runs = {name: Run(model, length) for name, model in models.items()}
    for _ in range(prefills):
        for run in runs.values():
            run.prefill()
    order = list(runs.values())
    for _ in range(turns):
        for run in order:
            run.turn(steps)
        order.reverse()  # nobody always comes after the same one
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of {STEPS} tokens each")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("decode-cpu.json"))
    options = parser.parse_args()

    dtype = torch.float32
    models = {name: build(name, SMALL, dtype, "cpu") for name in MODELS}
    report = {
        "shape": SMALL,
        "dtype": "float32",
        "batch_size": 1,
        "kv_bytes_per_token": {name: kv_bytes_per_token(model.config, dtype) for name, model in models.items()},
        "results": {},
    } | environment("cpu")
    measure(models, 256, prefills=1, turns=1, steps=STEPS)  # warm-up
    for length in options.lengths:
        runs = measure(models, length, 3 if length <= 4096 else 1, options.turns, STEPS)
        rows = {name: run.row() for name, run in runs.items()}
        teacher = rows[TEACHER]
        for name, row in rows.items():
            row["decode_speed_over_teacher"] = speed_over(runs[TEACHER], runs[name])
            row["prefill_speed_over_teacher"] = teacher["prefill_seconds"] / row["prefill_seconds"]
            row["cache_share_of_teacher"] = row["cache_bytes"] / teacher["cache_bytes"]
            print(
                f"{length:>6}  {name:<16} prefill {row['prefill_seconds']:7.3f} s"
                f" ×{row['prefill_speed_over_teacher']:.2f}  decode {row['decode_ms_per_token']:7.2f} ms"
                f" ×{row['decode_speed_over_teacher']:.2f}  cache {row['cache_bytes'] / 2**20:8.2f} MB",
                flush=True,
            )
        report["results"][str(length)] = rows
    Record(options.output).write(report)
    print(f"written to {options.output.name}")


if __name__ == "__main__":
    main()
