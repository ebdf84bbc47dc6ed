"""Text to ids and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from common.sources import DEMO_FOLDER, find_model
from common.tokenizers import ByteTokenizer, load_tokenizer


def test_byte_tokenizer_goes_both_ways() -> None:
    words = ByteTokenizer(260)
    assert (words.bos, words.special, words.size) == (256, (256,), 257)
    assert words.encode(["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert words.decode([256, 97, 0xC3, 0xA9]) == "aé"


def test_byte_tokenizer_without_room_has_no_bos() -> None:
    words = ByteTokenizer(256)
    assert (words.bos, words.special, words.size) == (None, (), 256)
    with pytest.raises(ConfigError, match=r"a vocabulary of 255, too small for raw bytes \(256\)"):
        ByteTokenizer(255)


def test_load_tokenizer_of_the_demo_goes_both_ways() -> None:
    words = load_tokenizer(find_model("demo"), 4096)
    text = "def grain(sack):\n    return 'é'\n"
    ids = words.encode([text, "x"])
    assert ids[0].dtype == np.int64
    assert words.decode(ids[0].tolist()) == text
    assert words.bos in words.special
    assert words.bos not in ids[0]


def test_load_tokenizer_refuses_one_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4,096 ids, but the model embeds 260\. Is it this model's\?"):
        load_tokenizer(find_model(str(tiny_model)), 260, str(DEMO_FOLDER))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--tokenizer .*: cannot be loaded \("):
        load_tokenizer(find_model(str(tiny_model)), 260, str(tmp_path))
