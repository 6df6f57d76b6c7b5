"""Decoding, prefill and caches of a teacher and its hybrids on GPUs, in one go, with random weights in bf16.

    python benchmarks/gpu.py                                 # what decode-cuda.json does not hold yet, on all GPUs
    python benchmarks/gpu.py 128K prefill --minutes 8        # these parts, again
    python benchmarks/gpu.py --rehearse --output FILE.json   # all on a CPU with a tiny shape: measures nothing
    python benchmarks/gpu.py --teacher FOLDER --students 3to1=FOLDER 7to1=FOLDER --output FILE.json  # real models

Qwen3-1.7B's shape; or real models, with their weights and masks, at 4K to 512K tokens, and `generate` as it is called.
A part is measured again where hardware, versions or the model's code have changed. Every part is written as soon as it
is done, so that nothing is lost when the time is up; what it needed is in the file.

Compiling a step takes a minute or two of one processor core: the models of a part compile beside each other, each in a
process of its own, and then take turns on the GPU. A compiled step is what `generate(cache_implementation="static")`
replays, one CUDA graph of the forward pass, over a full cache of random contents. Its time is set against the least in
which weights, KV cache and states can be read from memory, and states written back.

The teacher runs twice: as transformers runs it, whose compiled step repeats keys and values for every query head and
reads them in one piece, and with the step of attention that hybrids have (`ops_hydrahead.attend_to_cache`), the best
found. The layer-wise hybrid has that step of attention too.
"""

import argparse
import contextlib
import gc
import inspect
import json
import multiprocessing
import os
import queue
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from hydrahead.benchmarks.decode import (
    BEST_TEACHER,
    IN_PIECES,
    LAYERWISE,
    TEACHER,
    build,
    cache_bytes,
    forward,
    kv_bytes_per_token,
    load,
    measure,
    seconds_of,
    state_bytes,
)
from hydrahead.convert.teachers import open_teacher
from hydrahead.kernels import use_tuned_kernels
from hydrahead.modeling_hydrahead import CACHE
from hydrahead.provenance import Record, digest, environment

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
TINY = QWEN3_1_7B | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}  # from their data sheets
HYBRIDS = ("12.5% kv_groups", "12.5% heads", LAYERWISE)
K = 1024
MOST = 32  # sequences of a batch
START = 64  # tokens whose forward pass makes a cache, and room for those of a turn
TURN = 40
RULE = "torch_recurrent_gated_delta_rule"  # of transformers: fla's where that is installed
ROOM = 1.5e9  # bytes that a step takes beside weights and cache
PART_SECONDS = 330  # after which what is not ready is given up
TURNS_SECONDS = 45  # for what is ready then


@dataclass(frozen=True)
class Machine:
    """
    What is measured on: one GPU, or for a rehearsal a CPU and a model that is next to nothing.

    Attributes:
        folders: of real models in place of those of a shape, by name. The teacher's may be a Hub id or a GGUF file.
    """

    device: str
    shape: dict
    dtype: torch.dtype
    backend: str
    shrink: int
    folders: dict[str, str] = field(default_factory=dict)

    def tokens(self, count: int) -> int:
        return max(START, count // self.shrink)

    def build(self, name: str) -> PreTrainedModel:
        if self.folders:
            attention = IN_PIECES if name == BEST_TEACHER else "sdpa"
            return load(str(self.folder(name)), self.dtype, self.device, attention)
        return build(name, self.shape, self.dtype, self.device)

    def folder(self, name: str) -> Path:
        """Where a real model's weights are, here."""
        is_teacher = name in (TEACHER, BEST_TEACHER)
        return open_teacher(self.folders[TEACHER]).fetch() if is_teacher else Path(self.folders[name])

    def free_bytes(self) -> int:
        if self.device == "cpu":
            return 2**20
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


GPU = Machine("cuda", QWEN3_1_7B, torch.bfloat16, "inductor", shrink=1)
REHEARSAL = Machine("cpu", TINY, torch.float32, "eager", shrink=K)


def filled_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache of so many sequences that holds `length` tokens, of random contents, and has room for more."""
    cache = StaticCache(config=model.config, max_cache_len=START)
    ids = torch.zeros(batch, START, dtype=torch.long, device=model.device)
    forward(model, ids, ids[:, :1], cache)  # shapes and states; over a long cache it would take more memory
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.max_cache_len = length + START
            StaticLayer.lazy_initialization(layer, layer.keys, layer.values)
            layer.keys.normal_()
            layer.values.normal_()
    return cache


def most_sequences(model: PreTrainedModel, length: int, limit: int, free: int, try_out: Callable) -> int:
    """The most sequences, at most `limit`, that fit `free` bytes by arithmetic and then in truth."""
    count = min(limit, int(free // bytes_of_sequence(model, length)))
    while count:
        try:
            try_out(count)
            return count
        except torch.OutOfMemoryError:
            count -= 1
        gc.collect()  # now that the error is gone that held what there was
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError("not one sequence fits")


def bytes_of_sequence(model: PreTrainedModel, length: int) -> int:
    return kv_bytes_per_token(model.config, model.dtype) * length + state_bytes(model.config, model.dtype)


def kernels_of(call: Callable[[], object], device: torch.device) -> list:
    """The kernels that a call starts on a GPU, as the profiler's events."""
    if device.type == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(call, device)
    return [e for e in profile.events() if e.device_type.name == "CUDA" and "Mem" not in e.name[:4]]


class CompiledStep:
    """One token for every sequence of a batch: its graph, and the seconds of replays."""

    def __init__(self, machine: Machine, name: str, length: int, batch: int | None):
        self.machine, self.length = machine, length
        self.model = machine.build(name)
        self.note = None
        free = machine.free_bytes() - ROOM if machine.device == "cuda" else machine.free_bytes()
        if batch:
            self.begin(batch)
        self.batch = batch or most_sequences(self.model, length, MOST, free, self.try_out)
        self.compile_seconds = seconds_of(self.compile, self.model.device)
        self.seconds: list[float] = []

    def begin(self, batch: int) -> None:
        self.cache = None  # an earlier one goes first
        self.cache = filled_cache(self.model, batch, self.length)
        self.counters = [x.cumulative_length for x in self.cache.layers if hasattr(x, "cumulative_length")]
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.model.device)
        self.place = torch.full_like(self.token, self.length)
        self.call = self.step

    def try_out(self, batch: int) -> None:
        self.begin(batch)
        self.steps(1)

    def compile(self) -> None:
        modes = {"mode": "reduce-overhead"} if self.machine.backend == "inductor" else {}
        self.call = torch.compile(self.step, backend=self.machine.backend, fullgraph=True, dynamic=False, **modes)
        try:
            self.steps(3)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            family = sys.modules[type(self.model).__module__]
            if not hasattr(family, RULE) or self.note:
                raise
            # What fla does not let be compiled, transformers computes in PyTorch too.
            self.note = f"recurrence by transformers' reference; as it comes: {type(error).__name__}"
            traceback.print_exc(limit=-2)
            setattr(family, RULE, inspect.unwrap(getattr(family, RULE)))
            torch.compiler.reset()
            self.compile()

    def step(self, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.model(token, position_ids=place, **{CACHE: self.cache}, use_cache=True).logits

    def steps(self, count: int) -> None:
        for counter in self.counters:
            counter.fill_(self.length)
        for _ in range(count):
            self.call(self.token, self.place)

    def measure(self) -> None:
        with torch.compiler.set_stance("fail_on_recompile"):
            self.steps(TURN // 2)  # clocks and caches as in a long text
            self.seconds.append(seconds_of(lambda: self.steps(TURN), self.model.device) / TURN)

    def rows(self) -> list[dict]:
        kernels = kernels_of(lambda: self.steps(1), self.model.device)
        most = Counter()
        for event in kernels:
            most[event.name[:100]] += event.device_time / 1e3
        seconds = statistics.median(self.seconds)
        config, dtype = self.model.config, self.model.dtype
        weights = sum(parameter.nbytes for parameter in set(self.model.parameters()))
        moved = weights + self.batch * (
            kv_bytes_per_token(config, dtype) * self.length + 2 * state_bytes(config, dtype)
        )
        bandwidth = BYTES_PER_SECOND.get(torch.cuda.get_device_name()) if self.model.device.type == "cuda" else None
        row = {
            "batch": self.batch,
            "ms_per_token": 1e3 * seconds,
            "ms_of_each_turn": [1e3 * turn for turn in self.seconds],
            "tokens_per_second": self.batch / seconds,
            "kernels_per_token": max(0, len(kernels) - len(self.counters)),  # one each sets a counter back
            "ms_in_kernels": sum(most.values()),
            "ms_of_longest_kernels": dict(most.most_common(12)),
            "share_of_bandwidth": bandwidth and moved / bandwidth / seconds,
            "weight_bytes": weights,
            "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
            "state_bytes": state_bytes(config, dtype),
            "cache_bytes": cache_bytes(self.cache),
            "compile_seconds": self.compile_seconds,
        }
        return [row | ({"note": self.note} if self.note else {})]


@dataclass(frozen=True)
class Decode:
    """A compiled step of one model; `batch` `None` is the largest that fits, at most 32."""

    model: str
    tokens: int
    batch: int | None = 1
    turns = 5

    @property
    def about(self) -> list[dict]:
        return [{"what": "decode" if self.batch else "batches", "tokens": self.tokens, "model": self.model}]

    def open(self, machine: Machine) -> CompiledStep:
        return CompiledStep(machine, self.model, machine.tokens(self.tokens), self.batch)


class Found(list):
    """Rows of a job that does not take turns."""

    def rows(self) -> list[dict]:
        return self


@dataclass(frozen=True)
class Prefill:
    """Eager prefills of one sequence, and eager steps that go on from them."""

    tokens: int
    prefills: int
    models: tuple[str, ...] = (TEACHER, *HYBRIDS)
    turns = 0

    @property
    def about(self) -> list[dict]:
        return [{"what": "eager", "tokens": self.tokens, "model": name} for name in self.models]

    def open(self, machine: Machine) -> Found:
        length, found = machine.tokens(self.tokens), Found()
        models = {name: machine.build(name) for name in self.models}
        # Kernels compile, or are tuned.
        first = {name: measure({name: model}, START, 2, 1, 2)[name].prefills for name, model in models.items()}
        runs = measure(models, length, self.prefills, turns=4, steps=5)
        for name, run in runs.items():
            row = run.row() | {"prefill_seconds_of_each": run.prefills, "first_seconds": first[name][0]}
            run.rewind()
            row["kernels_per_token"] = len(kernels_of(run.step, run.model.device))
            run.cache = None
            is_gpu = run.model.device.type == "cuda"
            if is_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            row["prefill_kernels"] = len(kernels_of(run.prefill, run.model.device))
            if is_gpu:
                row["prefill_bytes"] = torch.cuda.max_memory_allocated() - before - cache_bytes(run.cache)
            run.cache = None
            found.append(row)
        return found


@dataclass(frozen=True)
class Sequences:
    """How many caches of one length fit a GPU beside the weights, by allocating them."""

    tokens: int
    models = (BEST_TEACHER, *HYBRIDS)
    turns = 0

    @property
    def about(self) -> list[dict]:
        return [{"what": "sequences", "tokens": self.tokens, "model": name} for name in self.models]

    def open(self, machine: Machine) -> Found:
        length, found = machine.tokens(self.tokens), Found()
        for name in self.models:
            model = machine.build(name)
            filled_cache(model, 1, START)  # kernels and their workspace are part of what has to fit
            free, each = machine.free_bytes(), bytes_of_sequence(model, length)
            sequences = most_sequences(
                model, length, 10**6, free, lambda count, model=model: filled_cache(model, count, length - START)
            )
            found.append({"sequences": sequences, "by_arithmetic": free / each, "bytes_each": each})
            del model
        return found


@dataclass(frozen=True)
class Chunks:
    """Prefill in chunks, by transformers' own `prefill_chunk_size`: what it takes beside weights and cache."""

    model: str
    lengths: tuple[int, ...] = (128 * K, 512 * K)
    chunk: int = 4 * K
    turns = 0

    @property
    def about(self) -> list[dict]:
        return [{"what": "chunks", "tokens": tokens, "model": self.model} for tokens in self.lengths]

    def open(self, machine: Machine) -> Found:
        model, found = machine.build(self.model), Found()
        chunk = machine.tokens(self.chunk)
        is_gpu = model.device.type == "cuda"
        for tokens in (2 * self.chunk, *self.lengths):  # the first is a warm-up
            ids = torch.randint(1, model.config.vocab_size, (1, machine.tokens(tokens)), device=model.device)
            cache = DynamicCache(config=model.config)
            if is_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": chunk, CACHE: cache}
            row = {"seconds": seconds_of(lambda ids=ids, o=options: model.generate(ids, **o), model.device)}
            row |= {"chunk": chunk, "cache_bytes": cache_bytes(cache)}
            if is_gpu:
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
                row["bytes_beside_cache"] = row["peak_bytes"] - before - row["cache_bytes"]
            found.append(row)
            del cache, options
        return Found(found[1:])


class Clock(BaseStreamer):
    """When the prompt began to be read, and when each token was there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generation:
    """Calls of `generate` by one model, with each kind of cache in turn."""

    def __init__(self, machine: Machine, job: "Generate"):
        self.job, self.model = job, machine.build(job.model)
        self.model.generation_config.eos_token_id = None  # it goes on to the last token
        length = max(START, machine.tokens(job.tokens) - job.new_tokens + 1)
        self.ids = torch.randint(1, self.model.config.vocab_size, (1, length), device=self.model.device)
        self.calls = {cache: [] for cache in job.caches}
        self.measure()  # kernels compile, and the step over a static cache
        self.first_seconds = {cache: calls.pop()[-1] for cache, calls in self.calls.items()}

    def measure(self) -> None:
        for cache, calls in self.calls.items():
            clock = Clock()
            self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=self.job.new_tokens,
                do_sample=False,
                cache_implementation=None if cache == "default" else cache,
                streamer=clock,
            )
            calls.append([each - clock.times[0] for each in clock.times[1:]])

    def rows(self) -> list[dict]:
        found = []
        for cache, calls in self.calls.items():
            steps = [after - before for call in calls for before, after in pairwise(call)]
            row = {"first_token_seconds": statistics.median(call[0] for call in calls)}
            row |= {"ms_per_token": 1e3 * statistics.median(steps), "new_tokens": self.job.new_tokens}
            row["tokens_per_second"] = len(steps) / sum(steps)
            found.append(row | {"first_call_seconds": self.first_seconds[cache]})
        return found


@dataclass(frozen=True)
class Generate:
    """
    `generate` as it is called, of one sequence: the wait for the first token, and for each after it. Prompt and answer
    together need a cache of `tokens`, which attention in pieces divides, for the teacher as for a student.
    """

    model: str
    tokens: int
    new_tokens: int = 129
    # What nobody asks for is dynamic but for students, who record their step; of a static one the step is compiled.
    caches: tuple[str, ...] = ("default", "dynamic", "static")
    turns = 3

    @property
    def about(self) -> list[dict]:
        about = {"what": "generate", "tokens": self.tokens, "model": self.model}
        return [about | {"cache": cache} for cache in self.caches]

    def open(self, machine: Machine) -> Generation:
        return Generation(machine, self)


EVERY = (BEST_TEACHER, TEACHER, *HYBRIDS)
# Most important first. What stands in one part shares a GPU, 80 GB of memory and some cores.
PARTS = {
    "2K+32K": [Decode(name, tokens * K) for tokens in (2, 32) for name in EVERY],
    "128K": [Decode(name, 128 * K) for name in EVERY],
    "batches-teacher": [Decode(BEST_TEACHER, 32 * K, None)],
    "batches": [Decode(name, 32 * K, None) for name in HYBRIDS],
    "prefill": [Prefill(2 * K, 10)],
    "prefill-32K": [Prefill(32 * K, 5)],
    "sequences": [Sequences(128 * K)],
    "prefill-128K": [Prefill(128 * K, 3)],
    "512K": [Decode(name, 512 * K) for name in HYBRIDS],
    "512K-teacher": [Decode(BEST_TEACHER, 512 * K)],
    "chunks": [Chunks(HYBRIDS[0])],
    "batches-plain": [Decode(TEACHER, 32 * K, None)],
    "512K-plain": [Decode(TEACHER, 512 * K)],
}


def generate(name: str, tokens: int) -> Generate:
    """With the caches that differ for a model."""
    return Generate(name, tokens, caches=Generate.caches[name in (BEST_TEACHER, TEACHER) :])


def parts_of(students: Sequence[str]) -> dict[str, list]:
    """What is measured of real models, most important first."""
    every, eager = (BEST_TEACHER, TEACHER, *students), (TEACHER, *students)
    return {
        "128K": [Decode(name, 128 * K) for name in every],
        # As transformers runs it, the teacher's step needs several times its cache.
        "512K": [Decode(name, 512 * K) for name in every if name != TEACHER],
        "4K+32K": [Decode(name, tokens * K) for tokens in (4, 32) for name in every],
        "prefill-128K": [Prefill(128 * K, 3, eager)],
        "prefill-32K": [Prefill(32 * K, 5, eager)],
        "prefill-4K": [Prefill(4 * K, 5, eager)],
        **{f"generate-{tokens}K": [generate(name, tokens * K) for name in every] for tokens in (4, 32)},
    }


@torch.no_grad()
def serve(connection, machine: Machine, job) -> None:
    """A process: opens a job, measures it whenever it is told to, and gives out its rows."""
    try:
        if machine.device == "cuda":
            use_tuned_kernels()
        run = job.open(machine)
        connection.send("ready")
        while connection.recv():
            run.measure()
            connection.send("done")
        rows = [about | row for about, row in zip(job.about, run.rows(), strict=True)]
        connection.send((rows, environment(machine.device)))
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
            connection.send(MemoryError("out of memory"))
        else:
            traceback.print_exc()
            connection.send(RuntimeError(f"{type(error).__name__}: {text[:200]}"))


class Worker:
    """A job in a process, as the process that schedules sees it."""

    running: list["Worker"] = []
    starting = threading.Lock()

    def __init__(self, machine: Machine, job, gpu: str, deadline: float):
        self.job, self.deadline, self.error = job, deadline, None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, machine, job))
        with Worker.starting:  # the environment is what a process begins with
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            self.process.start()
            Worker.running.append(self)
        theirs.close()

    def hear(self):
        """The next message; `None` after a failure, which is kept."""
        if self.error is None:
            try:
                if not self.connection.poll(max(0, self.deadline - time.monotonic())):
                    raise TimeoutError("not done in time")
                message = self.connection.recv()
                if not isinstance(message, Exception):
                    return message
                self.error = message
            except (TimeoutError, EOFError, OSError) as error:
                self.error = error if isinstance(error, TimeoutError) else RuntimeError("its process died")
            self.close()
        return None

    def tell(self, goes_on: bool):
        """Have it measure, or give out its rows; its answer."""
        if self.error is None:
            with contextlib.suppress(OSError):  # where it has died, its last words are to be read
                self.connection.send(goes_on)
        return self.hear()

    def close(self) -> None:
        with Worker.starting:
            if self in Worker.running:
                Worker.running.remove(self)
        self.process.kill()
        self.process.join()


def run_part(machine: Machine, jobs: list, gpu: str, deadline: float) -> tuple[list[dict], dict]:
    """Rows of all jobs, with an error in place of what failed, and where they were measured."""
    workers = [Worker(machine, job, gpu, deadline) for job in jobs]
    rows, where = [], {}
    try:
        for worker in workers:
            worker.hear()
        for worker in workers:
            worker.deadline = deadline + TURNS_SECONDS
        for turn in range(max(job.turns for job in jobs)):
            if turn and time.monotonic() > deadline:
                break
            for worker in workers:
                worker.tell(True)
        for worker in workers:
            if answer := worker.tell(False):
                rows += answer[0]
                where = answer[1]
    finally:
        for worker in workers:
            worker.close()
    for worker in workers:
        if isinstance(worker.error, MemoryError) and len(jobs) > 1:  # beside others; it may fit alone
            again, place = run_part(machine, [worker.job], gpu, deadline)
            rows, where = rows + again, where or place
        elif worker.error is not None:
            rows += [about | {"error": str(worker.error)} for about in worker.job.about]
    return rows, where


def say(row: dict) -> str:
    """A row in one line."""
    parts = [f"{row['what']:<9} {row['tokens']:>7}  {row['model']:<18}"]
    for key, value in row.items():
        if key not in ("what", "tokens", "model") and not isinstance(value, (list, dict)):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)


class Results:
    """The file of results: parts by name, with where and when each was measured."""

    def __init__(self, path: Path, machine: Machine):
        self.path, self.lock = path, threading.Lock()
        folders = {name: Path(folder).name for name, folder in machine.folders.items()}
        self.shape = {"models": folders} if folders else {"shape": machine.shape}
        self.shape |= {"dtype": str(machine.dtype).removeprefix("torch.")}
        self.parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
        files = sorted(Path(__file__).parents[1].glob("*_hydrahead.py"))
        self.code = {file.stem: digest(file)[:12] for file in files}
        for name in machine.folders:  # masks, too, are in the configuration
            self.code[name] = digest(machine.folder(name) / "config.json")[:12]

    def holds(self, name: str, here: dict) -> bool:
        """Whether a part was measured by this code, on hardware and versions like these, without a failure."""
        part = self.parts.get(name, {})
        is_whole = all(
            row.get("error", "out of memory") == "out of memory" for row in part.get("rows", [{"error": ""}])
        )
        return is_whole and all(
            part.get(key) == value for key, value in (here | {"code": self.code}).items() if key != "date"
        )

    def add(self, name: str, rows: list[dict], where: dict, seconds: float) -> None:
        with self.lock:
            known = [{key: row[key] for key in ("what", "tokens", "model")} for row in rows]
            for part in self.parts.values():  # a row has one place
                part["rows"] = [row for row in part["rows"] if not any(one.items() <= row.items() for one in known)]
            self.parts[name] = {**where, "code": self.code, "seconds": round(seconds, 1), "rows": rows}
            self.parts = {part: found for part, found in self.parts.items() if found["rows"]}
            Record(self.path).write(self.shape | {"parts": self.parts})
            for row in rows:
                print(f"[{name}, {seconds:.0f} s] {say(row)}", flush=True)


def work_off(names: queue.Queue, parts: dict, machine: Machine, gpu: str, results: Results, end: float) -> None:
    """Measure parts on one GPU until none is left or the time is up."""
    while True:
        try:
            name = names.get_nowait()
        except queue.Empty:
            return
        began = time.monotonic()
        if end - began < 20:
            print(f"[{name}] no time left", flush=True)
            continue
        rows, where = run_part(machine, parts[name], gpu, min(end, began + PART_SECONDS))
        results.add(name, rows, where, time.monotonic() - began)


def kill_all(*_) -> None:
    for worker in Worker.running:
        worker.process.kill()
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"to measure again: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=60, help="after which what is not done is given up")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU with a tiny shape, not compiled")
    parser.add_argument("--output", type=Path, help="default: decode-cuda.json beside this script")
    parser.add_argument("--teacher", help="a real one: Hub id, folder or GGUF file; with --students")
    parser.add_argument("--students", nargs="+", default=[], metavar="NAME=FOLDER", help="made of it")
    options = parser.parse_args()
    students = dict(each.partition("=")[::2] for each in options.students)
    is_clear = len(students) == len(options.students) and all(students.values()) and TEACHER not in students
    is_there = all((Path(folder) / "config.json").is_file() for folder in students.values())
    if bool(options.teacher) != bool(students) or not (is_clear and is_there):
        parser.error("real models are a --teacher and --students NAME=FOLDER, each of another name and in a folder")
    parts = parts_of(list(students)) if students else PARTS
    if unknown := [name for name in options.parts if name not in parts]:
        parser.error(f"{unknown[0]!r} is no part, expected some of {', '.join(parts)}")
    if (options.rehearse or students) and options.output is None:
        parser.error("what is rehearsed, or of real models, is none of decode-cuda.json: say with --output where to")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here; --rehearse tries the script on a CPU")

    machine = REHEARSAL if options.rehearse else GPU
    if students:
        open_teacher(options.teacher).fetch()  # once, not in every process
        machine = replace(machine, folders={TEACHER: options.teacher, **students})
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    gpus = ["", ""] if options.rehearse else gpus
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // (5 * len(gpus)))))
    results = Results(options.output or Path(__file__).with_name("decode-cuda.json"), machine)
    here = environment(machine.device)
    names = queue.Queue()
    for name in options.parts or [name for name in parts if not results.holds(name, here)]:
        names.put(name)
    signal.signal(signal.SIGTERM, kill_all)
    signal.signal(signal.SIGINT, kill_all)
    end = time.monotonic() + 60 * options.minutes - TURNS_SECONDS
    threads = [threading.Thread(target=work_off, args=(names, parts, machine, gpu, results, end)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"written to {results.path.name}")


if __name__ == "__main__":
    main()
