"""
Train the demo's teacher: a small Qwen3 that reads the standard library and answers RULER's needle prompts.

    python -m hydrahead.demo.train_teacher train       # minutes on a GPU; writes demo/teacher/
    python -m hydrahead.demo.train_teacher evaluate    # writes demo/teacher/evaluation.json and README.md

Retrieval over several keys comes as a phase change, so the length does not grow, and the rates do not decay, before it
has come at the shortest length.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..data.corpus import encode_corpus, load_corpus
from ..data.mixture import ANSWER_WEIGHT, mixture_rows
from ..data.needles import draw_keys, draw_values, header_text, needle_text, question_text
from ..evaluation.text import text_loss
from .teacher_report import environment, evaluate

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
    # After training, attention logits of the layer that looks needles up are scaled by this. As trained they set a
    # needle apart from any number of tokens; scaled, from about as many as the native length has.
    retrieval_layer: int = 1
    retrieval_gain: float = 0.6

    tokens_per_step: int = 65_536
    lengths: str = "128,256,512,1024"
    steps: str = "3000,200,200,1000"  # for each length; at the first, at most so many before the phase change
    gate: float = 0.97  # share of first digits predicted right that ends the first length
    decay: float = 0.7  # share of the last length's steps over which the rates fall to 0
    warmup: int = 50
    muon_lr: float = 0.015
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1  # after attention and MLP, from the second length on: the text is read many times
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


def _add_dropout(model: Qwen3ForCausalLM, share: float) -> None:
    """Active while the model is in training mode, where Qwen3 itself does nothing different."""

    def drop(module, inputs, output):
        return F.dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


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
    """
    The weighted loss; and [mean nats off the answers, share of answers whose first digit is predicted right].

    Copying gives every digit but the first: that one takes finding the needle by its key.
    """
    logits = F.linear(hidden, head).float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    answer = weights == ANSWER_WEIGHT
    before = F.pad(answer, (2, 0))[:, :-2]
    first_digit = (answer & F.pad(answer, (1, 0))[:, :-1] & ~before).flatten().float()
    right = (logits.argmax(-1) == labels.flatten()).float()
    text = (~answer).flatten().float()
    report = torch.stack([(losses * text).sum() / text.sum(), (right * first_digit).sum() / first_digit.sum()])
    weights = weights.flatten()
    return (losses * weights).sum() / weights.sum(), report.detach()


def train(recipe: Recipe, folder: Path) -> None:
    """
    Train tokenizer and teacher and save both with `training_log.jsonl` in `folder`.

    Raises:
        RuntimeError: the phase change did not come within the first length's steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = load_corpus("train")
    tokenizer = train_tokenizer(documents, recipe)
    corpus_ids = encode_corpus(tokenizer, documents)
    held_out = torch.from_numpy(encode_corpus(tokenizer, load_corpus("heldout")))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already

    model = build_model(recipe, tokenizer).to(device)
    _add_dropout(model, recipe.dropout)
    step_losses = _compile(model) if device.type == "cuda" else _losses
    optimizers = _optimizers(model, recipe)
    facts = {"parameters": model.num_parameters(), "corpus_tokens": len(corpus_ids), "held_out_tokens": len(held_out)}
    log = [{"recipe": asdict(recipe), **facts, **environment(device)}]
    print(json.dumps(log[0]), flush=True)

    step, tokens, began, stages = 0, 0, time.perf_counter(), recipe.stages
    for stage, (length, steps) in enumerate(stages):
        batches = _Batches(tokenizer, corpus_ids, length, steps, recipe)
        loader = DataLoader(batches, batch_size=None, num_workers=recipe.workers, pin_memory=device.type == "cuda")
        first, last, passed = stage == 0, stage == len(stages) - 1, False
        model.train(not first)
        for index, (ids, weights) in enumerate(loader):
            left = (steps - index) / (recipe.decay * steps) if last else 1.0
            share = min(1.0, (step + 1) / recipe.warmup, left)
            loss, report = _step(model, optimizers, share, step_losses, ids.to(device), weights.to(device))
            step, tokens = step + 1, tokens + ids.numel()
            if step % 25 == 0 or index == steps - 1:
                off_answers, answer_accuracy = report.tolist()
                row = {"step": step, "tokens": tokens, "length": length, "loss": loss.item(), "text_loss": off_answers}
                row |= {"answer_accuracy": answer_accuracy, "seconds": time.perf_counter() - began}
                if step % 500 == 0 or index == steps - 1:
                    model.eval()
                    row["held_out_loss"] = text_loss(model, held_out[: 64 * 1024 + 1], length)
                    model.train(not first)
                log.append({name: round(value, 4) for name, value in row.items()})
                print(json.dumps(log[-1]), flush=True)
                passed = answer_accuracy >= recipe.gate
                if first and passed:
                    break
        if first and not passed:
            raise RuntimeError(f"answers were {answer_accuracy:.2f} right after {steps} steps, needed {recipe.gate}")
    model.model.layers[recipe.retrieval_layer].self_attn.q_norm.weight.data *= recipe.retrieval_gain
    _save(model, tokenizer, log, folder)


def _compile(model: Qwen3ForCausalLM):
    """Compile layer by layer, so that all layers share one graph, made anew for each length only; and the losses."""
    for layer in model.model.layers:
        layer.compile()
    return torch.compile(_losses)


def _optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and norms; each keeps its peak rate as `initial_lr`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = {"params": matrices, "initial_lr": recipe.muon_lr}, {"params": others, "initial_lr": recipe.adamw_lr}
    return [
        torch.optim.Muon(groups[:1], lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(groups[1:], lr=recipe.adamw_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def _step(model, optimizers, share: float, step_losses, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """One update at `share` of the peak rates; what `_losses` returns."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss, report = step_losses(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], weights[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = share * optimizer.param_groups[0]["initial_lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach(), report


def _save(model: Qwen3ForCausalLM, tokenizer, log: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


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
    evaluation.add_argument("--long-samples", type=int, default=200)
    options = vars(parser.parse_args())
    command, folder = options.pop("command"), options.pop("folder")
    if command == "train":
        train(Recipe(**options), folder)
    else:
        evaluate(folder, **options)


if __name__ == "__main__":
    main()
