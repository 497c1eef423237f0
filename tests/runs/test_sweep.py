"""Sweeps: what points share is made once, each is what its own run would be, and what is wrong is said beforehand."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from paths import TESTS

from ministral_jax import yaml12
from ministral_jax.cli import main
from ministral_jax.commands import sweep as sweep_command
from ministral_jax.distributed.processes import Preempted
from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.recipe.load import resolve_specs
from ministral_jax.runs import sweep_run
from ministral_jax.runs.lock import owner
from ministral_jax.runs.naming import as_yaml, label, short_keys
from ministral_jax.runs.sweep import expand, measured, read_sweep, stage_directories
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.manifest import Manifest, finished, read_manifest

CACHE = Path(jax.config.jax_compilation_cache_dir)
MICRO = str(TESTS.joinpath("micro.yaml"))
SEED, SCORE = "stages.14b-short.seed", "stages.14b-pruned.options.mlp_score"
LR, STEPS = "stages.14b-short.optimizer.lr", "stages.14b-short.steps"
TEXTS = str(TESTS.joinpath("*", "test_*.py"))
FIXED = (
    f"data.sources.code={{kind: text, path: {TEXTS}, weight: 0.6}}",
    "defaults.distill.baseline=false",
    "defaults.distill.steps=3",
    "defaults.distill.optimizer.warmup=0",
    "defaults.train.steps=2",
)
STAGES, DO = ("parent", "14b-pruned", "14b-short"), ("train", "prune", "distill")
XLA = {"ENABLE_XLA_CACHES": "none", "MIN_COMPILE_TIME_SECS": "0.1"}  # else a program's key holds the cache's place
CACHED = {f"JAX_PERSISTENT_CACHE_{key}": value for key, value in XLA.items()}
ONE_DEVICE = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **CACHED}


def words(*vary: str) -> tuple[str, ...]:
    return (MICRO, "14b-short", *vary, *FIXED)


PURE = words(f"{SEED}=1,10", f"{SCORE}=activation,random")


def manifests(sweep_dir: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sweep_dir.glob("shared/*/manifest.json")}


def same(ours: Path, theirs: Path) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, load_stage(ours)[1], load_stage(theirs)[1]))


def read(sweep_dir: Path) -> dict:
    return json.loads((sweep_dir / "sweep.json").read_text())


PROCESS = """
import json, shutil, sys
from pathlib import Path
from ministral_jax.cli import main
*sweeps, plain, root = json.loads(sys.argv[1])
codes, before, root = [], {}, Path(root)
for words, name in zip(sweeps, ("swept", "swept", "bad"), strict=True):
    if name == "bad":
        shutil.copytree(root / "swept", root / "bad", symlinks=True)
    codes.append(main(["sweep", *words, "--run-dir", str(root / name)]))
    before = before or {path.parent.name: path.read_text() for path in root.glob("swept/shared/*/manifest.json")}
codes.append(main(["run", *plain, "--run-dir", str(root / "plain")]))
(root / "result.json").write_text(json.dumps({"codes": codes, "before": before}))
"""


@dataclass(frozen=True)
class Swept:
    """`swept`: 2 points, then 2 x 2; `bad`: a copy, one point of which diverges; `plain`: a run of one point."""

    root: Path
    codes: list[int]
    before: dict[str, str]
    """Manifests after the first 2."""
    output: str

    @property
    def dir(self) -> Path:
        return self.root / "swept"


def share_compiled(sweep_dir: Path) -> None:
    """Let a sweep's processes use the suite's compilation cache."""
    CACHE.mkdir(exist_ok=True)
    sweep_dir.mkdir()
    (sweep_dir / "xla").symlink_to(CACHE)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Swept:
    root = tmp_path_factory.mktemp("sweeps")
    share_compiled(root / "swept")
    commands = (
        (*words(f"{SEED}=1,10", f"{SCORE}=activation,random"), "--zip"),
        PURE,
        words(f"{LR}=1e30,3e-4", f"{SCORE}=random", f"{SEED}=10"),
        words(f"{SEED}=10", f"{SCORE}=random"),
        str(root),
    )
    command = [sys.executable, "-c", PROCESS, json.dumps(commands)]
    done = subprocess.run(command, env=ONE_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return Swept(root, **json.loads((root / "result.json").read_text()), output=done.stdout)


def test_stages_that_points_share_are_made_once(swept):
    assert swept.codes == [0, 0, 1, 0]
    after = manifests(swept.dir)
    made = [json.loads(text)["stage"] for text in after.values()]
    assert {stage: made.count(stage) for stage in STAGES} == {"parent": 1, "14b-pruned": 2, "14b-short": 4}
    assert len(swept.before) == 1 + 2 + 2
    assert swept.before.items() <= after.items()  # more points: what was there is kept
    begun = [swept.output.count(f"] {stage}: {do}") for stage, do in zip(STAGES, DO, strict=True)]
    assert begun == [1 + 1, 2 + 1, 4 + 1 + 1]  # one of each in the plain run, one that diverges
    points = sorted(path for path in swept.dir.iterdir() if "=" in path.name)
    assert [p.name for p in points][:2] == ["seed=10_mlp-score=activation", "seed=10_mlp-score=random"]
    assert len(points) == 4
    for point in points:
        assert all((point / name).is_symlink() and (point / name / "manifest.json").is_file() for name in STAGES)
        assert (point / "data").resolve() == (swept.dir / "shared" / "data")
        assert not os.path.isabs(os.readlink(point / "parent"))  # the directory may be moved
    assert read(swept.dir)["stages"] == 7 and read(swept.dir)["stages_unshared"] == 12


def test_a_point_is_what_its_own_run_would_be(swept):
    point, plain = swept.dir / "seed=10_mlp-score=random", swept.root / "plain"
    for stage in STAGES:
        assert not (plain / stage).is_symlink() and same(plain / stage, point / stage), stage
    ours, theirs = (finished(directory / "14b-short").metrics for directory in (point, plain))
    assert ours == theirs and ours["kl"] > 0
    assert not same(plain / "14b-short", swept.dir / "seed=1_mlp-score=random" / "14b-short")


def test_killed_in_the_middle_it_goes_on(swept, tmp_path):
    sweep_dir = tmp_path / "s"
    share_compiled(sweep_dir)
    for path in (*swept.dir.glob("shared/parent-*"), *swept.dir.glob("shared/data")):
        shutil.copytree(path, sweep_dir / path.relative_to(swept.dir))
    saving = "defaults.distill.checkpoint.every=1"  # makes no other stage
    command = [sys.executable, "-m", "ministral_jax", "sweep", *words(f"{SEED}=1,10", f"{SCORE}=random"), saving]
    command += ["--run-dir", str(sweep_dir)]
    process = subprocess.Popen(command, env=ONE_DEVICE, stderr=subprocess.DEVNULL)
    second = sweep_dir / "seed=10" / "14b-short"
    deadline = time.monotonic() + 900  # a guard against hanging, not a measure
    while not (second / "state" / "1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = manifests(sweep_dir)
    assert len(before) == 3 and read_manifest(second) is None
    assert [p["state"] for p in read(sweep_dir)["points"]] == ["finished", "unfinished"]
    output = subprocess.run(command, env=ONE_DEVICE, stderr=subprocess.PIPE, text=True, check=True).stderr
    assert output.count(": finished already") == 5 and output.count(": distill") == 1
    after = manifests(sweep_dir)
    assert before.items() <= after.items() and len(after) == 4
    for point in ("seed=1", "seed=10"):
        for stage in STAGES:
            assert same(sweep_dir / point / stage, swept.dir / f"{point}_mlp-score=random" / stage), (point, stage)


def test_the_report_has_a_table_and_the_figures(swept, capsys):
    assert main(["report", str(swept.dir)]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("4 of 4 points", "mlp_score", "activation", "bits_per_byte"))
    record, page = read(swept.dir), (swept.dir / "report.html").read_text()
    assert [m["stage"] for m in record["measure"]] == ["14b-short"]
    kl = {p["name"]: p["figures"]["14b-short"]["kl"] for p in record["points"]}
    for name, value in kl.items():
        assert value == finished(swept.dir / name / "14b-short").metrics["kl"]
        assert name in page and f"{value:.4f}" in page
    assert page.count("<svg") >= 3 and "<script" not in page


def test_a_point_that_diverges_is_named_and_the_others_go_on(swept):
    assert "ministral-jax: 1 of 2 points failed: lr=1e+30\n" in swept.output
    bad, good = read(swept.root / "bad")["points"]
    assert bad["state"] == "failed" and re.match(r"the loss is (nan|inf)", bad["error"])
    assert good["state"] == "finished" and good["error"] is None
    page = (swept.root / "bad" / "report.html").read_text()
    assert html.escape(bad["error"]) in page and "1 of 2 points finished, 1 failed" in page


# ---- without running anything: the cascade is made to write manifests ------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """`run_cascade` that only says it has made the stages; `refuse` maps a stage to what it raises."""
    made: list[str] = []
    refuse: dict[str, BaseException] = {}

    def run_cascade(recipe, run_dir, wanted, taken_from):
        specs = resolve_specs(recipe)
        for name in stage_directories(recipe, wanted):
            if read_manifest(run_dir / name) is None:
                write_json(run_dir / name / "stage.json", {})
                if name in refuse:
                    raise refuse[name]
                made.append(name)
                done = {"stage": name, "do": recipe.stages[name].do, "status": "finished", "metrics": {"kl": 1.0}}
                manifest = Manifest(**done, config={}, spec=specs[name])
                write_json(run_dir / name / "manifest.json", manifest.model_dump(mode="json"))

    monkeypatch.setattr(sweep_run, "run_cascade", run_cascade)
    monkeypatch.setattr(sweep_run, "write_summary", lambda recipe, run_dir: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return made, refuse


def test_a_shared_stage_that_fails_is_tried_once(pretend, tmp_path, capsys):
    made, refuse = pretend
    refuse["14b-pruned"] = UserError("no layer is left")
    argv = ["sweep", *PURE, "--run-dir", str(tmp_path / "s")]
    assert main(argv) == 1
    assert made == ["parent"]
    errors = [p["error"] for p in read(tmp_path / "s")["points"]]
    assert errors[:2] == ["no layer is left"] * 2
    assert errors[2] == "stage '14b-pruned' failed in point seed=1_mlp-score=activation, which shares it"
    assert "4 of 4 points failed" in capsys.readouterr().err
    refuse.clear()
    assert main(argv) == 0  # what failed is tried again
    assert len(made) == 1 + 2 + 4 and all(p["error"] is None for p in read(tmp_path / "s")["points"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Preempted("step 3"), SystemExit(75), RuntimeError("a fault")])
def test_what_is_no_fault_of_a_point_ends_the_sweep(pretend, tmp_path, stop):
    made, refuse = pretend
    refuse["14b-short"] = stop
    sweep = read_sweep(PURE[0], PURE[1:])
    with pytest.raises(type(stop)):
        sweep_run.run_sweep(sweep, tmp_path / "s")
    assert made == ["parent", "14b-pruned"]
    assert not (tmp_path / "s" / "report.html").exists()


def test_its_table_and_page_are_written_while_nobody_else_may(pretend, tmp_path, monkeypatch):
    owners = []
    monkeypatch.setattr(sweep_command, "finish_sweep", lambda sweep_dir: owners.append(owner(sweep_dir)))
    assert main(["sweep", *PURE, "--run-dir", str(tmp_path / "s")]) == 0
    assert [said["pid"] for said in owners] == [os.getpid()] and owner(tmp_path / "s") is None


def test_a_sweep_file_with_a_product_and_keys_that_vary_together(pretend, tmp_path, monkeypatch, capsys):
    made, _ = pretend
    monkeypatch.chdir(tmp_path)
    vary = {"product": {SCORE: ["random", "activation"]}, "zip": {LR: [1e-3, 1e-4, 1e-5], STEPS: [3, 6, 9]}}
    fixed = {word.partition("=")[0]: word.partition("=")[2] for word in FIXED[1:]}
    measure = {"stages": ["14b-pruned", "14b-short"], "metrics": ["kl"]}
    file = {"recipe": MICRO, **vary, "overrides": fixed, "stages": ["14b-short"], "measure": measure}
    Path("mine.yaml").write_text(yaml.safe_dump(file))
    assert main(["sweep", "mine.yaml"]) == 0
    names = [p["name"] for p in read(tmp_path / "runs" / "mine")["points"]]
    assert names[:2] == ["mlp-score=random_lr=1e-3_steps=3", "mlp-score=random_lr=1e-4_steps=6"] and len(names) == 6
    assert made.count("parent") == 1 and made.count("14b-short") == 6
    assert main(["sweep", "mine.yaml", f"{SEED}=1,2", f"{SCORE}=random", "--name", "more"]) == 0
    assert len(read(tmp_path / "runs" / "more")["points"]) == 6
    capsys.readouterr()
    for change, message in (
        ({"product": {SCORE: ["random"]}}, f"{SCORE} has one value and does not vary; put it under `overrides`"),
        ({"zip": {LR: []}}, f"zip.{LR} has no value"),
        ({"zip": {LR: [1, 2], SCORE: ["random", "activation"]}}, f"{SCORE} is under `product` and under `zip`"),
        ({"overrides": {LR: 1e-3}}, f"{LR} is under `overrides` and varies too"),
        ({"producct": {}}, "unknown key producct (did you mean product?)"),
        ({"measure": {"stages": ["14b-shrt"]}}, "'14b-shrt' is not run in every point (did you mean 14b-short?)"),
        ({"measure": {"metrics": ["kll"]}}, "no metric 'kll' (did you mean kl?)"),
        ({"recipe": "nowhere.yaml"}, "recipe 'nowhere.yaml' is not a file"),
    ):
        Path("bad.yaml").write_text(yaml.safe_dump({**file, **change}))
        assert main(["sweep", "bad.yaml"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("runs/bad").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([f"{LR}r=1,2"], f"point lrr=1: .*unknown key {LR}r .*mean lr?"),
        (["stages.14b-shrt.seed=1,2"], "point seed=1: .*no stage '14b-shrt' .*did you mean 14b-short?"),
        ([f"{LR}=fast,1e-3"], "point lr=fast: .*valid number.*got 'fast'"),
        ([f"{LR}=[1e-3,1e-4]", f"{SCORE}=random,activation"], "valid number"),
        ([f"{LR}="], "'stages.14b-short.optimizer.lr=' has no value"),
        ([f"{LR}=1e-3,,1e-4"], "must have the form dotted.key=v1,v2 with values in YAML"),
        ([f"{LR}=1e-3], [1"], "must have the form dotted.key=v1,v2 with values in YAML"),
        (["=1,2"], "'=1,2' must have the form dotted.key=v1,v2"),
        ([f"{LR}=1e-3"], "nothing varies in the sweep of"),
        ([f"{LR}=1e-3,0.001"], "the point lr=1e-3 occurs twice"),
        (["data.sources.code.path=a b,a-b"], "both be called path=a-b: data.sources.code.path = 'a b' and 'a-b'"),
        ([f"{LR}=1,2", f"{LR}=3,4"], "stages.14b-short.optimizer.lr is given twice"),
        ([f"{LR}=1,2", f"{SCORE}=random,activation,weight_norm", "--zip"], "lr has 2, .*mlp_score has 3"),
        (["stages.14b-hf.dtype=float32,bfloat16", "14b-short"], "are the same in every .*dtype makes no difference"),
        (["defaults.train.checkpoint.every=1,2", "parent"], "every makes no difference there"),
        ([f"{LR}=1,2", "14b-shrt"], "no stage '14b-shrt'"),
        ([f"{LR}=1,2", "--name", "a/b"], "--name 'a/b' must be letters"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, given, message):
    assert main(["sweep", MICRO, *given, "--run-dir", str(tmp_path / "s")]) == 2
    _, *error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0]), error
    assert list(tmp_path.iterdir()) == []


def test_directories_that_are_something_else(pretend, tmp_path, capsys):
    argv = ["sweep", *words(f"{LR}=1e-4,1e-2", f"{SCORE}=random"), "--run-dir", str(tmp_path)]
    (tmp_path / "lr=0.01" / "parent").mkdir(parents=True)
    assert main(argv) == 2 and "was not made by a sweep" in capsys.readouterr().err
    (tmp_path / "recipe.json").write_text("{}")
    assert main(argv) == 2 and "is the directory of a single run" in capsys.readouterr().err
    assert not (tmp_path / "sweep.json").exists()


# ---- pure ------------------------------------------------------------------------------------------------------------


def test_values_with_commas_quotes_and_brackets():
    sweep = read_sweep(MICRO, ["a=[1,2],[3,4]", 'b="x,y",z', "c={k: 1, l: 2},{k: 3}", "d='it''s',null", "e=1e-4"])
    values = {"a": [[1, 2], [3, 4]], "b": ["x,y", "z"], "c": [{"k": 1, "l": 2}, {"k": 3}], "d": ["it's", None]}
    assert sweep.product == values and sweep.axes == [{key: values[key]} for key in "abcd"]
    assert sweep.overrides == {"e": 1e-4} and sweep.name == "micro-a-b-c-d"
    texts = ("1e-4", "yes", "a: b", "#x", " x ", '"', "ü\n", "[", "*a", "word", "/a/b.c")
    for value in (*texts, *(value for several in values.values() for value in several)):
        assert yaml12.load(as_yaml(value)) == value and "\n" not in as_yaml(value)


def test_names():
    assert [label(v) for v in (1e-4, 0.001, 0.01, 0.0015, 1.5, 2.0, 1000, True, None, "norm_ratio", -0.5)] == (
        ["1e-4", "1e-3", "0.01", "0.0015", "1.5", "2", "1000", "true", "null", "norm-ratio", "-0.5"]
    )
    assert label("/data/../a b;rm -rf") == "data-..-a-b-rm--rf" and label([1, 2]) == "1-2" and label("") == "empty"
    long = [label("x" * 60 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 32
    keys = ["stages.8b-short.optimizer.lr", "stages.3b-short.optimizer.lr", "defaults.prune.options.layer_score"]
    assert list(short_keys(keys).values()) == ["8b-short.lr", "3b-short.lr", "layer_score"]


def test_a_baseline_is_shared_where_its_making_is():
    argv = (MICRO, "14b-short-scratch", "14b-short", f"{LR}=1e-4,1e-2", f"{SCORE}=activation,random")
    points = expand(read_sweep(argv[0], argv[1:]))
    assert len({p.stages["14b-short-scratch"] for p in points}) == 2
    assert len({p.stages["14b-short"] for p in points}) == 4
    assert [m.stage for m in measured(read_sweep(argv[0], argv[1:]), points)] == ["14b-short"]


def test_the_packaged_sweep():
    sweep = read_sweep("configs/sweeps/tiny_layer_score.yaml")
    points = expand(sweep)
    assert sweep.axes[0] == {"stages.8b-short.optimizer.lr": [3e-4, 3e-3]}
    assert len(points) == 6 and len({where for p in points for where in p.stages.values()}) == 3 + 3 + 6
