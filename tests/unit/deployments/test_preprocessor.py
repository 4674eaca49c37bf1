"""The Preprocessor's logic in this process; tests/deployments runs it under Serve."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from serve_app.config.schema import AppConfig, ModelSection
from serve_app.core.requests import PreparedPrompt, PrepareRequest
from serve_app.deployments import preprocessor as module
from serve_app.deployments.model_card import build_model_card
from serve_app.deployments.preprocessor import Preprocessor
from serve_app.deployments.prompt_preparation import PromptPreparer

CALL_S = 0.05


class SlowPreparer:
    """Takes 50 ms for a batch, however large; notes how many calls it was in at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self.max_inside = 0

    def prepare_batch(self, requests: Sequence[PrepareRequest]) -> list[PreparedPrompt]:
        with self._lock:
            self._num_inside += 1
            self.max_inside = max(self.max_inside, self._num_inside)
        time.sleep(CALL_S)
        with self._lock:
            self._num_inside -= 1
        return [PreparedPrompt(token_ids=(int(request.request_id),)) for request in requests]


@pytest.fixture
async def preprocessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Preprocessor]:
    monkeypatch.setenv("XERAY_LOCK_DIR", str(tmp_path))
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # the constructor changes them
    monkeypatch.setattr(module, "pin_process", lambda cpu_ids: None)
    monkeypatch.setattr(module, "enter_replica", lambda config: "r1")
    created = Preprocessor.__new__(Preprocessor)
    await Preprocessor.__init__(created, AppConfig())
    yield created
    created._pool.shutdown()
    created._cores.release()


async def call_sixteen(preprocessor: Preprocessor) -> list[int]:
    requests = [PrepareRequest(str(i), text="x") for i in range(16)]
    answers = await asyncio.gather(*(preprocessor.prepare(request) for request in requests))
    return [answer.token_ids[0] for answer in answers]


async def test_off_runs_every_call_alone_and_at_once(preprocessor: Preprocessor) -> None:
    preparer = SlowPreparer()
    preprocessor._preparer = preparer  # type: ignore[assignment]
    preprocessor.reconfigure({"micro_batching": {"enabled": False}})

    elapsed_s = []
    for _ in range(5):  # the fastest: another program may hold the cores meanwhile
        started_s = time.monotonic()
        assert await call_sixteen(preprocessor) == list(range(16))
        elapsed_s.append(time.monotonic() - started_s)

    assert (await preprocessor.state())["batch_sizes"] == {1: 80}
    assert preparer.max_inside > 8
    assert min(elapsed_s) < 0.3, "one after the other would take 0.8 s"


def test_a_batch_answers_each_prompt_as_if_it_were_alone() -> None:
    preparer = PromptPreparer(ModelSection())
    user = {"role": "user", "content": "Hello"}
    requests = [
        PrepareRequest("a", text="Hello world"),
        PrepareRequest("b", messages=(user,)),
        PrepareRequest("c", text="<|im_end|>"),
        PrepareRequest("d", text="<|im_end|>", parse_special=True),
        PrepareRequest("e", messages=()),
        PrepareRequest("f"),
    ]

    together = preparer.prepare_batch(requests)

    assert together == [preparer.prepare(request) for request in requests]
    a, b, c, d, e, f = together
    assert a.token_ids
    assert len(b.token_ids) > len(a.token_ids)
    assert len(d.token_ids) == 1 < len(c.token_ids), "user text is never a special token"
    assert e.error is not None
    assert e.error.param == "messages"
    assert f.error is not None


def test_one_bad_text_does_not_spoil_its_batch() -> None:
    preparer = PromptPreparer(ModelSection())

    good, bad = preparer.prepare_batch(
        [PrepareRequest("a", text="fine"), PrepareRequest("b", text="\ud800")]
    )

    assert good.token_ids
    assert good.error is None
    assert bad.error is not None
    assert bad.error.status == 400


def test_detokenize_refuses_ids_that_are_not() -> None:
    preparer = PromptPreparer(ModelSection())
    ids = preparer.prepare(PrepareRequest("a", text="Hello world")).token_ids

    assert preparer.detokenize(ids) == "Hello world"
    assert "".join(preparer.token_strings(ids)) == "Hello world"
    for bad in (-1, preparer.tokenizer.vocab_size):
        with pytest.raises(module.XeRayError, match="out of range"):
            preparer.detokenize((bad,))


def test_the_card_tells_what_the_files_say() -> None:
    model = ModelSection(aliases=("*",), default_sampling={"temperature": 0.2})
    card = PromptPreparer(model).card

    assert card.id == "SmolLM2-135M-Instruct"
    assert card.aliases == ("*",)
    assert card.max_model_len > 1000
    assert card.default_sampling == {"temperature": 0.2}
    assert card.has_chat_template
    assert not card.is_reasoning
    assert card.eos_token_ids


def test_a_length_beyond_the_model_is_refused() -> None:
    preparer = PromptPreparer(ModelSection())

    with pytest.raises(module.ConfigError, match=r"model\.max_model_len: 10000000 is more than"):
        build_model_card(ModelSection(max_model_len=10_000_000), preparer.tokenizer)
    short = build_model_card(ModelSection(max_model_len=100), preparer.tokenizer)
    assert short.max_model_len == 100
