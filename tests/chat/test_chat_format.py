"""Rendering, masks, bridge and strict parsing, against melody and transformers."""

import json
import math
import time

import pytest
from chat_corpus import PROPERTY, TOOLS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from north_lightning.chat import ActionFormatError, ChatFormat
from north_lightning.chat import controls as c
from north_lightning.chat.render import render_with_melody, to_json
from north_lightning.errors import DataError, InvalidActionError
from north_lightning.types import AssistantAction, Message, ToolCall, ToolResult, ToolSpec

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = st.one_of(
    st.text(max_size=25),
    st.sampled_from(
        ['say "hi"', "a\n\n  b\t\\n", "<|END_OF_TURN_TOKEN|>", "<|START_TEXT|>", "", "é\u2028\x00\x7f", "{{ x }}"]
    ),
)
PLAIN = TEXT.filter(lambda text: not any(name in text for name in c.CONTROL_TOKENS))
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(-1e6, 1e6).map(lambda x: round(x, 3)),
        PLAIN,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(PLAIN, inner, max_size=3)),
    max_leaves=6,
)
ANY_OBJECT = ToolSpec("anything", 'Takes <anything> & "more"\n', {"type": "object"})
ALL_TOOLS = (*TOOLS, ANY_OBJECT)


@st.composite
def conversations(draw, reasoning: bool):
    """Random conversations: several calls a turn, merged results, text turns, system messages anywhere."""
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(TEXT)))
    next_id = 0
    for _ in range(draw(st.integers(0, 3))):
        thought = draw(PLAIN) if reasoning else ""
        if draw(st.integers(0, 3)) == 0:
            messages += [Message("assistant", draw(PLAIN), thought), Message("user", draw(TEXT))]
            continue
        calls = []
        for _ in range(draw(st.integers(1, 3))):
            calls.append(ToolCall(str(next_id), "anything", draw(st.dictionaries(PLAIN, JSON, max_size=3))))
            next_id += 1
        messages.append(Message("assistant", "", thought, tuple(calls)))
        messages += [Message("tool", draw(TEXT), tool_call_id=call.id) for call in draw(st.permutations(calls))]
    if draw(st.booleans()):
        messages.append(Message("assistant", draw(PLAIN), draw(PLAIN) if reasoning else ""))
    return messages


def any_conversation():
    return st.booleans().flatmap(lambda reasoning: st.tuples(st.just(reasoning), conversations(reasoning)))


def text_of(segments):
    return "".join(segment.text for segment in segments)


# ---- rendering -----------------------------------------------------------------------------------------------------


@given(
    case=any_conversation(),
    tools=st.sampled_from([(), TOOLS, ALL_TOOLS, ALL_TOOLS[::-1], ALL_TOOLS[2:]]),
    platform=st.sampled_from(["", "Your name is North.\n- é"]),
)
@settings(PROPERTY, max_examples=120)
def test_prompts_are_byte_identical_with_melody(tokenizer, case, tools, platform):
    reasoning, messages = case
    chat = ChatFormat(tokenizer, reasoning, platform)
    expected = render_with_melody(messages, tools, reasoning, platform)
    assert tokenizer.decode(chat.encode_prompt(messages, tools)) == expected
    opening = c.TURN + c.CHATBOT + c.START_THINKING + ("" if reasoning else c.END_THINKING)
    assert text_of(chat.segments(messages, tools)) + opening == expected


@given(value=JSON, number=st.floats(allow_nan=False, allow_infinity=False))
@settings(PROPERTY, max_examples=150)
def test_arguments_are_written_as_json_that_reads_back(value, number):
    assert json.loads(to_json(value)) == value
    assert json.loads(to_json(number)) == number
    assert math.copysign(1, json.loads(to_json(number))) == math.copysign(1, number)


@pytest.mark.parametrize("number", [1e15, 1e16, 1.5e-5, -1e-5, 1e-6, 1e-4, 0.1, -0.0, 1e300, 5e-324, 100.0, 1.25e17])
def test_floats_are_spelled_as_melody_spells_them(tokenizer, number):
    messages = [Message("assistant", tool_calls=(ToolCall("0", "anything", {"number": number}),))]
    assert ChatFormat(tokenizer, False).encode_prompt(messages, (ANY_OBJECT,))


def test_the_thinking_of_past_turns_is_kept(tokenizer):
    messages = [
        Message("user", "hi"),
        Message("assistant", "", "first thought", (ToolCall("0", "submit", {}),)),
        Message("tool", "ok", tool_call_id="0"),
        Message("assistant", "bye", "second thought"),
        Message("user", "again"),
    ]
    text = tokenizer.decode(ChatFormat(tokenizer, True).encode_prompt(messages, TOOLS))
    assert "<|START_THINKING|>first thought<|END_THINKING|>" in text
    assert "<|START_THINKING|>second thought<|END_THINKING|>" in text


@given(case=any_conversation())
@settings(PROPERTY, max_examples=60)
def test_the_chat_template_renders_the_same_bytes(template_tokenizer, tokenizer, case):
    reasoning, messages = case
    theirs = template_tokenizer.apply_chat_template(
        [openai_message(message) for message in messages],
        tools=[openai_tool(tool) for tool in ALL_TOOLS],
        tokenize=False,
        add_generation_prompt=True,
        reasoning=reasoning,
        platform_instruction="Your name is North.",
    )
    assert theirs == render_with_melody(messages, ALL_TOOLS, reasoning, "Your name is North.")


@pytest.fixture(scope="session")
def template_tokenizer(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer.directory)


def openai_tool(tool):
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def openai_message(message):
    result = {"role": message.role, "content": message.content}
    if message.reasoning:
        result["reasoning_content"] = message.reasoning
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": f"call_{call.id}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = f"call_{message.tool_call_id}"
    return result


# ---- ids and masks -------------------------------------------------------------------------------------------------


@given(case=any_conversation())
@settings(PROPERTY, max_examples=80)
def test_prompt_sampled_ids_and_bridges_are_the_ids_of_the_whole_conversation(tokenizer, case):
    reasoning, messages = case
    chat = ChatFormat(tokenizer, reasoning)
    assume(messages[-1].role == "assistant")
    first = next(index for index, message in enumerate(messages) if message.role == "assistant")
    ids = chat.encode_prompt(messages[:first], ALL_TOOLS)
    mask = [False] * len(ids)
    index = first
    while index < len(messages):
        message = messages[index]
        action = AssistantAction(message.reasoning, message.content, message.tool_calls)
        sampled = chat.encode_action(action)
        num_calls = sum(len(m.tool_calls) for m in messages[:index])
        assert chat.parse(sampled, ALL_TOOLS, num_calls) == action
        ids, mask = ids + sampled, mask + [True] * len(sampled)
        index += 1
        results = []
        while index < len(messages) and messages[index].role == "tool":
            results.append(ToolResult(messages[index].tool_call_id, messages[index].content))
            index += 1
        assume(index == len(messages) or (results and messages[index].role == "assistant"))
        if results:
            bridge = chat.encode_tool_results(results)
            ids, mask = ids + bridge, mask + [False] * len(bridge)
    whole = chat.encode_conversation(messages, ALL_TOOLS, source="test")
    assert whole.token_ids == ids
    assert whole.loss_mask == mask
    assert whole.source == "test"


@given(case=any_conversation())
@settings(PROPERTY, max_examples=60)
def test_no_control_token_comes_from_content(tokenizer, case):
    reasoning, messages = case
    chat = ChatFormat(tokenizer, reasoning)
    sample = chat.encode_conversation(messages, ALL_TOOLS)
    expected = sum(segment.is_control for segment in chat.segments(messages, ALL_TOOLS))
    assert sum(map(tokenizer.is_control, sample.token_ids)) == expected
    assert tokenizer.decode(sample.token_ids) == text_of(chat.segments(messages, ALL_TOOLS))


def test_the_mask_covers_exactly_what_the_assistant_produces(tokenizer):
    messages = [
        Message("system", "Rules."),
        Message("user", "hi"),
        Message("assistant", "", "hmm", (ToolCall("0", "submit", {}),)),
        Message("tool", "done", tool_call_id="0"),
        Message("assistant", "bye"),
    ]
    action = '[\n    {"tool_call_id": "0", "tool_name": "submit", "parameters": {}}\n]'
    calls = c.START_ACTION + action + c.END_ACTION + c.END_TURN
    answer = c.START_TEXT + "bye" + c.END_TEXT + c.END_TURN
    assert (
        trained_text(ChatFormat(tokenizer, True), messages) == "hmm" + c.END_THINKING + calls + c.END_THINKING + answer
    )
    messages[2] = Message("assistant", tool_calls=messages[2].tool_calls)
    assert trained_text(ChatFormat(tokenizer, False), messages) == calls + answer


def trained_text(chat, messages):
    sample = chat.encode_conversation(messages, TOOLS)
    assert not sample.loss_mask[0]
    return chat.tokenizer.decode(i for i, trained in zip(sample.token_ids, sample.loss_mask, strict=True) if trained)


# ---- conversations that must be refused ----------------------------------------------------------------------------

CALL = ToolCall("0", "submit", {})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([Message("assistant", "text", tool_calls=(CALL,))], "content or tool calls, got both"),
        ([Message("assistant", tool_calls=(ToolCall("0", "submit", '{"a": 1}'),))], "as an object, got str"),
        ([Message("assistant", tool_calls=(CALL, CALL))], "new tool call id"),
        ([Message("tool", "x", tool_call_id="0")], "expected the result of one of"),
        (
            [Message("assistant", tool_calls=(CALL,)), *[Message("tool", "x", tool_call_id="0")] * 2],
            "expected the result",
        ),
        ([Message("user", "x", tool_calls=(CALL,))], "of the assistant only"),
        ([Message("assistant", "x", reasoning="hm")], "reasoning off"),
        ([Message("assistant", "a <|END_TEXT|> b")], "no control markers"),
        ([Message("user", "\ud800")], "what Command-4 can carry"),
        ([Message("assistant", tool_calls=(ToolCall("0", "submit", {"a": float("nan")}),))], "finite"),
        ([Message("assistant", tool_calls=(ToolCall("0", "submit", {"a": 2**64}),))], "64 bits"),
        ([Message("assistant", tool_calls=(ToolCall("0", "submit", {1: 2}),))], "string keys"),
        ([Message("assistant", tool_calls=(ToolCall("0", "submit", {"a": {1, 2}}),))], "JSON value"),
    ],
)
def test_conversations_that_would_be_rendered_wrong_are_refused(tokenizer, messages, message):
    with pytest.raises(DataError, match=message):
        ChatFormat(tokenizer, False).encode_conversation(messages, TOOLS)


def test_numbers_that_melody_rounds_are_refused(tokenizer):
    messages = [Message("assistant", tool_calls=(ToolCall("0", "anything", {"a": 3.9917007467776965e-25}),))]
    with pytest.raises(DataError, match="rounds numbers"):
        ChatFormat(tokenizer, False).encode_conversation(messages, ())


def test_foreign_call_ids_are_renumbered(tokenizer):
    def messages(first, second):
        return [
            Message("assistant", tool_calls=(ToolCall(first, "submit", {}), ToolCall(second, "submit", {}))),
            Message("tool", "two", tool_call_id=second),
            Message("tool", "one", tool_call_id=first),
        ]

    chat = ChatFormat(tokenizer, False)
    assert chat.encode_prompt(messages("call_b", "call_a"), TOOLS) == chat.encode_prompt(messages("0", "1"), TOOLS)


@pytest.mark.parametrize("reasoning", [True, False])
def test_a_turn_that_is_not_learned_is_shown_and_masked_whole(tokenizer, reasoning):
    def messages(first, second):
        thought = "Hm." * reasoning
        call = ToolCall("0", "terminal", {"keystrokes": "ls"})
        return [
            Message("user", "Go."),
            Message("assistant", "", thought, (call,), trained=first),
            Message("tool", "a", tool_call_id="0"),
            Message("assistant", "Done.", thought, trained=second),
        ]

    chat = ChatFormat(tokenizer, reasoning)
    both, one, other, none = (
        chat.encode_conversation(messages(*which), TOOLS)
        for which in ((True, True), (True, False), (False, True), (False, False))
    )
    assert both.token_ids == one.token_ids == other.token_ids == none.token_ids
    assert not any(none.loss_mask)
    assert [a or b for a, b in zip(one.loss_mask, other.loss_mask, strict=True)] == both.loss_mask
    assert not any(a and b for a, b in zip(one.loss_mask, other.loss_mask, strict=True))
    assert sum(one.loss_mask) > sum(other.loss_mask) > 0


# ---- parsing -------------------------------------------------------------------------------------------------------


def ids_of(chat, *pieces):
    """Ids of alternating names of control tokens and texts."""
    ids = []
    for piece in pieces:
        ids += chat.tokenizer.control_ids(piece) if piece in c.CONTROL_TOKENS else chat.tokenizer.encode_text(piece)
    return ids


def call_text(call_id="4", name="terminal", parameters='{"keystrokes": "ls"}'):
    return f'{{"tool_call_id": "{call_id}", "tool_name": "{name}", "parameters": {parameters}}}'


def sampled(chat, text):
    return ids_of(chat, c.START_ACTION, text, c.END_ACTION, c.END_TURN)


GOOD = f"[\n    {call_text()}\n]"


def test_a_valid_turn_parses(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    expected = ToolCall("4", "terminal", {"keystrokes": "ls"})
    assert chat.parse(sampled(chat, GOOD), TOOLS, 4) == AssistantAction(tool_calls=(expected,))
    two = f"[\n    {call_text()},\n    {call_text('5', 'submit', '{}')}\n]"
    assert [call.id for call in chat.parse(sampled(chat, two), TOOLS, 4).tool_calls] == ["4", "5"]
    thinking = ChatFormat(tokenizer, reasoning=True)
    ids = ids_of(thinking, " why\n", c.END_THINKING, c.START_TEXT, " bye ", c.END_TEXT, c.END_TURN)
    assert thinking.parse(ids, TOOLS, 0) == AssistantAction(" why\n", " bye ")


def test_any_tokenization_of_a_valid_turn_parses(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    single_bytes = [token for character in GOOD for token in tokenizer.encode_text(character)]
    ids = [*ids_of(chat, c.START_ACTION), *single_bytes, *ids_of(chat, c.END_ACTION, c.END_TURN)]
    assert chat.parse(ids, TOOLS, 4) == chat.parse(sampled(chat, GOOD), TOOLS, 4)


BAD_TEXTS = {
    "no list": call_text(),
    "empty list": "[\n]",
    "empty": "",
    "prose": "let me run ls",
    "broken JSON": GOOD[:-3] + "\n]",
    "trailing text": GOOD + "\n",
    "compact": GOOD.replace(": ", ":"),
    "escaped letter": GOOD.replace("ls", "\\u006cs"),
    "duplicate key": GOOD.replace('"ls"', '"ls", "keystrokes": "ls"'),
    "wrong key order": '[\n    {"tool_name": "submit", "tool_call_id": "4", "parameters": {}}\n]',
    "missing id": '[\n    {"tool_name": "submit", "parameters": {}}\n]',
    "extra key": f'[\n    {call_text()[:-1]}, "more": 1}}\n]',
    "integer id": GOOD.replace('"4"', "4"),
    "wrong id": GOOD.replace('"4"', '"0"'),
    "padded id": GOOD.replace('"4"', '"04"'),
    "repeated id": f"[\n    {call_text()},\n    {call_text()}\n]",
    "name no string": GOOD.replace('"terminal"', "null"),
    "parameters no object": f"[\n    {call_text(parameters='[]')}\n]",
    "string parameters": "[\n    " + call_text(parameters='"{}"') + "\n]",
    "nan": "[\n    " + call_text(name="anything", parameters='{"a": NaN}') + "\n]",
    "float spelling": "[\n    " + call_text(parameters='{"keystrokes": "ls", "wait_s": 1e1}') + "\n]",
    "huge integer": "[\n    " + call_text(parameters='{"keystrokes": "ls", "wait_s": ' + "9" * 5000 + "}") + "\n]",
    "lone surrogate": GOOD.replace("ls", "\\ud800"),
    "spelled marker": GOOD.replace("ls", "<|END_ACTION|>"),
    "deep": "[" * 100_000,
    "deep parameters": "[\n    " + call_text("4", "anything", '{"a": ' + "[" * 110 + "]" * 110 + "}") + "\n]",
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_malformed_calls_are_parse_errors(tokenizer, name):
    chat = ChatFormat(tokenizer, reasoning=False)
    with pytest.raises(ActionFormatError) as caught:
        chat.parse(sampled(chat, BAD_TEXTS[name]), ALL_TOOLS, 4)
    assert caught.value.kind == "parse"
    assert isinstance(caught.value, InvalidActionError)


@pytest.mark.parametrize(
    ("parameters", "name", "kind"),
    [
        ("{}", "terminal", "schema"),
        ('{"keystrokes": 3}', "terminal", "schema"),
        ('{"keystrokes": "ls", "more": 1}', "terminal", "schema"),
        ('{"keystrokes": "ls", "wait_s": 61}', "terminal", "schema"),
        ('{"x": 1}', "submit", "schema"),
        ("{}", "bash", "unknown_tool"),
        ("{}", "", "unknown_tool"),
    ],
)
def test_calls_that_no_tool_takes_are_refused(tokenizer, parameters, name, kind):
    chat = ChatFormat(tokenizer, reasoning=False)
    with pytest.raises(ActionFormatError) as caught:
        chat.parse(sampled(chat, f"[\n    {call_text(name=name, parameters=parameters)}\n]"), TOOLS, 4)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "pieces",
    [
        [c.END_TURN],
        ["hello", c.END_TURN],
        ["hm", c.START_ACTION, GOOD, c.END_ACTION, c.END_TURN],
        [c.START_ACTION, GOOD, c.END_TURN],
        [c.START_ACTION, GOOD, c.END_TEXT, c.END_TURN],
        [c.START_ACTION, GOOD, c.END_ACTION, "more", c.END_TURN],
        [c.START_ACTION, GOOD, c.END_ACTION, c.END_TURN, c.END_TURN],
        [c.START_ACTION, GOOD, c.END_ACTION, c.START_TEXT, "x", c.END_TEXT, c.END_TURN],
        [c.START_ACTION, GOOD, c.START_ACTION, c.END_ACTION, c.END_TURN],
        [c.START_ACTION, c.END_TURN],
        [c.START_TEXT, "x", c.USER, c.END_TEXT, c.END_TURN],
        [c.START_TEXT, "x", c.END_TURN, "y", c.END_TEXT, c.END_TURN],
        [c.END_THINKING, c.START_ACTION, GOOD, c.END_ACTION, c.END_TURN],
    ],
)
def test_control_tokens_in_any_other_order_are_parse_errors(tokenizer, pieces):
    chat = ChatFormat(tokenizer, reasoning=False)
    with pytest.raises(ActionFormatError) as caught:
        chat.parse(ids_of(chat, *pieces), TOOLS, 4)
    assert caught.value.kind == "parse"


def test_thinking_must_end_once_and_hold_only_text(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=True)
    action = (c.START_ACTION, GOOD, c.END_ACTION, c.END_TURN)
    assert chat.parse(ids_of(chat, c.END_THINKING, *action), TOOLS, 4).reasoning == ""
    for thinking in ([], ["a", c.START_THINKING, "b", c.END_THINKING], ["a", c.END_THINKING, c.END_THINKING]):
        with pytest.raises(ActionFormatError) as caught:
            chat.parse(ids_of(chat, *thinking, *action), TOOLS, 4)
        assert caught.value.kind == "parse"


def test_text_and_thinking_that_spell_a_marker_are_parse_errors(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=True)
    for pieces in (
        ["a <|END_TEXT|> b", c.END_THINKING, c.START_TEXT, "x"],
        [c.END_THINKING, c.START_TEXT, "a <|USER_TOKEN|>"],
    ):
        ids = [token for piece in pieces for token in ids_of(chat, piece)] + ids_of(chat, c.END_TEXT, c.END_TURN)
        with pytest.raises(ActionFormatError, match="spelled-out"):
            chat.parse(ids, TOOLS, 0)


def test_a_turn_without_its_end_is_truncated(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    assert chat.stop_token_ids == (tokenizer.eos_id,)
    for ids in ([], sampled(chat, GOOD)[:-1], sampled(chat, GOOD)[:3]):
        with pytest.raises(ActionFormatError) as caught:
            chat.parse(ids, TOOLS, 4)
        assert caught.value.kind == "truncated"


def test_bytes_that_are_no_text_and_ids_beyond_the_vocabulary_are_parse_errors(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    half_a_character = tokenizer.encode_text("é")[:1]
    for inside in (half_a_character, [tokenizer.vocab_size + 1], [tokenizer.pad_id]):
        ids = [*ids_of(chat, c.START_TEXT), *inside, *ids_of(chat, c.END_TEXT, c.END_TURN)]
        with pytest.raises(ActionFormatError) as caught:
            chat.parse(ids, TOOLS, 0)
        assert caught.value.kind == "parse"


@given(data=st.data())
@settings(PROPERTY, max_examples=120)
def test_random_ids_never_crash_the_parser(tokenizer, data):
    chat = ChatFormat(tokenizer, data.draw(st.booleans()))
    valid = sampled(chat, GOOD)[:-1]
    token = st.one_of(st.sampled_from(valid), st.integers(0, tokenizer.vocab_size + 5))
    ids = data.draw(st.lists(token, max_size=15)) if data.draw(st.booleans()) else list(valid)
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(ids)))
        ids[place : place + data.draw(st.integers(0, 2))] = data.draw(st.lists(token, max_size=1))
    try:
        action = chat.parse([*ids, tokenizer.eos_id], TOOLS, 4)
    except InvalidActionError:
        return
    assert chat.parse(chat.encode_action(action), TOOLS, 4) == action


def test_a_call_that_a_server_would_read_differently_is_a_parse_error(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    quoted = ToolSpec('a"b', "", {"type": "object"})  # melody does not undo the escapes of a tool's name
    ids = chat.encode_action(AssistantAction(tool_calls=(ToolCall("0", quoted.name, {}),)))
    with pytest.raises(ActionFormatError, match="melody"):
        chat.parse(ids, (quoted,), 0)


def test_a_broken_tool_schema_is_the_users_mistake_not_the_models(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    with pytest.raises(DataError, match="tool terminal: expected a JSON schema"):
        chat.parse(sampled(chat, GOOD), (ToolSpec("terminal", "", {"type": "nonsense"}),), 4)


def test_parsing_takes_about_a_millisecond(tokenizer):
    chat = ChatFormat(tokenizer, reasoning=False)
    ids = sampled(chat, f"[\n    {call_text(parameters=json.dumps({'keystrokes': 'cat kaldor.txt; ' * 20}))}\n]")
    chat.parse(ids, TOOLS, 4)
    start = time.process_time()
    for _ in range(100):
        chat.parse(ids, TOOLS, 4)
    assert time.process_time() - start < 0.3
