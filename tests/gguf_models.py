"""Tiny GGUF files of random weights, written with the package gguf as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hydrahead.tests.families import make_teacher

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "Ġ Ġ", "r e", "o n", "a t", "e r"]
TOKENS = [*CONTROL, *bytes_to_unicode().values(), *("".join(merge.split()) for merge in MERGES)]
WORDS = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def tiny_teacher(family: str, **changes) -> PreTrainedModel:
    """A teacher of `families.FAMILIES` with the vocabulary of these files and rows that can be quantised."""
    return make_teacher(family, **{"vocab_size": len(TOKENS), "hidden_size": 96} | changes)


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with the two halves of the rotary embedding interleaved, as llama.cpp's converter leaves them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: PreTrainedModel, kind: str = "F32", pre: str | None = None, **header) -> Path:
    """
    Write a model as a GGUF file.

    Args:
        kind: `F32`, `BF16`, `Q8_0` or `Q4_1`, of the matrices.
        pre: the pre-tokenizer that the header names; by default that of the architecture.
        header: further texts and numbers; `__` in a name stands for a dot.
    """
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or WORDS[architecture])
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    for key, value in header.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        data = parameter.detach().float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            data = llama_cpp_order(data, len(data) // head_dim)
        quantised = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        if quantised != gguf.GGMLQuantizationType.F32:
            data = gguf.quantize(data, quantised)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(data), raw_dtype=quantised)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
