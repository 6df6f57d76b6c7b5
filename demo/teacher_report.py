"""What the demo's teacher can do: needles at and beyond its length, text loss against baselines, the model card."""

import json
import lzma
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import provenance
from ..data.corpus import encode_corpus, load_corpus
from ..data.needles import make_niah
from ..evaluation.needles import answer, score
from ..evaluation.text import text_loss

# Seeds of evaluation prompts; training rows come from the recipe's seed, and from other text.
FIRST_SEED = 1_000_000

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [qwen3, needle-in-a-haystack]
---

# The demo's teacher

A small `Qwen3ForCausalLM` that reads the Python standard library and answers RULER's needle prompts hidden in it. It
exists to be converted by `hydrahead demo` and to be studied; it is no assistant.

| | |
| --- | --- |
| parameters | {parameters:,} (tied embeddings), stored in bf16 |
| shape | {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} query and {num_key_value_heads} \
key-value heads of {head_dim}, MLP {intermediate_size}, RoPE theta {rope_theta:g} |
| native length | {native_length} tokens |
| tokenizer | byte-level BPE, {vocab_size} entries, digits one by one |
| data | {corpus_tokens:,} tokens of the standard library's sources, documentation and licence (Python {python}), \
needles hidden in three rows of four; about 5% of the files held out |
| trained on | {million_tokens:.0f} million tokens, {minutes:.1f} minutes, {hardware}, torch {torch} |

Needle prompts (`hydrahead.data.needles`) hidden in held-out text, greedy generation, exact match. The last two
columns split them by the distance from the needle to the answer.

| length | keys | prompts | exact | needle within {native_length} tokens | farther away |
| ---: | ---: | ---: | ---: | ---: | ---: |
{needles}

After training, the attention logits of layer {retrieval_layer}, which looks needles up, were scaled by \
{retrieval_gain}. As trained they were so large that a needle within the native length was found in a prompt of any
length; scaled, more tokens than the native length dilute the softmax, as in teachers whose logits are bounded.
`docs/experiments.md` has both.

Held-out text, {text[held_out_tokens]:,} tokens in windows of {text[window]}:

| | nats per token | bits per byte |
| --- | ---: | ---: |
| teacher | {text[teacher][nats_per_token]:.3f} | {text[teacher][bits_per_byte]:.3f} |
| interpolated trigram, same tokens | {text[trigram][nats_per_token]:.3f} | {text[trigram][bits_per_byte]:.3f} |
| lzma, with all training text before it | | {text[lzma_after_train_text][bits_per_byte]:.3f} |

Evaluated {report[date]} in {report[dtype]} on {report[hardware]} (torch {report[torch]}, transformers
{report[transformers]}, Python {report[python]}).
Made by `python -m hydrahead.demo.train_teacher train` and `evaluate`; the recipe and the log are in
`training_log.jsonl`, the numbers in `evaluation.json`.
"""


def trigram_loss(train_ids: np.ndarray, test_ids: np.ndarray, vocab_size: int) -> float:
    """Mean nats per token of an interpolated trigram (Witten-Bell: order `n` trusts itself by `c / (c + types)`)."""
    probability = np.full(len(test_ids) - 2, 1 / vocab_size)
    for order in (1, 2, 3):
        grams, counts = np.unique(_grams(train_ids, order, vocab_size), return_counts=True)
        contexts, types = np.unique(grams // vocab_size, return_counts=True)
        totals = np.bincount(np.searchsorted(contexts, grams // vocab_size), weights=counts)
        wanted = _grams(test_ids, order, vocab_size)[3 - order :]
        count = _look_up(grams, counts, wanted)
        total, kinds = (
            _look_up(contexts, totals, wanted // vocab_size),
            _look_up(contexts, types, wanted // vocab_size),
        )
        known = total > 0
        probability[known] = ((count + kinds * probability) / np.maximum(total + kinds, 1))[known]
    return float(-np.log(probability).mean())


def _grams(ids: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    return sum(ids[i : len(ids) - order + 1 + i] * vocab_size ** (order - 1 - i) for i in range(order))


def _look_up(names: np.ndarray, numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[place] == wanted, numbers[place], 0)


def lzma_bits_per_byte(train_text: bytes, test_text: bytes) -> float:
    """What `test_text` adds to the compressed size of `train_text`, in bits per byte."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    sizes = [
        len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)) for text in (train_text, train_text + test_text)
    ]
    return 8 * (sizes[1] - sizes[0]) / len(test_text)


def evaluate(folder: Path, samples: int = 200, long_samples: int = 200) -> dict:
    """
    Measure the teacher in `folder` in fp32; write `evaluation.json` and the model card there.

    Args:
        folder: What `train` wrote.
        samples: Prompts for each number of keys (1, 4 and 8) at native length, hidden in held-out text.
        long_samples: Prompts with one key at each of 2, 4 and 8 times that length.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    native = model.config.max_position_embeddings
    texts = [load_corpus(split) for split in ("train", "heldout")]
    train_ids, test_ids = (encode_corpus(tokenizer, documents) for documents in texts)
    train_text, test_text = ("\n\n".join(documents).encode() for documents in texts)
    compressor = ThreadPoolExecutor()  # works beside the accelerator
    lzma_result = compressor.submit(lzma_bits_per_byte, train_text, test_text)

    needles = []
    for multiple, num_keys in ((1, 1), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1)):
        count = samples if multiple == 1 else long_samples
        needles.append(_needle_cell(model, tokenizer, test_ids, multiple * native, num_keys, count))
        print(json.dumps(needles[-1]), flush=True)

    nats = text_loss(model, test_ids, native)
    trigram = trigram_loss(train_ids, test_ids, len(tokenizer))
    to_bits = len(test_ids) / len(test_text) / math.log(2)
    report = {
        **environment(device),
        "dtype": "float32",
        "parameters": model.num_parameters(),
        "needles": needles,
        "text": {
            "held_out_tokens": len(test_ids),
            "held_out_bytes": len(test_text),
            "window": native,
            "teacher": {"nats_per_token": nats, "bits_per_byte": nats * to_bits},
            "trigram": {"nats_per_token": trigram, "bits_per_byte": trigram * to_bits},
            "lzma_after_train_text": {"bits_per_byte": lzma_result.result()},
        },
    }
    print(json.dumps(report["text"]), flush=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    write_card(folder)
    return report


def _needle_cell(model, tokenizer, haystack_ids: np.ndarray, length: int, num_keys: int, samples: int) -> dict:
    """Accuracy at one length and number of keys, also apart for needles within native length of the answer."""
    native = model.config.max_position_embeddings
    prompts = [
        make_niah(tokenizer, haystack_ids, length, num_keys=num_keys, seed=seed)
        for seed in range(FIRST_SEED, FIRST_SEED + samples)
    ]
    answers = answer(model, tokenizer, [prompt.input_ids for prompt in prompts], 16, batch_tokens=32_768)
    found = np.array([score(said, prompt.answers) for said, prompt in zip(answers, prompts)])
    exact = [re.findall(r"\d+", said)[:1] == prompt.answers[:1] for said, prompt in zip(answers, prompts)]
    near = np.array(
        [len(prompt.input_ids) - prompt.value_spans[prompt.query_index[0]][0] <= native for prompt in prompts]
    )
    return {
        "length": length,
        "keys": num_keys,
        "samples": samples,
        "seeds": [FIRST_SEED, FIRST_SEED + samples - 1],
        "accuracy": float(found.mean()),
        "exact": sum(exact) / samples,
        "needles_within_native_length": int(near.sum()),
        "accuracy_within_native_length": float(found[near].mean()) if near.any() else None,
        "accuracy_beyond_native_length": float(found[~near].mean()) if not near.all() else None,
    }


def write_card(folder: Path) -> None:
    """Write the model card of the teacher in `folder` from its `training_log.jsonl` and `evaluation.json`."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    start, end = rows[0], rows[-1]
    report = json.loads((folder / "evaluation.json").read_text())
    recipe, text = start["recipe"], report["text"]
    needles = "\n".join(
        "| {length:,} | {keys} | {samples} | {exact:.3f} | {near} | {far} |".format(
            near=_share(cell["accuracy_within_native_length"]),
            far=_share(cell["accuracy_beyond_native_length"]),
            **cell,
        )
        for cell in report["needles"]
    )
    (folder / "README.md").write_text(
        CARD.format(
            **recipe,
            **{name: start[name] for name in ("parameters", "corpus_tokens", "hardware", "torch", "python")},
            million_tokens=end["tokens"] / 1e6,
            minutes=end["seconds"] / 60,
            needles=needles,
            report=report,
            text=text,
        )
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def environment(device: torch.device) -> dict:
    """Date, machine and versions, side by side, as the files beside the teacher have them."""
    found = provenance.environment(device.type)
    return found.pop("versions") | found
