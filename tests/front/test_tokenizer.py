"""The tokenizer says what transformers says, without torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.front.errors import CannotStart, InvalidRequest, TemplateFailed
from server.front.tokenizer import TextTokenizer
from tests.front.letters import BOS, EOS, save_letters

TEXTS = ["", "Hello", "naïve 😀 text", " two  spaces ", "a</s>b", "x" * 20_000]
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_ids_are_those_of_transformers(tmp_path: Path, adds_bos: bool) -> None:
    save_letters(tmp_path, adds_bos=adds_bos)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = asyncio.run(TextTokenizer.load(str(tmp_path)))
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = asyncio.run(tokenizer.encode(text, add_special_tokens))
            assert ids == oracle(text, add_special_tokens=add_special_tokens)["input_ids"]
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert asyncio.run(tokenizer.encode("A"))[0] == (BOS if adds_bos else ord("A"))
    assert tokenizer.special_ids == {BOS, EOS}
    assert tokenizer.render_chat(CHAT) == "[user]hi[assistant]"


def test_loading_and_chatting_import_no_torch(tmp_path: Path) -> None:
    save_letters(tmp_path)
    program = (
        "import asyncio, sys\n"
        "from server.front.tokenizer import TextTokenizer\n"
        f"tokenizer = asyncio.run(TextTokenizer.load({str(tmp_path)!r}))\n"
        f"assert tokenizer.render_chat({CHAT!r}) == '[user]hi[assistant]'\n"
        "assert asyncio.run(tokenizer.encode('AB')) == [65, 66]\n"
        "print('torch' in sys.modules, 'tokenizers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    tokenizer = asyncio.run(TextTokenizer.load(str(save_letters(tmp_path))))
    with pytest.raises(InvalidRequest, match="surrogate at character 2"):
        asyncio.run(tokenizer.encode("ab\ud800"))


def test_a_chat_without_a_template_or_against_it_is_refused(tmp_path: Path) -> None:
    tokenizer = asyncio.run(TextTokenizer.load(str(save_letters(tmp_path))))
    with pytest.raises(TemplateFailed, match="no such role"):
        tokenizer.render_chat([{"role": "refuse", "content": ""}])
    bare = asyncio.run(TextTokenizer.load(str(save_letters(tmp_path, template=None))))
    assert not bare.has_chat_template
    with pytest.raises(TemplateFailed, match="no chat template"):
        bare.render_chat(CHAT)


def test_a_directory_without_a_tokenizer_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"tokenizer\.json"):
        asyncio.run(TextTokenizer.load(str(tmp_path)))
