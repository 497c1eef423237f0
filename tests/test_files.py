"""Paths that are none."""

from pathlib import Path

import pytest

from ministral_jax.errors import UserError
from ministral_jax.files import refuse_url

URLS = ("gs://bucket/run", "s3://bucket", "file:///tmp/run", "http://host/run", "HDFS://host/x", "abfs+x://a@b/c")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_refused_in_one_sentence_as_text_and_as_a_path(url, kind):
    with pytest.raises(
        UserError, match=r"^--run-dir .* is a URL, and [\w+]+: is neither read nor written; give a directory"
    ) as refused:
        refuse_url(kind(url), "--run-dir")
    assert str(kind(url)) in str(refused.value)


@pytest.mark.parametrize("path", ["runs/tiny", "/abs/x", "C:/x", "a:b", "run:1/x", "..", "", "17:30"])
def test_a_path_is_let_pass(path):
    refuse_url(path, "--run-dir")
    refuse_url(Path(path), "--run-dir")


def test_text_that_begins_with_a_dot_is_a_path_whatever_follows():
    refuse_url("./gs://x", "--run-dir")
