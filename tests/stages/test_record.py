"""The record stage and what reads it: rows into batches, kill and go on, stored against online, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from paths import TESTS

from ministral_jax.cli import main
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.files import read_jsonl
from ministral_jax.stages import record
from ministral_jax.stages.record import plan_batches
from ministral_jax.teachers.store import open_store

DEVICES = jax.devices()
RECIPE = str(TESTS / "micro_stored.yaml")


@pytest.mark.parametrize(
    ("rows", "shard", "groups", "local"), [(37, 4, 2, 2), (37, 4, 3, 4), (5, 32, 4, 1), (64, 8, 1, 16)]
)
def test_every_row_once_and_every_file_by_one_group(rows, shard, groups, local):
    plan = np.stack(plan_batches(rows, shard, groups, local))
    assert plan.shape[1:] == (groups, local)
    assert sorted(plan[plan >= 0]) == list(range(rows))
    for group in range(groups):
        mine = plan[:, group][plan[:, group] >= 0]
        assert set(mine // shard % groups) <= {group} and (np.diff(mine) > 0).all()
    # at most a shard's worth of slots of a group stands empty
    assert len(plan) <= -(-(-(-rows // (shard * groups)) * shard) // local)


def test_rows_of_a_mesh_and_their_owners():
    place = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2), DEVICES), Rules())
    (rows, owner), *others = place.row_owners(8)
    assert not others and owner == 0 and rows.tolist() == list(range(8))  # one process holds them all
    by_row = jax.NamedSharding(place.mesh, jax.P(place.rules.batch))
    array = jax.device_put(np.arange(24).reshape(8, 3), by_row)
    np.testing.assert_array_equal(place.local_rows(array), np.arange(24).reshape(8, 3))


# ---- the stage, by the command line ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on a laptop; the suite's eight are for meshes."""
    monkeypatch.setattr(jax, "devices", lambda *backend: DEVICES[:1])


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A run directory with a parent and a pruned child."""
    run_dir = tmp_path_factory.mktemp("stored") / "parent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: DEVICES[:1])
        assert main(["run", RECIPE, "parent", "pruned", "--run-dir", str(run_dir)]) == 0
    return run_dir


def copy_of(parent: Path, directory: Path) -> Path:
    return Path(shutil.copytree(parent, directory))


def run(run_dir: Path, *words: str) -> None:
    assert main(["run", RECIPE, *words, "--run-dir", str(run_dir)]) == 0


def curve(run_dir: Path, stage: str = "short") -> dict[str, np.ndarray]:
    """Loss of every step, KL of every evaluation."""
    lines = read_jsonl(run_dir / stage / "metrics.jsonl")
    return {
        "loss": np.array([line["loss"] for line in lines if line["kind"] == "train"]),
        "kl": np.array([line["kl"] for line in lines if line["kind"] == "eval"]),
    }


def files(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def online(parent, tmp_path_factory) -> dict[str, np.ndarray]:
    run_dir = copy_of(parent, tmp_path_factory.mktemp("online") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: DEVICES[:1])
        run(run_dir, "short", "stages.short.teacher=parent")
    return curve(run_dir)


@pytest.mark.parametrize(
    ("codec", "tolerance"),
    [
        # logits of the same states, of batches of the same shape: nothing is rounded on the way
        ("{kind: dense}", 0.0),
        ("{kind: hidden, dtype: float32}", 0.0),
        # 2^-9 of a state that makes logits of the order of one, averaged over tokens, and what six steps make of it
        ("{kind: hidden, dtype: bfloat16}", 2.0**-9),
    ],
)
def test_the_whole_distribution_from_disk_is_the_online_teacher(parent, online, tmp_path, codec, tolerance):
    run_dir = copy_of(parent, tmp_path / "run")
    run(run_dir, "short", f"stages.logits.codec={codec}")
    stored = curve(run_dir)
    worst = {key: np.abs(stored[key] / online[key] - 1).max() for key in online}
    print(codec, worst)
    np.testing.assert_allclose(stored["loss"], online["loss"], rtol=tolerance)
    np.testing.assert_allclose(stored["kl"], online["kl"], rtol=tolerance)


@pytest.mark.parametrize("codec", ["{kind: topk, entries: 16}", "{kind: sampled, entries: 50}"])
def test_part_of_the_distribution_teaches(parent, online, tmp_path, codec):
    run_dir = copy_of(parent, tmp_path / "run")
    run(run_dir, "short", f"stages.logits.codec={codec}")
    stored = curve(run_dir)
    # exact at evaluations, so the first one, before any step, is the online one
    assert stored["kl"][0] == online["kl"][0]
    assert stored["kl"][-1] < stored["kl"][0]
    figures = json.loads((run_dir / "logits" / "manifest.json").read_text())
    assert figures["metrics"]["bytes_per_token"] > 0
    if "topk" in codec:
        assert 0 < figures["metrics"]["gradient_error_bound"] <= 2


@pytest.fixture(scope="module")
def unbroken(parent, tmp_path_factory) -> Path:
    run_dir = copy_of(parent, tmp_path_factory.mktemp("unbroken") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: DEVICES[:1])
        run(run_dir, "short")
    return run_dir


def test_on_a_mesh_that_cuts_everything(unbroken, tmp_path, monkeypatch):
    """Recorded and read where rows, tokens and vocabulary are cut: the same codes, and the same curve of a student."""
    monkeypatch.setattr(jax, "devices", lambda *backend: DEVICES)
    mesh = ("mesh={fsdp: 2, tensor: 2, context: 2}",)
    run_dir = Path(shutil.copytree(unbroken, tmp_path / "run", ignore=shutil.ignore_patterns("short", "logits")))
    run(run_dir, "short", *mesh)
    ours, theirs = (
        {
            name: array.read().result()
            for name, array in open_store(str(path / "logits" / "store")).split("train")._arrays.items()
        }
        for path in (run_dir, unbroken)
    )
    np.testing.assert_array_equal(ours["counted"], theirs["counted"])
    same = (ours["ids"] == theirs["ids"]).all(-1)  # all but where two ids tie to rounding
    assert same.mean() > 0.99
    for name, codes in (("logprobs", 1), ("forced", 1), ("tail", 8), ("tail_entropy", 8)):
        difference = ours[name][same].astype(int) - theirs[name][same].astype(int)
        assert np.abs(difference).max() <= codes, name
    for key, values in curve(unbroken).items():
        # a code more or less of a few log-probabilities, 2 % of a probability each
        np.testing.assert_allclose(curve(run_dir)[key], values, rtol=2e-3, err_msg=key)


class Stop(BaseException):
    """As abrupt as a kill, for what runs in this process."""


def test_interrupted_at_every_batch_it_ends_in_the_same_files(parent, unbroken, tmp_path, monkeypatch):
    run_dir, real = copy_of(parent, tmp_path / "run"), record.Writer.write
    count = 0

    def write(self, split, rows, hashes, arrays):
        nonlocal count
        count += 1
        if count % 2 == 0:  # half of what it was given, then gone
            half = len(rows) // 2
            real(self, split, rows[:half], hashes[:half], {name: array[:half] for name, array in arrays.items()})
            raise Stop
        real(self, split, rows, hashes, arrays)

    monkeypatch.setattr(record.Writer, "write", write)
    stops = 0
    while True:
        try:
            run(run_dir, "logits")
            break
        except Stop:
            stops += 1
    assert stops >= 4
    assert files(run_dir / "logits" / "store") == files(unbroken / "logits" / "store")


def test_a_finished_store_is_not_made_again(unbroken, capsys):
    before = files(unbroken / "logits" / "store")
    run(unbroken, "logits")
    assert "logits: finished already" in capsys.readouterr().err
    assert files(unbroken / "logits" / "store") == before


def refused(capsys, run_dir: Path, *words: str) -> str:
    assert main(["run", RECIPE, *words, "--run-dir", str(run_dir)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def without_student(unbroken: Path, directory: Path) -> Path:
    return Path(shutil.copytree(unbroken, directory, ignore=shutil.ignore_patterns("short")))


def test_other_data_is_refused_before_anything_is_written(unbroken, tmp_path, capsys):
    run_dir = without_student(unbroken, tmp_path / "run")
    error = refused(capsys, run_dir, "short", "stages.short.data.sources.digits.weight=0.5")
    assert "stages.short.data differs from that of 'logits', whose rows are recorded" in error
    assert not (run_dir / "short").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher", {"stage": "parent", "digest": "0" * 64}, "teacher"),
        ("tokenizer_digest", "0" * 64, "tokenizer"),
        ("data_digest", "0" * 64, "data"),
    ],
)
def test_another_teacher_tokenizer_or_packing_is_refused(parent, tmp_path, capsys, monkeypatch, key, value, message):
    run_dir, real = copy_of(parent, tmp_path / "run"), record.StoreInfo
    monkeypatch.setattr(record, "StoreInfo", lambda **known: real.model_validate({**known, key: value}))
    run(run_dir, "logits")
    error = refused(capsys, run_dir, "short")
    assert message in error and "000000" in error and str(run_dir / "logits" / "store") in error, error
    print(error)


def test_a_flipped_byte_is_refused(unbroken, tmp_path, capsys):
    run_dir = without_student(unbroken, tmp_path / "run")
    shard = sorted((run_dir / "logits" / "store" / "train" / "logprobs" / "c").rglob("0"))[0]
    shard = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    error = refused(capsys, run_dir, "short")
    assert "damaged" in error and "logprobs" in error, error
    assert not (run_dir / "short" / "manifest.json").exists()


def test_a_parent_made_anew_is_another_teacher(unbroken, tmp_path, capsys):
    run_dir = without_student(unbroken, tmp_path / "run")
    manifest = run_dir / "parent" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds"', '"Seconds"'))
    assert "was made from another parent 'parent' than the one there now" in refused(capsys, run_dir, "short")
