"""Rows that cannot be used: one run names them all, and they are left out where a source says so."""

import json

import numpy as np
import pytest
from PIL import Image

from ministral_jax.data import bad_rows
from ministral_jax.data.bad_rows import BadRows
from ministral_jax.data.config import DataConfig, SourceConfig
from ministral_jax.data.prepare import prepare
from ministral_jax.data.prompts import RowCheck, open_prompts
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
LENGTH = 128
KINDS = {
    "texts": lambda n: {"text": f"text {n}"},
    "chats": lambda n: {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]},
    "questions": lambda n: {"question": f"{n}?", "answer": f"{n}", "image": "good.png"},
    "preferences": lambda n: {"prompt": f"{n}?", "chosen": f"{n}", "rejected": "no"},
}
BAD = [
    (b'{"text": ""}', "'text' must be text that is not empty, got ''"),
    (b"{'text': 1}", "not JSON"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b"[1]", "must be an object"),
    (b'{"messages": [{"role": "assistant", "content": "4"}]}', "roles"),
    (b'{"question": "q", "answer": "a", "image": "none.png"}', "does not exist"),
    (b'{"question": "q", "answer": "a", "image": "cut.png"}', "cannot be read"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "a"}', "are the same"),
]


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(noise).resize((4, 4)).save(tmp_path / "good.png")
    Image.fromarray(noise).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:900])
    bad_rows.say_once.cache_clear()
    return tmp_path


def write(folder, good, bad, kind="chats"):
    """`bad` rows every third line from the second on, among `good` ones."""
    rows = [json.dumps(KINDS[kind](n)).encode() for n in range(good)]
    for place, row in enumerate(bad):
        rows.insert(1 + 3 * place, row)
    (folder / "rows.jsonl").write_bytes(b"\n".join(rows))


def config(folder, on_bad_row="stop", kind="jsonl", **changes):
    source = dict(kind=kind, path=str(folder / "rows.jsonl"), on_bad_row=on_bad_row)
    tokenizer = dict(vocab=2048, special=64)
    return DataConfig(**dict(dict(tokenizer=tokenizer, sources=dict(s=source), held_out=0.1, patches=64), **changes))


def packed(folder, on_bad_row="stop", **changes):
    return prepare(config(folder, on_bad_row, **changes), LENGTH, VISION, folder / "data")


@pytest.mark.parametrize("kind", KINDS)
def test_all_bad_rows_are_named_at_once(folder, kind):
    write(folder, 20, [row for row, _ in BAD[:5]], kind)
    with pytest.raises(UserError, match=r"^data.sources.s: 5 of 25 rows cannot be used: .*on_bad_row: skip") as error:
        packed(folder)
    for place, (_, reason) in enumerate(BAD[:5]):
        assert f"rows.jsonl row {2 + 3 * place}: {reason}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((folder / "data").glob("*/index.json")) and not list((folder / "data" / "documents").iterdir())


def test_of_many_bad_rows_the_first_are_named_and_all_are_counted(folder):
    write(folder, 60, [row for row, _ in BAD] * 2)
    with pytest.raises(
        UserError, match=r"16 of 76 rows .* row 14: roles .*; and 11 more \(mend them, or leave"
    ) as error:
        packed(folder)
    assert str(error.value).count("rows.jsonl row ") == bad_rows.SHOWN


def test_one_bad_row_is_said_as_it_is(folder):
    write(folder, 20, [BAD[0][0]])
    with pytest.raises(UserError, match=r"rows.jsonl row 2: 'text' .* \(mend it, or leave such rows out with data.so"):
        packed(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_left_out_where_the_source_says_so(folder, kind, capfd):
    write(folder, 20, [row for row, _ in BAD], kind)
    data = packed(folder, "skip")
    left_out = data.counts["left_out"]["s"]
    assert (left_out["rows"], left_out["of"], len(left_out["reasons"])) == (8, 28, bad_rows.SHOWN)
    said = capfd.readouterr().err
    assert "data.sources.s: 8 of 28 rows are left out: " in said and "row 2: 'text' must" in said and "3 more" in said
    write(folder, 20, [], kind)
    clean = packed(folder)
    assert clean.counts["left_out"]["s"] == {"rows": 0, "of": 20, "reasons": []}
    for split in ("train", "held_out"):
        assert data.counts[split] == clean.counts[split]


def test_what_was_packed_without_bad_rows_is_refused_where_none_may_be_left_out(folder):
    write(folder, 20, [BAD[0][0], BAD[6][0]])
    packed(folder, "skip")
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 22 rows cannot be used: .*row 2: 'text'"):
            packed(folder)
    assert packed(folder, "skip").counts["left_out"]["s"]["rows"] == 2


@pytest.mark.parametrize(("bad", "fits"), [(8, True), (9, False)])
def test_more_than_half_are_too_many_to_be_left_out(folder, bad, fits):
    write(folder, 8, [BAD[0][0]] * bad)
    if fits:
        assert packed(folder, "skip").counts["left_out"]["s"]["rows"] == bad
        return
    with pytest.raises(UserError, match=r"9 of 17 rows cannot be used, too many to be left out: .*row 2"):
        packed(folder, "skip")


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_file_of_another_kind_is_not_read_to_its_end(folder, on_bad_row, monkeypatch):
    monkeypatch.setattr(bad_rows, "HOPELESS", 10)
    write(folder, 1, [])
    with (folder / "rows.jsonl").open("a") as file:
        file.write(5000 * '\n{"txt": "a"}')
    with pytest.raises(UserError, match=r"10 of 11 rows cannot be used.* and 5 more"):
        packed(folder, on_bad_row)


def test_memory_does_not_grow_with_bad_rows():
    bad = BadRows("s", SourceConfig(kind="jsonl", path="a", on_bad_row="skip"))
    for n in range(20_000):
        bad.good(f"good {n}")
        bad.add(f"row {n}", UserError(f"row {n}: bad"))
    assert bad.settle() == {"rows": 20_000, "of": 40_000, "reasons": [f"row {n}: bad" for n in range(5)]}


def test_what_is_no_fault_of_a_row_stops_at_once():
    bad = BadRows("s", SourceConfig(kind="jsonl", path="a", on_bad_row="skip"))
    with pytest.raises(UserError, match="no sandbox on this machine"):
        bad.add("row 1", UserError("no sandbox on this machine"))


def test_files_of_text_are_left_out_too(folder):
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"text {n}")
    (folder / "6.txt").write_text(" ")
    (folder / "7.txt").write_bytes(b"caf\xe9")
    source = dict(kind="text", path=str(folder / "*.txt"))
    with pytest.raises(UserError, match=r"2 of 8 files cannot be used: .*is (empty|not UTF-8).*is (empty|not UTF-8)"):
        packed(folder, sources=dict(s=source))
    counts = packed(folder, sources=dict(s={**source, "on_bad_row": "skip"})).counts
    assert counts["left_out"]["s"]["rows"] == 2
    assert sum(counts[split]["sources"]["s"]["documents"] for split in ("train", "held_out")) == 6


def test_pictures_that_no_row_holds_are_named_at_once_or_left_out(folder):
    large = json.dumps({"question": "q", "answer": "a", "image": "large.png"}).encode()
    write(folder, 20, [large, BAD[0][0], large], "questions")
    with pytest.raises(UserError, match=r"rows.jsonl row 5: 'text'"):
        packed(folder)
    write(folder, 20, [large, large], "questions")
    with pytest.raises(UserError, match=r"2 of 22 rows .*row 2 \(data.sources.s\) needs 144 image .*row 5 \(data.sou"):
        packed(folder)
    counts = packed(folder, "skip").counts
    assert (counts["left_out"]["s"]["rows"], counts["left_out"]["s"]["of"]) == (2, 22)
    assert sum(counts[split]["sources"]["s"]["documents"] for split in ("train", "held_out")) == 20
    with pytest.raises(UserError, match=r"2 of 22 rows cannot be used"):
        packed(folder)


PROMPTS = [
    (b'{"text": "a"}', "needs 'messages', 'prompt'"),
    (b'{"prompt": "2+2?"}', "column answer"),
    (json.dumps({"prompt": "word " * 99, "answer": "4"}).encode(), "too long"),
    (b'{"prompt": "a", "answer": "4", "image": "cut.png"}', "cannot be read"),
]


def short_and_answered(looked_at):
    def row(prompt, held_out):
        looked_at.append(prompt.where)
        if len(prompt.rendered.tokens) > 64:
            raise UserError(f"{prompt.where}: too long")
        if "answer" not in prompt.columns:
            raise UserError(f"{prompt.where}: no column answer")

    return RowCheck(["short", "answered"], row)


def test_bad_prompts_are_named_at_once_or_left_out_the_same_each_time(folder):
    rows = [json.dumps({"prompt": f"{n}+1?", "answer": str(n + 1)}).encode() for n in range(20)]
    for place, (row, _) in enumerate(PROMPTS):
        rows.insert(1 + 3 * place, row)
    (folder / "rows.jsonl").write_bytes(b"\n".join(rows))

    def opened(on_bad_row, looked_at):
        check = short_and_answered(looked_at)
        return open_prompts(config(folder, on_bad_row), VISION, folder / "data", check=check)

    with pytest.raises(UserError, match=r"^data.sources.s: 4 of 24 rows cannot be used: ") as error:
        opened("stop", [])
    for place, (_, reason) in enumerate(PROMPTS):
        assert f"rows.jsonl row {2 + 3 * place}: " in str(error.value) and reason in str(error.value)
    looked_at: list[str] = []
    first = opened("skip", looked_at)
    kept = [document.columns["answer"] for split in (first.train, first.held_out) for document in split["s"]]
    assert sorted(map(int, kept)) == list(range(1, 21)) and len(looked_at) > 20
    again: list[str] = []
    second = opened("skip", again)
    assert (first.train, first.held_out) == (second.train, second.held_out) and len(again) == 1
    with pytest.raises(UserError, match="4 of 24 rows cannot be used"):
        opened("stop", [])
    other = RowCheck(["another"], lambda prompt, held_out: None)
    with pytest.raises(UserError, match="2 of 24 rows cannot be used"):
        open_prompts(config(folder), VISION, folder / "data", check=other)
