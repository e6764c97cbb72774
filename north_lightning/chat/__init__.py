"""Messages to token ids and loss masks, and sampled ids back to validated actions. Free of torch."""

from north_lightning.chat.format import ActionFormatError, ChatFormat, parse_calls
from north_lightning.chat.openai import to_openai, tools_to_openai
from north_lightning.chat.phrases import mine_phrases
from north_lightning.chat.render import Segment, conversation_texts, render_calls, render_conversation
from north_lightning.chat.tokenizer import NorthTokenizer
from north_lightning.chat.training import train_tokenizer

__all__ = [
    "ActionFormatError",
    "ChatFormat",
    "NorthTokenizer",
    "Segment",
    "conversation_texts",
    "mine_phrases",
    "parse_calls",
    "render_calls",
    "render_conversation",
    "to_openai",
    "tools_to_openai",
    "train_tokenizer",
]
