"""A prompt that cannot fit is refused by its parts; one that fits is never refused, whatever its tokenizer does."""

import random
import string
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from agent.loader import lengths
from agent.loader.generation import Prepared
from agent.loader.lengths import MARGIN, MOST_CHARS, PART_CHARS, PLAIN_CHARS, exceeds
from agent.loader.mlx.engine import MLXEngine
from agent.loader.mlx.model import embedding_inputs
from agent.wire.frames import Embed, Failed, Generate, Message
from tests.tiny_model import write_tiny_model

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "rack",
    "node",
    "heat",
    "fan",
    "token",
    "queue",
    "swap",
    "peer",
    "load",
    "cache",
    "batch",
    "drain",
    "überraschung",
    "прибор",
    "机架",
    "データ",
    "emoji🙂",
    "don't",
    "x=1;",
    '{"a":',
    "[1,",
    "2]}",
    "https://example.org/a?b=c",
    "2024-01-31",
]


def corpus() -> Iterator[str]:
    dice = random.Random(3)
    for _ in range(200):
        yield " ".join(dice.choices(WORDS, k=30)) + dice.choice(["\n", "\n\n", "    ", "!!!"])


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@cache
def tokenizer(kind: str) -> Tokenizer:
    """A tokenizer of each kind that models have."""
    special = ["[UNK]"]
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return trained(made, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    if kind == "runs of spaces":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        made.train_from_iterator(
            [*corpus(), *(" " * 256 for _ in range(500)), *("ab" * 99 for _ in range(500))], trainer
        )
        return made
    if kind == "sentencepiece-like":
        made = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return trained(made, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        return trained(made, trainers.UnigramTrainer(vocab_size=200, unk_token="[UNK]", special_tokens=special))
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))


KINDS = ("byte-level", "runs of spaces", "sentencepiece-like", "unigram", "wordpiece")


def count_of(kind: str) -> Callable[[str], int]:
    return lambda part: len(tokenizer(kind).encode(part, add_special_tokens=False).ids)


texts = st.one_of(
    st.builds(lambda words, n: " ".join(words) * n, st.lists(st.sampled_from(WORDS), min_size=1), st.integers(1, 900)),
    # one word that no cut finds an end of, of lengths around those at which tokenizers change their minds
    st.builds(
        lambda one, size, gap, n: (one * size + gap) * n,
        st.sampled_from([*"aZ é机🙂\u200b\u0301", "ab", "Qx", "  "]),
        st.sampled_from([1, 3, 60, 99, 101, 4000, PART_CHARS - 1, PART_CHARS + 50, PART_CHARS + 99, 20_000]),
        st.sampled_from(["", " ", "\n", "."]),
        st.integers(1, 40),
    ),
    st.builds(
        lambda seed, n: "".join(random.Random(seed).choices(string.printable, k=n)),
        st.integers(),
        st.integers(0, 40_000),
    ),
).map(lambda text: text[:80_000])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(texts)
def test_what_just_fits_is_never_refused(kind: str, text: str) -> None:
    count = count_of(kind)
    assert exceeds([text], fitting(text, count), count) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [99, 101, PART_CHARS + 60, PART_CHARS + 99])
@pytest.mark.parametrize("one", ["a", "é", " ", "th"])
def test_words_that_no_cut_spares_are_never_refused_for_it(kind: str, size: int, one: str) -> None:
    """Some tokenizers make one token of any long word, and many of its rest behind a cut."""
    count = count_of(kind)
    text = (one * size + " ")[-size:] * (25_000 // size)
    assert exceeds([text], fitting(text, count), count) == 0


@pytest.mark.parametrize(
    ("kind", "one"),
    [("runs of spaces", " "), ("runs of spaces", "ab"), ("wordpiece", "a"), ("wordpiece", " "), ("unigram", "-")],
)
def test_megabytes_of_few_tokens_are_refused_at_the_cost_of_what_fits(kind: str, one: str) -> None:
    """Runs of blanks are tokens of many characters, and an unknown word is one token however long it is."""
    count, read = count_of(kind), list[int]()
    text, limit_tok = (one * 9_900_000)[:9_900_000], 512

    def counted(part: str) -> int:
        read.append(len(part))
        return count(part)

    found = exceeds([text], limit_tok, counted)
    assert found > limit_tok
    assert sum(read) <= MOST_CHARS * MARGIN * limit_tok * 1.1


def test_the_length_of_the_longest_token_is_a_fair_length() -> None:
    assert exceeds(["x" * 200_000], 1000, lambda part: 1, most_chars=200) == 0
    assert exceeds(["x" * 200_001], 1000, lambda part: 1, most_chars=200) == 1001


def fitting(text: str, count: Callable[[str], int]) -> int:
    """A context length that the text fits into: a tokenizer may drop it all, but its length counts."""
    return max(count(text), -(-len(text) // MOST_CHARS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "alphabet", [string.ascii_letters, string.digits, string.punctuation + " ", "机架データ", "the rack "]
)
def test_what_a_refusal_costs_depends_on_what_fits(kind: str, alphabet: str) -> None:
    """Five megabytes are read as far as needed, which is no further than twenty-five kilobytes would be."""
    read: list[int] = []
    count = count_of(kind)

    def counted(part: str) -> int:
        read.append(len(part))
        return count(part)

    block = "".join(random.Random(1).choices(alphabet, k=25_000))
    limit_tok = 128
    assert exceeds([block * 200], limit_tok, counted) > limit_tok or count(block) <= limit_tok
    if count(block) > 4 * limit_tok:
        assert sum(read) <= 30_000


def test_short_texts_are_not_even_counted() -> None:
    def never(part: str) -> int:
        raise AssertionError(part)

    assert exceeds(["x" * (PLAIN_CHARS * 100)], 100, never) == 0
    assert exceeds([], 100, never) == 0


def test_every_part_is_progress_and_what_is_known_to_fit_is_not_read_again() -> None:
    moved: list[None] = []
    text = " " * (20 * PART_CHARS)
    assert exceeds([text], 2000, lambda part: 1, lambda: moved.append(None)) == 0
    assert len(moved) >= 20
    moved.clear()
    assert exceeds([text + "x"], 2000, lambda part: 1, lambda: moved.append(None), known_chars=len(text)) == 0
    assert not moved
    assert exceeds([text + "x" * 40_000], 2000, len, known_chars=len(text)) > 2000, "a template may add much"


def test_a_large_prompt_of_few_tokens_is_read_twice_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of blanks, or one long word: once in parts, once whole."""
    write_tiny_model(tmp_path / "model", seed=3)
    engine = MLXEngine(str(tmp_path / "model"), kv_tok=512)
    model = engine._model
    read: list[int] = []
    moved: list[int] = []

    def few(text: str, *_: str) -> list[int]:
        read.append(len(text))
        return [1] * (1 + len(text) // 20_000)

    monkeypatch.setattr(model._template, "tokens", few)
    monkeypatch.setattr(model._template, "shielded_tokens", few)
    monkeypatch.setattr(model, "_longest_token_bytes", 20_000)
    size = 1 << 20
    request = Generate(id=1, model="m", messages=(Message(role="user", content="x" * size),), max_tokens=1)
    found = engine.prepare(request, lambda: moved.append(len(read)))
    assert isinstance(found, Prepared)
    assert sum(read) < 2.01 * size
    assert len(moved) > size / PART_CHARS
    assert {*range(len(read))} <= {*moved}, "before each part, and before the whole"


def test_parts_are_the_text() -> None:
    for text in ("", "a" * 30_000, "word " * 9000, "word\n" * 9000, " " * 30_000):
        parts = [part for part, _ in lengths._parts(text)]
        assert "".join(parts) == text
        assert all(0 < len(part) <= PART_CHARS for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inputs_of_an_embedding_are_refused_alike_and_those_that_fit_are_whole(kind: str) -> None:
    read = 0

    def encode(text: str) -> list[int]:
        nonlocal read
        read += len(text)
        return list(tokenizer(kind).encode(text).ids)

    fits = "the rack of the node " * 20
    long = "".join(random.Random(2).choices("the rack node ", k=12_000)) * 5
    moved: list[None] = []
    found = embedding_inputs(
        Embed(id=3, model="m", inputs=(fits, long)), encode, 512, 10_000, lambda: moved.append(None)
    )
    assert isinstance(found, Failed)
    assert (found.code, found.param) == ("context_length_exceeded", "input")
    assert found.message.startswith("input[1]: over ")
    assert read < 100_000
    assert len(moved) > 2, "each input, and each part of one"
    whole = embedding_inputs(Embed(id=3, model="m", inputs=(fits, (1, 2, 3))), encode, 512, 10_000)
    assert not isinstance(whole, Failed)
    assert whole.prompts == (list(tokenizer(kind).encode(fits).ids), [1, 2, 3])
