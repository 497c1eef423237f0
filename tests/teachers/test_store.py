"""The logit store: what is read is what was written, whatever happened since, or a sentence says what is wrong."""

import hashlib
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import store_worker as worker
from paths import ROOT
from store_worker import INFO, LAYOUT, ROWS, SHARD_ROWS, arrays, hashes, record, seal, shuffled, write, writer

from ministral_jax.errors import UserError
from ministral_jax.teachers.store import HashIndex, Store, verify
from ministral_jax.teachers.store_format import TeacherIdentity

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
whole = lambda rows: [rows] if len(rows) else []


def files(root):
    return {str(path.relative_to(root)): path for path in sorted(Path(root).rglob("*")) if path.is_file()}


def digests(root):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files(root).items()}


def sentence(function, *arguments, **named):
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def use(root):
    """Everything that a training does with a store."""
    store = Store(str(root))
    for split, rows in ROWS.items():
        same(store.read(split, hashes(split, range(rows))), arrays(split, range(rows)))
    assert np.array_equal(store.head(), worker.head())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished store, each split written in one call."""
    root = tmp_path_factory.mktemp("reference") / "store"
    record(root, whole)
    return root


@pytest.fixture
def copy(reference, tmp_path):
    return shutil.copytree(reference, tmp_path / "store")


# ---- reading --------------------------------------------------------------------------------------------------------


def test_every_dtype_returns_in_any_order_and_batch_size(reference):
    store = Store(f"{reference}/")
    assert store.info == INFO and verify(str(reference)) == []
    rng = np.random.default_rng(0)
    for split, count in ROWS.items():
        for size in (1, 2, 7, count, 3 * count):
            rows = rng.integers(0, count, size).tolist()
            same(store.read(split, hashes(split, rows)), arrays(split, rows))
        nothing = store.read(split, [])
        assert {name: part.shape for name, part in nothing.items()} == {n: (0, *one.shape) for n, one in LAYOUT.items()}
        text = sentence(store.read, split, [*hashes(split, [0]), b"\7" * 16])
        assert f"no row {'07' * 6}… in {split} (1 of 2" in text and "another packing" in text
    assert np.array_equal(store.head((slice(1, 3), slice(4000, 4200))), worker.head()[1:3, 4000:4200])
    assert "no split 'test', it has" in sentence(store.read, "test", [])


def test_the_index_finds_equal_and_colliding_hashes():
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 2, (500, 16), np.uint8) * np.array([1] + [0] * 13 + [1, 1], np.uint8)  # 8 values
    stored[100:] = rng.integers(0, 256, (400, 16))
    stored[200:220, :8] = stored[200, :8]
    found = HashIndex(stored).find(stored)
    assert np.array_equal(stored[found], stored) and np.array_equal(found[100:], np.arange(100, 500))
    for other in (stored[200] ^ np.uint8([0] * 15 + [1]), stored[300] ^ np.uint8([1] + [0] * 15)):
        assert HashIndex(stored).find(other[None]).tolist() == [-1]
    assert HashIndex(stored[:0]).find(stored[:2]).tolist() == [-1, -1]


def test_equal_rows_may_lie_in_a_store_twice(tmp_path):
    store = writer(tmp_path / "store", rows={"train": 4})
    rows = [1, 2, 1, 2]
    write(store, "train", range(4), of=rows)
    store.put_head(worker.head())
    store.finish(seal(store))
    same(Store(str(tmp_path / "store")).read("train", hashes("train", rows)), arrays("train", rows))


def test_threads_and_copies_in_other_processes_read_the_same(reference):
    store = Store(str(reference))

    def batch(seed):
        rows = np.random.default_rng(seed).integers(0, ROWS["train"], 5).tolist()
        same(store.read("train", hashes("train", rows)), arrays("train", rows))
        return len(rows)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(batch, range(200))) == 1000
    pickled = pickle.dumps(store)
    assert len(pickled) < 3000  # neither the index nor the handles
    same(pickle.loads(pickled).read("train", hashes("train", [3, 1])), arrays("train", [3, 1]))
    code = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer).read('train', [])), 'jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    spoken = subprocess.run(command, input=pickled, env=ENVIRONMENT, capture_output=True, check=True)
    assert spoken.stdout.split() == [str(len(LAYOUT)).encode(), b"False"]


def test_a_store_without_a_head_says_so(tmp_path):
    store = writer(tmp_path / "store", rows={"train": 0}, head=None)
    store.finish(seal(store))
    assert "has no head" in sentence(Store(str(tmp_path / "store")).head)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_records_say_sizes_and_what_statistics_saw(reference):
    found = Store(str(reference)).record
    for split, count in ROWS.items():
        on_disk = dict.fromkeys((*LAYOUT, "hash"), 0)
        for k, one in enumerate(found.shards[split]):
            rows = range(count)[k * SHARD_ROWS : (k + 1) * SHARD_ROWS]
            assert one.rows == len(rows) and one.statistics == worker.statistics(arrays(split, rows))
            for name in on_disk:
                (file,) = [path for part, path in files(reference).items() if part.startswith(f"{split}/{name}/c/{k}")]
                assert one.bytes[name] == file.stat().st_size
                assert one.sha256[name] == hashlib.sha256(file.read_bytes()).hexdigest()
                on_disk[name] += one.bytes[name]
        assert sum(one.rows for one in found.shards[split]) == count
        assert found.totals[split] == {"rows": count, "bytes": on_disk}


def test_the_bytes_do_not_depend_on_how_the_rows_came(reference, tmp_path):
    for seed, most in ((0, 1), (1, 5), (2, 40)):
        record(tmp_path / str(seed), shuffled(seed, most))
    # two writers of one job, each with its shards, and a URL in place of a path
    url = f"file://{tmp_path}/url"
    first, second = writer(url), writer(url, create=False)
    for split, spec in first.description.splits.items():
        for k in range(spec.shards):
            write((first, second)[k % 2], split, list(spec.rows_of(k))[::-1])
        assert first.done(split).all() and spec.rows == len(second.done(split))
    second.put_head(worker.head()[2:], (slice(2, None), slice(None)))
    first.put_head(worker.head()[:2], (slice(0, 2), slice(None)))
    first.finish(seal(first, second))
    for root in ("0", "1", "2", "url"):
        assert digests(tmp_path / root) == digests(reference), root
    use(url)


def test_a_finished_store_is_opened_again_without_a_byte_changed(copy):
    before = digests(copy)
    (copy / "recording/train").mkdir(parents=True)
    (copy / "recording/train/0.json").write_text("killed while this was being deleted")
    record(copy, whole)
    assert digests(copy) == before and not (copy / "recording").exists()
    with pytest.raises(ValueError, match="takes no more rows"):
        write(writer(copy), "train", [0])


def test_a_sealed_shard_is_not_read_again_unless_its_rows_are_written(tmp_path):
    store, count = writer(tmp_path / "store"), []
    statistics = lambda parts: count.append(1) or {"sum": int(parts["uint8"].sum())}
    write(store, "train", range(SHARD_ROWS))
    sealed = store.seal_shard("train", 0, statistics)
    store, other = writer(tmp_path / "store"), writer(tmp_path / "store", create=False)
    assert store.seal_shard("train", 0, statistics) == sealed and len(count) == 1
    write(store, "train", [1], of=[2])
    again = store.seal_shard("train", 0, statistics)
    assert again != sealed and len(count) == 2
    assert other.seal_shard("train", 0, statistics) == again and len(count) == 2


def test_wrong_arrays_are_a_fault_of_the_caller(tmp_path):
    store, parts = writer(tmp_path / "store"), arrays("train", [0])
    without = {name: part for name, part in parts.items() if name != "uint8"}
    for wrong in (without, parts | {"uint8": parts["uint16"]}, parts | {"uint8": parts["uint8"][:, :1]}):
        with pytest.raises(ValueError, match="whose layout is"):
            store.write("train", [0], hashes("train", [0]), wrong)
    with pytest.raises(ValueError, match="hashes of 16 bytes"):
        store.write("train", [0], [b"\0" * 16], parts)
    assert "is not a place for a logit store" in sentence(writer, "nothing://there")


# ---- harm -----------------------------------------------------------------------------------------------------------


def test_a_store_that_is_killed_again_and_again_is_as_if_it_never_was(reference, tmp_path):
    """Ten SIGKILLs at random moments of opening, writing, sealing and finishing."""
    root, rng, kills, left = tmp_path / "store", np.random.default_rng(2), 0, []
    for attempt in range(100):
        command = [sys.executable, str(Path(worker.__file__)), str(root), str(attempt)]
        child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        if kills < 10:
            time.sleep(float(rng.uniform(0, 0.12)))
            child.kill()
        code = child.wait(60)
        child.stdout.close()
        if code == 0:
            break
        assert code == -9
        kills += 1
        left += [name for name in files(root) if name.endswith(".__lock")] if root.exists() else []
        if not (root / "store.json").exists():
            assert "not finished" in (text := sentence(Store, str(root))) or "not a logit store" in text
    print(f"{kills} kills, left behind: {left}")
    assert kills >= 5
    assert digests(root) == digests(reference)


def test_a_row_without_its_hash_is_not_there_and_leftovers_go(reference, tmp_path):
    root = tmp_path / "store"
    store = writer(root)
    commit = store._commit

    def dies_after_its_first(parts, index):
        commit(parts, index)
        raise KeyboardInterrupt

    store._commit = dies_after_its_first
    with pytest.raises(KeyboardInterrupt):
        write(store, "train", [0, 9], of=[1, 2])
    assert not writer(root).done("train").any()
    for lock in ("train/uint8/c/0/0/0", "head/c/0/0", "recording/train/0.json", "recording.json", "store.json"):
        path = root / f"{lock}.__lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a file")
    record(root, whole)
    assert digests(root) == digests(reference)


def test_a_shard_whose_files_were_lost_is_recorded_again(copy):
    before = digests(copy)
    (copy / "store.json").unlink()
    for name in (*LAYOUT, "hash"):
        lost = copy / "train" / name / "c" / "2"
        lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    store = writer(copy)
    assert np.flatnonzero(~store.done("train")).tolist() == list(range(16, 24))
    text = sentence(store.seal_shard, "train", 2, worker.statistics)
    assert "shard 2 of train: 8 of its 8 rows are not there" in text
    record(copy, whole)
    assert digests(copy) == before


def test_a_file_that_was_lost_after_sealing_is_missed_at_the_end(copy):
    (copy / "store.json").unlink()
    store = writer(copy)
    records = seal(store)
    (copy / "train" / "scalar" / "c" / "1").unlink()
    assert "cannot be finished: train/scalar/c/1 is missing; record its rows again" in sentence(store.finish, records)
    with pytest.raises(ValueError, match="5 records of train for its 6 shards"):
        store.finish(records | {"train": records["train"][:-1]})
    assert not (copy / "store.json").exists()


@contextmanager
def no_file_beyond(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_said_and_the_store_goes_on(reference, tmp_path):
    root = tmp_path / "store"
    store = writer(root)
    write(store, "train", [0, 1])
    with no_file_beyond(200):
        text = sentence(write, store, "train", [2, 3, 4, 5])
        assert f"store {root}: 4 rows of train (the first is 2) could not be written" in text
        # of the files that are written at once, whichever failed first is named
        assert re.search(rf"{root}/train/\w+/c/0", text) and "File too large" in text, text
        assert "head" in sentence(store.put_head, worker.head())
    root.rename(tmp_path / "away")
    root.write_text("the place is gone")
    assert "Not a directory" in sentence(write, store, "train", [6])
    assert "Cannot list non-directory" in sentence(writer, root)
    root.unlink()
    (tmp_path / "away").rename(root)
    assert np.flatnonzero(store.done("train")).tolist() == [0, 1]
    write(store, "train", [2, 3])
    record(root, whole)
    assert digests(root) == digests(reference)


def test_a_flipped_byte_in_any_file_is_refused_by_name(copy):
    rng = np.random.default_rng(5)
    for name, path in files(copy).items():
        raw = path.read_bytes()
        for at in (0, len(raw) - 1, *rng.integers(0, len(raw), 6 if name.endswith("json") else 2).tolist()):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << int(rng.integers(8)))]) + raw[at + 1 :])
            text = sentence(use, copy)
            assert str(copy) in text and name in text, (name, at, text)
            parts = name.split("/")
            if "c" in parts[2:] and parts[1] != "hash":
                assert f"of {parts[0]} (shard {parts[3]}, array {parts[1]}" in text
            if name == "store.json":
                assert "store.json is damaged" in text or "has the format" in text
        if name != "store.json":
            assert verify(str(copy)) == [f"{name} is damaged: its sha256 is not what store.json says"]
        path.write_bytes(raw)
    use(copy)


def test_missing_and_truncated_files_are_refused_by_name(copy):
    (copy / "extra").write_text("")
    for i, (name, path) in enumerate(files(copy).items()):
        raw = path.read_bytes()
        damages = [None, raw[: (0, len(raw) // 2, len(raw) - 1)[i % 3]]]
        for left in damages if name not in ("store.json", "extra") else ():
            path.unlink() if left is None else path.write_bytes(left)
            assert name in sentence(use, copy)
            kind = "missing" if left is None else "damaged: its sha256 is not what store.json says"
            assert sorted(verify(str(copy))) == sorted([f"{name} is {kind}", "extra is not of this store"])
            path.write_bytes(raw)
    (copy / "store.json").unlink()
    assert "is not finished" in sentence(Store, str(copy))
    (copy / "recording.json").unlink()
    assert "is not a logit store" in sentence(Store, str(copy))
    assert "holds files, and no logit store" in sentence(writer, copy)
    assert "is not there" in sentence(writer, copy, create=False)


OTHER = "d4" * 32


def test_a_store_of_something_else_is_refused_by_what_differs(copy):
    changes = {
        "teacher.digest a1a1a1a1a1a1…, not d4d4d4d4d4d4…": dict(teacher=TeacherIdentity(stage="parent", digest=OTHER)),
        "tokenizer_digest b2b2b2b2b2b2…, not d4": dict(tokenizer_digest=OTHER),
        "data_digest c3c3c3c3c3c3…, not d4": dict(data_digest=OTHER),
        "codec.entries 64, not 32": dict(codec={"kind": "topk", "entries": 32}),
        "length 6, not 7": dict(length=7),
        "seed 0, not 1": dict(seed=1),
        "dtype 'float32', not 'bfloat16'": dict(dtype="bfloat16"),
    }
    shapes = {
        "shard_rows 8, not 4": dict(shard_rows=4),
        "splits.train.rows 42, not 43": dict(rows={**ROWS, "train": 43}),
        "arrays.uint8.dtype 'uint8', not 'uint16'": dict(layout={**LAYOUT, "uint8": LAYOUT["uint16"]}),
    }
    before = digests(copy)
    for finished in (True, False):
        for what, change in changes.items():
            text = sentence(writer, copy, info=INFO.model_copy(update=change))
            assert f"store {copy} is of something else than is to be recorded: it has {what}" in text
        for what, change in shapes.items():
            assert what in sentence(writer, copy, **change)
        if finished:
            (copy / "store.json").unlink()
    del before["store.json"]
    assert digests(copy) == before


def test_a_store_of_something_else_is_refused_by_its_reader(reference):
    store = Store(str(reference))
    used = dict(teacher_digest="a1" * 32, tokenizer_digest="b2" * 32, data_digest="c3" * 32, length=6, vocab=5000)
    store.check(**used)
    teacher = "another teacher (stage parent): it has teacher (stage parent) a1a1a1a1a1a1…, not d4d4d4d4d4d4…"
    for key, other, what in (
        ("teacher_digest", OTHER, teacher),
        ("tokenizer_digest", OTHER, "another tokenizer: it has tokenizer b2b2b2b2b2b2…, not d4d4d4d4d4d4…"),
        ("data_digest", OTHER, "another set or packing of data"),
        ("length", 7, "another length of a row: it has length of a row 6, not 7"),
        ("vocab", 7, "another vocabulary: it has vocabulary 5000, not 7"),
    ):
        text = sentence(store.check, **{**used, key: other})
        assert what in text and "record it again" in text
