"""The comparison of two runs: times may differ, one bit of a result may not."""

import json
import shutil
import sys

import jax.numpy as jnp
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from paths import ROOT

from ministral_jax.training.checkpoint import save_params

sys.path.insert(0, str(ROOT / "benchmarks"))
import same_results

STAGES = ("student", "logits", "hf")
PARAMS = {"decoder": {"embed": jnp.arange(12.0).reshape(3, 4), "norm": jnp.ones(4, jnp.bfloat16)}}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in value) if path.suffix == ".jsonl" else json.dumps(value))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """What a finished run leaves, of every sort."""
    run = tmp_path_factory.mktemp("runs") / "before"
    for stage in STAGES:
        results = {"tokens": 256, "metrics": {"kl": 0.25}, "data": {"digest": "abc"}, "prune": {"tokens": None}}
        lineage = {"inputs": {"parent": {"digest": "one"}}, "seconds": 1.5, "versions": {"jax": "1"}}
        write(run / stage / "manifest.json", {"stage": stage, "status": "finished", **results, **lineage})
    save_params(run / "student" / "params", PARAMS)
    trained = {"kind": "train", "step": 1, "loss": 0.5, "tokens_per_second": 10.0}
    write(
        run / "student" / "metrics.jsonl", [trained, {"kind": "time", "step": 1, "at": 3.0, "seconds": {"step": 1.0}}]
    )
    write(run / "student" / "answers.json", {"answers": [{"answer": "12"}]})
    write(run / "logits" / "store" / "store.json", {"info": {"teacher": {"digest": "one"}}, "rows": 4})
    (run / "logits" / "store" / "c").write_bytes(b"\0\1")
    write(run / "hf" / "hf" / "config.json", {"layers": 2})
    write_rows(run / "data" / "abc" / "train.array_record", [b"row 1", b"row 2"])
    write(run / "summary.json", {"wall_seconds": 9.0, "children": {"8b": {"kl": 0.25}}})
    return run


@pytest.fixture
def after(before, tmp_path):
    return shutil.copytree(before, tmp_path / "after")


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    write(path, values)


def test_other_times_and_lineage_are_the_same_result(before, after, capsys):
    edit(after / "student" / "manifest.json", lambda m: m.update(seconds=7.0, versions={}, inputs={}, git="f"))
    edit(after / "student" / "manifest.json", lambda m: m["metrics"].update(extra=None))
    (after / "student" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5, "mfu": 0.4}\n')
    edit(after / "logits" / "store" / "store.json", lambda s: s["info"]["teacher"].update(digest="two"))
    edit(after / "summary.json", lambda s: s.update(wall_seconds=1.0))
    shutil.rmtree(after / "student" / "params")
    save_params(after / "student" / "params", PARAMS)  # other names of files, other times in them
    assert same_results.main([str(before), str(after)]) == 0
    assert "5 of 5 the same" in capsys.readouterr().out


def flip(run):
    bits = PARAMS["decoder"]["embed"].at[1, 1].set(jnp.nextafter(jnp.float32(5), jnp.float32(6)))
    shutil.rmtree(run / "student" / "params")
    save_params(run / "student" / "params", {"decoder": {**PARAMS["decoder"], "embed": bits}})


def rows(run):
    (run / "data" / "abc" / "train.array_record").unlink()
    write_rows(run / "data" / "abc" / "train.array_record", [b"row 1", b"row 3"])


HARM = {
    "parameter": ("student", flip, "params decoder/embed differs in 1 of 12 values"),
    "no parameters": ("student", lambda run: shutil.rmtree(run / "student" / "params"), "is only in"),
    "figure": (
        "student",
        lambda run: edit(run / "student" / "manifest.json", lambda m: m["metrics"].update(kl=0.25000000000000006)),
        "manifest.metrics.kl is 0.25 and 0.25000000000000006",
    ),
    "data": (
        "student",
        lambda run: edit(run / "student" / "manifest.json", lambda m: m["data"].update(digest="abd")),
        'manifest.data.digest is "abc" and "abd"',
    ),
    "record": (
        "student",
        lambda run: write(run / "student" / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": 0.25}]),
        "metrics.jsonl[0].loss is 0.5 and 0.25",
    ),
    "record lost": ("student", lambda run: write(run / "student" / "metrics.jsonl", []), "has 1 and 0 entries"),
    "answer": (
        "student",
        lambda run: write(run / "student" / "answers.json", {"answers": [{"answer": "13"}]}),
        'answers.json.answers[0].answer is "12" and "13"',
    ),
    "store": ("logits", lambda run: (run / "logits" / "store" / "c").write_bytes(b"\0\2"), "differ"),
    "export": ("hf", lambda run: (run / "hf" / "hf" / "config.json").write_text('{ "layers": 2}'), "differ"),
    "export lost": ("hf", lambda run: (run / "hf" / "hf" / "config.json").unlink(), "config.json is only in"),
    "stage lost": ("hf", lambda run: shutil.rmtree(run / "hf"), "is not a finished stage"),
    "rows": ("(data)", rows, "train.array_record differ"),
    "summary": ("(run)", lambda run: edit(run / "summary.json", lambda s: s.update(children={})), "summary.json.child"),
}


@pytest.mark.parametrize("harm", HARM)
def test_one_other_result_is_told(before, after, capsys, harm):
    where, do, said = HARM[harm]
    do(after)
    assert same_results.main([str(before), str(after)]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line]
    assert len(told) == 1 and told[0].startswith(where) and said in told[0], told


def test_a_directory_without_a_stage_is_no_comparison(tmp_path, capsys):
    with pytest.raises(SystemExit):
        same_results.main([str(tmp_path), str(tmp_path)])
    assert "has no finished stage" in capsys.readouterr().err
