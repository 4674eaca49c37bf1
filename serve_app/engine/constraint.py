"""Which tokens a sequence may take next: a grammar, a limit on thinking, or both. Ids and bytes.

Grammars are llguidance's (an optional package without dependencies); masks are made on CPU cores.
The state follows from the output ids alone, so a sequence that was preempted, or that another
engine began, comes back to the same state by going through its ids.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.core.errors import ClientError, EngineError
from serve_app.core.sampling import Constraint, TokenVocabulary

MAX_GRAMMAR_CHARS = 256 * 1024
_MAX_ERROR_CHARS = 160
_MAX_LEXER_STATES = 20_000
_WHITESPACE = b" \t\r\n"

MaskRow = npt.NDArray[np.uint8]
"""One bit per token id, the least significant first."""


def has_grammars() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class GrammarCompiler:
    """Turns grammars into matchers over one vocabulary, which it indexes once (0.1 s and more).

    Raises ConfigError at construction where llguidance is missing.
    """

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        import llguidance

        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary)),
            n_vocab=len(vocabulary.tokens),
            eos_token=list(vocabulary.eos_ids),
        )

    def check(self, grammar: str, param: str = "response_format") -> None:
        """Raise ClientError naming `param` where the grammar is wrong, too large or too complex."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise ClientError(
                f"{param}: the schema is too large ({len(grammar)} characters as a grammar;"
                f" at most {MAX_GRAMMAR_CHARS})",
                param=param,
            )
        matcher = self.matcher(grammar, param)
        # Some faults (an endless recursion) only show at the first token.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ClientError(f"{param}: {_reason(matcher.get_error())}", param=param)

    def matcher(self, grammar: str, param: str = "response_format") -> Any:
        """A matcher at its beginning. Raises ClientError as `check`."""
        matcher = self._library.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise ClientError(f"{param}: {_reason(matcher.get_error())}", param=param)
        return matcher


class Constraints:
    """An engine's constraints: its vocabulary, indexed in the background while weights load."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiler: Future[GrammarCompiler] | None = None
        # A grammar's end is the token that ends an answer.
        if has_grammars() and vocabulary.eos_ids:
            pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            self._compiler = pool.submit(GrammarCompiler, vocabulary)
            pool.shutdown(wait=False)

    @property
    def has_grammars(self) -> bool:
        """Whether grammars can be followed; limits on thinking always can."""
        return self._compiler is not None

    def start(self, constraint: Constraint) -> SequenceConstraint:
        """A sequence's constraint at its first token. Raises ClientError on a wrong grammar."""
        make_matcher = None
        if constraint.grammar:
            if self._compiler is None:
                raise ClientError(
                    "response_format: this engine has no grammars (llguidance is not installed)",
                    param="response_format",
                )
            make_matcher = self._compiled().matcher(constraint.grammar).deep_copy
        return SequenceConstraint(constraint, self._vocabulary, make_matcher)

    def _compiled(self) -> GrammarCompiler:
        assert self._compiler is not None
        try:
            return self._compiler.result()
        except Exception as error:  # the library refuses the vocabulary: this request's failure
            message = f"grammars do not work with this vocabulary ({type(error).__name__})"
            raise EngineError(message) from error


class _Phase(StrEnum):
    START = "start"  # the answer may begin with an opening tag
    THINKING = "thinking"
    CLOSING = "closing"  # the budget is used up: the closing tag is forced
    ANSWER = "answer"


class SequenceConstraint:
    """The state of one sequence.

    Thinking ends at its closing tag, found in the tokens' bytes; what else the token that completes
    the tag may hold is not the grammar's (only where the tag is no token of its own).
    """

    def __init__(
        self,
        constraint: Constraint,
        vocabulary: TokenVocabulary,
        make_matcher: Callable[[], Any] | None = None,
    ) -> None:
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._make_matcher = make_matcher
        self._matcher: Any = None
        self._num_taken = 0
        self.error: str | None = None
        self._reset()

    def advance(self, output_ids: Sequence[int]) -> None:
        """Take the whole output so far; what was taken before is not taken again."""
        if len(output_ids) < self._num_taken:
            self._reset()
        for token_id in output_ids[self._num_taken :]:
            self._take(token_id)
        self._num_taken = len(output_ids)

    def fill(self, row: MaskRow) -> bool:
        """Write the bits of what may come next; False, and nothing written, where all may.

        After a failure no bit is set, and `error` says why.
        """
        if self._phase is _Phase.CLOSING:
            row.fill(0)
            _set_bit(row, self._vocabulary.think_close_ids[self._num_closed])
            return True
        if self._phase is _Phase.THINKING or self._matcher is None:
            return False
        row.fill(0)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self._fail()
            return True
        size = min(len(row), len(mask))
        row[:size] = mask[:size]
        if self._phase is _Phase.START and self._vocabulary.think_open_id is not None:
            _set_bit(row, self._vocabulary.think_open_id)
        return True

    def fill_rows(self, rows: MaskRow, draft: Sequence[int]) -> bool:
        """As `fill` for [1 + len(draft), bytes]: row i follows the first i tokens of `draft`.

        Rows behind a token that may not come stay as they are: the row before rejects the draft.
        """
        is_restricted = self.fill(rows[0])
        if not draft or self.error is not None:
            return is_restricted
        state = self._fork()
        for row, next_row, token_id in zip(rows[:-1], rows[1:], draft, strict=True):
            if not _has_bit(row, token_id):
                break
            state._take(token_id)
            if state.error is not None:
                next_row.fill(0)  # nothing may come of it; without the draft the failure is told
                return True
            is_restricted |= state.fill(next_row)
        return is_restricted

    def _fork(self) -> SequenceConstraint:
        """A copy that goes its own way."""
        other = copy.copy(self)
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    def _reset(self) -> None:
        self._num_taken = 0
        self._num_thought = 0
        self._num_closed = 0
        self._tail = b""
        self._matcher = None if self._make_matcher is None else self._make_matcher()
        if self._constraint.is_thinking:
            self._phase = _Phase.THINKING
            self._close_when_used_up()
        else:
            self._phase = _Phase.START if self._constraint.may_think else _Phase.ANSWER

    def _take(self, token_id: int) -> None:
        if self._phase is _Phase.START:
            self._begin(token_id)
        elif self._phase is _Phase.THINKING:
            self._think(token_id)
        elif self._phase is _Phase.CLOSING:
            self._num_closed += 1
            if self._num_closed == len(self._vocabulary.think_close_ids):
                self._phase = _Phase.ANSWER
        else:
            self._answer(token_id)

    def _begin(self, token_id: int) -> None:
        vocabulary = self._vocabulary
        if token_id == vocabulary.think_open_id:
            self._enter_thinking()
            return
        self._tail += self._bytes(token_id)
        text = self._tail.lstrip(_WHITESPACE)
        # A tag of several tokens begins thinking only where no grammar holds.
        if self._matcher is None and text.startswith(vocabulary.think_open):
            self._enter_thinking()
        elif self._matcher is not None or not vocabulary.think_open.startswith(text):
            self._phase = _Phase.ANSWER
            self._answer(token_id)

    def _enter_thinking(self) -> None:
        self._phase, self._tail = _Phase.THINKING, b""
        self._close_when_used_up()

    def _think(self, token_id: int) -> None:
        close = self._vocabulary.think_close
        self._num_thought += 1
        self._tail += self._bytes(token_id)
        if close in self._tail:
            self._phase = _Phase.ANSWER
            return
        self._tail = self._tail[-len(close) :]
        self._close_when_used_up()

    def _close_when_used_up(self) -> None:
        budget = self._constraint.thinking_budget
        if budget is not None and self._num_thought >= budget and self._vocabulary.think_close_ids:
            self._phase, self._num_closed = _Phase.CLOSING, 0

    def _answer(self, token_id: int) -> None:
        if self._matcher is None or token_id in self._vocabulary.eos_ids:
            return
        if not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> None:
        self.error = "the answer's grammar became too complex to follow"

    def _bytes(self, token_id: int) -> bytes:
        tokens = self._vocabulary.tokens
        return tokens[token_id] if token_id < len(tokens) else b""


def new_rows(num_rows: int, vocab_size: int) -> MaskRow:
    """Bits [num_rows, bytes] that allow everything."""
    return np.full((num_rows, -(-vocab_size // 8)), 0xFF, dtype=np.uint8)


def _has_bit(row: MaskRow, token_id: int) -> bool:
    return bool(row[token_id // 8] >> token_id % 8 & 1)


def _set_bit(row: MaskRow, token_id: int) -> None:
    row[token_id // 8] |= np.uint8(1 << token_id % 8)


def _reason(error: str) -> str:
    lines = error.strip().splitlines() or ["it cannot be followed"]
    reason = lines[0].split("failed to compile JSON schema: ")[-1].strip(" :")
    if " " not in reason:  # a code of the library's, such as for an endless recursion
        return "this schema cannot be followed"
    return f"this schema cannot be followed: {reason[:_MAX_ERROR_CHARS]}"


class _Tokens:
    """The vocabulary in the form that llguidance reads."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0] if vocabulary.eos_ids else 0
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = list(vocabulary.special_ids)
        self._ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens) if token}

    def __call__(self, text: bytes) -> list[int]:
        """Ids of forced text; only hints hang on it, so one token per byte is enough."""
        return [token_id for byte in text if (token_id := self._ids.get(bytes((byte,))))]
