"""A few hundred fuzzed conversations; ``tests/benchmarks/bench_data_quality.py`` does the same with 10,000."""

import random

import pytest
from data_fuzz import check_duplicates, check_quality, check_text_and_ids, edit, small_tokenizer, sound_conversation

from north_lightning.chat import ChatFormat


def test_fuzzed_conversations_render_and_parse_exactly_and_everything_planted_is_caught(tmp_path):
    found = check_quality(130, tmp_path)  # every defect five times
    assert found["wrong"] == {}, found["examples"]
    assert found["caught"] == found["planted"]
    assert len(found["planted"]) == 16, "every reason was planted"


def test_duplicates_are_caught_and_others_are_not():
    found = check_duplicates(200)
    assert found["caught"] == found["planted"] > 50
    assert found["false_positives"] == 0


@pytest.mark.parametrize("break_mask", ["result", "eos", "none"])
def test_the_check_of_trained_spans_notices_a_wrong_mask(tmp_path, monkeypatch, break_mask):
    chat = ChatFormat(small_tokenizer(tmp_path), reasoning=True)
    rng = random.Random(5)
    sample = next(s for s in iter(lambda: sound_conversation(rng), None) if any(m.role == "tool" for m in s.messages))
    sample = edit(sample, -1, content="Fine.", tool_calls=())
    encode = ChatFormat.encode_conversation

    def broken(self, messages, tools, source=""):
        encoded = encode(self, messages, tools, source)
        eos = self.tokenizer.eos_id
        for position, token_id in enumerate(encoded.token_ids):
            if break_mask == "result" and token_id == self.tokenizer.control_id("<|START_TOOL_RESULT|>"):
                encoded.loss_mask[position + 1] = True
            if break_mask == "eos" and token_id == eos:
                encoded.loss_mask[position] = False
        return encoded

    monkeypatch.setattr(ChatFormat, "encode_conversation", broken)
    assert bool(check_text_and_ids(chat, sample)) == (break_mask != "none")
