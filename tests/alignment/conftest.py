"""A tokenizer of 512 entries, as the models of these tests have them."""

import pytest

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(TokenizerConfig(vocab=512, special=64), tmp_path_factory.mktemp("tokenizer"))
