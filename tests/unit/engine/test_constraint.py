"""Grammars and limits on thinking: a random network at a high temperature over a real vocabulary.

Nothing but the masks can make sense of such a network's tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest
import torch

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ClientError
from serve_app.core.events import FinishReason
from serve_app.core.sampling import Constraint, SamplingParams, TokenVocabulary
from serve_app.engine.constraint import Constraints, GrammarCompiler, SequenceConstraint, new_rows
from serve_app.engine.native import NativeEngine
from serve_app.engine.sampler import unpack_mask
from serve_app.engine.wire import pack_sampling, unpack_sampling
from serve_app.models.interface import KVCacheSpec, LoadedModel
from serve_app.text.token_vocabulary import token_vocabulary
from serve_app.text.tokenizer import load_tokenizer
from serve_app.text.tool_calls.grammar import output_grammar
from serve_app.text.tool_calls.registry import SYNTAXES
from serve_app.text.tool_calls.stream import ToolCallParser
from serve_app.text.tool_calls.syntax import ToolFunction

torch.set_num_threads(1)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
NOTE = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "score": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        "by": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{1,8}$"}]},
    },
    "required": ["tags", "score", "by"],
    "additionalProperties": False,
}
FUNCTIONS = (ToolFunction("get_weather", "", WEATHER), ToolFunction("add_note", "", NOTE))


class RandomNetwork:
    """Logits are a random function of the newest token and its position; it has no attention.

    It has fewer ids than the tokenizer: those of all bytes and of the most frequent words.
    """

    vocab_size = 8192
    max_position = 2048
    device = torch.device("cpu")
    kv_spec = KVCacheSpec(1, 1, 8, torch.float32)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._tokens = torch.randn(self.vocab_size, 4, generator=generator)
        self._places = torch.randn(self.max_position, 4, generator=generator)
        self._head = torch.randn(4, self.vocab_size, generator=generator)

    def allocate_kv_cache(self, num_blocks, block_size):
        return torch.zeros(1, 2, num_blocks, block_size, 1, 8)

    def forward(self, input_ids, positions, kv_cache, metadata):
        return self._tokens[input_ids] + self._places[positions]

    def compute_logits(self, hidden):
        return hidden @ self._head


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model(ModelSection()))


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> TokenVocabulary:
    whole = token_vocabulary(tokenizer)
    assert tokenizer.decode(whole.think_close_ids) == "\n</think>\n\n"
    # The same text byte by byte, since the network has no id above 8191.
    ids = tokenizer.encode
    closing = [i for char in "\n</think>\n\n" for i in ids(char, add_special_tokens=False)]
    return replace(whole, think_close_ids=tuple(closing))


@pytest.fixture(scope="module")
def constraints(vocabulary) -> Constraints:
    return Constraints(vocabulary)


@pytest.fixture(scope="module")
def make_engine(constraints):
    network = RandomNetwork()

    def make(**section) -> NativeEngine:
        settings = {"kv_cache_tokens": 32768, "max_num_seqs": 64, "warmup": False, **section}
        settings.setdefault("max_num_batched_tokens", 256)
        model = LoadedModel(network, "random", "random", torch.float32, 1000, "dense", (2,))
        engine = NativeEngine(model, EngineSection(**settings))
        engine.use_constraints(constraints)
        return engine

    return make


def run(engine: NativeEngine, requests: dict[str, SamplingParams]) -> dict[str, list]:
    """All events by request, each with a prompt of its own; every block is free at the end."""
    events: dict[str, list] = {}
    for place, (request_id, sampling) in enumerate(requests.items()):
        engine.submit(request_id, [1, 100 + place % 3], sampling)
    while engine.has_work():
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return events


def ids_of(events: list) -> list[int]:
    return [token_id for event in events for token_id in event.new_token_ids]


def params(constraint: Constraint | None, seed: int, **changes) -> SamplingParams:
    values = {"max_tokens": 400, "temperature": 1.5, "seed": seed, "stop_token_ids": (2, 0)}
    return SamplingParams(**{**values, **changes}, constraint=constraint)


def grammar_of(tokenizer, schema=None, syntax=None, functions=(), **options) -> str:
    return output_grammar(schema, syntax, functions, tokenizer.special_tokens.get, **options)


@pytest.mark.parametrize(
    ("name", "num_seeds"), [("hermes", 200), ("deepseek_v3", 20), ("deepseek_v31", 20)]
)
def test_a_named_choice_always_gives_valid_arguments(make_engine, tokenizer, name, num_seeds):
    syntax = SYNTAXES[name]
    grammar = grammar_of(tokenizer, None, syntax, FUNCTIONS[:1], max_calls=1)
    requests = {str(seed): params(Constraint(grammar), seed) for seed in range(num_seeds)}
    answers = set()
    for events in run(make_engine(), requests).values():
        assert events[-1].finish_reason is FinishReason.STOP
        text = tokenizer.decode(ids_of(events))
        parser = ToolCallParser(syntax)
        content, deltas = parser.push(text)
        rest, more = parser.finish()
        assert content + rest == ""
        assert [delta.name for delta in deltas if delta.name] == ["get_weather"]
        arguments = "".join(delta.arguments for delta in deltas + more)
        jsonschema.validate(json.loads(arguments), WEATHER)
        answers.add(arguments)
    assert len(answers) > num_seeds * 0.9  # the seeds do choose


def test_a_schema_is_followed_whatever_the_seed(make_engine, tokenizer):
    grammar = grammar_of(tokenizer, NOTE)
    requests = {str(seed): params(Constraint(grammar), seed) for seed in range(50)}
    for events in run(make_engine(), requests).values():
        assert events[-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(tokenizer.decode(ids_of(events))), NOTE)


def test_required_allows_any_function_and_several_calls(make_engine, tokenizer):
    grammar = grammar_of(tokenizer, None, SYNTAXES["hermes"], FUNCTIONS)
    requests = {str(seed): params(Constraint(grammar), seed) for seed in range(24)}
    names, counts = set(), set()
    for events in run(make_engine(), requests).values():
        parser = ToolCallParser(SYNTAXES["hermes"])
        _, deltas = parser.push(tokenizer.decode(ids_of(events)))
        names |= {delta.name for delta in deltas if delta.name}
        counts.add(parser.num_calls)
    assert names == {"get_weather", "add_note"}
    assert min(counts) == 1
    assert max(counts) > 1


def mixed_requests(tokenizer) -> dict[str, SamplingParams]:
    held = Constraint(grammar_of(tokenizer, NOTE))
    requests = {f"held-{seed}": params(held, seed) for seed in range(8)}
    free = {"max_tokens": 30, "stop_token_ids": ()}
    return requests | {f"free-{seed}": params(None, seed, **free) for seed in range(4)}


def test_preemption_and_batch_mates_change_nothing(make_engine, tokenizer):
    requests = mixed_requests(tokenizer)
    alone = {
        request_id: ids_of(run(make_engine(), {request_id: sampling})[request_id])
        for request_id, sampling in requests.items()
        if request_id in ("held-0", "free-0")
    }
    roomy = run(make_engine(), requests)
    tight_engine = make_engine(kv_cache_tokens=256)
    tight = run(tight_engine, requests)
    assert tight_engine.stats().num_preemptions_total > 0
    assert {i: ids_of(e) for i, e in roomy.items()} == {i: ids_of(e) for i, e in tight.items()}
    assert ids_of(roomy["held-0"]) == alone["held-0"]
    assert len(ids_of(roomy["free-0"])) == 30


def test_steps_queued_ahead_wait_for_the_ids_of_constrained_rows(make_engine, tokenizer):
    requests = mixed_requests(tokenizer)
    expected = {i: ids_of(e) for i, e in run(make_engine(), requests).items()}
    engine = make_engine()
    engine._depth = 1  # as on an accelerator
    assert {i: ids_of(e) for i, e in run(engine, requests).items()} == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_follow_the_grammar_and_change_nothing(make_engine, tokenizer, depth):
    held = Constraint(grammar_of(tokenizer, NOTE))
    example = json.dumps({"tags": ["a", "b"], "score": 0.25, "by": None})
    text = f"{example} {example.replace(' ', '')}"
    # Character by character, since the network has no id above 8191.
    prompt = [i for char in text for i in tokenizer.encode(char, add_special_tokens=False)]
    answers = []
    for speculative in ({}, {"method": "prompt_lookup", "min_ngram": 1}):
        engine = make_engine(speculative=speculative)
        engine._depth = depth
        for seed in range(16):
            engine.submit(str(seed), prompt, params(held, seed))
        events: dict[str, list] = {}
        while engine.has_work():
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
        answers.append({request_id: ids_of(own) for request_id, own in events.items()})
    assert answers[0] == answers[1]
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens_total < stats.num_draft_tokens_total
    assert stats.num_used_blocks == 0


def test_rows_of_a_draft_hold_what_may_follow_each_of_its_tokens():
    state = Constraints(BYTES).start(Constraint('start: "ab" ("c" | "d")\n', may_think=True))
    rows = new_rows(4, 259)
    assert state.fill_rows(rows, list(b"abx"))
    masks = [set(m.nonzero().flatten().tolist()) for m in unpack_mask(torch.from_numpy(rows), 259)]
    assert masks[:3] == [{ord("a"), 256}, {ord("b")}, {ord("c"), ord("d")}]
    assert len(masks[3]) == 259, "nothing is said of what follows a token that cannot come"
    assert allowed(state) == {ord("a"), 256}, "the draft has not happened"


def test_thinking_is_closed_when_its_budget_is_used_up(make_engine, tokenizer, vocabulary):
    closing = vocabulary.think_close_ids
    assert tokenizer.decode(closing) == "\n</think>\n\n"
    grammar = grammar_of(tokenizer, NOTE, has_break=True)
    limits = {"0": 0, "7": 7, "None": None}
    requests = {
        name: params(
            Constraint(grammar, is_thinking=True, thinking_budget=budget), 5, max_tokens=300
        )
        for name, budget in limits.items()
    }
    events = run(make_engine(), requests)
    for name, budget in limits.items():
        ids = ids_of(events[name])
        if budget is None:
            assert len(ids) == 300  # a random network never closes it by itself
            continue
        assert tuple(ids[budget : budget + len(closing)]) == closing
        answer = tokenizer.decode(ids[budget + len(closing) :])
        jsonschema.validate(json.loads(answer), NOTE)


def test_a_budget_without_a_grammar_leaves_the_answer_free(make_engine, vocabulary):
    constraint = Constraint(is_thinking=True, thinking_budget=3)
    sampling = params(constraint, 1, max_tokens=40, stop_token_ids=())
    ids = ids_of(run(make_engine(), {"x": sampling})["x"])
    assert tuple(ids[3 : 3 + len(vocabulary.think_close_ids)]) == vocabulary.think_close_ids
    assert len(ids) == 40


BYTES = TokenVocabulary(
    tokens=(*(bytes((byte,)) for byte in range(256)), b"<think>", b"</think>", b"<eos>"),
    special_ids=(258,),
    eos_ids=(258,),
    think_open_id=256,
    think_close_ids=(10, 257),
)


def allowed(state: SequenceConstraint) -> set[int] | None:
    rows = new_rows(1, 259)
    if not state.fill(rows[0]):
        return None
    return set(unpack_mask(torch.from_numpy(rows), 259)[0].nonzero().flatten().tolist())


def test_the_grammar_waits_for_the_end_of_thinking():
    constraints = Constraints(BYTES)
    state = constraints.start(Constraint('start: "ab"\n', may_think=True, thinking_budget=2))
    assert allowed(state) == {ord("a"), 256}
    state.advance([256])
    assert allowed(state) is None
    state.advance([256, ord("x"), ord("y")])
    assert allowed(state) == {10}
    state.advance([256, ord("x"), ord("y"), 10])
    assert allowed(state) == {257}
    state.advance([256, ord("x"), ord("y"), 10, 257])
    assert allowed(state) == {ord("a")}
    state.advance([ord("a")])  # another beginning, as after going elsewhere: taken anew
    assert allowed(state) == {ord("b")}
    state.advance([ord("a"), ord("b")])
    assert allowed(state) == {258}


def test_a_tag_of_several_tokens_ends_thinking_too():
    state = Constraints(BYTES).start(Constraint('start: "ab"\n', is_thinking=True))
    state.advance(list(b"hm</think"))
    assert allowed(state) is None
    state.advance(list(b"hm</think>"))
    assert allowed(state) == {ord("a")}


def test_an_opening_tag_in_pieces_counts_where_only_a_budget_holds():
    state = Constraints(BYTES).start(Constraint(may_think=True, thinking_budget=1))
    state.advance(list(b"\n<think>a"))
    assert allowed(state) == {10}
    state = Constraints(BYTES).start(Constraint(may_think=True, thinking_budget=1))
    state.advance(list(b"Well <think>a"))
    assert allowed(state) is None


def test_an_id_that_the_grammar_forbids_is_an_error_and_allows_nothing():
    state = Constraints(BYTES).start(Constraint('start: "ab"\n'))
    state.advance([ord("z")])
    assert state.error is not None
    assert allowed(state) == set()


def test_a_bad_grammar_is_refused_by_name(make_engine):
    compiler = GrammarCompiler(BYTES)
    with pytest.raises(ClientError) as caught:
        compiler.check("start: nowhere\n", "response_format")
    assert caught.value.param == "response_format"
    endless = 'start: %json {"$ref": "#"}\n'
    with pytest.raises(ClientError):
        compiler.check(endless)
    with pytest.raises(ClientError, match="too large"):
        compiler.check("start: " + '"a" ' * 100_000)
    engine = make_engine()
    with pytest.raises(ClientError):
        engine.submit("x", [1], params(Constraint("start: nowhere\n"), 0))
    assert not engine.has_work()


def test_an_engine_without_a_vocabulary_refuses_constraints(make_engine):
    network = RandomNetwork()
    model = LoadedModel(network, "random", "random", torch.float32, 1000, "dense", (2,))
    section = EngineSection(kv_cache_tokens=4096, max_num_seqs=2, warmup=False)
    engine = NativeEngine(model, section)
    assert not engine.info.capabilities.structured_output
    for constraint, param in (
        (Constraint("start: /a/\n"), "response_format"),
        (Constraint(thinking_budget=4), "thinking_budget"),
    ):
        with pytest.raises(ClientError) as caught:
            engine.submit("x", [1], params(constraint, 0))
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert make_engine().info.capabilities.structured_output


def test_a_constraint_crosses_to_the_engine_process():
    sampling = params(Constraint("start: /a/\n", may_think=True, thinking_budget=5), 1)
    assert unpack_sampling(pack_sampling(sampling)) == sampling
    assert "constraint" not in pack_sampling(SamplingParams())


def test_masks_unpack_bit_by_bit():
    rows = new_rows(2, 70)
    rows[1] = 0
    rows[1][0], rows[1][8] = 0b10000001, 0b00100000
    mask = unpack_mask(torch.from_numpy(rows), 70)
    assert mask[0].all()
    assert mask[1].nonzero().flatten().tolist() == [0, 7, 69]
