"""Messages to token ids and loss masks, and sampled ids back to validated actions. Free of torch."""

from north_lightning.chat.format import ActionFormatError, ChatFormat
from north_lightning.chat.openai import OpenAIConversion, from_openai, to_openai
from north_lightning.chat.phrases import mine_phrases
from north_lightning.chat.render import Segment, conversation_texts
from north_lightning.chat.tokenizer import NorthTokenizer
from north_lightning.chat.training import train_tokenizer

__all__ = [
    "ActionFormatError",
    "ChatFormat",
    "NorthTokenizer",
    "OpenAIConversion",
    "Segment",
    "conversation_texts",
    "from_openai",
    "mine_phrases",
    "to_openai",
    "train_tokenizer",
]
