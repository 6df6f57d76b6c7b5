"""What vLLM is given: slots of heads, their weights, pages of memory. None of it needs vLLM; `test_vllm.py` does."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM, ops_hydrahead
from hydrahead.benchmarks import serving as benchmark
from hydrahead.modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding, log_position_scale
from hydrahead.ops_hydrahead import reference_chunk_gated_delta_rule
from hydrahead.serving import RELEASE, why_not_with
from hydrahead.serving.heads import (
    EMPTY,
    Pages,
    ServedFusion,
    ServedGates,
    ServedLayer,
    check_served,
    checkpoint_names,
    query_scale,
    served_kv_heads,
    served_weights,
)
from hydrahead.tests import serving_gpu
from hydrahead.tests.families import ALL_LINEAR, MIXED, make_student, mask_examples, random_masks, student_fields

LENGTH = 11
OPTIONS = {
    "paper": {},
    "rope": {"full_attention_position": "rope", "logit_scale_base": None},
    "no gate, no norm, biases": {
        "full_attention_gate": False,
        "qk_norm": False,
        "attention_bias": True,
        "attention_output_bias": True,
    },
    "gate fusion": {"fusion": "gate"},
    "linear heads normalised": {"fusion_norm": "linear"},
    "gate fusion, linear heads": {"fusion": "gate", "fusion_norm": "linear"},
    "concat": {"fusion": "concat"},
    "short convolution": {"short_conv_kernel_size": 2},
}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}  # heads that several GPUs can share
SPLIT = {
    "whole groups": (2, [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]]),
    "one KV head on two GPUs": (2, [[0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]),
    "irregular": (2, [[1, 0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 0]]),
    "no heads of one kind": (2, [[0] * 8, [1] * 8]),
    "four GPUs": (4, [[1] * 8, [1, 0, 1, 0, 1, 0, 1, 0]]),
}


def config_of(**changes) -> HydraHeadConfig:
    return HydraHeadConfig(**student_fields(**changes))


def normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)


def serve(config: HydraHeadConfig, layer_idx: int, weights: dict, hidden_states: torch.Tensor, ranks: int):
    """What `serving/vllm.py` computes of one sequence `[T, D]`, GPU by GPU, with plain attention and convolution."""
    layer, dim, eps = ServedLayer.of(config, layer_idx, ranks), config.head_dim, config.rms_norm_eps
    served = served_weights(config, layer_idx, weights, ranks)
    positions = torch.arange(len(hidden_states))
    rotation = [x[0] for x in HydraHeadRotaryEmbedding(config)(hidden_states[None], positions[None])]  # [T, d]

    def of_rank(name: str, rank: int, axis: int = 0) -> torch.Tensor:
        return served[name].chunk(ranks, axis)[rank]

    def project(branch: str, rank: int, sizes: list[int]) -> list[torch.Tensor]:
        bias = of_rank(f"{branch}.qkv_proj.bias", rank) if config.attention_bias else None
        projected = F.linear(hidden_states, of_rank(f"{branch}.qkv_proj.weight", rank), bias)
        return [x.unflatten(-1, (-1, dim)).transpose(0, 1) for x in projected.split(sizes, -1)]  # [heads, T, d]

    def norms(branch: str, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (served.get(f"{branch}.{part}_norm.weight") for part in "qk")
        return normed(query, q, eps), normed(key, k, eps)

    total = served.get("o_proj.bias", torch.zeros(config.hidden_size))
    for rank in range(ranks):
        outputs, full = [], len(layer.queries[rank])
        if full:
            sizes = [full * dim, *[len(layer.keys[rank]) * dim] * 2] + [full * dim] * config.full_attention_gate
            query, key, value, *gate = project("full_attention", rank, sizes)
            query, key = norms("full_attention", query, key)
            if config.full_attention_position == "rope":
                query, key = apply_rotary_pos_emb(query, key, *rotation, unsqueeze_dim=0)
            if config.logit_scale_base is not None:
                query = query * query_scale(positions, config.logit_scale_base)
            readers = full // len(layer.keys[rank])  # the same for every KV head, as vLLM's attention wants it
            key, value = (x.repeat_interleave(readers, 0) for x in (key, value))
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            outputs.append(output * (2 * gate[0].sigmoid()) if gate else output)
        if layer.linear[rank]:
            heads = len(layer.linear[rank])
            mixed = torch.cat(project("linear_attention", rank, [heads * dim] * 3)).transpose(1, 2).flatten(0, 1)
            kernel = of_rank("linear_attention.conv", rank)
            mixed = F.conv1d(F.pad(mixed, (kernel.shape[1] - 1, 0)), kernel[:, None], groups=len(mixed))
            query, key, value = mixed.unflatten(0, (3, heads, dim)).transpose(2, 3)  # [h, T, d]
            query, key = norms("linear_attention", query, key)
            query, key = apply_rotary_pos_emb(query, key, *rotation, unsqueeze_dim=0)
            gates = ServedGates(config.hidden_size, heads)
            names = gates.state_dict()
            gates.load_state_dict({name: of_rank(f"linear_attention.gates.{name}", rank) for name in names})
            beta, g = gates(hidden_states)
            query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, T, h, d]
            output, _ = reference_chunk_gated_delta_rule(
                query, key, value, g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=True
            )
            outputs.append(output[0].transpose(0, 1))
        fusion = ServedFusion(config, layer.heads[rank], full)
        fusion.load_state_dict({name: served[f"fusion.{name}"] for name in fusion.state_dict()})
        fused = fusion(torch.cat(outputs).transpose(0, 1), hidden_states)
        total = total + F.linear(fused.flatten(1), of_rank("o_proj.weight", rank, 1))
    return total


def check_layers(ranks: int = 1, **changes) -> None:
    """Every layer of a student gives what our model gives, in fp32: sums are in another order."""
    student = make_student(**changes)
    hidden_states = torch.randn(LENGTH, student.config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH)[None]
    for layer_idx, layer in enumerate(student.model.layers):
        expected = layer.self_attn(
            hidden_states[None],
            position_embeddings=student.model.rotary_emb(hidden_states, positions),
            query_scale=log_position_scale(student.config, positions),
        )[0]
        actual = serve(student.config, layer_idx, layer.self_attn.state_dict(), hidden_states, ranks)
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("masks", mask_examples(3), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_from_the_served_weights_is_the_layer_of_our_model(options, masks):
    check_layers(head_masks=masks, **options)


@torch.no_grad()
@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("options", [OPTIONS["paper"], OPTIONS["gate fusion, linear heads"]], ids=["paper", "gate"])
def test_a_layer_split_over_gpus_is_the_layer_of_our_model(case, options):
    ranks, masks = case
    check_layers(ranks, head_masks=masks, **EIGHT, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_checkpoint_holds_just_the_weights_that_are_asked_for(options):
    for masks in mask_examples(1):
        config = config_of(head_masks=masks, **options)
        for layer_idx in range(config.num_hidden_layers):
            with torch.device("meta"):
                held = HydraHeadAttention(config, layer_idx).state_dict().keys()
            assert checkpoint_names(config, layer_idx) == held


@given(random_masks())
def test_every_head_has_one_slot_and_every_kv_head_as_many_query_slots(masks):
    config = config_of(head_masks=masks)
    for layer_idx, mask in enumerate(masks):
        layer, layout = ServedLayer.of(config, layer_idx), config.head_layout(layer_idx)
        assert sorted(head for head in layer.heads[0] if head != EMPTY) == list(range(len(mask)))
        assert len(layer.keys[0]) == (served_kv_heads(config) if any(mask) else 0)
        if any(mask):
            assert len(layer.queries[0]) % len(layer.keys[0]) == 0
            readers = len(layer.queries[0]) // len(layer.keys[0])
            size = len(mask) // config.num_key_value_heads
            for slot, head in enumerate(layer.heads[0][: len(layer.queries[0])]):
                assert head == EMPTY or layout.kv_heads[layer.keys[0][slot // readers]] == head // size


QWEN3_1_7B = {
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "short_conv_kernel_size": 4,
}
GROUPS = [[0] * (2 * (layer % 8)) + [1, 1] + [0] * (14 - 2 * (layer % 8)) for layer in range(28)]  # 7:1


def test_equal_kv_groups_waste_no_kv_cache():
    config = config_of(**QWEN3_1_7B | {"head_masks": GROUPS})
    pages = Pages.of(config)
    assert pages.kv_bytes_per_token == pages.kv_bytes_needed == 28 * 2 * 128 * 2
    # A state of 14 heads (917,504 bytes, and 32,256 of its convolution) in a page of 240 tokens of 8 KV heads.
    assert pages.page_bytes == 240 * 8 * 2 * 128 * 2 and pages.tokens == 1920
    assert pages.state_bytes_needed == 28 * (917504 + 32256) and pages.state_bytes == 28 * pages.page_bytes
    assert "empty slots" not in pages.in_words()


def test_what_irregular_masks_cost_is_said():
    masks = [row.copy() for row in GROUPS]
    masks[3] = [1, 0] * 3 + [0] * 10  # three KV heads: 3 does not divide 8, so there are four everywhere
    config = config_of(**QWEN3_1_7B | {"head_masks": masks})
    pages = Pages.of(config)
    assert served_kv_heads(config) == 4
    assert (pages.kv_bytes_per_token, pages.kv_bytes_needed) == (28 * 4 * 512, 30 * 512)
    assert "57,344 bytes a token (the masks need 15,360)" in pages.in_words() and "empty slots" in pages.in_words()


def test_layers_without_heads_of_one_kind_keep_nothing_for_it():
    linear = Pages.of(config_of(head_masks=ALL_LINEAR))
    assert linear.kv_bytes_per_token == linear.kv_bytes_needed == 0 and linear.state_bytes == linear.state_bytes_needed
    full = Pages.of(config_of(head_masks=[[1] * 6] * 2))
    assert full.state_bytes == 0 and full.kv_bytes_per_token == full.kv_bytes_needed == 2 * 2 * 2 * 16 * 2


def test_heads_that_cannot_be_split_are_refused_in_one_line_with_what_can():
    config = config_of(**QWEN3_1_7B | {"head_masks": GROUPS})
    check_served(config, 2)  # 14 linear heads, and two query heads of one KV head
    with pytest.raises(ValueError, match=r"^heads cannot be split over 4 GPUs, .*: tensor_parallel_size may be 1, 2$"):
        check_served(config, 4)
    with pytest.raises(ValueError, match="layer 1 has 5 linear heads"):
        check_served(config_of(head_masks=MIXED), 2)


def test_a_convolution_wider_than_vllms_is_refused():
    with pytest.raises(ValueError, match="short_conv_kernel_size is 5: vLLM's convolution has at most 4 taps"):
        check_served(config_of(short_conv_kernel_size=5))


def test_other_versions_of_vllm_are_refused_in_one_line():
    assert why_not_with(f"{RELEASE}.0") is None and why_not_with(f"{RELEASE}.1+cu129") is None
    for other in ("0.33.0", "0.2.6", "1.26.0", "0.260.0"):
        problem = why_not_with(other)
        assert f"this is {other}" in problem and RELEASE in problem and "\n" not in problem


def test_the_gpus_script_says_where_tokens_part_and_by_what_margin():
    expected = {"prompt_tokens": 9, "tokens": [4, 5], "best": [[4, 1], [5, 6]], "logits": [[3.0, 1.0], [2.0, 1.75]]}
    assert serving_gpu.first_difference(expected, [4, 5]) is None
    found = serving_gpu.compared([expected] * 3, [[4, 5], [4, 6], [7, 5]])
    assert (found["equal"], found["widest_margin"]) == (1, 2.0)
    close, far = found["differences"]
    assert (close["step"], close["given"], close["margin"], close["is_bound"]) == (1, 6, 0.25, False)
    assert (far["step"], far["given"], far["margin"], far["is_bound"]) == (0, 7, 2.0, True)
    turn = {"turn 1": found, "preemptions": 0}
    assert [len(serving_gpu.problems(part, turn)) for part in ("eager", "preempted")] == [1, 2]


def test_the_gpus_script_counts_errors_where_both_read_the_same():
    expected = {"prompt_tokens": 2, "tokens": [4, 5], "best": [[4, 1], [5, 6]], "logits": [[3.0, 1.0], [2.0, 1.75]]}
    given = [([4, 6], [-1.5, -9.0], 0)]  # from the second token on it goes another way
    places = serving_gpu.shared_places([expected], given)
    assert places == [{1: -1.5}]
    held = {"fp32.0": torch.tensor([-3.0, -1.0, -2.0]), "bf16.0": torch.tensor([-3.0, -1.25, -2.0])}
    found = serving_gpu.errors(places, held)
    assert (found["places"], found["mean_error"], found["mean_error_of_transformers"]) == (1, 0.5, 0.25)
    assert not serving_gpu.problems("eager", {"read": found})  # twice the error of transformers, and no more
    assert len(serving_gpu.problems("eager", {"read": serving_gpu.errors([{1: -1.51}], held)})) == 1


class Server:
    """For `vllm serve`: up at the second question, the last token of every prompt again and again."""

    def __init__(self, command: list[str]):
        assert command[3:5] == ["serve", "folder"] and command[command.index("--max-model-len") + 1] == "6"
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.path)
                self.send_response(200 if len(seen) > 1 else 503)
                self.end_headers()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["temperature"] == 0 and body["ignore_eos"] and body["return_token_ids"]
                tokens, chosen = [body["prompt"][-1]] * body["max_tokens"], [-1.5] * body["max_tokens"]
                self.send_response(200)
                self.end_headers()
                choice = {"token_ids": tokens, "logprobs": {"token_logprobs": chosen}}
                self.wfile.write(json.dumps({"choices": [choice]}).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", int(command[-1])), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def poll(self):
        return None

    def terminate(self):
        self.server.shutdown()
        self.server.server_close()

    def wait(self, timeout: float):
        assert not serving_gpu.is_up(self.server.server_address[1])


def test_the_gpus_script_asks_a_server(monkeypatch):
    monkeypatch.setattr(serving_gpu.subprocess, "Popen", Server)
    monkeypatch.setattr(serving_gpu.time, "sleep", lambda seconds: None)
    best = {"best": [[4, 1], [4, 6]], "logits": [[3.0, 1.0], [2.0, 1.75]]}
    expected = [{"prompt_tokens": 3, "tokens": [4, 4], **best}, {"prompt_tokens": 2, "tokens": [4, 6], **best}]
    held = {f"{name}.{row}": torch.full((4,), -2.0) for name in ("fp32", "bf16") for row in range(2)}
    found = serving_gpu.asked(Path("folder"), [[1, 2, 4], [1, 4]], expected, held, 2)["turn 1"]
    assert (found["equal"], found["places"], found["mean_error"]) == (1, 3, 0.5)
    (difference,) = found["differences"]
    assert (difference["prompt_tokens"], difference["step"], difference["given"]) == (2, 1, 4)


@torch.no_grad()
def test_the_gpus_script_makes_a_model_and_its_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", ops_hydrahead.chunk_gated_delta_rule)
    folder, output = tmp_path / "model", tmp_path / "results.json"
    serving_gpu.make_model(folder, "small")
    config = HydraHeadConfig.from_pretrained(folder)
    prompts = serving_gpu.prompts_of(folder, config, new_tokens=2)
    assert [len(prompts["mixed"][0]), len(prompts["mixed"][-1])] == [16, 8192] and len(prompts["edges"]) == 8
    found = serving_gpu.reference(folder, {"mixed": [[5] * 16, [7] * 40]}, 2, "sdpa", output)
    held = load_file(serving_gpu.scores_file(output))
    assert held["fp32.1"].shape == (41,)
    # Beside padding and alone: the first token that is taken is the likeliest, and its probability is the one kept.
    row = [7] * 40 + found["mixed"][1]["tokens"]
    logits = HydraHeadForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([row])).logits[0]
    assert abs(logits.log_softmax(-1)[39, row[40]] - held["fp32.1"][39]) <= 1e-4
    assert (held["bf16.1"] - held["fp32.1"]).abs().mean() < 0.5


def test_the_benchmark_fills_the_cache_and_compares_what_both_models_have():
    config = config_of(**QWEN3_1_7B | {"head_masks": GROUPS})
    # A state, and 5 pages of 1,920 tokens; one page is vLLM's own.
    assert benchmark.room_for(config, 1 + 7 * 6, 8192, block_size=16) == 7
    row = {"environment": {"hardware": "a GPU"}, "ms_per_token": 4.0, "tokens_per_second": 100.0}
    rows = {"teacher full 8192": row, "hybrid full 8192": row | {"tokens_per_second": 250.0}, "hybrid one 2048": row}
    assert benchmark.summary(rows) == ["full 8192: tokens_per_second 100.00 and 250.00, 2.50×"]


@pytest.mark.parametrize(
    "words",
    [
        ["hybrid", "needles", "--model", "student", "--tokens", "1K"],  # whose model it is would not be clear
        ["--model", "student", "--output", "results.json"],
        ["--model", "student", "--teacher", "teacher"],
        ["--model", "student", "--teacher", "teacher", "--output", str(benchmark.RESULTS)],
    ],
)
def test_real_models_are_not_measured_into_the_file_of_random_weights(words, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert capsys.readouterr().err.count("error:") == 1


def test_a_cell_of_another_model_is_measured_again(tmp_path, monkeypatch):
    output, started = tmp_path / "results.json", []
    cells = {"hybrid one 2048": {"model": "one"}, "teacher one 2048": {}}
    output.write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(
        benchmark.subprocess, "run", lambda words: started.append(words) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(benchmark, "summary", lambda cells: [])
    for model in ("one", "two"):
        words = ["hybrid", "--kind", "one", "--tokens", "2K", "--model", model, "--output", str(output)]
        assert benchmark.main(words) == 0
    assert [words[words.index("--model") + 1] for words in started] == ["two"]
