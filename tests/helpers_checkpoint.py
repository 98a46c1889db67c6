"""A tiny random checkpoint on the disk with a tokenizer of whole words.

Import it only after ``pytest.importorskip("transformers")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from tests.tiny_models import VOCABULARY, tiny_model

#: Words of the tokenizer, by token id.
WORDS = ["?", "<end>", *(f"w{i}" for i in range(2, VOCABULARY))]


def tiny_checkpoint(folder: Path, model_type: str = "mixtral", **overrides: Any) -> Path:
    """Save a tiny model of *model_type* and its tokenizer in *folder*."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    level: Any = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?")
    words: Any = tokenizers.Tokenizer(level)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=words, unk_token="?", eos_token="<end>").save_pretrained(folder)
    return folder
