"""Checkpoints survive what happens to clusters: lost bits, killed processes, full disks, other meshes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harm_cases import flip, free_port, truncate
from paths import ROOT, TESTS

from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.training.checkpoint import ResumeStore, load_params, save_params

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def state(step: int, size: int = 64) -> dict:
    key = jax.random.key(step)
    return {"params": {"w": jax.random.normal(key, (size, 64))}, "step": jnp.array(step), "key": key}


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(ours, theirs) -> bool:
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(bits(a), bits(b)), ours, theirs))


def save_steps(directory: Path, steps, keep: int = 3) -> ResumeStore:
    store = ResumeStore(directory, keep)
    for step in steps:
        store.save(step, state(step), {"seconds": step / 2})
    store.wait()
    return store


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def data_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """States of steps 2, 4 and 6; copied before it is damaged."""
    directory = tmp_path_factory.mktemp("saved") / "state"
    save_steps(directory, (2, 4, 6)).close()
    return directory


# ---- states ----


def test_a_state_comes_back_bit_for_bit_though_it_was_consumed_while_it_was_written(tmp_path):
    store = ResumeStore(tmp_path / "state", keep=2)
    assert store.latest is None
    consume = jax.jit(lambda s: {**s, "params": {"w": s["params"]["w"] * 0}}, donate_argnums=0)
    begun = state(3, size=20_000)
    expected = jax.tree.map(lambda x: x.copy(), begun)
    consume(jax.tree.map(lambda x: x.copy(), begun))
    store.save(3, begun, {"seconds": 1.5})
    jax.block_until_ready(consume(begun))
    store.close()
    again = ResumeStore(tmp_path / "state", keep=2)
    assert again.latest == 3
    restored, note = again.restore(jax.eval_shape(lambda: expected))
    assert same(restored, expected) and note == {"seconds": 1.5}
    assert data_file(tmp_path / "state" / "3").stat().st_size > expected["params"]["w"].nbytes, "compressed in vain"
    with pytest.raises(UserError, match=r"state/3: params/w has shape \(20000, 64\), the spec needs \(8, 64\); delete"):
        again.restore(abstract(state(3, size=8)))
    other = {**expected, "step": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(UserError, match="state/3: step has dtype int32, the spec needs float32; delete"):
        again.restore(other)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda d: truncate(data_file(d / "6")), r"state/\S+ has (\d+) bytes instead of \d+"),
        (lambda d: flip(data_file(d / "6")), r"the content of state/\S+ has changed since it was written"),
        (lambda d: data_file(d / "6").unlink(), r"state/\S+ is missing"),
        (lambda d: (d / "checksums" / "6.json").unlink(), r"it has no checksums/6\.json: the run ended before"),
        (lambda d: truncate(d / "checksums" / "6.json"), None),
        (lambda d: (d / "checksums" / "6.json").write_text("{"), r"checksums/6\.json is not readable"),
        (lambda d: (d / "checksums" / "6.json").write_text("{}"), "the list of its files is not readable"),
    ],
    ids=["truncated", "flipped", "missing", "unrecorded", "record without its newline", "torn record", "empty record"],
)
def test_a_damaged_state_is_named_set_aside_and_the_one_before_is_used(saved, tmp_path, capfd, harm, why):
    directory = tmp_path / "state"
    shutil.copytree(saved, directory)
    harm(directory)
    store = ResumeStore(directory, keep=3)
    err = capfd.readouterr().err
    if why is None:  # harmless
        assert store.latest == 6 and err == ""
        return
    assert store.latest == 4
    line = rf"{directory}/6 is damaged \({why}.*\); moved to {directory}/damaged/6; going on from step 4\n"
    assert re.fullmatch(line, err), err
    restored, note = store.restore(abstract(state(4)))
    assert same(restored, state(4)) and note == {"seconds": 2.0}
    assert steps_in(directory) == [2, 4] and (directory / "damaged" / "6").is_dir()
    store.save(6, state(6), {})  # the step is done again
    store.close()
    assert ResumeStore(directory, keep=3).latest == 6 and capfd.readouterr().err == ""
    store.delete()
    assert not directory.exists()


def test_when_no_state_is_good_the_stage_starts_from_the_beginning(saved, tmp_path, capfd):
    directory = tmp_path / "state"
    shutil.copytree(saved, directory)
    for step in (2, 4, 6):
        flip(data_file(directory / str(step)))
    store = ResumeStore(directory, keep=3)
    assert store.latest is None
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.endswith("; starting from the beginning") for line in lines)
    store.save(2, state(2), {})
    assert store.latest == 2


def test_the_newest_are_kept_until_the_stage_is_finished(tmp_path):
    directory = tmp_path / "state"
    store = save_steps(directory, range(1, 12), keep=2)
    assert steps_in(directory) == [10, 11]
    assert sorted(path.name for path in (directory / "checksums").iterdir()) == ["10.json", "11.json"]
    (directory / "damaged" / "9").mkdir(parents=True)
    store.delete()
    assert not directory.exists()


_KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from test_checkpoint import ResumeStore, state
store = ResumeStore(Path({directory!r}), {keep})
for step in range(1, 1000):
    store.save(step, state(step, size=200_000), {{}})
    print("saving", step, flush=True)
"""


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_while_it_saves_it_goes_on_from_a_whole_state(tmp_path, capfd, keep):
    directory = tmp_path / "state"
    script = _KILLED.format(tests=str(TESTS), directory=str(directory), keep=keep)
    process = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "saving 4\n":
            break
    deadline = time.monotonic() + 30
    while not any(directory.glob("*.orbax-checkpoint-tmp")) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    capfd.readouterr()
    left = {path.name for path in directory.iterdir()}
    store = ResumeStore(directory, keep=2)
    latest = store.latest
    assert latest is not None and latest >= 3
    assert same(store.restore(abstract(state(0, size=200_000)))[0], state(latest, size=200_000))
    err = capfd.readouterr().err
    for name in left:
        if name.endswith(".orbax-checkpoint-tmp"):
            step = name.split(".")[0]
            assert f"{directory}/{step} was being written when the run ended; removed; going on from" in err
    assert not any(directory.glob("*-tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """Six MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_said_and_costs_no_state(small_disk, capfd):
    directory, threads = small_disk / "state", threading.active_count()
    store = ResumeStore(directory, keep=2)
    store.save(1, state(1, size=14_000), {})  # 3.5 MB
    store.wait()
    store.save(2, state(2, size=14_000), {})
    message = (
        rf"^the state of step 2 could not be saved in {directory}: No space left on device; the state of step 1 is "
        "intact, the same command goes on from there$"
    )
    with pytest.raises(UserError, match=message):
        store.save(3, state(3), {})
    assert sorted(path.name for path in directory.iterdir()) == ["1", "checksums"]
    assert store.latest == 1
    store.save(3, state(3), {})  # a small one fits: the space has come back
    store.wait()
    assert steps_in(directory) == [1, 3]
    store.save(4, state(4, size=14_000), {})
    store.close()  # on the way out of another error: said, not raised
    assert "step 4 could not be saved" in (err := capfd.readouterr().err) and "Traceback" not in err
    with pytest.raises(UserError, match=r"the parameters could not be saved in .*disk/params: No space left on device"):
        save_params(small_disk / "params", state(1, size=40_000)["params"])
    assert sorted(path.name for path in small_disk.iterdir()) == ["state"]
    deadline = time.monotonic() + 30
    while threading.active_count() > threads + 1:  # none stays; on a busy machine one may take a moment to end
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.02)
    again = ResumeStore(directory, keep=2)
    assert again.latest == 3
    assert capfd.readouterr().err == ""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_saves_hold_no_more_memory_than_ten(tmp_path):
    store = ResumeStore(tmp_path / "state", keep=2)
    tree = state(0, size=8_000)  # 2 MB: were the copies kept, there would be 80 MB more
    after: dict[int, int] = {}
    for step in range(1, 51):
        store.save(step, tree, {})
        store.wait()
        after[step] = resident()
    assert after[50] - after[10] < 20e6
    assert steps_in(tmp_path / "state") == [49, 50]


# ---- meshes and processes ----


@pytest.mark.parametrize("devices", [2, 1])
def test_a_state_moves_to_another_mesh_bit_for_bit(tmp_path, devices):
    spec = jax.sharding.PartitionSpec("fsdp", "tensor")
    eight = jax.sharding.NamedSharding(make_mesh(MeshConfig(fsdp=4, tensor=2)), spec)
    tree = {"w": jax.device_put(jax.random.normal(jax.random.key(1), (16, 64)), eight)}
    store = ResumeStore(tmp_path / "state", keep=1)
    store.save(1, tree, {})
    files = save_params(tmp_path / "params", tree)
    other = jax.sharding.NamedSharding(make_mesh(MeshConfig(), jax.devices()[:devices]), spec)
    for restored in (
        store.restore(abstract(tree, other))[0],
        load_params(tmp_path / "params", abstract(tree, other), files),
    ):
        assert restored["w"].sharding == other and np.array_equal(restored["w"], tree["w"])


def test_two_processes_write_and_one_reads(tmp_path):
    worker, port = [sys.executable, str(TESTS.joinpath("checkpoint_worker.py"))], str(free_port())
    said: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    processes = [subprocess.Popen([*worker, str(index), port, str(tmp_path)], **said) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    said, other = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    read = said.pop("process 0 has read"), other.pop("process 1 has read")
    left = [said.pop(f"left by process {process}") for process in (0, 1)]
    assert left == [["1", "2", "checksums", "damaged"]] * 2
    assert said == {key: other[key] for key in said}
    assert list(said["files"].items()) == list(said["alone"].items()) and said["recorded"]
    theirs = [f"params/{name}" for name in said["files"] if "process_1" in name]
    assert len(theirs) >= 3 and read == (sorted({f"params/{name}" for name in said["files"]} - {*theirs}), theirs)
    assert said["loads"] and said["restored"] and said["latest"] == 3 and said["after damage"] == 2
    assert "3 is damaged" in outputs[0][1] and "damaged" not in outputs[1][1]
    for process in (0, 1):
        assert said[f"process {process} fails"] == (
            f"the state of step 4 could not be saved in {tmp_path}/state: File too large; the state of step 2 is "
            "intact, the same command goes on from there"
        )
    assert said["goes on"] == 4
    assert re.search(r"params: state/\S+ has \d+ bytes instead of \d+; delete", said["params"])

    expected = {"w": jax.random.normal(jax.random.key(4), (64, 1024)), "count": jnp.array(4)}
    store = ResumeStore(tmp_path / "state", keep=3)
    restored, note = store.restore(abstract(expected))
    assert store.latest == 4 and note == {"step": 4} and same(restored, expected)


# ---- parameters ----


def test_parameters_are_checked_cast_and_replaced(tmp_path):
    directory = tmp_path / "stage" / "params"
    params = state(1)["params"]
    save_params(directory, state(2)["params"])  # left by a killed run
    files = json.loads(json.dumps(save_params(directory, params)))
    assert {size for size, _ in files.values()} and all(len(digest) == 64 for _, digest in files.values())
    half = load_params(directory, {"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)}, files)
    assert np.array_equal(half["w"], params["w"].astype(jnp.bfloat16))
    flip(data_file(directory))
    again = rf"; delete {tmp_path}/stage to have the stage made again$"
    with pytest.raises(UserError, match=r"params: the content of state/\S+ has changed since it was written" + again):
        load_params(directory, abstract(params), files)
    data_file(directory).unlink()
    with pytest.raises(UserError, match=r"params: state/\S+ is missing" + again):
        load_params(directory, abstract(params), files)
    with pytest.raises(UserError, match=r"params cannot be read: .*" + again):
        load_params(directory, abstract(params))
    shutil.rmtree(directory)
    for known in (files, None):
        with pytest.raises(UserError, match="params is not a checkpoint: there is no such directory"):
            load_params(directory, abstract(params), known)
