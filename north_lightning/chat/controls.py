"""The control tokens of the Command-4 format, by name.

Everything that structures a conversation is one of these; everything between two of them is plain text. No code here.
"""

from __future__ import annotations

PAD = "<PAD>"
BOS = "<BOS_TOKEN>"
TURN = "<|START_OF_TURN_TOKEN|>"
END_TURN = "<|END_OF_TURN_TOKEN|>"
SYSTEM = "<|SYSTEM_TOKEN|>"
USER = "<|USER_TOKEN|>"
CHATBOT = "<|CHATBOT_TOKEN|>"
START_THINKING = "<|START_THINKING|>"
END_THINKING = "<|END_THINKING|>"
START_ACTION = "<|START_ACTION|>"
END_ACTION = "<|END_ACTION|>"
START_TOOL_RESULT = "<|START_TOOL_RESULT|>"
END_TOOL_RESULT = "<|END_TOOL_RESULT|>"
START_TEXT = "<|START_TEXT|>"
END_TEXT = "<|END_TEXT|>"

PAD_ID = 0
BOS_ID = 5

CONTROL_TOKENS = (
    BOS,
    TURN,
    END_TURN,
    SYSTEM,
    USER,
    CHATBOT,
    START_THINKING,
    END_THINKING,
    START_ACTION,
    END_ACTION,
    START_TOOL_RESULT,
    END_TOOL_RESULT,
    START_TEXT,
    END_TEXT,
)
"""What the renderer emits. Padding is not among them: it is never part of a conversation."""

TEXT_MARKERS = (START_TEXT, END_TEXT)
"""Not registered as *special* in the released tokenizer; see ``NorthTokenizer.control_ids``."""

RESERVED_TOKENS = (PAD, "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", BOS, "<EOS_TOKEN>", "<EOP_TOKEN>")
"""Ids 0 to 7 of every Cohere tokenizer; trained tokenizers keep them."""
