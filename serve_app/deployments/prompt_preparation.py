"""Prompts to token ids: the Preprocessor's work, without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ClientError, ErrorInfo, XeRayError
from serve_app.core.requests import ModelCard, PreparedPrompt, PrepareRequest
from serve_app.deployments.form_preparation import FormPreparer
from serve_app.deployments.model_card import build_model_card
from serve_app.text.chat_template import render_marked
from serve_app.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class PreparedText:
    """Text of token ids, whole or one by one in `parts`; `error` where the ids were at fault."""

    text: str = ""
    parts: tuple[str, ...] = ()
    error: ErrorInfo | None = None


class PromptPreparer:
    """Chat template and tokenisation of one model. Thread-safe; imports neither torch nor Ray.

    Raises ConfigError at construction where the model's files are missing or unusable.
    """

    def __init__(self, model: ModelSection) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(
            resolve_model(model), chat_template_override=model.chat_template
        )
        self.card: ModelCard = build_model_card(model, self.tokenizer)
        self._forms = FormPreparer(self.tokenizer, self.card)

    def prepare(self, request: PrepareRequest) -> PreparedPrompt:
        """Return the ids of one prompt; an error of the input comes back as `error`."""
        try:
            if request.messages is None:
                return PreparedPrompt(token_ids=tuple(self._encode(request)))
            text, starts_in_reasoning = self._render(request)
            ids = self.tokenizer.encode_marked(text)
            grammar = self._forms.grammar(request.form, starts_in_reasoning)
        except XeRayError as error:
            return PreparedPrompt(error=error.info())
        return PreparedPrompt(tuple(ids), starts_in_reasoning, grammar=grammar)

    def prepare_batch(self, requests: Sequence[PrepareRequest]) -> list[PreparedPrompt]:
        """Return each prompt's ids, in order; those that are alike are encoded in one call."""
        results: list[PreparedPrompt | None] = [None] * len(requests)
        if len(requests) > 1:
            self._prepare_chats(requests, results)
            self._prepare_texts(requests, results)
        return [
            self.prepare(request) if result is None else result
            for request, result in zip(requests, results, strict=True)
        ]

    def _prepare_chats(
        self, requests: Sequence[PrepareRequest], results: list[PreparedPrompt | None]
    ) -> None:
        """Fill in the conversations that render; the others are left to `prepare`."""
        rendered: dict[int, tuple[str, bool]] = {}
        for index, request in enumerate(requests):
            # A grammar is made for each by itself.
            if request.messages is not None and request.form is None:
                with contextlib.suppress(XeRayError):
                    rendered[index] = self._render(request)
        with contextlib.suppress(XeRayError):  # one is at fault: below, each for itself
            encoded = self.tokenizer.encode_marked_batch([text for text, _ in rendered.values()])
            for (index, (_, is_reasoning)), ids in zip(rendered.items(), encoded, strict=True):
                results[index] = PreparedPrompt(tuple(ids), is_reasoning)

    def _prepare_texts(
        self, requests: Sequence[PrepareRequest], results: list[PreparedPrompt | None]
    ) -> None:
        """Fill in the plain texts, one call for each kind; a kind with a fault is left out."""
        groups: dict[tuple[bool, bool], list[int]] = {}
        for index, request in enumerate(requests):
            if request.messages is None and request.text is not None:
                key = (request.add_special_tokens, request.parse_special)
                groups.setdefault(key, []).append(index)
        for (add_special_tokens, parse_special), indices in groups.items():
            texts = [requests[index].text or "" for index in indices]
            with contextlib.suppress(XeRayError):
                encoded = self.tokenizer.encode_batch(
                    texts, add_special_tokens=add_special_tokens, parse_special=parse_special
                )
                for index, ids in zip(indices, encoded, strict=True):
                    results[index] = PreparedPrompt(token_ids=tuple(ids))

    def _render(self, request: PrepareRequest) -> tuple[str, bool]:
        messages, kwargs = self._forms.adapt(request)
        return render_marked(
            self.tokenizer,
            messages,
            request.add_generation_prompt,
            request.continue_final_message,
            kwargs,
        )

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the ids' text, special tokens included. Raises ClientError on an unknown id."""
        self._check_range(token_ids)
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return each id's own text. Raises ClientError on an id out of range."""
        self._check_range(token_ids)
        return [self.tokenizer.token_text(token_id) for token_id in token_ids]

    def _encode(self, request: PrepareRequest) -> list[int]:
        if request.text is None:
            raise ClientError("neither text nor messages were given", param="prompt")
        return self.tokenizer.encode(
            request.text,
            add_special_tokens=request.add_special_tokens,
            parse_special=request.parse_special,
        )

    def _check_range(self, token_ids: Sequence[int]) -> None:
        limit = self.tokenizer.vocab_size
        bad = next((token_id for token_id in token_ids if not 0 <= token_id < limit), None)
        if bad is not None:
            raise ClientError(
                f"token id {bad} is out of range; the vocabulary has {limit} ids", param="tokens"
            )
