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
from ministral_jax.teachers.store import Store
from ministral_jax.teachers.store_format import FINISHED, Files, Finished, TeacherIdentity

pytestmark = pytest.mark.usefixtures("one_device")
DEVICES = jax.devices()
RECIPE = str(TESTS / "micro_stored.yaml")
STORE = "logits/store"


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


def run(run_dir: Path, *words: str) -> Path:
    assert main(["run", RECIPE, *words, "--run-dir", str(run_dir)]) == 0
    return run_dir


def copy_of(made: Path, directory: Path, without: tuple[str, ...] = ()) -> Path:
    return Path(shutil.copytree(made, directory / "run", ignore=shutil.ignore_patterns(*without)))


@pytest.fixture(scope="module")
def parent(tmp_path_factory, one_device) -> Path:
    """A run directory with a parent and a pruned child."""
    return run(tmp_path_factory.mktemp("stored") / "parent", "parent", "pruned")


@pytest.fixture(scope="module")
def online(parent, tmp_path_factory) -> dict[str, np.ndarray]:
    """What the student learns from the parent beside it."""
    return curve(run(copy_of(parent, tmp_path_factory.mktemp("online")), "short", "stages.short.teacher=parent"))


@pytest.fixture(scope="module")
def unbroken(parent, tmp_path_factory) -> Path:
    """A run directory with a store and a student of it."""
    return run(copy_of(parent, tmp_path_factory.mktemp("unbroken")), "short")


def curve(run_dir: Path) -> dict[str, np.ndarray]:
    """Loss of every step of the student, KL of every evaluation."""
    lines = read_jsonl(run_dir / "short" / "metrics.jsonl")
    figures = {"loss": "train", "kl": "eval"}
    return {name: np.array([line[name] for line in lines if line["kind"] == kind]) for name, kind in figures.items()}


def files(run_dir: Path) -> dict[str, str]:
    found = [path for path in sorted((run_dir / STORE).rglob("*")) if path.is_file()]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


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
    stored = curve(run(copy_of(parent, tmp_path), "short", f"stages.logits.codec={codec}"))
    for name, values in online.items():
        np.testing.assert_allclose(stored[name], values, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("codec", ["{kind: topk, entries: 16}", "{kind: sampled, entries: 50}"])
def test_part_of_the_distribution_teaches(parent, online, tmp_path, codec):
    run_dir = run(copy_of(parent, tmp_path), "short", f"stages.logits.codec={codec}")
    kl = curve(run_dir)["kl"]
    # exact at evaluations, so the first one, before any step, is the online one
    assert kl[0] == online["kl"][0] and kl[-1] < kl[0]
    figures = json.loads((run_dir / "logits" / "manifest.json").read_text())["metrics"]
    assert figures["bytes_per_token"] > 0
    assert "topk" not in codec or 0 < figures["gradient_error_bound"] <= 2


def test_on_a_mesh_that_cuts_everything(unbroken, tmp_path, monkeypatch):
    """Recorded and read where rows, tokens and vocabulary are cut: the same codes, and the same curve of a student."""
    monkeypatch.setattr(jax, "devices", lambda *backend: DEVICES)
    run_dir = copy_of(unbroken, tmp_path, without=("short", "logits"))
    run(run_dir, "short", "mesh={fsdp: 2, tensor: 2, context: 2}")
    stores = [Store(str(path / STORE))._arrays for path in (run_dir, unbroken)]
    read = lambda name: [arrays[f"train/{name}"].read().result() for arrays in stores]
    np.testing.assert_array_equal(*read("counted"))
    same = np.equal(*read("ids")).all(-1)  # all but where two ids tie to rounding
    assert same.mean() > 0.99
    for name, codes in (("logprobs", 1), ("forced", 1), ("tail", 8), ("tail_entropy", 8)):
        ours, theirs = (array[same].astype(int) for array in read(name))
        assert np.abs(ours - theirs).max() <= codes, name
    for key, values in curve(unbroken).items():
        # a code more or less of a few log-probabilities, 2 % of a probability each
        np.testing.assert_allclose(curve(run_dir)[key], values, rtol=2e-3, err_msg=key)


class Stop(BaseException):
    """As abrupt as a kill, for what runs in this process."""


def test_interrupted_at_every_batch_it_ends_in_the_same_files(parent, unbroken, tmp_path, monkeypatch):
    run_dir, real = copy_of(parent, tmp_path), record.Writer.write
    writes, stops = 0, 0

    def write(self, split, rows, hashes, arrays):
        nonlocal writes
        writes += 1
        if writes % 2 == 0:  # half of what it was given, then gone
            half = len(rows) // 2
            real(self, split, rows[:half], hashes[:half], {name: array[:half] for name, array in arrays.items()})
            raise Stop
        real(self, split, rows, hashes, arrays)

    monkeypatch.setattr(record.Writer, "write", write)
    while True:
        try:
            run(run_dir, "logits")
            break
        except Stop:
            stops += 1
    assert stops >= 4
    assert files(run_dir) == files(unbroken)


def test_a_finished_store_is_not_made_again(unbroken, capsys):
    before = files(unbroken)
    run(unbroken, "logits")
    assert "logits: finished already" in capsys.readouterr().err
    assert files(unbroken) == before


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def taught(unbroken, tmp_path) -> Path:
    """A run directory with a store and no student yet."""
    return copy_of(unbroken, tmp_path, without=("short",))


def test_other_data_is_refused_before_anything_is_written(taught, refused):
    error = refused(RECIPE, taught, "short", "stages.short.data.sources.digits.weight=0.5")
    assert "stages.short.data differs from that of 'logits', whose rows are recorded" in error
    assert not (taught / "short").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": TeacherIdentity(stage="parent", digest="0" * 64)}, "teacher"),
        ({"tokenizer_digest": "0" * 64}, "tokenizer"),
        ({"data_digest": "0" * 64}, "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_teacher_tokenizer_or_packing_is_refused(taught, refused, changed, message):
    store = Files(str(taught / STORE))
    finished = store.load(Finished, FINISHED)
    info = finished.description.info.model_copy(update=changed)
    description = finished.description.model_copy(update={"info": info})
    store.save(FINISHED, finished.model_copy(update={"description": description}))
    error = refused(RECIPE, taught, "short")
    assert message in error and "000000" in error and str(taught / STORE) in error, error


def test_a_flipped_byte_is_refused(taught, refused):
    shard = taught / STORE / "train/logprobs/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    error = refused(RECIPE, taught, "short")
    assert "damaged" in error and "logprobs" in error, error
    assert not (taught / "short" / "manifest.json").exists()


def test_a_parent_made_anew_is_another_teacher(taught, refused):
    manifest = taught / "parent" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds"', '"Seconds"'))
    assert "was made from another parent 'parent' than the one there now" in refused(RECIPE, taught, "short")
