"""RULER's tasks answered: greedy generation, scored as RULER does (arXiv 2404.06654)."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..console import blaming
from ..data.ruler import Prompt
from .models import check_positions

FIRST_SEED = 1_000_000  # of prompts that are evaluated; training rows come from small seeds, and from other text
PREFILL_CHUNK = 16_384  # tokens of a longer prompt that are read at once


def as_asked(prompts: Sequence[Prompt], written_with, tokenizer, template: bool = False) -> list[list[int]]:
    """
    The token ids that a model is given for each prompt.

    Args:
        written_with: the tokenizer that made the prompts.
        tokenizer: the model's own. Where it has another vocabulary, the same text is encoded anew.
        template: the question is a user's message in the chat template, and the answer begins as RULER begins it. The
            template's tokens come on top of the prompt's length.
    """
    if not template and same_vocabulary(written_with, tokenizer):
        return [prompt.input_ids for prompt in prompts]
    texts = [written_with.decode(prompt.input_ids, skip_special_tokens=True) for prompt in prompts]
    if not template:
        return [tokenizer(text, verbose=False).input_ids for text in texts]
    found = []
    for text, prompt in zip(texts, prompts):
        chat = in_template(tokenizer, [{"role": "user", "content": text.removesuffix(prompt.prefix)}])
        whole = chat + prompt.prefix.lstrip()
        found.append(tokenizer(whole, add_special_tokens=False, verbose=False).input_ids)
    return found


def in_template(tokenizer, messages: Sequence[dict]) -> str:
    """
    Messages in a tokenizer's chat template, and the beginning of the model's.

    Raises:
        ValueError: the template, which is a program in a sandbox, fails.
    """
    with blaming("the chat template cannot be applied"):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def same_vocabulary(one, other) -> bool:
    """Whether two tokenizers give ids the same meaning."""
    return one is other or one.get_vocab() == other.get_vocab()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_tokens: int = 4096,
    on_answers: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """
    Continue every prompt by greedy generation.

    A batch that does not fit into the GPU's memory is divided. Prompts of one length beyond `PREFILL_CHUNK` are read
    together in chunks; of different lengths they are padded on the left and, beyond it, read one by one.

    Args:
        model: any causal language model; runs where its weights are.
        prompts: token ids.
        new_tokens: tokens generated at most.
        batch_tokens: tokens of the prompts that are answered together, one prompt at the least.
        on_answers: called after each batch, with the number of its prompts.

    Returns:
        the continuations.

    Raises:
        torch.OutOfMemoryError: not even one prompt fits.
        ValueError: a prompt is longer than a model with learned positions can read.
    """
    longest = max(map(len, prompts), default=0)
    check_positions(model, longest + new_tokens)
    size = max(1, batch_tokens // max(1, longest))
    if longest > PREFILL_CHUNK and not (can_go_on(model) and len(set(map(len, prompts))) == 1):
        size = 1  # a batch that is read whole holds attention masks of its length squared
    answers: list[str] = []
    was_training = model.training
    model.eval()
    while len(answers) < len(prompts):
        batch = prompts[len(answers) : len(answers) + size]
        try:
            answers += _continue(model, tokenizer, batch, new_tokens)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            continue
        on_answers(len(batch))
    model.train(was_training)
    return answers


def score(answer: str, references: Sequence[str]) -> float:
    """The share of references that an answer holds, case ignored."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def can_go_on(model: PreTrainedModel) -> bool:
    """Whether a model can read several tokens behind those of its cache as if it read all at once."""
    # Most recurrent layers of other models begin anew there; ours go on.
    has_state = model._is_stateful and model.config.model_type != "hydrahead"
    # Frequencies that depend on the length of the text: what is cached was rotated by other ones.
    rope = getattr(model.config, "rope_parameters", None) or {}
    return not has_state and rope.get("rope_type") not in ("longrope", "dynamic")


@torch.no_grad()
def _continue(model, tokenizer, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prompts))
    before = [width - len(ids) for ids in prompts]
    rows = [[pad_id or 0] * count + list(ids) for count, ids in zip(before, prompts)]
    mask = [[0] * count + [1] * (width - count) for count in before]
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "pad_token_id": pad_id}
    if width > PREFILL_CHUNK and not any(before) and can_go_on(model):
        options["prefill_chunk_size"] = PREFILL_CHUNK
    input_ids, mask = (torch.tensor(each, device=model.device) for each in (rows, mask))
    output = model.generate(input_ids=input_ids, attention_mask=mask, **options)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
