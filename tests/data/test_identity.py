"""What data is, is its content: no path, no time, no compression; and a file that did not change is read once."""

import gzip
import json
import os
import shutil
from contextlib import suppress

import pytest
from PIL import Image

from ministral_jax.data import digests, sources
from ministral_jax.data.config import DataConfig, SourceConfig, TokenizerConfig
from ministral_jax.data.pipeline import Order, batches
from ministral_jax.data.prepare import prepare
from ministral_jax.data.sources import open_source, read_documents, source_digest
from ministral_jax.data.tokenizer import load_tokenizer, tokenizer_digest
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS
from ministral_jax.stages.rows import data_contents

VISION = PRESETS["tiny-24b"].vision
TINY = TokenizerConfig(vocab=2048, special=64)


@pytest.fixture
def folder(tmp_path):
    """Rows with pictures in two files, and texts."""
    folder = tmp_path / "mine"
    (folder / "texts" / "below").mkdir(parents=True)
    for n in range(12):
        (folder / "texts" / ("below" if n % 2 else "") / f"{n}.txt").write_text(f"text {n}")
    Image.new("RGB", (4, 4), "red").save(folder / "a.bmp")
    rows = [{"question": f"{n}?", "answer": str(n), "image": "a.bmp"} for n in range(20)]
    for name, share in (("rows-0.jsonl", rows[:12]), ("rows-1.jsonl", rows[12:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in share))
    return folder


def config(folder, **changes):
    found = dict(
        rows=dict(kind="jsonl", path=str(folder / "*.jsonl")), texts=dict(kind="text", path=str(folder / "texts"))
    )
    return DataConfig(**dict(dict(tokenizer=TINY.model_dump(), sources=found, held_out=0.2, patches=16), **changes))


def data_digest(*args) -> str | None:
    with suppress(UserError):
        return prepare(*args).digest
    return None


def of_source(folder, name="rows", root=None):
    return source_digest(config(folder).sources[name], root)


def test_moved_renamed_touched_and_compressed_data_is_the_same(folder, tmp_path):
    root = tmp_path / "data"
    before = data_digest(config(folder), 64, VISION, root)
    first = prepare(config(folder), 64, VISION, root)
    assert before == first.digest
    moved = shutil.move(folder, tmp_path / "elsewhere" / "yours")
    (moved / "texts" / "3.txt").write_text("text 3")
    (moved / "texts" / "below" / "3.txt").unlink()
    (moved / "texts" / "0.txt").rename(moved / "texts" / "zero.txt")
    for n in range(2):
        text = (moved / f"rows-{n}.jsonl").read_bytes().replace(b"\n", b"\r\n").strip()
        (moved / f"part-{n}.jsonl").write_bytes(gzip.compress(text) if n else text)
        (moved / f"rows-{n}.jsonl").unlink()
    os.utime(moved / "a.bmp", (1e9, 1e9))
    assert data_digest(config(moved), 64, VISION, root) == before
    second = prepare(config(moved), 64, VISION, tmp_path / "other")
    assert (second.digest, second.counts) == (first.digest, first.counts)
    for one, other in zip(batches(first, 2, Order(), range(3)), batches(second, 2, Order(), range(3)), strict=True):
        assert all((one[key] == other[key]).all() for key in one if key not in ("images", "image_sizes"))
        for ours, theirs in zip(one.get("images", ()), other.get("images", ()), strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or (ours.patches == theirs.patches).all())


def test_another_picture_behind_the_same_path_is_noticed(folder, tmp_path, monkeypatch):
    """Of the same size, and given the time of the other."""
    monkeypatch.setattr(digests, "SETTLED", -60)
    before, path = of_source(folder, root=tmp_path / "data"), folder / "a.bmp"
    assert of_source(folder, root=tmp_path / "data") == before
    stat = path.stat()
    Image.new("RGB", (4, 4), "blue").save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    changed = of_source(folder, root=tmp_path / "data")
    assert changed != before and changed == of_source(folder)
    path.unlink()
    assert len({before, changed, of_source(folder)}) == 3


@pytest.mark.parametrize("change", ["row", "row added", "order", "text", "text added", "limit", "tokenizer", "length"])
def test_any_other_content_or_setting_is_noticed(folder, tmp_path, change):
    def digest(length=64, **options):
        tokenizer = options.pop("tokenizer", TINY.model_dump())
        found = config(folder, tokenizer=tokenizer)
        found = found.sources | {"rows": found.sources["rows"].model_copy(update=options)}
        chosen = config(folder, tokenizer=tokenizer, sources=found)
        return data_digest(chosen, length, VISION, tmp_path / "data")

    before, rows = digest(), folder / "rows-1.jsonl"
    match change:
        case "row":
            rows.write_text(rows.read_text().replace("15?", "16?"))
        case "row added":
            rows.write_text(rows.read_text() + '{"text": "more"}\n')
        case "order":
            rows.rename(folder / "rows-.jsonl")
        case "text":
            (folder / "texts" / "0.txt").write_text("text 9")
        case "text added":
            (folder / "texts" / "more.txt").write_text("more")
    changed = {
        "limit": dict(limit=5),
        "tokenizer": dict(tokenizer=dict(vocab=2047, special=64)),
        "length": dict(length=65),
    }
    assert digest(**changed.get(change, {})) != before


def test_what_is_gone_has_no_digest(folder, tmp_path):
    shutil.copy(load_tokenizer(TINY, tmp_path).path, folder / "tekken.json")
    chosen = config(folder, tokenizer=dict(file=str(folder / "tekken.json")))
    del chosen.sources["texts"]
    root = tmp_path / "data"
    contents = data_contents(chosen, root)
    assert None not in contents.values()
    assert tokenizer_digest(chosen.tokenizer, root) == load_tokenizer(chosen.tokenizer, root).digest
    assert data_digest(chosen, 64, VISION, root) == prepare(chosen, 64, VISION, root).digest
    moved = shutil.move(folder / "tekken.json", tmp_path / "tekken.json")
    assert tokenizer_digest(chosen.tokenizer, root) is None
    assert data_digest(chosen, 64, VISION, root) is None is data_contents(chosen, root)["data.tokenizer"]
    same = chosen.model_copy(update=dict(tokenizer=TokenizerConfig(file=str(moved))))
    assert data_contents(same, root) == contents
    shutil.rmtree(folder)
    assert of_source(folder) is None is of_source(folder, "texts")
    assert data_digest(same, 64, VISION, root) is None is data_contents(same, root)["data.sources.rows"]


def test_files_that_did_not_change_are_read_once(folder, tmp_path, monkeypatch):
    root = tmp_path / "data"
    before = [of_source(folder, name, root) for name in ("rows", "texts")]
    assert not (root / "digests.jsonl").exists()  # they were written just now and may change within a tick of the clock
    monkeypatch.setattr(digests, "SETTLED", -60)
    assert [of_source(folder, name, root) for name in ("rows", "texts")] == before
    kept = (root / "digests.jsonl").read_text()
    (root / "digests.jsonl").write_text(kept + '{"of": "torn')
    with monkeypatch.context() as patch:
        for name in ("file_digest", "_digest_rows", "_picture_digest"):
            patch.setattr(sources, name, lambda path: pytest.fail(f"{path} was read again"))
        assert [of_source(folder, name, root) for name in ("rows", "texts")] == before
    shutil.rmtree(root)
    root.write_text("no directory")
    assert of_source(folder, root=root / "below") == before[0]


def test_what_is_held_out_depends_on_rows_and_not_on_names(folder):
    def keys(path):
        source = open_source("s", SourceConfig(kind="jsonl", path=str(path)))
        return [document.key for document in read_documents(source)]

    first = keys(folder / "rows-0.jsonl")
    assert len(set(first)) == 12
    both = folder / "both.jsonl"
    both.write_text((folder / "rows-1.jsonl").read_text() + 2 * (folder / "rows-0.jsonl").read_text())
    assert keys(both) == [*keys(folder / "rows-1.jsonl"), *first, *first]
