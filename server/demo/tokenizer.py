"""The demo's tokenizer: byte-level BPE, trained on the corpus.

Any text can be encoded, since every byte is a token. A number is one token a digit, with
the space before it, so that a model copies numbers it has never seen.

Running example: " 350 degrees" is [" 3", "5", "0", " degrees"].
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from server.demo.corpus import ASSISTANT, CHAT_TEMPLATE, END, USER, documents
from server.demo.registers import REGISTERS

MAX_VOCAB_SIZE = 1536  # the corpus needs fewer: training ends when every word is one token
MAX_LENGTH = 1024  # positions of the base
_WORDS = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
_TEXTS_PER_REGISTER = 2000


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train on every register in equal parts; the same seed gives the same file."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(_WORDS, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> Tokenizer:
    """The trained tokenizer, without `transformers` around it."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _texts(seed: int) -> list[str]:
    texts: list[str] = []
    for register in REGISTERS:
        for document in islice(documents(seed, register), _TEXTS_PER_REGISTER):
            texts += [document.context, document.answer.removesuffix(END)]
    return texts
