"""The tokenizer of the tiny family."""

import pytest

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(TokenizerConfig(vocab=2048, special=64), tmp_path_factory.mktemp("tokenizers"))
