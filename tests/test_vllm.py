"""
The plug-in inside vLLM itself, on a CPU: its own layers, weight loading and metadata around stand-ins for the kernels.

Runs where vLLM can be imported; `serving_gpu.py` is for machines where it can run.
"""
# ruff: noqa: E402 (what vLLM takes itself for is said before it is imported)

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

platforms = pytest.importorskip("vllm.platforms")
if torch.cuda.is_available():
    pytest.skip("stands in for a GPU's kernels: run tests/serving_gpu.py here", allow_module_level=True)

from vllm.platforms.cpu import CpuPlatform

platforms._current_platform = CpuPlatform()  # a build for GPUs finds no platform here

from vllm.utils import torch_utils

torch_utils.PIN_MEMORY = False  # nor memory that a GPU reads; others copy the value when they are imported

if not hasattr(torch.ops._C, "silu_and_mul"):  # nor its compiled operations; asked for, not called
    compiled = torch.library.Library("_C", "FRAGMENT")
    compiled.define("silu_and_mul(Tensor! out, Tensor input) -> ()")

from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.core.kv_cache_utils import (
    _get_kv_cache_groups_uniform_page_size,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
    unify_kv_cache_spec_page_size,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import block_table, mamba_utils
from vllm.v1.worker.cpu_model_runner import CPUModelRunner, cpu_tl
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from hydrahead import HydraHeadConfig, serving
from hydrahead.benchmarks import serving as benchmark
from hydrahead.files import read_json
from hydrahead.ops_hydrahead import reference_recurrent_gated_delta_rule
from hydrahead.serving.heads import Pages, served_kv_heads
from hydrahead.tests import serving_gpu
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, MIXED, VOCAB, make_student, random_ids
from hydrahead.tests.test_serving import GROUPS, OPTIONS, QWEN3_1_7B, config_of

serving.register()
plugin = pytest.importorskip("hydrahead.serving.vllm")


def test_the_architecture_is_registered_as_a_hybrid_model(tmp_path):
    assert "HydraHeadForCausalLM" in ModelRegistry.get_supported_archs()
    make_student().save_pretrained(tmp_path)
    model = ModelConfig(model=str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=64)
    assert model.is_hybrid and model.has_inner_state and isinstance(model.hf_config, HydraHeadConfig)


def test_in_one_process_the_model_is_known_by_its_class(monkeypatch):
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.setenv(name, "1")  # to be as they were after the test
    for architecture in ("HydraHeadForCausalLM", "Qwen3ForCausalLM"):
        monkeypatch.setitem(ModelRegistry.models, architecture, ModelRegistry.models[architecture])
        benchmark.prepare_vllm(architecture)
        assert ModelRegistry.models[architecture].model_cls.__name__ == architecture


class Engine:
    """Reads a prompt in every step and gives every sequence that it has read a token, a step late as vLLM does."""

    def __init__(self):
        self.waiting, self.running, self.late = [], [], []
        cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
        self.vllm_config = SimpleNamespace(cache_config=cache, use_v2_model_runner=False)

    def add_request(self, name, prompt, options):
        self.waiting.append(name)

    def abort_request(self, names):
        self.running = [name for name in self.running if name not in names]

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        outputs, self.running = self.late, self.running + self.waiting[:1]
        del self.waiting[:1]
        token = SimpleNamespace(token_ids=[0])
        self.late = [SimpleNamespace(request_id=name, outputs=[token]) for name in self.running]
        return outputs


def test_the_benchmark_measures_cell_by_cell_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    output, started = tmp_path / "results.json", []

    def start(folder, architecture, **options):
        assert HydraHeadConfig.from_pretrained(folder).architectures == [architecture]
        started.append(options["max_model_len"])
        return SimpleNamespace(llm_engine=Engine(), model_config=SimpleNamespace(get_vocab_size=lambda: 99))

    monkeypatch.setattr(benchmark, "start", start)
    kernel = SimpleNamespace(name="a kernel", device_time=1e3 * benchmark.PROFILED)  # in so many steps
    timed = []

    def kernels_of_steps(engine) -> list:
        timed.append(list(read_json(output)["cells"]))
        return [kernel]

    monkeypatch.setattr(benchmark, "kernels_of_steps", kernels_of_steps)
    words = ["hybrid", "--here", "--output", str(output), "--tokens", "2K", "8K"]
    benchmark.main([*words, "--minutes", "0"])
    assert not output.exists()
    benchmark.main([*words, "--kind", "one"])
    benchmark.main(words)  # what is left
    rows = read_json(output)["cells"]
    assert list(rows) == ["hybrid one 2048", "hybrid one 8192", "hybrid full 8192"]
    one = rows["hybrid one 2048"]
    assert (one["ms_in_kernels"], one["ms_of_longest_kernels"]) == (1.0, {"a kernel": 1.0})
    assert timed == [["hybrid one 2048", "hybrid one 8192"]] * 2  # no profiler before all that is timed
    row = rows["hybrid full 8192"]
    # A state and seven pages of 1,920 tokens for a prompt of 8K and 4K more, of 99 pages.
    assert row["sequences"] == 99 // 8 and row["tokens_given"] == row["sequences"] * row["steps"]
    assert started == [12288] * 3 and row["options"]["max_model_len"] == 12288 and row["model_runner"] == 1


def test_the_benchmark_takes_a_real_model_past_its_positions(tmp_path, monkeypatch):
    output, given = tmp_path / "results.json", {}
    make_student().save_pretrained(tmp_path / "real")

    def start(folder, architecture, **options):
        given.update(options, folder=folder, architecture=architecture)
        return SimpleNamespace(llm_engine=Engine(), model_config=SimpleNamespace(get_vocab_size=lambda: 99))

    monkeypatch.setattr(benchmark, "start", start)
    monkeypatch.setattr(benchmark, "kernels_of_steps", lambda engine: [])
    words = ["hybrid", "--here", "--model", str(tmp_path / "real"), "--tokens", "2K"]
    with pytest.raises(SystemExit):
        benchmark.main(words)  # not into the file of random weights
    benchmark.main([*words, "--output", str(output)])
    assert (given["folder"], given["architecture"]) == (str(tmp_path / "real"), "HydraHeadForCausalLM")
    assert given["hf_overrides"] == {"max_position_embeddings": 6144} and "load_format" not in given
    assert read_json(output)["cells"]["hybrid one 2048"]["model"] == "real"


class Convolution:
    """For `causal_conv1d_fn` and `causal_conv1d_update`: sequence by sequence, states in place."""

    @staticmethod
    def one(x, weight, state):
        """`[C, T]`, `[C, W]` and the inputs before, `[C, W - 1]`."""
        inputs = torch.cat([state, x], dim=1)
        state.copy_(inputs[:, -state.shape[1] :])
        return F.conv1d(inputs, weight[:, None], groups=len(weight))

    @classmethod
    def fn(
        cls, x, weight, bias, *, conv_states, query_start_loc, cache_indices, has_initial_state, activation, metadata
    ):
        assert bias is None and activation is None and metadata.nums_dict is not None
        outputs = []
        for row, page in enumerate(cache_indices.tolist()):
            if not has_initial_state[row]:
                conv_states[page] = 0
            outputs.append(cls.one(x[:, query_start_loc[row] : query_start_loc[row + 1]], weight, conv_states[page]))
        return torch.cat(outputs, dim=1)

    @classmethod
    def update(cls, x, state, weight, *, conv_state_indices):
        return torch.cat([cls.one(row[:, None], weight, state[page]).t() for row, page in zip(x, conv_state_indices)])


def recurrence(query, key, value, g, beta, state):
    """One sequence `[1, T, h, d]` from a state `[h, d, d]`, in vLLM's order values by keys."""
    output, state = reference_recurrent_gated_delta_rule(
        query, key, value, g=g, beta=beta, initial_state=state.transpose(-1, -2)[None].float(),
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return output, state[0].transpose(-1, -2)


def fused_recurrent(
    *heads, initial_state, inplace_final_state, cu_seqlens, ssm_state_indices, use_qk_l2norm_in_kernel
):
    assert inplace_final_state and use_qk_l2norm_in_kernel and initial_state.shape[1] == heads[0].shape[2]
    outputs = []
    for row in range(len(cu_seqlens) - 1):
        part = slice(cu_seqlens[row], cu_seqlens[row + 1])
        output, state = recurrence(*(x[:, part] for x in heads), initial_state[ssm_state_indices[row]])
        initial_state[ssm_state_indices[row]] = state
        outputs.append(output)
    return torch.cat(outputs, dim=1), initial_state


def chunked(
    *heads, initial_state, output_final_state, cu_seqlens, chunk_indices, chunk_offsets, use_qk_l2norm_in_kernel
):
    assert output_final_state and use_qk_l2norm_in_kernel and chunk_indices is not None
    outputs, states = [], []
    for row in range(len(cu_seqlens) - 1):
        part = slice(cu_seqlens[row], cu_seqlens[row + 1])
        output, state = recurrence(*(x[:, part] for x in heads), initial_state[row])
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.stack(states)


def prepare_step(x, conv, state, places, q_weight, k_weight, eps, angles, positions, hidden_states, gates, beta_bias):
    rows, (heads, dim) = [], (len(beta_bias), angles.shape[1])
    cos, sin = (part.repeat(1, 2)[:, None] for part in angles[positions].chunk(2, dim=-1))
    convolved = Convolution.update(x, state, conv, conv_state_indices=places)
    for part, weight in zip(convolved.view(len(x), 3, heads, dim).unbind(1), (q_weight, k_weight, None)):
        if weight is not None:
            part = F.rms_norm(part, (dim,), weight, eps)
        if len(rows) < 2:
            low, high = part.chunk(2, dim=-1)
            part = part * cos + torch.cat([-high, low], dim=-1) * sin
        rows.append(part.flatten(1))
    beta, step = F.linear(hidden_states, gates).chunk(2, dim=-1)
    return torch.cat(rows, dim=1), beta + beta_bias, step


def packed_decode(qkv, a, b, A_log, dt_bias, scale, state, out, places, *, use_qk_l2norm_in_kernel):
    assert use_qk_l2norm_in_kernel and scale == out.shape[-1] ** -0.5 and out.is_contiguous()
    g = -A_log.exp() * F.softplus(a + dt_bias)
    for row, page in enumerate(places.tolist()):
        if page == 0:
            out[row] = 0
            continue
        heads = (x.unflatten(-1, (-1, out.shape[-1]))[None, None] for x in qkv[row].chunk(3))
        out[row], state[page] = recurrence(*heads, g[row, None, None], b[row, None, None].sigmoid(), state[page])


def use_pytorch(model) -> None:
    """For vLLM's compiled operations. Every second layer has no kernel for a step, as for other rotary embeddings."""
    for module in model.modules():
        module.cpu_linear = F.linear
        if isinstance(module, CustomOp):
            module._forward_method = module.forward_native
    linear = [module for module in model.modules() if isinstance(module, plugin.HydraHeadGatedDeltaNet)]
    for module in linear[::2]:
        module.has_step = plugin.has_one_table(module.rotary_emb)


class Batches:
    """Runs a vLLM model batch by batch, as the engine does, with plain attention over what it has seen."""

    PAGES = 8

    def __init__(self, model, vllm_config: VllmConfig):
        self.model, self.vllm_config, self.batch = model, vllm_config, []
        self.seen: dict[str, int] = {}
        self.layers = vllm_config.compilation_config.static_forward_context
        self.builders = {}
        for name, layer in self.layers.items():
            if isinstance(layer, plugin.HydraHeadGatedDeltaNet):
                # What is in a page before belongs to somebody else.
                layer.kv_cache = tuple(torch.full((self.PAGES, *shape), 7.0) for shape in layer.get_state_shape())
                builder = layer.get_attn_backend().get_builder_cls()
                spec = layer.get_kv_cache_spec(vllm_config)
                self.builders[name] = builder(spec, [name], vllm_config, torch.device("cpu"))
            else:
                layer.forward = self.attention(layer)

    def attention(self, layer):
        cache: dict[str, list[torch.Tensor]] = {}

        def forward(query, key, value):
            outputs, start = [], 0
            for name, count in self.batch:
                q, k, v = (
                    x[start : start + count].unflatten(-1, (-1, layer.head_size)).transpose(0, 1)
                    for x in (query, key, value)
                )
                if name in cache:
                    k, v = torch.cat([cache[name][0], k], dim=1), torch.cat([cache[name][1], v], dim=1)
                cache[name] = [k, v]
                mask = torch.ones(count, k.shape[1], dtype=torch.bool).tril(k.shape[1] - count)
                k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
                outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1))
                start += count
            return F.pad(torch.cat(outputs), (0, 0, 0, len(query) - start))

        return forward

    def step(self, padding: int = 0, **pieces: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The next ids of some sequences, those that generate first, to the logits of each.

        Args:
            padding: tokens behind the last that are nobody's, as where a batch fills up a CUDA graph.
        """
        self.batch = [(name, len(ids)) for name, ids in pieces.items()]
        before = [self.seen.get(name, 0) for name in pieces]
        for name, ids in pieces.items():
            self.seen[name] = self.seen.get(name, 0) + len(ids)
        lengths = torch.tensor([self.seen[name] for name in pieces], dtype=torch.int32)
        counts = torch.tensor([len(ids) for ids in pieces.values()])
        starts = F.pad(counts.cumsum(0), (1, 0)).int()
        pages = torch.tensor([[1 + list(self.seen).index(name)] for name in pieces], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(pieces),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=pages,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.long),
        )
        metadata = {name: builder.build(0, common) for name, builder in self.builders.items()}
        positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids in zip(before, pieces.values())])
        ids = F.pad(torch.cat(list(pieces.values())), (0, padding))
        with set_forward_context(metadata, self.vllm_config), torch.no_grad():
            hidden_states = self.model(ids, F.pad(positions, (0, padding)))
            assert hidden_states.isfinite().all()
            hidden_states = hidden_states[: len(positions)]
            logits = F.linear(hidden_states, self.model.lm_head.weight[:VOCAB])
        return dict(zip(pieces, logits.split(counts.tolist())))


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the kernels of the linear branch, which take fp32."""
    monkeypatch.setattr(plugin, "refuse_what_is_not_supported", lambda config: None)
    monkeypatch.setattr(plugin, "set_triton_allocator", lambda device: None)
    monkeypatch.setattr(plugin, "causal_conv1d_fn", Convolution.fn)
    monkeypatch.setattr(plugin, "causal_conv1d_update", Convolution.update)
    monkeypatch.setattr(plugin, "fused_recurrent_gated_delta_rule", fused_recurrent)
    monkeypatch.setattr(plugin, "chunk_gated_delta_rule", chunked)
    monkeypatch.setattr(plugin, "prepare_step", prepare_step)
    monkeypatch.setattr(plugin, "fused_recurrent_gated_delta_rule_packed_decode", packed_decode)


@pytest.fixture
def serve(tmp_path, kernels):
    """From a student to its `Batches` in vLLM, in fp32: what differs is the order of sums."""

    def start(student, prefix_caching: bool = False) -> Batches:
        student.save_pretrained(tmp_path)
        longest = student.config.max_position_embeddings
        vllm_config = VllmConfig(
            model_config=ModelConfig(
                model=str(tmp_path),
                dtype="float32",
                skip_tokenizer_init=True,
                max_model_len=longest,
                enforce_eager=True,
            ),
            device_config=DeviceConfig(device="cpu"),
            cache_config=CacheConfig(block_size=32, enable_prefix_caching=prefix_caching),
            scheduler_config=SchedulerConfig(
                max_model_len=longest,
                is_encoder_decoder=False,
                max_num_batched_tokens=100,
                max_num_seqs=8,
                async_scheduling=False,
            ),
        )
        with set_current_vllm_config(vllm_config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, "gloo")
                initialize_model_parallel(1, 1)
            model = vllm_model(vllm_config)
            weights = {}
            for file in Path(tmp_path).glob("*.safetensors"):
                weights |= load_file(file)
            loaded = model.load_weights(iter(weights.items()))
            assert loaded == {name for name, _ in model.named_parameters()}
            use_pytorch(model)
            return Batches(model, vllm_config)

    return start


def vllm_model(vllm_config: VllmConfig):
    return plugin.HydraHeadForCausalLM(vllm_config=vllm_config)


MASKS = [MIXED, ALL_FULL, ALL_LINEAR, [[0] * 6, [1] * 6]]


@pytest.mark.parametrize(
    ("options", "masks"),
    [*((OPTIONS["paper"], masks) for masks in MASKS), *((options, MIXED) for options in OPTIONS.values())],
    ids=lambda value: str(value)[:40],
)
def test_sequences_that_come_go_and_are_fed_in_pieces_give_what_our_model_gives(serve, poisoned, options, masks):
    student = make_student(head_masks=masks, **options)
    batches = serve(student)
    ids = dict(zip("abcd", random_ids(4, 14)))
    given = {name: [] for name in ids}
    for step in (
        {"a": 5, "b": 7},
        {"a": 1, "b": 4, "c": 6},  # one generates, the prompt of another goes on, a third begins
        {"a": 1, "b": 1, "c": 1, "d": 1},  # a prompt of one token
        {"c": 1, "d": 1, "a": 3},
    ):
        pieces = {}
        for name, count in step.items():
            start = batches.seen.get(name, 0)
            pieces[name] = ids[name][start : start + count]
        for name, logits in batches.step(padding=2, **pieces).items():
            given[name].append(logits)
    for name, logits in given.items():
        logits = torch.cat(logits)
        with torch.no_grad():
            expected = student(ids[name][None, : len(logits)]).logits[0]
        assert (logits - expected).abs().max() <= 1e-4, name


def test_a_checkpoint_of_another_model_is_refused_by_the_weight_at_fault(serve):
    batches = serve(make_student())
    weights = make_student().state_dict()
    lacking = weights.copy()
    del lacking["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"the checkpoint has no layers\.1\.self_attn\.o_proj\.weight$"):
        batches.model.load_weights(iter(lacking.items()))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight is a weight that this model does not"):
        batches.model.load_weights(iter({"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}.items()))


@pytest.mark.parametrize("masks", [[[1, 0, 0, 0, 0, 0]] * 2, [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]], ids=str)
def test_flash_attention_is_scheduled_for_the_heads_of_the_layer(serve, masks):
    batches = serve(make_student(head_masks=masks))
    for name, layer in batches.layers.items():
        if isinstance(layer, plugin.HydraHeadSlots):
            layer.attn_backend = FlashAttentionBackend
            builder = layer.get_attn_backend().get_builder_cls()
            made = builder(layer.get_kv_cache_spec(batches.vllm_config), [name], batches.vllm_config, "cpu")
            assert (made.num_heads_q, made.num_heads_kv) == (layer.num_heads, layer.num_kv_heads)
            assert not made.supports_update_block_table


def found_in_cache(vllm_config: VllmConfig, kv_cache_config, prompt: list[int]) -> int:
    """Tokens of a prompt that vLLM's scheduler finds where the same prompt was read before."""
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    init_none_hash(hash)
    scheduler = Scheduler(
        vllm_config, kv_cache_config, StructuredOutputManager(vllm_config), block_size, hash_block_size
    )
    found = []
    for name in ("first", "second"):
        options = SamplingParams(max_tokens=2, ignore_eos=True)
        hasher = get_request_block_hasher(hash_block_size, lambda value: hash(value).to_bytes(8, signed=True))
        request = Request(name, prompt, options, None, block_hasher=hasher)
        scheduler.add_request(request)
        while scheduler.has_unfinished_requests():
            step = scheduler.schedule()
            found = [new.num_computed_tokens for new in step.scheduled_new_reqs] or found
            ended = request.num_computed_tokens >= len(prompt)
            output = ModelRunnerOutput([name], {name: 0}, sampled_token_ids=[[1] if ended else []])
            scheduler.update_from_output(step, output)
    return found[0]


def test_a_prefix_is_found_where_a_page_of_keys_and_values_ends(serve):
    batches = serve(  # one KV head of two
        make_student(head_masks=[[1, 0, 0, 0, 0, 0]] * 2, max_position_embeddings=512), prefix_caching=True
    )
    vllm_config = batches.vllm_config
    layers = batches.layers.values()
    attention = next(layer.get_attn_backend() for layer in layers if isinstance(layer, plugin.HydraHeadSlots))
    with set_current_vllm_config(vllm_config):
        CpuPlatform._align_hybrid_block_size(vllm_config, attention)
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in batches.layers.items()}
    (kv_cache_config,) = get_kv_cache_configs(vllm_config, [specs], [2**24])
    groups = kv_cache_config.kv_cache_groups
    assert {group.kv_cache_spec.block_size for group in groups} == {64}
    vllm_config.cache_config.block_size = min(group.kv_cache_spec.block_size for group in groups)  # as its engine does
    vllm_config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    # Pieces of 100 tokens end at multiples of 64, not of 32: 96 and 160 would be of no use to the attention layers.
    for length, expected in ((64 * 2 + 40, 64 * 2), (64 * 5 + 40, 64 * 5), (63, 0)):
        assert found_in_cache(vllm_config, kv_cache_config, list(range(length))) == expected


IRREGULAR = [[1, 0] * (layer % 4) + [0] * (16 - 2 * (layer % 4)) for layer in range(28)]


PAGED = {"groups": GROUPS, "irregular": IRREGULAR, "full": [[1] * 16] * 28, "linear": [[0] * 16] * 28}


@pytest.mark.parametrize("masks", PAGED.values(), ids=PAGED)
def test_pages_are_what_vllm_makes_of_them(masks):
    config = config_of(**QWEN3_1_7B | {"head_masks": masks})
    pages, specs = Pages.of(config), {}
    heads = max(row.count(0) for row in masks)
    for layer, row in enumerate(masks):
        if any(row):
            specs[f"{layer}"] = FullAttentionSpec(
                block_size=pages.page_bytes // (2 * 8 * 128 * 2) if heads else 16,
                num_kv_heads=served_kv_heads(config),
                head_size=128,
                dtype=torch.bfloat16,
            )
        if not all(row):
            specs[f"{layer}.state"] = MambaSpec(
                block_size=2048,
                shapes=((3, 3 * heads * 128), (heads, 128, 128)),
                dtypes=(torch.bfloat16, torch.float32),
                page_size_padded=pages.page_bytes,
            )
    specs = unify_kv_cache_spec_page_size(specs)
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    size = max(len(group.layer_names) for group in groups)
    token = state = 0
    for group in groups:
        assert group.kv_cache_spec.page_size_bytes == pages.page_bytes
        if isinstance(group.kv_cache_spec, MambaSpec):
            state += size * pages.page_bytes
        else:
            assert group.kv_cache_spec.block_size == pages.tokens
            token += size * pages.page_bytes // pages.tokens
    assert (token, state) == (pages.kv_bytes_per_token, pages.state_bytes)
    assert pages.numbers(1) == len(groups)


class SlotMapping:
    """For the kernel that says where in the cache each token of a batch lies."""

    def __getitem__(self, grid):
        def run(count, most, starts, positions, pages, stride, page, slots, *args, **kwargs):
            slots.fill_(-1)
            for row, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist())):
                places = positions[start:end]
                slots[start:end] = pages[row][places // page].long() * page + places % page

        return run


def split_cache(impl, kv_cache) -> tuple[torch.Tensor, torch.Tensor]:
    return kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)  # [pages, tokens, heads, d]


def write_cache(impl, layer, key, value, kv_cache, slots):
    key, value, slots = (x[: len(slots)][slots >= 0] for x in (key, value, slots))
    for cache, new in zip(split_cache(impl, kv_cache), (key, value)):
        cache[slots // cache.shape[1], slots % cache.shape[1]] = new


def attend(impl, layer, query, key, value, kv_cache, metadata, output=None, *args, **kwargs):
    if metadata is None:
        return output.fill_(0)
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for row, length in enumerate(lengths[: len(starts) - 1]):
        part, places = slice(starts[row], starts[row + 1]), torch.arange(length)
        q = query[part].transpose(0, 1)
        k, v = (
            cache[metadata.block_table[row][places // cache.shape[1]].long(), places % cache.shape[1]]
            .transpose(0, 1)
            .repeat_interleave(len(q) // cache.shape[2], 0)
            for cache in split_cache(impl, kv_cache)
        )
        mask = torch.ones(q.shape[1], length, dtype=torch.bool).tril(length - q.shape[1])
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=impl.scale)
        output[part] = attended.transpose(0, 1).reshape(output[part].shape)
    return output


@pytest.fixture
def engine(tmp_path, monkeypatch, kernels):
    """From a student and options to vLLM's own engine on a CPU: its scheduler, batches, caches and metadata."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.setenv(name, "0")  # to be as they were after the test
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # a graph that is traced is run as it is
    monkeypatch.setitem(ModelRegistry.models, "HydraHeadForCausalLM", ModelRegistry.models["HydraHeadForCausalLM"])
    benchmark.prepare_vllm("HydraHeadForCausalLM")
    monkeypatch.setattr(attention, "get_attn_backend", lambda *args, **kwargs: FlashAttentionBackend)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: None)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", write_cache)
    monkeypatch.setattr(FlashAttentionImpl, "forward", attend)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # the worker takes it away
    monkeypatch.setattr(CPUWorker, "__init__", Worker.__init__)  # the worker binds memory by a compiled operation
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda worker: 2**26)
    monkeypatch.setattr(CPUModelRunner, "_postprocess_triton", lambda runner: None)
    monkeypatch.setattr(block_table, "_compute_slot_mapping_kernel", SlotMapping())
    monkeypatch.setattr(mamba_utils, "batch_memcpy_kernel", cpu_tl.batch_memcpy_kernel)
    load_model = CPUModelRunner.load_model

    def load(runner, *args, **kwargs):
        load_model(runner, *args, **kwargs)
        use_pytorch(runner.model)

    monkeypatch.setattr(CPUModelRunner, "load_model", load)

    def start(student, **options) -> LLM:
        student.save_pretrained(tmp_path)
        return LLM(
            str(tmp_path),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=400,
            disable_log_stats=False,
            **{"enforce_eager": True} | options,
        )

    return start


ONE_GROUP = [[1, 0, 0, 0, 0, 0]] * 2
ENGINES = {  # options, masks, lengths of prompts, and what has to have happened
    "mixed": ({}, MIXED, (3, 1, 40, 100, 230, 64), None),
    "traced": ({"enforce_eager": False}, MIXED, (3, 1, 40, 100, 230, 64), None),
    "linear layers": ({}, ALL_LINEAR, (3, 1, 40, 100), None),
    "full layers": ({}, ALL_FULL, (3, 1, 40, 100), None),
    "chunked": ({"max_num_batched_tokens": 32, "max_num_seqs": 4}, MIXED, (3, 1, 40, 100, 230), None),
    "preempted": ({"num_gpu_blocks_override": 12}, ONE_GROUP, (250, 251, 252, 253, 254, 255), "vllm:num_preemptions"),
    "prefix": (
        {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 128},
        ONE_GROUP,
        (3, 1, 40, 129, 257, 380),
        "vllm:prefix_cache_hits",
    ),
}


@pytest.mark.parametrize("case", ENGINES.values(), ids=ENGINES)
def test_vllms_engine_gives_the_tokens_of_our_model(engine, case):
    options, masks, lengths, event = case
    student = make_student(head_masks=masks, max_position_embeddings=512)
    llm, new_tokens = engine(student, **options), 8
    prompts = [random_ids(1, length)[0].tolist() for length in lengths]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(new_tokens):
                ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, len(prompt) :].tolist())

    def happened() -> int:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == event)

    before = happened()
    for every in (0, 2):  # at once, then one by one
        given = serving_gpu.generate(llm.llm_engine, prompts, new_tokens, every)
        assert [tokens for tokens, *_ in given] == expected
    assert event is None or happened() > before
