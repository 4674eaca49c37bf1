from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from subprocess import run

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline
from tokenizers.decoders import ByteLevel

from serve_app.config.model_source import ModelFormat, ModelSource, resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ClientError, ConfigError
from serve_app.models.gguf import GGUFFile
from serve_app.text.pre_tokenizers import PRE_TOKENIZERS
from serve_app.text.tokenizer import Tokenizer, load_tokenizer
from serve_app.text.vocabulary import byte_level_alphabet
from tests.unit.text.vocabularies import R1_SPECIALS, gguf_tokenizer, write_hf_folder

TRICKY = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "1234567890 3.14 1,000,000 ½ ² Ⅻ ٣٤",
    "a\n\n\nb\r\n\tc \u00a0\u3000\u2028 d",
    "it's I'LL they've 's",
    "naïve café ÅÄÖ ß ﬁ",
    "日本語のテキスト 中文 한국어",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
    "\x00\x01\x7f\x1b[0m",
    "def f(x):\n    return x**2  # 100%",
    "العربية עברית ไทย हिन्दी",
    "\ufffd\ufeff\uf8ff",
    "a" * 300 + " " * 40 + "!" * 50,
    "<|im_start|>system\nx<|im_end|>",
]

# SmolLM2's vocabulary lacks some bytes (rare control characters, unassigned planes); like its own
# tokenizer.json, we leave those out.
spelt_text = st.text(
    st.characters(
        max_codepoint=0x3FFFF,
        exclude_categories=["Cs"],
        exclude_characters="\x04\x06\x13\x14\x16\x1d",
    ),
    max_size=60,
)


class ReferenceBpe:
    """BPE as in Sennrich et al. 2016, word by word, in plain Python, for SmolLM2's vocabulary."""

    def __init__(self) -> None:
        metadata = GGUFFile(resolve_model(ModelSection()).path).metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = metadata["tokenizer.ggml.merges"]
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.letters = {byte: char for char, byte in byte_level_alphabet().items()}
        self.words = regex.compile(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        )

    def encode(self, text: str) -> list[int]:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        words = [word for piece in pieces for word in self.words.findall(piece)]
        return [token_id for word in words for token_id in self.word_ids(word)]

    def word_ids(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 30))
            if best not in self.ranks:
                break
            index = pairs.index(best)
            parts[index : index + 2] = ["".join(best)]
        return [self.ids[part] for part in parts]


@pytest.fixture(scope="session")
def reference() -> ReferenceBpe:
    return ReferenceBpe()


@pytest.mark.parametrize("text", TRICKY)
def test_embedded_model_encodes_as_the_reference_does(
    embedded: Tokenizer, reference: ReferenceBpe, text: str
) -> None:
    assert embedded.encode(text, add_special_tokens=True) == reference.encode(text)


@given(text=spelt_text)
def test_any_text_encodes_as_the_reference_does_and_comes_back(
    embedded: Tokenizer, reference: ReferenceBpe, text: str
) -> None:
    ids = embedded.encode(text, add_special_tokens=False)

    assert ids == reference.encode(text)
    assert embedded.decode(ids) == text


def test_bytes_that_the_vocabulary_lacks_are_left_out(embedded: Tokenizer) -> None:
    assert embedded.encode("a\x04b", add_special_tokens=False) == embedded.encode(
        "a", add_special_tokens=False
    ) + embedded.encode("b", add_special_tokens=False)


def test_known_ids_of_the_embedded_model(embedded: Tokenizer) -> None:
    assert embedded.encode("Hello 123", add_special_tokens=True) == [19556, 216, 33, 34, 35]
    assert embedded.vocab_size == 49152
    assert embedded.eos_token_ids == (2, 0)
    assert embedded.bos_token_id == 1


@given(
    pieces=st.lists(
        st.one_of(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "|>"]), spelt_text)
    )
)
def test_text_never_becomes_a_special_token(embedded: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)

    ids = embedded.encode(text, add_special_tokens=False)

    assert not embedded.special_ids & set(ids)
    assert embedded.decode(ids) == text


def test_the_mark_of_one_process_is_unknown_to_another(embedded: Tokenizer) -> None:
    other = load_tokenizer(resolve_model(ModelSection()))

    ids = embedded.encode(other.special_mark + "<|im_start|>", add_special_tokens=False)

    assert not embedded.special_ids & set(ids)


def test_parse_special_finds_special_tokens(embedded: Tokenizer) -> None:
    ids = embedded.encode(
        "<|im_start|>user<|im_end|>", add_special_tokens=False, parse_special=True
    )

    assert ids == [1, *embedded.encode("user", add_special_tokens=False), 2]
    assert embedded.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert embedded.decode(ids) == "user"


def test_batch_equals_one_by_one(embedded: Tokenizer) -> None:
    one_by_one = [embedded.encode(text, add_special_tokens=False) for text in TRICKY]

    assert embedded.encode_batch(TRICKY, add_special_tokens=False) == one_by_one


def test_lone_surrogate_is_a_client_error(embedded: Tokenizer) -> None:
    with pytest.raises(ClientError, match="not valid Unicode"):
        embedded.encode("a\ud800", add_special_tokens=False)
    with pytest.raises(ClientError, match="not valid Unicode"):
        embedded.encode_batch(["a\ud800"], add_special_tokens=False)


def test_token_bytes_join_to_the_text(embedded: Tokenizer) -> None:
    ids = embedded.encode("日本 😀", add_special_tokens=False)

    assert b"".join(map(embedded.token_bytes, ids)) == "日本 😀".encode()
    assert embedded.token_bytes(-1) == embedded.token_bytes(10**9) == b""
    assert "\ufffd" in "".join(map(embedded.token_text, ids))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 1234", ["a", " 1234"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("qwen2", "I'M x12\n\n", ["I", "'M", " x", "1", "2", "\n\n"]),
        ("deepseek-r1-qwen", "I'M x12", ["I", "'M", " x", "1", "2"]),
        ("llama-bpe", "x 12345", ["x", " ", "123", "45"]),
        ("deepseek-v3", "x 12345日本a.b", ["x", " ", "123", "45", "日本", "a", ".b"]),
        ("deepseek-llm", "x 12\r\n日本!", ["x", " ", "1", "2", "\r", "\n", "日本", "!"]),
        ("deepseek-coder", "x+1日", ["x", "+", "1", "日"]),
        ("default", "x!1234", ["x", "!", "123", "4"]),
        ("gpt-4o", "fooBar's 1234", ["foo", "Bar's", " ", "123", "4"]),
        ("tekken", "fooBar 12", ["foo", "Bar", " ", "1", "2"]),
        ("qwen35", "e\u0301a", ["\u00e9a"]),
    ],
)
def test_pre_tokenizer_cuts_words(pre: str, text: str, words: list[str]) -> None:
    entry = PRE_TOKENIZERS[pre]
    normalizer = entry.normalizer()
    normal = normalizer.normalize_str(text) if normalizer else text
    cuts = entry.build().pre_tokenize_str(normal)

    assert [normal[start:end] for _, (start, end) in cuts] == words


def test_qwen2_normalises_to_nfc_and_r1_does_not() -> None:
    decomposed = "e\u0301"

    qwen = gguf_tokenizer("qwen2")
    r1 = gguf_tokenizer("deepseek-r1-qwen")

    assert qwen.decode(qwen.encode(decomposed, add_special_tokens=False)) == "\u00e9"
    assert r1.decode(r1.encode(decomposed, add_special_tokens=False)) == decomposed


def test_bos_is_put_in_front_when_the_file_says_so() -> None:
    with_bos, without = gguf_tokenizer(), gguf_tokenizer(add_bos_token=False)

    assert with_bos.encode("a", add_special_tokens=True)[0] == with_bos.bos_token_id
    assert with_bos.encode("a", add_special_tokens=False) == without.encode(
        "a", add_special_tokens=True
    )


@pytest.mark.parametrize(("pre", "has_bos"), [("llama-bpe", True), ("qwen2", False)])
def test_bos_of_a_file_that_does_not_say_depends_on_the_family(pre: str, has_bos: bool) -> None:
    tokenizer = gguf_tokenizer(pre, add_bos_token=None)

    ids = tokenizer.encode("a", add_special_tokens=True)

    assert (ids[0] == tokenizer.bos_token_id) is has_bos


@pytest.mark.parametrize(
    ("settings", "has_bos"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True}, False),
        ({}, False),
    ],
)
def test_llama_classes_declare_their_bos(
    tmp_path: Path, settings: dict[str, object], has_bos: bool
) -> None:
    write_hf_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    tokenizer = load_tokenizer(hf_source(tmp_path))

    ids = tokenizer.encode("a", add_special_tokens=True)

    assert (ids[0] == tokenizer.bos_token_id) is has_bos


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "martian"}, "'martian'"),
        ({"model": "t5"}, "'t5'"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"tokens": None, "token_type": None}, "tokenizer.ggml.tokens"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["zzz qqq"]}, "merges"),
        ({"token_type": [1]}, "token types"),
    ],
)
def test_a_vocabulary_we_cannot_read_is_refused_by_name(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        gguf_tokenizer(**changes)

    assert "small.gguf" in caught.value.message
    assert "\n" not in caught.value.message


def test_sentencepiece_vocabulary_with_byte_fallback() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁h"]
    scores = [0.0] * len(tokens) + [-9, -9, -9, -9, -9, -1, -2, -3, -4, -5, -6]
    tokenizer = gguf_tokenizer(
        model="llama",
        pre=None,
        merges=None,
        tokens=tokens + pieces,
        token_type=types + [1] * len(pieces),
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_bos_token=None,
    )

    hello = tokens.index("<0xFF>") + 1 + pieces.index("▁hello")
    smile = [3 + byte for byte in "é".encode()]

    assert tokenizer.encode("hello", add_special_tokens=True) == [1, hello]
    assert tokenizer.encode("helloé", add_special_tokens=False) == [hello, *smile]
    assert tokenizer.decode([1, hello, *smile, hello]) == "helloé hello"
    assert tokenizer.token_bytes(smile[0]) == b"\xc3"
    assert 1 not in tokenizer.encode("<s>hello", add_special_tokens=False)


def hf_source(folder: Path) -> ModelSource:
    return ModelSource("small", folder, ModelFormat.HUGGING_FACE)


def test_hugging_face_folder(tmp_path: Path) -> None:
    write_hf_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    library = Pipeline.from_file(str(tmp_path / "tokenizer.json"))
    text = f"{R1_SPECIALS[2]}the cat<think>x"

    tokenizer = load_tokenizer(hf_source(tmp_path))

    parsed = tokenizer.encode(text, add_special_tokens=True, parse_special=True)
    plain = tokenizer.encode(text, add_special_tokens=False)
    library.encode_special_tokens = True
    assert plain == library.encode(text, add_special_tokens=False).ids
    library.encode_special_tokens = False
    assert parsed == library.encode(text).ids
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text == tokenizer.decode(parsed, False)
    assert tokenizer.eos_token_ids == (7, 8, library.token_to_id(R1_SPECIALS[1]))
    assert tokenizer.bos_token_id == library.token_to_id(R1_SPECIALS[0])
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_vocabulary_with_gaps_keeps_ids_apart(tmp_path: Path) -> None:
    write_hf_folder(tmp_path)
    letters = {char: 3 * index for index, char in enumerate(byte_level_alphabet())}
    pipeline = Pipeline(models.BPE(letters, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = ByteLevel()
    pipeline.add_special_tokens([AddedToken("<s>", special=True)])
    pipeline.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(hf_source(tmp_path))
    text = "".join(map(chr, range(32, 127))) + "é"

    ids = tokenizer.encode(text, add_special_tokens=False)

    assert ids == [letters[c] for c in pipeline.encode(text).tokens]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
    ],
)
def test_broken_folder_is_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    write_hf_folder(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(hf_source(tmp_path))

    assert "\n" not in caught.value.message


def test_chat_template_override_as_text_and_as_path(tmp_path: Path) -> None:
    source = resolve_model(ModelSection())
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}")

    assert load_tokenizer(source, chat_template_override="{{ 1 }}").chat_template == "{{ 1 }}"
    assert (
        load_tokenizer(source, chat_template_override=str(path)).chat_template == path.read_text()
    )
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        load_tokenizer(source, chat_template_override=str(tmp_path / "none.jinja"))


def test_text_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, serve_app.text.output, serve_app.text.chat_template, serve_app.text.reasoning;"
        "print(sorted({'torch', 'transformers', 'ray'} & sys.modules.keys()))"
    )

    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
