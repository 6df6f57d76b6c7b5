"""Decode speed, prefill time and cache size of a teacher and its hybrids, interleaved, with random weights.

    python benchmarks/decode.py                 # CPU, fp32: 512 … 32K tokens, a small Qwen3 shape, as PyTorch comes
    python benchmarks/decode.py --device cuda   # one GPU, bf16: Qwen3-1.7B's shape, compiled with a static cache too

Writes `decode-<device>.json` beside itself. Speed does not depend on the values of the weights, nor on which head of a
layer is kept, only on how many.

On a GPU the teacher runs twice: as transformers runs it, whose compiled step repeats keys and values for every query
head and reads them in one piece, and with our step of attention (`ops_hydrahead.attend_to_cache`), the best found.

A compiled step is what `generate(cache_implementation="static")` replays: one CUDA graph of the forward pass. Its time
is set against the least in which weights, KV cache and states can be read from memory, and states written back.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hydrahead import HydraHeadForCausalLM
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.options import student_config, teacher_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.kernels import use_tuned_kernels
from hydrahead.modeling_hydrahead import CACHE
from hydrahead.ops_hydrahead import attend_to_cache
from hydrahead.provenance import environment

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
QWEN3_1_7B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2**20,
    "tie_word_embeddings": True,
}
BUDGETS = {
    "cpu": (("25% heads", 0.25, "heads"), ("12.5% kv_groups", 0.125, "kv_groups")),
    "cuda": (("12.5% kv_groups", 0.125, "kv_groups"), ("12.5% heads", 0.125, "heads")),
}
LENGTHS = {"cpu": (512, 2048, 8192, 32768), "cuda": (2048, 32768, 131072)}
BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}  # from their data sheets


def attention_in_pieces(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention, but for single tokens."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])
    return attend_to_cache(grouped, key, value, attention_mask).flatten(1, 2).unsqueeze(1), None


BEST_TEACHER = "teacher, in pieces"
AttentionInterface.register(IN_PIECES := "in_pieces", attention_in_pieces)
AttentionMaskInterface.register(IN_PIECES, sdpa_mask)


def build_models(device: str, shape: dict, dtype: torch.dtype, names: list[str]) -> dict[str, torch.nn.Module]:
    """Teacher and hybrids of one shape, in the dtypes that loading gives; heads are drawn at random."""
    torch.manual_seed(0)
    models = {}
    for name, attention in (("teacher", "sdpa"), (BEST_TEACHER, IN_PIECES)):
        with torch.device(device):
            if name in names:
                config = Qwen3Config(**shape)  # the attention is set in it: one for each model
                models[name] = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).eval()
    adapter = adapter_for(Qwen3Config(**shape))
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    scores = HeadScores(
        scores=torch.rand(layers, heads).tolist(),
        tie_break=[[0.0] * heads] * layers,
        num_key_value_heads=shape["num_key_value_heads"],
        probes=[],
        capabilities={},
        method="random",
        teacher="random",
    )
    for name, ratio, unit in BUDGETS[device]:
        if name not in names:
            continue
        # In KV groups as serving wants them: the same number in every layer.
        strategy = "layer" if device == "cuda" and unit == "kv_groups" else "global"
        config = student_config(adapter, select_heads(scores, ratio, strategy=strategy, budget_unit=unit))
        with torch.device(device):
            model = HydraHeadForCausalLM(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if not any(part in parameter_name for part in model._keep_in_fp32_modules_strict):
                parameter.data = parameter.data.to(dtype)
        model.tie_weights()
        model.pack_projections()
        models[name] = model
    return models


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def config_of(model: torch.nn.Module):
    """A model's configuration as a HydraHead, the teacher's too."""
    return teacher_config(adapter_for(model.config)) if model.config.model_type == "qwen3" else model.config


def least_seconds(model: torch.nn.Module, length: int, bandwidth: float) -> float:
    """Weights and KV cache read once, states read and written once, at so many bytes a second."""
    config = config_of(model)
    weights = sum(parameter.nbytes for parameter in set(model.parameters()))
    return (weights + config.kv_bytes_per_token() * length + 2 * config.state_bytes()) / bandwidth


class Run:
    """One model at one length: a prefilled cache and the times of every measurement, in seconds."""

    def __init__(self, model: torch.nn.Module, length: int):
        self.model, self.length = model, length
        self.device = next(model.parameters()).device
        self.ids = torch.randint(0, model.config.vocab_size, (1, length), device=self.device)
        self.cache: DynamicCache | None = None
        self.position = length
        self.prefill_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def timed(self, call) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def forward(self, ids: torch.Tensor, position: int) -> None:
        position_ids = torch.arange(position, position + ids.shape[1], device=self.device).unsqueeze(0)
        self.model(ids, position_ids=position_ids, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)

    def prefill(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.prefill_seconds.append(self.timed(lambda: self.forward(self.ids, 0)))
        self.position = self.length

    def step(self) -> None:
        self.step_seconds.append(self.timed(lambda: self.forward(self.ids[:, :1], self.position)))
        self.position += 1

    def result(self) -> dict:
        return {
            "prefill_seconds": statistics.median(self.prefill_seconds),
            "decode_ms_per_token": 1e3 * statistics.median(self.step_seconds),
            "cache_bytes": cache_bytes(self.cache),
        }


class CompiledRun(Run):
    """The same for one graph of a step over a static cache that holds `length` tokens."""

    def __init__(self, model: torch.nn.Module, length: int):
        super().__init__(model, length)
        self.cache = StaticCache(config=model.config, max_cache_len=length + 64)
        self.forward(self.ids[:, :64], 0)  # allocates it; what stands in it does not matter
        self.counters = [layer.cumulative_length for layer in self.cache.layers if hasattr(layer, "cumulative_length")]
        self.token, self.place = self.ids[:, :1].clone(), torch.tensor([[length]], device=self.device)
        self.compiled = torch.compile(self.model_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self.compile_seconds = self.timed(lambda: [self.steps(1) for _ in range(3)])

    def model_step(self, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.model(token, position_ids=place, **{CACHE: self.cache}, use_cache=True).logits

    def steps(self, count: int) -> None:
        for counter in self.counters:
            counter.fill_(self.length)
        for _ in range(count):
            self.compiled(self.token, self.place)

    def measure(self, count: int = 20) -> None:
        self.step_seconds.append(self.timed(lambda: self.steps(count)) / count)

    def result(self, bandwidth: float | None) -> dict:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.timed(lambda: self.steps(1))
        kernels = [e for e in profile.events() if e.device_type.name == "CUDA" and "Mem" not in e.name[:4]]
        seconds = statistics.median(self.step_seconds)
        result = {
            "ms_per_token": 1e3 * seconds,
            "kernels_per_token": len(kernels) - len(self.counters),  # one each sets a counter back
            "ms_in_kernels": sum(e.device_time for e in kernels) / 1e3,
            "compile_seconds": self.compile_seconds,
        }
        if bandwidth:
            result["share_of_bandwidth"] = least_seconds(self.model, self.length, bandwidth) / seconds
        return result


@torch.no_grad()
def measure(models: dict[str, torch.nn.Module], length: int, prefills: int, steps: int) -> dict[str, dict]:
    """Medians of every model at one length; models take turns, so that a slow moment of the machine hits all alike."""
    runs = {name: Run(model, length) for name, model in models.items() if name != BEST_TEACHER}
    for _ in range(prefills):
        for run in runs.values():
            run.prefill()
    for _ in range(steps):
        for run in runs.values():
            run.step()
    return {name: run.result() for name, run in runs.items()}


@torch.no_grad()
def measure_compiled(models: dict[str, torch.nn.Module], length: int, bandwidth: float | None) -> dict[str, dict]:
    """The same for compiled steps."""
    torch.compiler.reset()
    runs = {name: CompiledRun(model, length) for name, model in models.items()}
    for _ in range(5):
        for run in runs.values():
            run.measure()
    return {name: run.result(bandwidth) for name, run in runs.items()}


def show(length: int, results: dict[str, dict], compiled: dict[str, dict]) -> None:
    """Print a line for each model, and add its ratios to the results."""
    teacher = results.get("teacher")
    for name in results | compiled:
        line = f"{length:>7}  {name:<18}"
        if result := results.get(name):
            if teacher:
                result["decode_speed_over_teacher"] = teacher["decode_ms_per_token"] / result["decode_ms_per_token"]
                result["prefill_speed_over_teacher"] = teacher["prefill_seconds"] / result["prefill_seconds"]
                result["cache_share_of_teacher"] = result["cache_bytes"] / teacher["cache_bytes"]
            line += f" prefill {result['prefill_seconds']:>7.3f} s ×{result.get('prefill_speed_over_teacher', 1):.2f}"
            line += (
                f"  decode {result['decode_ms_per_token']:>7.2f} ms ×{result.get('decode_speed_over_teacher', 1):.2f}"
            )
            line += f"  cache {result['cache_bytes'] / 2**20:>9.2f} MB"
        if found := compiled.get(name):
            if "teacher" in compiled:
                found["speed_over_teacher"] = compiled["teacher"]["ms_per_token"] / found["ms_per_token"]
                found["kernels_over_teacher"] = found["kernels_per_token"] / compiled["teacher"]["kernels_per_token"]
            line += f"  compiled {found['ms_per_token']:.2f} ms ×{found.get('speed_over_teacher', 1):.2f}"
            line += f", {found['kernels_per_token']} kernels, {found.get('share_of_bandwidth', 0):.0%} of bandwidth"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--models", nargs="+", help="teacher, or a budget such as '12.5%% heads'; all by default")
    parser.add_argument("--prefills", type=int, default=3, help="prefills timed up to 4,096 tokens; one above")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="nothing compiled on a GPU either")
    parser.add_argument("--output", type=Path, help="default: decode-<device>.json beside this script")
    options = parser.parse_args()

    is_gpu = options.device == "cuda"
    use_tuned_kernels()
    shape, dtype = (QWEN3_1_7B, torch.bfloat16) if is_gpu else (SMALL, torch.float32)
    teachers = ["teacher", BEST_TEACHER] if is_gpu else ["teacher"]
    names = options.models or [*teachers, *(name for name, *_ in BUDGETS[options.device])]
    models = build_models(options.device, shape, dtype, names)
    bandwidth = BYTES_PER_SECOND.get(torch.cuda.get_device_name()) if is_gpu else None
    output = options.output or Path(__file__).with_name(f"decode-{options.device}.json")
    report = {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": 1,
        "bytes_per_second": bandwidth,
        "kv_bytes_per_token": {
            name: config_of(model).kv_bytes_per_token(dtype.itemsize) for name, model in models.items()
        },
        "results": {},
    } | environment(options.device)
    measure(models, 256, prefills=1, steps=5)  # warm-up
    for length in options.lengths or LENGTHS[options.device]:
        results = measure(models, length, options.prefills if length <= 4096 else 1, options.steps)
        compiled = measure_compiled(models, length, bandwidth) if is_gpu and not options.eager else {}
        show(length, results, compiled)
        for name, found in compiled.items():
            results.setdefault(name, {})["compiled"] = found
        report["results"][length] = results
        output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
