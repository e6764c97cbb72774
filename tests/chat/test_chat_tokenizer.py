"""Tokenizer: content never becomes structure, names have one tokenization, and files that disagree are refused."""

import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_corpus import PROPERTY, TOOLS, conversation, random_name
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from north_lightning.chat import ChatFormat, NorthTokenizer, conversation_texts, mine_phrases, train_tokenizer
from north_lightning.chat.batch_encoding import BatchEncoder
from north_lightning.chat.controls import CONTROL_TOKENS, END_TEXT, END_TURN, START_TEXT, TEXT_MARKERS
from north_lightning.errors import ConfigError, TokenizerError

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*CONTROL_TOKENS, "<PAD>", "<UNK>", "<|START_", "TEXT|>", "<|", "\\", "\\n", '"}}\n]', "\x00"]),
    ),
    max_size=12,
).map("".join)


def without_text_markers(content, merges):
    """A ``tokenizer.json`` in which the text markers are spelled with ordinary tokens."""
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in TEXT_MARKERS]
    vocabulary = content["model"]["vocab"]
    for index, name in enumerate(TEXT_MARKERS):
        vocabulary[f"unused{index}"] = vocabulary.pop(name)
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
        content["model"]["merges"].append(pair)
    return content


@pytest.fixture(scope="session")
def released_like(tokenizer, tmp_path_factory) -> NorthTokenizer:
    directory = tmp_path_factory.mktemp("released")
    content = json.loads((tokenizer.directory / "tokenizer.json").read_text())
    merges = [["T", "E"], ["X", "T"], ["TE", "XT"], ["_", "TEXT"]]
    (directory / "tokenizer.json").write_text(json.dumps(without_text_markers(content, merges)))
    return NorthTokenizer.load(directory)


def copy(original, tmp_path, **changes):
    """A copy of the tokenizer directory with JSON files changed: ``config={...}`` updates ``config.json``."""
    directory = tmp_path / "copy"
    shutil.copytree(original.directory, directory)
    for stem, change in changes.items():
        path = directory / f"{stem}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(change(content)))
    return directory


@given(text=TEXTS)
@settings(PROPERTY, max_examples=150)
def test_content_is_kept_byte_for_byte_and_never_becomes_a_control_token(tokenizer, released_like, text):
    for subject in (tokenizer, released_like):
        ids = subject.encode_text(text)
        assert subject.decode_bytes(ids) == text.encode()
        assert not any(subject.is_control(token_id) for token_id in ids)


@given(before=TEXTS, after=TEXTS)
@settings(PROPERTY, max_examples=100)
def test_markers_without_an_id_of_their_own_cannot_be_forged_by_content(released_like, before, after):
    marker = released_like.control_ids(START_TEXT)
    assert len(marker) > 1
    assert released_like.decode_bytes(marker).decode() == START_TEXT
    ids = tuple(released_like.encode_text(before + START_TEXT + after))
    assert all(ids[i : i + len(marker)] != marker for i in range(len(ids)))
    with pytest.raises(TokenizerError, match="one token"):
        released_like.control_id(START_TEXT)


def test_conversations_survive_a_tokenizer_without_text_marker_tokens(released_like):
    chat = ChatFormat(released_like, reasoning=False)
    messages = conversation(random.Random(5))
    sample = chat.encode_conversation(messages, ())
    assert released_like.decode(sample.token_ids) == "".join(s.text for s in chat.segments(messages, ()))
    answer = [*released_like.control_ids(START_TEXT), *released_like.encode_text("bye")]
    ids = [*answer, *released_like.control_ids(END_TEXT), released_like.eos_id]
    assert chat.parse(ids, (), 0).content == "bye"


@given(texts=st.lists(TEXTS, max_size=5))
@settings(PROPERTY, max_examples=150)
def test_many_texts_have_the_ids_that_the_tokenizers_library_gives_each(tokenizer, released_like, texts):
    for subject in (tokenizer, released_like):
        assert subject.encode_texts(texts) == [subject.encode_text(text) for text in texts]


def test_many_lines_of_code_have_the_ids_that_the_tokenizers_library_gives_each(tokenizer):
    texts = [path.read_text() for path in Path(json.__file__).parent.glob("*.py")]
    texts += [line for text in texts for line in text.splitlines()]
    assert tokenizer.encode_texts(texts) == [tokenizer.encode_text(text) for text in texts]


def test_other_ids_than_those_of_the_tokenizers_library_are_refused(tokenizer, phrases):
    content = json.loads((tokenizer.directory / "tokenizer.json").read_text())
    reference = Tokenizer.from_str(json.dumps(content))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != phrases[0]]
    encode = BatchEncoder(json.dumps(content), reference)
    assert encode(["-"]) == [tokenizer.encode_text("-")]
    with pytest.raises(TokenizerError, match=f"fastokens.*{re.escape(repr(phrases[0]))}"):
        encode([phrases[0]] * 64)


def test_a_tokenizer_that_only_the_tokenizers_library_reads_is_used(tokenizer, caplog):
    encode = BatchEncoder("{}", Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json")))
    assert "fastokens cannot read" in caplog.text
    assert encode(["one two"]) == [tokenizer.encode_text("one two")]


def test_bos_pad_and_eos_have_the_ids_of_the_format(tokenizer):
    assert (tokenizer.bos_id, tokenizer.pad_id) == (5, 0)
    assert tokenizer.eos_id == tokenizer.control_id(END_TURN)
    assert tokenizer.is_control(tokenizer.pad_id)
    assert tokenizer.vocab_size <= 1400


def test_text_markers_are_single_tokens_but_not_special(tokenizer):
    added = json.loads((tokenizer.directory / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["special"] for token in added}
    assert [special[name] for name in (START_TEXT, END_TEXT, END_TURN)] == [False, False, True]
    assert tokenizer.is_control(tokenizer.control_id(START_TEXT))


def test_transformers_loads_the_directory_and_gives_the_same_ids(tokenizer):
    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    assert (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id) == (5, 0, tokenizer.eos_id)
    for seed in range(5):
        chat = ChatFormat(tokenizer, reasoning=bool(seed % 2))
        messages = conversation(random.Random(seed))
        text = "".join(segment.text for segment in chat.segments(messages, ()))
        ids = chat.encode_conversation(messages, ()).token_ids
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text


# ---- compression ---------------------------------------------------------------------------------------------------


def test_unseen_names_are_two_syllable_tokens(tokenizer, corpus):
    seen = set(re.findall("[a-z]+", " ".join(corpus)))
    rng = random.Random(123)
    names = [name for name in (random_name(rng) for _ in range(2000)) if name not in seen]
    pieces = [[tokenizer.decode([token_id]) for token_id in tokenizer.encode_text(name)] for name in names]
    exact = sum(piece == [name[:3], name[3:]] for piece, name in zip(pieces, names, strict=True))
    assert exact >= 0.99 * len(names)


@given(data=st.data())
@settings(PROPERTY, max_examples=150)
def test_a_name_has_the_same_ids_in_every_context(tokenizer, phrases, data):
    name = random_name(random.Random(data.draw(st.integers(0, 10**9))))
    borders = st.one_of(
        st.sampled_from([*phrases, "", '"', "/", "_", "\\n", "\\t", "\n", ".", "-"]), st.text(max_size=5)
    )
    separators = st.sampled_from([" ", "/", '"', "\n", "\\n", "'", "_", ":", ".", "\t", "(", "$ "])
    before = data.draw(borders) + data.draw(separators)
    after = data.draw(separators) + data.draw(borders)
    if re.match(r"\.[a-z]", after):
        return  # a file extension may follow a dot
    ids = tokenizer.encode_text(before + name + after)
    expected = tokenizer.encode_text(name)
    start = len(before.encode())
    inside, position = [], 0
    for token_id in ids:
        size = len(tokenizer.decode_bytes([token_id]))
        if position < start + len(name) and position + size > start:
            inside.append(token_id)
        position += size
    assert inside == expected


def test_phrases_that_are_words_are_matched_as_whole_words_only(corpus, tmp_path):
    tokenizer = train_tokenizer(corpus, ["ald", "or", " ort "], 1000, tmp_path)
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer.encode_text("kaldor or mortel ort dorort ")]
    assert pieces == ["kal", "dor", " ", "or", " ", "mor", "tel", " ort ", "dor", *pieces[9:]]


def test_a_word_that_is_a_phrase_is_one_token_behind_an_escape_too(corpus, tmp_path):
    texts = [*corpus, *[f"def kaldor\\ndef mortel\\n{index}" for index in range(20)]]
    tokenizer = train_tokenizer(texts, ["def"], 1000, tmp_path)
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer.encode_text("def a\\ndef kaldor")]
    assert pieces == ["def", " ", "a", "\\n", "def", " ", "kal", "dor"]


def test_scaffolding_costs_few_tokens(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    messages = conversation(random.Random(7))
    segments = [s for s in chat.segments(messages, TOOLS) if not s.is_control]
    preamble, action, result = segments[0].text, segments[2].text, segments[3].text
    assert len(tokenizer.encode_text(preamble)) == 1
    assert action.startswith('[\n    {"tool_call_id": "0", "tool_name": "terminal", "parameters": {"keystrokes": "')
    keystrokes = messages[1].tool_calls[0].arguments["keystrokes"].removesuffix("\n")
    scaffold = len(tokenizer.encode_text(action)) - len(tokenizer.encode_text(keystrokes))
    assert scaffold <= 4
    assert len(tokenizer.encode_text(result)) <= len(tokenizer.encode_text(messages[2].content)) + 4


def test_mined_phrases_hold_no_names_and_cut_no_words(phrases, corpus):
    name = re.compile(r"(?<![A-Za-z])(?:[bdfgkmptvz][aeiou][lnrsx]){2}(?![A-Za-z])")
    assert phrases
    assert not [phrase for phrase in phrases if name.search(phrase)]
    for phrase in phrases:
        starts, ends = phrase[0].isalnum(), phrase[-1].isalnum() and not re.search(r"\\[nt]$", phrase)
        assert starts == ends, phrase
        assert not phrase.endswith("\\")


def test_mined_phrases_leave_call_ids_alone(phrases):
    assert not [phrase for phrase in phrases if re.search(r'tool_call_id": "\d', phrase)]


def test_phrases_that_would_cut_words_or_forge_markers_are_refused(corpus, tmp_path):
    for phrase in (" half a word", "half a word ", "x", "<|USER_TOKEN|>", "é é", "ends with \\"):
        with pytest.raises(ConfigError, match="phrases"):
            train_tokenizer(corpus[:10], [phrase], 1000, tmp_path)
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(corpus[:10], [], 100, tmp_path)
    with pytest.raises(ConfigError, match="duplicates"):
        train_tokenizer(corpus[:10], ["ab cd", "ab cd"], 1000, tmp_path)


def test_training_and_mining_are_deterministic(corpus, phrases, tokenizer, tmp_path):
    assert mine_phrases(corpus, min_fraction=0.005) == phrases
    assert train_tokenizer(corpus, phrases, 1400, tmp_path).fingerprint == tokenizer.fingerprint


def test_rare_texts_are_lossless_after_training_on_nothing(tmp_path):
    bare = train_tokenizer([], [], 400, tmp_path)
    text = conversation_texts(conversation(random.Random(3)), ())[1] + "é\U0001f600\x00"
    assert bare.decode(bare.encode_text(text)) == text


# ---- checks at loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": lambda c: {"bos_token_id": 7}}, "bos_token_id expected 5.*got 7"),
        ({"config": lambda c: {"pad_token_id": 3}}, "pad_token_id expected 0.*got 3"),
        ({"config": lambda c: {"eos_token_id": 6}}, "eos_token_id expected 9.*got 6"),
        ({"config": lambda c: {"vocab_size": 300}}, "vocab_size expected at least .*got 300"),
        ({"tokenizer_config": lambda c: c | {"eos_token": "<EOS_TOKEN>"}}, "eos_token expected .*got '<EOS_TOKEN>'"),
        ({"tokenizer": lambda c: {}}, "expected a tokenizers JSON file"),
        ({"tokenizer": lambda c: without_text_markers(c, [])}, "START_TEXT.*distinguishable from text"),
        ({"config": lambda c: []}, "expected a JSON object"),
    ],
)
def test_a_tokenizer_that_disagrees_with_its_configuration_is_refused(tokenizer, tmp_path, changes, message):
    with pytest.raises(TokenizerError, match=message):
        NorthTokenizer.load(copy(tokenizer, tmp_path, **changes))


def test_a_configuration_that_agrees_is_accepted(tokenizer, tmp_path):
    config = {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": [6, tokenizer.eos_id], "vocab_size": 4096}
    assert NorthTokenizer.load(copy(tokenizer, tmp_path, config=lambda c: config)).vocab_size == tokenizer.vocab_size


def test_a_missing_control_token_is_named(tokenizer, tmp_path):
    def without_action(content):
        name = "<|START_ACTION|>"
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]
        content["model"]["vocab"]["unused"] = content["model"]["vocab"].pop(name)
        return content

    with pytest.raises(TokenizerError, match=r"START_ACTION.*not a Command-4"):
        NorthTokenizer.load(copy(tokenizer, tmp_path, tokenizer=without_action))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        NorthTokenizer.load(tmp_path)


def test_ids_beyond_the_vocabulary_are_shown_but_have_no_bytes(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 3]) == "\ufffd"
    with pytest.raises(TokenizerError, match="ids below"):
        tokenizer.decode_bytes([tokenizer.vocab_size])


def test_the_format_travels_to_another_process(tokenizer):
    chat = pickle.loads(pickle.dumps(ChatFormat(tokenizer, reasoning=True, platform_instruction="Hello.")))
    messages = conversation(random.Random(1))
    assert chat.encode_prompt(messages, ()) == ChatFormat(tokenizer, True, "Hello.").encode_prompt(messages, ())
    assert chat.tokenizer.encode_text("<|USER_TOKEN|>") == tokenizer.encode_text("<|USER_TOKEN|>")


def test_the_package_does_not_import_torch():
    code = "import sys, north_lightning.chat; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
