"""Decode speed, prefill time and cache size of a teacher and its hybrids, interleaved, with random weights.

    python benchmarks/decode.py                 # CPU, fp32: 512 … 32K tokens, a small Qwen3 shape
    python benchmarks/decode.py --device cuda   # the same on a GPU, bf16

Writes `decode-<device>.json` beside itself. Speed does not depend on the values of the weights, nor on which head of a
layer is kept, only on how many.
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from hydrahead import HydraHeadForCausalLM
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.options import student_config, teacher_config
from hydrahead.convert.teachers import adapter_for

SHAPE = {
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
LENGTHS = (512, 2048, 8192, 32768)


def build_models(device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Teacher and hybrids of one shape; heads are drawn at random under each budget."""
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).to(device, dtype).eval()
    adapter = adapter_for(teacher.config)
    layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
    scores = HeadScores(
        scores=torch.rand(layers, heads).tolist(),
        tie_break=[[0.0] * heads] * layers,
        num_key_value_heads=SHAPE["num_key_value_heads"],
        probes=[],
        capabilities={},
        method="random",
        teacher="random",
    )
    models = {"teacher": teacher}
    for name, ratio, unit in (("25% heads", 0.25, "heads"), ("12.5% kv_groups", 0.125, "kv_groups")):
        masks = select_heads(scores, ratio, strategy="global", budget_unit=unit)
        model = HydraHeadForCausalLM(student_config(adapter, masks))
        models[name] = model.to(device).to(dtype).eval()
    return models


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Run:
    """One model at one length: a prefilled cache and the times of every measurement, in seconds."""

    def __init__(self, model: torch.nn.Module, length: int):
        self.model, self.length = model, length
        self.device = next(model.parameters()).device
        self.ids = torch.randint(0, SHAPE["vocab_size"], (1, length), device=self.device)
        self.cache: DynamicCache | None = None
        self.position = length
        self.prefill_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def _timed(self, ids: torch.Tensor, position: int) -> float:
        position_ids = torch.arange(position, position + ids.shape[1], device=self.device).unsqueeze(0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        self.model(ids, position_ids=position_ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def prefill(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.prefill_seconds.append(self._timed(self.ids, 0))
        self.position = self.length

    def step(self) -> None:
        self.step_seconds.append(self._timed(self.ids[:, :1], self.position))
        self.position += 1

    def result(self) -> dict:
        return {
            "prefill_seconds": statistics.median(self.prefill_seconds),
            "decode_ms_per_token": 1e3 * statistics.median(self.step_seconds),
            "cache_bytes": cache_bytes(self.cache),
        }


@torch.no_grad()
def measure(models: dict[str, torch.nn.Module], length: int, prefills: int, steps: int) -> dict[str, dict]:
    """Medians of every model at one length; models take turns, so that a slow moment of the machine hits all alike."""
    runs = {name: Run(model, length) for name, model in models.items()}
    for _ in range(prefills):
        for run in runs.values():
            run.prefill()
    for _ in range(steps):
        for run in runs.values():
            run.step()
    return {name: run.result() for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--prefills", type=int, default=3, help="prefills timed up to 4,096 tokens; one above")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="default: decode-<device>.json beside this script")
    options = parser.parse_args()

    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    models = build_models(options.device, dtype)
    measure(models, 256, prefills=1, steps=5)  # warm-up
    lengths = {}
    print(f"{'tokens':>7}  {'model':<16} {'prefill s':>10} {'ms/token':>9} {'speed':>6} {'cache MB':>9} {'share':>6}")
    for length in options.lengths:
        results = measure(models, length, options.prefills if length <= 4096 else 1, options.steps)
        lengths[length] = results
        teacher = results["teacher"]
        for name, result in results.items():
            result["decode_speed_over_teacher"] = teacher["decode_ms_per_token"] / result["decode_ms_per_token"]
            result["prefill_speed_over_teacher"] = teacher["prefill_seconds"] / result["prefill_seconds"]
            result["cache_share_of_teacher"] = result["cache_bytes"] / teacher["cache_bytes"]
            print(
                f"{length:>7}  {name:<16} {result['prefill_seconds']:>10.3f} {result['decode_ms_per_token']:>9.2f} "
                f"{result['decode_speed_over_teacher']:>6.2f} {result['cache_bytes'] / 2**20:>9.2f} "
                f"{result['cache_share_of_teacher']:>6.3f}",
                flush=True,
            )
    is_gpu = options.device.startswith("cuda")
    report = {
        "shape": SHAPE,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": 1,
        "results": lengths,
        "kv_bytes_per_token": {
            name: (
                teacher_config(adapter_for(model.config)) if name == "teacher" else model.config
            ).kv_bytes_per_token(dtype.itemsize)
            for name, model in models.items()
        },
        "hardware": torch.cuda.get_device_name() if is_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    }
    output = options.output or Path(__file__).with_name(f"decode-{options.device.split(':')[0]}.json")
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
