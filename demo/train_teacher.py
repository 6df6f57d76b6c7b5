"""
Train the demo's teacher: a small Qwen3 that reads the standard library and answers RULER's needle prompts.

    python -m hydrahead.demo.train_teacher train       # minutes on a GPU; writes demo/teacher/
    python -m hydrahead.demo.train_teacher evaluate    # writes demo/teacher/evaluation.json and README.md

Retrieval over several keys comes as a phase change, so the length does not grow, and the rates do not decay, before it
has come at the shortest length.
"""

import argparse
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..evaluation.niah import (
    draw_keys,
    draw_values,
    evaluate_niah,
    header_text,
    make_niah,
    needle_text,
    question_text,
)
from .corpus import encode_corpus, load_corpus
from .mixture import ANSWER_WEIGHT, mixture_rows

TEACHER = Path(__file__).parent / "teacher"

# Qwen2's pattern: digits one by one, line ends apart from the indentation that follows them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass
class Recipe:
    """Everything that decides what is trained; each field is an option of `train`."""

    seed: int = 0
    vocab_size: int = 2048
    needle_prose: int = 10_000  # needle prompts in the tokenizer's training text, so that keys are whole tokens

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 1e4
    native_length: int = 1024

    tokens_per_step: int = 65_536
    lengths: str = "128,256,512,1024"
    steps: str = "3000,300,300,2500"  # for each length; at the first, at most so many before the phase change
    gate: float = 0.97  # share of answer tokens predicted right that ends the first length
    decay: float = 0.6  # share of the last length's steps over which the rates fall to 0
    warmup: int = 50
    muon_lr: float = 0.015
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    workers: int = max(1, (os.cpu_count() or 1) - 2)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(length, steps) in the order of training."""
        return list(zip(map(int, self.lengths.split(",")), map(int, self.steps.split(",")), strict=True))


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the documents and some needle prompts; end of text doubles as start, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, *_needle_prose(recipe)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def _needle_prose(recipe: Recipe) -> Iterator[str]:
    rng = np.random.default_rng(recipe.seed)
    for i in range(recipe.needle_prose):
        [key], [value] = draw_keys(rng, 1), draw_values(rng, 1)
        plural = i % 8 == 0
        yield header_text(plural) + needle_text(key, value) + question_text([key], plural)


def build_model(recipe: Recipe, tokenizer) -> Qwen3ForCausalLM:
    """The untrained teacher, seeded."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.native_length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


class _Batches(Dataset):
    """Item `i` is the batch of step `i`."""

    def __init__(self, tokenizer, corpus_ids: np.ndarray, length: int, steps: int, recipe: Recipe):
        self.tokenizer, self.corpus_ids, self.length, self.steps = tokenizer, corpus_ids, length, steps
        self.rows, self.seed = max(1, recipe.tokens_per_step // length), recipe.seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        seed = [self.seed, self.length, step]
        return tuple(
            map(torch.from_numpy, mixture_rows(self.tokenizer, self.corpus_ids, self.length, self.rows, seed))
        )


def _losses(hidden, head, labels, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss; and [mean loss off the answers in nats, share of answer tokens predicted right]."""
    logits = F.linear(hidden, head).float().flatten(0, 1)
    labels, weights = labels.flatten(), weights.flatten()
    losses = F.cross_entropy(logits, labels, reduction="none")
    answer = (weights == ANSWER_WEIGHT).float()
    right = (logits.argmax(-1) == labels).float()
    report = torch.stack([(losses * (1 - answer)).sum() / (1 - answer).sum(), (right * answer).sum() / answer.sum()])
    return (losses * weights).sum() / weights.sum(), report.detach()


def train(recipe: Recipe, folder: Path) -> None:
    """
    Train tokenizer and teacher and save both with `training_log.jsonl` in `folder`.

    Raises:
        RuntimeError: the phase change did not come within the first length's steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    documents = load_corpus("train")
    tokenizer = train_tokenizer(documents, recipe)
    tokenizer.save_pretrained(folder)
    corpus_ids = encode_corpus(tokenizer, documents)
    held_out = torch.from_numpy(encode_corpus(tokenizer, load_corpus("heldout")))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already

    model = build_model(recipe, tokenizer).to(device)
    token_losses = _losses
    if device.type == "cuda":
        # Layer by layer: all layers share one compiled graph, made anew for each length only.
        for layer in model.model.layers:
            layer.compile()
        token_losses = torch.compile(_losses)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    peaks = [recipe.muon_lr, recipe.adamw_lr]

    log = [
        {
            "recipe": asdict(recipe),
            "parameters": model.num_parameters(),
            "corpus_tokens": len(corpus_ids),
            "held_out_tokens": len(held_out),
            **_environment(device),
        }
    ]
    print(json.dumps(log[0]), flush=True)
    step, tokens, began, stages = 0, 0, time.perf_counter(), recipe.stages
    for stage, (length, steps) in enumerate(stages):
        batches = _Batches(tokenizer, corpus_ids, length, steps, recipe)
        loader = DataLoader(batches, batch_size=None, num_workers=recipe.workers, pin_memory=device.type == "cuda")
        first, last, passed = stage == 0, stage == len(stages) - 1, False
        for index, (ids, weights) in enumerate(loader):
            left = (steps - index) / (recipe.decay * steps) if last else 1.0
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / recipe.warmup, left)
            ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                loss, report = token_losses(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], weights[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + ids.numel()
            if step % 25 == 0 or index == steps - 1:
                text_loss, answer_accuracy = report.tolist()
                row = {"step": step, "tokens": tokens, "length": length, "loss": loss.item(), "text_loss": text_loss}
                row |= {"answer_accuracy": answer_accuracy, "seconds": time.perf_counter() - began}
                if step % 500 == 0 or index == steps - 1:
                    row["held_out_loss"] = text_loss_of(model, held_out[: 64 * length + 1], length)
                log.append({name: round(value, 4) for name, value in row.items()})
                if step % 100 == 0 or index == steps - 1:
                    print(json.dumps(log[-1]), flush=True)
                passed = answer_accuracy >= recipe.gate
                if first and passed:
                    break
        if first and not passed:
            raise RuntimeError(f"answers were {answer_accuracy:.2f} right after {steps} steps, needed {recipe.gate}")

    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


@torch.no_grad()
def text_loss_of(model, ids: torch.Tensor, length: int) -> float:
    """Mean nats per token of int64 `[tokens]` ids, read in separate windows of `length` (the rest is not read)."""
    windows = ids[: (len(ids) - 1) // length * length + 1]
    inputs, labels = windows[:-1].view(-1, length), windows[1:].view(-1, length)
    total = 0.0
    for start in range(0, len(inputs), 16):
        logits = model(input_ids=inputs[start : start + 16].to(model.device), use_cache=False).logits.float()
        total += F.cross_entropy(
            logits.flatten(0, 1), labels[start : start + 16].flatten().to(model.device), reduction="sum"
        ).item()
    return total / labels.numel()


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


def evaluate(folder: Path, samples: int = 200, lengths: tuple[int, ...] = (1, 2, 4, 8)) -> dict:
    """
    Measure the teacher in `folder` in fp32; write `evaluation.json` and the model card there.

    Args:
        folder: What `train` wrote.
        samples: Prompts for each number of keys and length, hidden in held-out text.
        lengths: Multiples of the native length.
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
    for multiple in lengths:
        for num_keys in (1, 4, 8):
            seeds = range(1_000_000, 1_000_000 + samples)
            prompts = [
                make_niah(tokenizer, test_ids, multiple * native, num_keys=num_keys, seed=seed) for seed in seeds
            ]
            result = evaluate_niah(
                model, prompts, tokenizer, batch_size=max(1, 65_536 // (multiple * native)), max_new_tokens=16
            )
            needles.append(
                {
                    "length": multiple * native,
                    "keys": num_keys,
                    "samples": samples,
                    "accuracy": result["accuracy"],
                    "exact": result["exact"],
                    "seeds": [seeds[0], seeds[-1]],
                }
            )
            print(json.dumps(needles[-1]), flush=True)

    nats = text_loss_of(model, torch.from_numpy(test_ids), native)
    trigram = trigram_loss(train_ids, test_ids, len(tokenizer))
    to_bits = len(test_ids) / len(test_text) / math.log(2)
    report = {
        **_environment(device),
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
    return report


def _environment(device: torch.device) -> dict:
    return {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, evaluation = commands.add_parser("train"), commands.add_parser("evaluate")
    for command in (training, evaluation):
        command.add_argument("--folder", type=Path, default=TEACHER)
    for field in fields(Recipe):
        training.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    evaluation.add_argument("--samples", type=int, default=200)
    options = vars(parser.parse_args())
    command, folder = options.pop("command"), options.pop("folder")
    if command == "train":
        train(Recipe(**options), folder)
    else:
        evaluate(folder, **options)


if __name__ == "__main__":
    main()
