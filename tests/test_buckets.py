"""Places in emulated object stores: what a file system does at once is done so that a kill leaves nothing half done."""

import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import BUCKET, emulator
from interop_cases import SPEC
from model_cases import random_params
from PIL import Image
from store_worker import ROWS, arrays, hashes, record

from ministral_jax import buckets, cli
from ministral_jax.data.config import DataConfig, SourceConfig, TokenizerConfig
from ministral_jax.data.pictures import read_pictures
from ministral_jax.data.prepare import SPLITS, prepare
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.errors import UserError
from ministral_jax.files import append_jsonl, read_jsonl, write_json
from ministral_jax.interop.export import is_export
from ministral_jax.interop.hf import export_hf
from ministral_jax.models.spec import VisionSpec
from ministral_jax.places import (
    Lines,
    copy_tree,
    fetched,
    is_complete,
    move,
    new_directory,
    on_disk,
    place,
    put_files,
    remove_tree,
)
from ministral_jax.runs import lock
from ministral_jax.teachers.store import Store, verify
from ministral_jax.training.checkpoint import ResumeStore, load_params, save_params

VISION = VisionSpec(layers=1, width=16, mlp_width=24, heads=1, head_width=16, patch_size=2, max_image_size=16)


@pytest.fixture(scope="module", params=["gs", "s3"])
def root(request, tmp_path_factory):
    """A bucket of either kind."""
    before = {**os.environ}
    folder = tmp_path_factory.mktemp(request.param)
    with emulator(request.param, folder) as environment:
        os.environ.clear()
        os.environ.update(environment, XDG_CACHE_HOME=str(folder / "cache"))
        buckets._store.cache_clear()
        try:
            yield place(f"{request.param}://{BUCKET}", "bucket")
        finally:
            os.environ.clear()
            os.environ.update(before)
            buckets._store.cache_clear()


@pytest.fixture
def bucket(root, tmp_path):
    """A place of its own for each test."""
    return root / tmp_path.name


def test_objects_answer_as_files_do(bucket):
    assert not bucket.exists() and list(bucket.iterdir()) == [] and list(bucket.rglob("*")) == []
    bucket.mkdir(parents=True)
    write_json(bucket / "a.json", {"a": 1})
    (bucket / "b/c.txt").write_text("ç", encoding="utf-8")
    assert (bucket / "a.json").is_file() and not (bucket / "a.json").is_dir() and bucket.is_dir()
    assert (bucket / "b").is_dir() and not (bucket / "b").is_file() and not (bucket / "n").exists()
    assert [path.name for path in bucket.iterdir()] == ["a.json", "b"]
    assert list(bucket.glob("*/c.txt")) == [bucket / "b/c.txt"] and len(list(bucket.rglob("*"))) == 2
    assert (bucket / "b/c.txt").read_text() == "ç" and (bucket / "b/c.txt").stat().st_size == 2
    with (bucket / "a.json").open("rb") as file:
        assert json.load(file) == {"a": 1}
    with pytest.raises(ValueError, match="an object is written whole"):
        (bucket / "a.json").open("a")
    move(bucket / "b", bucket / "d/e")
    assert not (bucket / "b").exists() and (bucket / "d/e/c.txt").read_text() == "ç"
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/n'"):
        (bucket / "n").read_bytes()
    (bucket / "n").unlink(missing_ok=True)
    bucket.rmtree()
    assert not bucket.exists()


def test_a_store_that_does_not_answer_is_not_one_where_nothing_is(monkeypatch):
    """A finished stage would be made again."""

    class Gone:
        def info(self, path):
            raise ConnectionError("no route to host\nand a long tale")

    monkeypatch.setattr(buckets, "_store", lambda scheme: Gone())
    path = place("gs://bucket/run/manifest.json", "directory")
    for ask in (path.exists, path.is_file, path.is_dir):
        with pytest.raises(OSError, match=r"ConnectionError: no route to host: 'gs://bucket/run/manifest.json'$"):
            ask()


def test_of_many_who_create_an_object_one_does(bucket):
    made, threads = [], []

    def create(n: int) -> None:
        try:
            (bucket / "once").create(str(n).encode())
            made.append(n)
        except FileExistsError:
            pass

    for n in range(8):
        threads.append(threading.Thread(target=create, args=(n,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (bucket / "once").read_text() == str(made[0])


def test_lines_are_kept_though_nothing_is_appended(bucket):
    path = bucket / "log.jsonl"
    for n in range(2):
        lines = Lines(path)
        lines.add(json.dumps({"n": n}))
        assert len(read_jsonl(path)) == n  # not for each line
        lines.flush()
        assert len(read_jsonl(path)) == n + 1
        lines.close()
    append_jsonl(path, {"n": 2})
    assert [one["n"] for one in read_jsonl(path)] == [0, 1, 2]


def test_a_directory_is_complete_when_its_last_file_is_there(bucket, monkeypatch):
    with new_directory(bucket / "0123", "z.json") as draft:
        for name in ("a.bin", "sub/b.bin", "z.json"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)
        assert not bucket.exists()
    assert is_complete(bucket / "0123", "z.json")
    assert (on_disk(bucket / "0123") / "sub/b.bin").read_text() == "sub/b.bin"
    put = buckets.BucketPath.put

    def fail(self, path):
        if self.name == "b.bin":
            raise OSError("cut off")
        put(self, path)

    monkeypatch.setattr(buckets.BucketPath, "put", fail)
    with pytest.raises(OSError, match="cut off"), new_directory(bucket / "4567", "a.json") as draft:
        (draft / "a.json").write_text("a")
        (draft / "b.bin").write_text("b")
    assert not is_complete(bucket / "4567", "a.json")


def test_a_model_is_copied_again_when_it_has_changed(bucket, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    put_files(tmp_path, bucket / "hf", "config.json")
    with pytest.raises(UserError, match=f"{bucket}/hg is not a directory"):
        fetched(bucket / "hg")
    first = fetched(bucket / "hf")
    assert first == fetched(bucket / "hf") and (first / "config.json").read_text() == "{}"
    (bucket / "hf/more.json").write_text("[]")
    assert (fetched(bucket / "hf") / "more.json").is_file()


def test_the_doctor_reads_headers_where_they_lie(bucket, monkeypatch, capsys):
    export_hf(random_params(SPEC), SPEC, bucket)
    monkeypatch.setattr(buckets.BucketPath, "fetch", None)
    assert cli.main(["doctor", str(bucket)]) == 0
    assert "all of the names and shapes" in capsys.readouterr().out


def test_data_in_a_bucket_is_the_data_on_a_disk(bucket, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8), (60 * n, 0, 0)).save(rows / f"{n}.png")
    chat = lambda n: [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
    shown = lambda n: [{"role": "user", "content": [{"type": "image", "image": f"{n}.png"}]}, chat(n)[1]]
    lines = [{"messages": shown(n) if n < 4 else chat(n)} for n in range(40)]
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    put_files(rows, bucket / "rows")
    at = lambda where: SourceConfig(kind="jsonl", path=str(where))
    ours, theirs = (open_source("s", at(where)) for where in (bucket / "rows/*.jsonl", rows))
    assert ours.digest == theirs.digest and ours.files[0][0] == "rows.jsonl"
    assert [document.key for document in read_documents(ours)] == [document.key for document in read_documents(theirs)]
    packed = [
        prepare(
            DataConfig(
                tokenizer=TokenizerConfig(vocab=512, special=64), sources={"s": at(where)}, held_out=0.2, patches=64
            ),
            64,
            VISION,
            root,
        )
        for where, root in ((bucket / "rows/rows.jsonl", bucket / "data"), (rows, tmp_path / "data"))
    ]
    assert packed[0].digest == packed[1].digest and packed[0].counts == packed[1].counts
    names = {path.name for path in (bucket / "data" / packed[0].digest[:16]).iterdir()}
    assert names == {"index.json"} | {f"{s}.{kind}" for s in SPLITS for kind in ("array_record", "pictures")}
    for split in SPLITS:
        ours, theirs = (read_pictures(data.directory, split) for data in packed)
        assert len(ours.starts) == packed[0].counts[split]["rows"] + 1
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(UserError, match=r"^data.sources.s.path = '.*none.jsonl' matches no file; give a file"):
        open_source("s", at(bucket / "none.jsonl"))


def test_one_store_copies_itself_and_what_is_spared_is_not_read(bucket, monkeypatch):
    for name in ("manifest.json", "params/a", "state/2/b"):
        (bucket / "from" / name).write_text(name)
    none = lambda self, path: pytest.fail(f"{self} passes through this machine")
    monkeypatch.setattr(buckets.BucketPath, "fetch", none)
    monkeypatch.setattr(buckets.BucketPath, "put", none)
    copy_tree(bucket / "from", bucket / "to", last="manifest.json", spare="state")
    assert sorted(str(path.relative_to(bucket / "to")) for path in (bucket / "to").rglob("*")) == [
        "manifest.json",
        "params/a",
    ]
    move(bucket / "to", bucket / "moved")
    assert (bucket / "moved/params/a").read_text() == "params/a" and not (bucket / "to").exists()


def test_what_cannot_be_removed_is_warned_of(bucket, monkeypatch, caplog):
    def fail(self, missing_ok=True):
        raise OSError(5, "ServiceUnavailable", str(self))

    monkeypatch.setattr(buckets.BucketPath, "rmtree", fail)
    remove_tree(bucket / "state")
    assert "state could not be removed: ServiceUnavailable" in caplog.text


def test_a_logit_store_in_a_bucket_is_read_as_it_was_written(bucket):
    root = str(bucket / "store")
    record(root, lambda rows: [rows[:3], rows[3:]] if len(rows) > 3 else [rows])
    store = Store(root)
    for split, count in ROWS.items():
        found = store.read(split, hashes(split, range(count)))
        assert all(np.array_equal(found[name], array) for name, array in arrays(split, range(count)).items())
    assert verify(root) == []
    (bucket / "store/store.json").unlink()
    with pytest.raises(UserError, match=r"is not finished|is not a logit store"):
        Store(root)


def test_an_export_that_was_cut_off_is_written_anew_and_nothing_else_is(bucket):
    for name in ("tekken.json", "model-00001-of-00002.safetensors", "generation_config.json"):
        (bucket / "hf" / name).write_text("")
    assert is_export(bucket / "hf")
    (bucket / "hf/notes.txt").write_text("")
    assert not is_export(bucket / "hf")


def state(step: int) -> dict:
    return {"w": jnp.arange(8.0) * step, "step": jnp.array(step)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_a_state_counts_when_its_checksums_are_there(root, bucket, capfd):
    if str(root).startswith("s3"):
        return  # where no run's directory lies
    store = ResumeStore(bucket / "state", keep=2)
    for step in (2, 4, 6):
        store.save(step, state(step), {"note": step})
    store.close()
    assert {path.name for path in (bucket / "state").iterdir()} == {"4", "6", "checksums"}
    (bucket / "state/checksums/6.json").unlink()  # as of a run that was killed before
    store = ResumeStore(bucket / "state", keep=2)
    assert store.latest == 4 and not (bucket / "state/6").exists()
    assert "state/6 was being written when the run ended; removed; going on from step 4" in capfd.readouterr().err
    restored, note = store.restore(abstract(state(0)))
    assert note == {"note": 4} and np.array_equal(restored["w"], state(4)["w"])
    store.save(6, state(6), {})
    assert store.latest == 6
    record = json.loads((bucket / "state/checksums/6.json").read_text())
    victim = max(record, key=lambda name: record[name][0])
    (bucket / "state/6" / victim).write_bytes(b"x" * record[victim][0])
    assert ResumeStore(bucket / "state", keep=2).latest == 4
    assert "is damaged" in capfd.readouterr().err and (bucket / "state/damaged/6").is_dir()


def test_parameters_are_checked_as_they_are_on_a_disk(root, bucket):
    if str(root).startswith("s3"):
        return
    files = save_params(bucket / "params", state(1))
    assert np.array_equal(load_params(bucket / "params", abstract(state(1)), files)["w"], state(1)["w"])
    assert save_params(bucket / "params", state(1)).keys() >= {"commit_success.txt", "_CHECKPOINT_METADATA"}
    (bucket / "params/state/manifest.ocdbt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"params: .* delete .* to have the stage made again"):
        load_params(bucket / "params", abstract(state(1)), files)


def test_a_run_in_a_bucket_has_one_owner(bucket, monkeypatch):
    with lock.owned(bucket):
        assert lock.owner(bucket)["pid"] == os.getpid()
        with pytest.raises(UserError, match=r"is being written by process \d+ on .*; wait for its end or stop it"):
            lock.owned(bucket).__enter__()
    assert lock.owner(bucket) is None
    elsewhere = {"host": "other", "machine": ["m"], "pid": 1, "since": "then"}
    (bucket / ".owner/000007").write_text(json.dumps(elsewhere))
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    with lock.owned(bucket):  # which gave no sign of life
        assert [path.name for path in (bucket / ".owner").iterdir()] == ["000008"]


def test_a_bucket_that_is_not_there_is_said(root):
    with pytest.raises(UserError, match=r"cannot be a run's directory: .*none-of-it"):
        lock.owned(place(f"{str(root)[:5]}none-of-it/run", "")).__enter__()
