"""A conversation with a causal language model: its cache stays from turn to turn, and nothing in it is read again."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..data.ruler import Prompt
from .models import cache_bytes, position_limit
from .needles import as_asked, can_go_on, in_template

# transformers 5.24 renamed `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CHUNK = 2048  # tokens that are read at once: between chunks, reading can be stopped


@dataclass
class Turn:
    """
    An answer, and what it took.

    Attributes:
        ids: tokens of the answer, without an end-of-text token.
        read: tokens of the prompt that were read for it: those that the cache did not hold.
        read_seconds: until the answer's first token.
        seconds: of the answer, from its first token on.
        held: tokens that the cache holds.
        kv_bytes, state_bytes: of the cache: what grows with the text, and what does not.
        is_stopped: by the user.
    """

    ids: list[int]
    read: int = 0
    read_seconds: float = 0.0
    seconds: float = 0.0
    held: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    is_stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of the answer; its first token came with the prompt."""
        return (len(self.ids) - 1) / self.seconds if self.seconds else 0.0


class Conversation:
    """
    A text that its user and a model write by turns.

    Where the tokenizer has a chat template, the user's parts are messages in it, and elsewhere lines that the model
    continues. The cache is kept as long as the text begins with what it holds. Where a template changes earlier turns
    (one that drops their reasoning does), or a turn was stopped before its answer, the text is read anew: a recurrent
    state cannot be rolled back.

    Attributes:
        ids: tokens of the text.
        new_tokens: that an answer may have.
        greedy: always the most likely token; else as the model's generation config says.

    Args:
        template: use the tokenizer's chat template; by default if it has one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: bool | None = None,
        new_tokens: int = 512,
        greedy: bool = False,
    ):
        if template and tokenizer.chat_template is None:
            raise ValueError("--template: this tokenizer has no chat template; leave it out, and text is continued")
        self.model, self.tokenizer = model, tokenizer
        self.has_template = tokenizer.chat_template is not None if template is None else template
        self.new_tokens, self.greedy = new_tokens, greedy
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.ids: list[int] = []
        self._messages: list[dict] = []
        self._forget()

    def _forget(self) -> None:
        self._cached: list[int] = []  # tokens that the cache holds: of `ids`, or of a prompt that was not answered
        self._cache: Cache | None = None

    def say(
        self,
        text: str,
        on_token: Callable[[str, Turn], object] = lambda text, turn: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """
        Add the user's part to the text, and have the model answer.

        Args:
            on_token: called with the answer so far and what it has taken, after each token and each part of the
                prompt that was read.
            is_stopped: asked as often whether to stop.

        Raises:
            ValueError: the text outgrows a model with learned positions.
        """
        message = {"role": "user", "content": text}
        prompt = self._templated([*self._messages, message]) if self.has_template else self._continued(text)
        return self._turn(prompt, [message], "", self.new_tokens, on_token, is_stopped)

    def ask(
        self,
        prompt: Prompt,
        new_tokens: int,
        on_token: Callable[[str, Turn], object] = lambda text, turn: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Begin anew with one of RULER's prompts, made with this tokenizer; as `say`, greedily."""
        self.reset()
        (ids,) = as_asked([prompt], self.tokenizer, self.tokenizer, self.has_template)
        text = self.tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
        message = {"role": "user", "content": text.removesuffix(prompt.prefix)}
        return self._turn(ids, [message], prompt.prefix.lstrip(), new_tokens, on_token, is_stopped, greedy=True)

    def _continued(self, text: str) -> list[int]:
        """The text with a line of the user's."""
        more = f"\n{text}" if self.ids else text
        return self.ids + self.tokenizer(more, add_special_tokens=not self.ids, verbose=False).input_ids

    def _templated(self, messages: Sequence[dict]) -> list[int]:
        """The messages in the chat template: what the text holds of them, token by token, and the rest."""
        text = in_template(self.tokenizer, messages)
        before = self._decode(self.ids)
        if self.ids and text.startswith(before):
            ids = self.ids + self._encode(text.removeprefix(before))
            if self._decode(ids) == text:
                return ids
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def _turn(self, prompt, messages, prefix, new_tokens, on_token, is_stopped, greedy=None) -> Turn:
        """Read what is new in a prompt, and answer it; `prefix` is the part of the answer that it begins."""
        limit = position_limit(self.model)
        if limit is not None and len(prompt) + new_tokens > limit:
            raise ValueError(f"{len(prompt) + new_tokens:,} tokens, and the model has positions for {limit:,}")
        goes_on = can_go_on(self.model)
        if not goes_on or prompt[: len(self._cached)] != self._cached or len(self._cached) == len(prompt):
            self._forget()
        if self._cache is None and self.model._supports_default_dynamic_cache():
            self._cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        turn, begun = Turn([], len(prompt) - len(self._cached)), time.monotonic()

        def show() -> None:
            turn.held = len(prompt) + len(turn.ids) - 1 if turn.ids else len(self._cached)
            turn.kv_bytes, turn.state_bytes = (0, 0) if self._cache is None else cache_bytes(self._cache)
            on_token(self.tokenizer.decode(turn.ids, skip_special_tokens=True), turn)

        def add(token: int) -> None:
            now = time.monotonic()
            turn.read_seconds = turn.read_seconds or now - begun
            turn.seconds = now - begun - turn.read_seconds
            turn.ids.append(token)
            show()

        def stop() -> bool:
            turn.is_stopped = turn.is_stopped or is_stopped()
            return turn.is_stopped

        try:
            while goes_on and len(prompt) - len(self._cached) > CHUNK and not stop():
                self._read(prompt[len(self._cached) : len(self._cached) + CHUNK])
                show()
            if not stop():
                self._generate(prompt, new_tokens, self.greedy if greedy is None else greedy, add, stop)
        except BaseException:
            self._forget()  # some layers may have read more than others
            raise
        if turn.ids:
            self._keep(prompt, messages, prefix, turn)
        return turn

    def _keep(self, prompt: list[int], messages: list[dict], prefix: str, turn: Turn) -> None:
        """Make an answered prompt and its answer part of the text."""
        if not self.has_template and turn.ids[-1] in self.tokenizer.all_special_ids:
            turn.ids.pop()  # the text goes on; the cache has not read it
        answer = prefix + self.tokenizer.decode(turn.ids, skip_special_tokens=True)
        self._messages += [*messages, {"role": "assistant", "content": answer}]
        self.ids = prompt + turn.ids

    def _read(self, ids: list[int]) -> None:
        """Let the cache hold further tokens."""
        rows = torch.tensor([ids], device=self.model.device)
        self.model(rows, use_cache=True, logits_to_keep=1, **{CACHE: self._cache})
        self._cached = self._cached + ids

    def _generate(self, prompt: list[int], new_tokens: int, greedy: bool, add: Callable, stop: Callable) -> None:
        rows = torch.tensor([prompt], device=self.model.device)
        options = {"do_sample": False} if greedy else {}
        pad_id = self.tokenizer.pad_token_id
        output = self.model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=new_tokens,
            num_beams=1,
            pad_token_id=self.tokenizer.eos_token_id if pad_id is None else pad_id,
            streamer=_Each(add),
            stopping_criteria=StoppingCriteriaList([_When(stop)]),
            return_dict_in_generate=True,
            **options,
            **{CACHE: self._cache},
        )
        self._cache = next((value for value in output.values() if isinstance(value, Cache)), None)
        self._cached = output.sequences[0, :-1].tolist()  # its last token has not been read


class _Each(BaseStreamer):
    """Hands on every token but the prompt's."""

    def __init__(self, add: Callable[[int], object]):
        self.add, self.is_prompt = add, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.add(int(value))
        self.is_prompt = False

    def end(self) -> None:
        pass


class _When(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[], bool]):
        self.is_stopped = is_stopped

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.is_stopped(), device=input_ids.device)
