"""Which places are accepted, and what is said of the others."""

from pathlib import Path

import pytest

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote
from ministral_jax.places import place, refuse_url, run_place

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


@pytest.mark.parametrize("url", ["gs://bucket/a", "s3://bucket/a/"])
def test_a_place_in_an_object_store_keeps_its_name(url):
    found = place(url, "--run-dir")
    assert is_remote(found) and str(found / "b") == f"{url.rstrip('/')}/b" and (found / "b").parent == place(found, "")
    assert str((found / "b/c").relative_to(found)) == "b/c"


@pytest.mark.parametrize("text", ["hdfs://bucket/a", "file:///a"])
def test_any_other_url_is_no_place(text):
    with pytest.raises(UserError, match=r"^--run-dir .*: is neither read nor written; .* or gs://bucket/name or s3://"):
        place(text, "--run-dir")


def test_a_run_at_s3_is_refused():
    with pytest.raises(UserError, match=r"^--run-dir s3://bucket/a: a run is not written to s3://, .*; give a direct"):
        run_place("s3://bucket/a", "--run-dir")
    with pytest.raises(UserError, match=r"that is mounted here, or gs://bucket/name$"):
        run_place("hdfs://bucket/a", "--run-dir")
    assert str(run_place("gs://bucket/a", "--run-dir")) == "gs://bucket/a"
    assert run_place("runs/a", "--run-dir") == Path("runs/a")


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("ministral_jax.places.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3://bucket/a needs s3fs, .*, pip install -e '\.\[s3\]'$"):
        place("s3://bucket/a", "data.sources.a.path =")


@pytest.mark.parametrize("text", ["gs:/bucket/a", "gs://", "GS://bucket/a"])
def test_a_misspelt_bucket_is_told_how_it_is_spelt(text):
    sentence = r"^--run-dir (gs|GS):/.* lacks two slashes and a bucket, .*; give gs://bucket/name$"
    with pytest.raises(UserError, match=sentence):
        run_place(text, "--run-dir")
