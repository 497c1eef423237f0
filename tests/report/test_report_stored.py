"""The report's section on record stages: what a store takes, what it leaves out, and what another size would have."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_run import shard, write_json, write_record, write_run

from ministral_jax.report.collect import read_run
from ministral_jax.report.details import stages
from ministral_jax.report.page import build_report
from ministral_jax.report.stored import Kept, stored
from ministral_jax.report.stored_plots import against_bytes, by_shard, distribution
from ministral_jax.teachers.codecs import DenseCodec, HiddenCodec, SampledCodec, TopKCodec
from ministral_jax.teachers.statistics import EDGES

TOPK = TopKCodec(entries=32)


def text_of(markup: str | None) -> str:
    """Tables' cells are set apart by bars."""
    assert markup
    return " ".join(re.sub(r"<[^>]*>", "|", re.sub(r"<svg.*?</svg>", "", markup, flags=re.S)).split())


def cells(markup: str | None, head: str) -> list[list[str]]:
    """Every table row that begins with `head`."""
    root = ElementTree.fromstring(f"<div>{markup}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    return [row[1:] for row in rows if row[0] == head]


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", "14b-pruned")


def test_what_topk_leaves_out(run):
    manifest = write_record(run, "logits", TOPK)
    made = stored(read_run(run))
    train = json.loads(manifest.read_text())["store"]["train"]
    text, mean = text_of(made), train["tail_mass"]["mean"]
    assert f"32 entries per token leave out {100 * mean:.2f} % of the teacher’s probability" in text
    shares = [100 * train["tail_mass"][name] for name in ("mean", "p50", "p90", "p99", "max")]
    [left], [bound] = cells(made, "probability left out"), cells(made, "gradient error, at most")
    np.testing.assert_allclose([float(c.removesuffix("\u202f%")) for c in left], shares, rtol=5e-3)
    np.testing.assert_allclose([float(c) for c in bound], np.array(shares) / 50, rtol=2e-2)
    by_shard = [100 * shard(TOPK, i).statistics["tail_mass"] / 4000 for i in range(5)]
    assert f"Shard to shard the mean is {by_shard[0]:.2f} % to {by_shard[4]:.2f} %" in text
    assert made is not None and made.count("<svg") == 3
    # 48 bytes of entries, 12.88 of the rest
    assert cells(made, "train") == [
        ["32 most probable, in 8 bits", "160", "20\u202fk", "5", "1.22\u202fMB", "60.9", "1.50"]
    ]
    assert cells(made, "held out") == [
        ["hidden states, bfloat16", "32", "4\u202fk", "1", "516\u202fkB", "129", "\u2013"]
    ]
    assert cells(made, "together") == [["1.22\u202fMB", "60.9", "516\u202fkB", "129"]]
    assert cells(made, "ids of the entries") == [["640\u202fkB", "32.0", "\u2013", "\u2013"]]


def test_what_other_sizes_would_have_taken(run):
    write_record(run, "logits", TOPK)
    made = stored(read_run(run))
    # an id 1 byte and a bit more or less per halving or doubling, a log-probability half a byte
    for entries, id_bytes in ((8, 1.25), (16, 1.125), (64, 0.875), (128, 0.75)):
        [[left, bound, takes, size, against]] = cells(made, str(entries))
        expected = 12.878 + entries * (id_bytes + 0.5)
        assert takes.startswith("\u2248") and float(takes[2:]) == pytest.approx(expected, rel=6e-3)
        assert size.startswith("\u2248") and against[0] == ("\u2212" if entries < 32 else "+")
        assert float(re.sub(r"\D", "", against)) == pytest.approx(100 * abs(expected / 60.878 - 1), abs=0.6)
        assert float(bound) == pytest.approx(float(left.removesuffix("\u202f%")) / 50, rel=1e-2)
    [stands] = cells(made, "32stored")
    assert stands[2:] == ["60.9", "1.22\u202fMB", "\u2013"]


def test_every_codec_in_one_page(run):
    for name, codec in (
        ("a", TOPK),
        ("b", TOPK),  # the same figures twice
        ("c", SampledCodec()),
        ("d", HiddenCodec(dtype="float8")),
        ("e", DenseCodec()),
    ):
        write_record(run, name, codec)
    page = build_report(run).read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids)) and "stored" in ids
    made = stored(read_run(run))
    text = text_of(made)
    for said in ("What the stored teachers leave out", "a: what parent says", "50 draws, systematic", "12.0", "float8"):
        assert said in text
    assert "all logits" in text and "add noise to the gradient, and no bias" in text
    assert len(cells(made, "gradient error, at most")) == 2 and made is not None and made.count("<svg") == 6
    assert cells(stages(read_run(run)), "a")[0][:6] == [
        "record",
        "parent",
        "finished",
        "24.6\u202fk",
        "\u2013",
        "1\u202fmin 23\u202fs",
    ]


def test_one_of_each_codec_is_told_by_its_bytes(run):
    write_record(run, "states", HiddenCodec())
    made = stored(read_run(run))
    assert "The stored teacher takes 129 bytes per token" in text_of(made)
    assert "probability left out" not in text_of(made) and "<svg" not in str(made)


def test_nothing_recorded(run):
    assert stored(read_run(run)) is None and 'id="stored"' not in build_report(run).read_text(encoding="utf-8")
    manifest = write_record(run, "logits", TOPK)
    for broken in ("{", "{}", '{"store": []}', '{"store": {"train": 3}}', '{"status": "finished", "store": {}}'):
        manifest.write_text(broken)
        assert stored(read_run(run)) is None
    manifest.write_text('{"store": {"train": {"rows": 3}}}')
    assert "What the stored teacher leaves out" in text_of(stored(read_run(run)))
    manifest.unlink()
    assert stored(read_run(run)) is None


ODD = [math.nan, math.inf, -math.inf, 1e300, -1.0, 0, None, "<b>x", True, 10**400, [], {}, {"8": "y"}, [1, None]]


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything in it, of lists their first entry."""
    for key in tree if isinstance(tree, dict) else range(min(len(tree), 1)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(tree[key], (*path, key))


def put(tree: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def test_values_no_report_expects(run):
    manifest = write_record(run, "logits", TOPK)
    good, chance = json.loads(manifest.read_text()), random.Random(0)
    everywhere = list(places(good["store"]["train"]))
    assert len(everywhere) > 35
    # one place at a time, then many: deepest first, so that what is replaced is still there
    damage = [[path] for path in everywhere]
    damage += [sorted(chance.sample(everywhere, 12), key=len, reverse=True) for _ in range(12)]
    for paths in damage:
        odd = copy.deepcopy(good)
        for path in paths:
            put(odd["store"]["train"], path, chance.choice(ODD))
        write_json(manifest, odd)
        made = stored(read_run(run))
        root = ElementTree.fromstring(str(made))
        assert not re.search(r'[dxy]="[^"]*(nan|inf)', ElementTree.tostring(root, encoding="unicode")), paths
        assert "<b>x" not in str(made)


def test_figures_of_what_cannot_be_drawn():
    tail = [1e-3, 1e-2]
    assert distribution("model-0", tail, [3, 4], {"mean": 2e-3}, "a")
    assert distribution("model-0", tail, [0, 4], {"mean": math.nan}, "a")
    for edges, counts in (
        (tail, [0, 0]),
        (tail[::-1], [1, 1]),
        (tail, [1]),
        ([], []),
        (tail, [-1, 2]),
        ([0, 1], [1, 1]),
    ):
        assert distribution("model-0", edges, counts, {}, "a") is None
    assert by_shard("model-0", {"mean": [0.1], "p99": [0.1, 0.0]}, "a") is None
    assert against_bytes("model-0", [(8, 10.0, 0.1, True), (16, 20.0, 0.0, False)], "a") is None
    many = by_shard("model-0", {"mean": np.linspace(0.01, 0.02, 100_000).tolist()}, "a")
    assert many and len(many) < 60_000  # as large as that of some hundred shards


def test_bars_hold_all_tokens():
    """181 bins are 30 bars of six and one of one."""
    counts = np.random.default_rng(0).integers(1, 50, len(EDGES))
    drawn = distribution("model-0", EDGES.tolist(), counts.tolist(), {}, "a")
    corners = r"M (\S+) (\S+) L (\S+) \S+ L \S+ (\S+) L \S+ \S+ z"
    bars = np.array([[float(v) for v in found] for found in re.findall(corners, str(drawn))])[-31:]
    widths, heights = bars[:, 2] - bars[:, 0], bars[:, 1] - bars[:, 3]
    np.testing.assert_allclose(widths, [widths[0]] * 30 + [widths[0] / 6], rtol=1e-3)
    np.testing.assert_allclose(bars[1:, 0], bars[:-1, 2], atol=1e-3)
    np.testing.assert_allclose(
        heights / heights.sum(), np.add.reduceat(counts, np.arange(0, 181, 6)) / counts.sum(), atol=1e-4
    )


def test_sizes_that_are_no_powers_of_two():
    found = {"codec": {"kind": "topk", "entries": 50}, "tokens": 10, "bytes": {"ids": 500, "logprobs": 500}}
    kept = Kept(
        "train",
        found | {"curve": {"8": 0.4, "64": 0.1, "0": 0.9, "x": 0.3, "9" * 12: 0.0}, "tail_mass": {"mean": 0.12}},
    )
    assert [(s.entries, s.left_out, s.stored) for s in kept.sizes] == [
        (8, 0.4, False),
        (50, 0.12, True),
        (64, 0.1, False),
    ]
    assert kept.sizes[1].bytes_per_token == 100
    assert kept.sizes[2].bytes_per_token == pytest.approx(64 * (2 + math.log2(50 / 64) / 8))
