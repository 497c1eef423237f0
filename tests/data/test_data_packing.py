"""Packing against the documents it started from, and batches against the rows."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save

from ministral_jax.data.chat import ANSWER, TEXT, TRAINABLE
from ministral_jax.data.config import DataConfig, SourceConfig
from ministral_jax.data.documents import tokenise
from ministral_jax.data.packing import pack
from ministral_jax.data.pipeline import Order, batches, chosen_rows, held_out, row_numbers
from ministral_jax.data.prepare import prepare
from ministral_jax.data.rows import content_hash
from ministral_jax.data.sources import open_source
from ministral_jax.data.tokenizer import load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
TOKENIZER = dict(vocab=2048, special=64)
LENGTH, PATCHES = 64, 48
WORDS = ["the", "row", "holds", "packed", "documents", "and", "images", "of", "several", "sources"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Text of mixed lengths, and a JSONL of texts, conversations and questions about pictures of several sizes."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)

    def sentence(count):
        return " ".join(rng.choice(WORDS, count)) + "."

    (folder / "text").mkdir()
    for n in range(60):
        (folder / "text" / f"{n:02d}.txt").write_text(f"{n}: {sentence(rng.integers(1, 160))} é")
    rows = []
    for n in range(70):
        name = f"{n}.png"
        Image.fromarray(rng.integers(0, 256, (rng.integers(1, 12), rng.integers(1, 12), 3), np.uint8)).save(
            folder / name
        )
        rows.append({"image": name, "question": f"{n}?", "answer": sentence(rng.integers(1, 8))})
        if n % 10 == 0:
            rows[-1] = {"images": [name, "0.png"], "question": f"{n}?", "answer": "both"}
        if n % 3 == 0:
            turns = [sentence(rng.integers(1, 12)) for _ in range(4)]
            roles = ["user", "assistant"] * 2
            rows.append({"messages": [dict(role=r, content=c) for r, c in zip(roles, turns, strict=True)]})
    rows.append({"messages": [dict(role="user", content="long"), dict(role="assistant", content=sentence(150))]})
    (folder / "chat.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    return folder


def config(inputs, **changes):
    sources = dict(
        text=dict(kind="text", path=str(inputs / "text"), weight=3),
        chat=dict(kind="jsonl", path=str(inputs / "chat.jsonl"), weight=1),
    )
    return DataConfig(**dict(dict(tokenizer=TOKENIZER, sources=sources, held_out=0.2, patches=PATCHES), **changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def data(inputs, root):
    return prepare(config(inputs), LENGTH, VISION, root)


@pytest.fixture(scope="module")
def sources(inputs, root, data):
    chosen = config(inputs)
    opened = {name: open_source(name, source) for name, source in chosen.sources.items()}
    return {n: tokenise(s, data.tokenizer, VISION, root / "documents") for n, s in opened.items()}


def rows_of(data, split):
    """Every row of a split once."""
    count = data.counts["train"]["rows"]
    stream = held_out(data, 4) if split == "held_out" else batches(data, 1, Order(0), range(count))
    return [row for batch in stream for row in rows_in(batch)]


def rows_in(batch):
    """Each row of a batch; without pictures, one that has none."""
    none = {"images": None, "image_slot": np.full(LENGTH, -1)}
    arrays = {key: array for key, array in batch.items() if key != "image_sizes"}
    return [{**none, **{key: array[i] for key, array in arrays.items()}} for i in range(len(batch["tokens"]))]


def pieces_of(row, bos):
    """(tokens, pictures) of each packed piece of a row, with pictures as (columns, patches) from the batch arrays."""
    for segment in range(1, row["segments"].max() + 1):
        at = np.flatnonzero(row["segments"] == segment)
        assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
        assert np.array_equal(row["positions"][at], np.arange(len(at)))
        tokens = row["tokens"][at]
        assert tokens[0] == bos
        slots = row["image_slot"][at]
        assert np.array_equal(slots >= 0, tokens == 10)
        used = sorted({int(i) for s in slots[slots >= 0] for i in range(4 * s, 4 * s + 4)})
        yield tokens, used


def test_rows_hold_every_document_once(data, sources):
    d = data.tokenizer
    for split in ("train", "held_out"):
        rows = rows_of(data, split)
        found: dict[str, int] = {}
        words = b""
        for row in rows:
            assert row["tokens"].shape == (LENGTH,)
            padding = row["segments"] == 0
            for key in ("tokens", "positions", "loss_mask", "answer_mask", "text_bytes"):
                assert not row[key][padding].any()
            assert (row["image_slot"][padding] == -1).all()
            seen = 0
            for tokens, used in pieces_of(row, d.bos):
                assert used == list(range(seen, seen + len(used)))
                seen += len(used)
                found[tokens.tobytes()] = found.get(tokens.tobytes(), 0) + 1
                words += b"".join(d.tekken.id_to_byte_piece(int(t)) for t in tokens)
            patches = np.zeros((0, 12)) if row["images"] is None else row["images"].patches
            assert seen == len(patches) <= PATCHES
        counts = data.counts[split]
        for name, documents in sources.items():
            inside = (documents.drawn(0.2)) == (split == "held_out")
            tally = counts["sources"][name]
            lowest, highest = 10**9, 0
            for i in np.flatnonzero(inside):
                tokens = documents.tokens[documents.starts[i] : documents.starts[i + 1]].astype(np.int32)
                if len(tokens) <= LENGTH and not documents.plain[i]:  # never cut
                    lowest, highest = min(lowest, found[tokens.tobytes()]), max(highest, found[tokens.tobytes()])
            if name == "chat":
                assert lowest >= int(tally["passes"]) >= 1 and highest <= int(tally["passes"]) + 1
            if tally["passes"] == 1:
                assert tally["documents"] == inside.sum() and (name == "text" or highest == 1)
        passes = [tally["passes"] for tally in counts["sources"].values()]
        assert min(passes) == 1 and (split == "train" or max(passes) == 1)
        if split == "held_out":
            texts = [Path(sources["text"].where(i)).read_bytes() for i in np.flatnonzero(sources["text"].drawn(0.2))]
            assert len(texts) > 3
            # Every byte of text is predicted exactly once, windows included: each begins with <s>.
            assert sum(row["text_bytes"].sum() for row in rows) == sum(map(len, texts))
        assert counts["tokens"] == sum((row["segments"] > 0).sum() for row in rows)
        assert counts["padding"] < (0.05 if split == "train" else 0.1)  # no held-out window is cut to fill a row


def test_documents_are_cut_and_reassembled(sources):
    """Pieces put together give each document back, continued windows behind one extra token for <s>."""
    for spread in (False, True):
        members = {name: np.arange(len(d.keys)) for name, d in sources.items()}
        rows, tallies = pack(sources, members, dict(text=1, chat=1), LENGTH, PATCHES, spread)
        rows = list(rows)
        if spread:  # in any order
            rows = [[piece] for piece in sorted((p for row in rows for p in row), key=lambda p: p.start)]
        covered = {}
        for row in rows:
            assert sum(p.size for p in row) <= LENGTH
            used = 0
            for piece in row:
                documents = list(sources.values())[piece.source]
                used += documents.patch_starts[piece.document + 1] - documents.patch_starts[piece.document]
                cuts = covered.setdefault((piece.source, piece.document), [0])
                if piece.start == 0 and cuts[-1] != 0:
                    cuts.append(0)  # another pass
                assert piece.start == cuts[-1] < piece.stop
                cuts[-1] = piece.stop
                if piece.start or piece.stop < len_of(documents, piece.document):
                    assert documents.plain[piece.document] or len_of(documents, piece.document) > LENGTH
            assert used <= PATCHES
        for s, (name, documents) in enumerate(sources.items()):
            for i in range(len(documents.keys)):
                cuts = covered[s, i]
                complete = [cut == len_of(documents, i) for cut in cuts]
                assert complete[0] and all(complete[:-1])
                assert not spread or len(cuts) == 1
            assert tallies[name].passes >= 1 and (not spread or tallies[name].passes == 1)
        assert min(tally.passes for tally in tallies.values()) == 1


def len_of(documents, i):
    return documents.starts[i + 1] - documents.starts[i]


def test_every_prefix_has_the_mix(sources):
    members = {name: np.arange(len(d.keys)) for name, d in sources.items()}
    rows, _ = pack(sources, members, dict(text=3, chat=1), LENGTH, PATCHES, False)
    tokens = np.zeros(2)
    for row in rows:
        for piece in row:
            tokens[piece.source] += piece.size
        assert abs(tokens[1] - tokens.sum() / 4) <= 2 * LENGTH


def test_masks_and_pictures_follow_the_documents(data, sources):
    """Each row against a loop over its documents, found by their tokens."""
    chat = sources["chat"]
    known = {
        chat.tokens[chat.starts[i] : chat.starts[i + 1]].astype(np.int32).tobytes(): i for i in range(len(chat.keys))
    }
    checked = 0
    for batch in batches(data, 8, Order(3), range(15)):
        for row in rows_in(batch):
            picture = 0
            for segment in range(1, row["segments"].max() + 1):
                at = np.flatnonzero(row["segments"] == segment)
                i = known.get(row["tokens"][at].tobytes())
                if i is None:
                    continue
                flags = chat.flags[chat.starts[i] : chat.starts[i + 1]]
                for t, position in enumerate(at):
                    target = flags[t + 1] if t + 1 < len(at) else 0
                    assert row["loss_mask"][position] == float(target & TRAINABLE > 0)
                    assert row["answer_mask"][position] == float(target & ANSWER > 0)
                    assert row["text_bytes"][position] == 0 and not target & TEXT
                first = row["image_slot"][at].max(initial=-1)
                stored = chat.patches[chat.patch_starts[i] : chat.patch_starts[i + 1]]
                if first < 0:
                    assert not len(stored)
                    continue
                start = 4 * row["image_slot"][at][row["image_slot"][at] >= 0].min()
                where = slice(start, start + len(stored))
                assert np.array_equal(row["images"].patches[where], stored)
                grids = chat.grids[chat.picture_starts[i] : chat.picture_starts[i + 1]]
                assert np.array_equal(row["images"].grids[picture : picture + len(grids)], grids)
                picture += len(grids)
                checked += 1
    assert checked > 10


def test_batches_depend_on_the_seed_and_the_step_alone(data):
    def read(start=0, seed=5, rows=None):
        return [shown(batch) for batch in batches(data, 8, Order(seed), range(start, 12), rows)]

    def shown(batch):
        pixels = [b"" if images is None else images.patches.tobytes() for images in batch.get("images", 8 * [None])]
        return {
            **{key: array for key, array in batch.items() if key != "image_sizes"},
            "images": np.array(pixels, object),
        }

    def same(a, b):
        return len(a) == len(b) and all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)

    whole = read()
    assert len(whole) == 12 and same(whole, read()) and same(whole[7:], read(7))
    assert not same(whole, read(seed=6))
    for hosts in (2, 4):
        shares = [np.arange(8)[host::hosts] for host in range(hosts)]
        parts = [read(3, rows=share) for share in shares]
        for step, batch in zip(zip(*parts, strict=True), whole[3:], strict=True):
            for share, part in zip(shares, step, strict=True):
                assert all(np.array_equal(part[key], batch[key][share]) for key in batch if key != "images")
                assert part["images"].tolist() == (
                    batch["images"][share].tolist() if any(batch["images"]) else [b""] * 8
                )
    assert read(12) == []
    endless = batches(data, 8, Order(5))
    assert same(whole[:2], [shown(next(endless)), shown(next(endless))])
    endless.close()

    rows = data.counts["train"]["rows"]
    epochs = [
        [b["tokens"].tobytes() for b in batches(data, 1, Order(5), range(e * rows, (e + 1) * rows))] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] and len(set(epochs[0])) > rows * 0.9


def test_held_out_rows_are_fixed_and_padded(data):
    whole = list(held_out(data, 4))
    rows = data.counts["held_out"]["rows"]
    assert len(whole) == -(-rows // 4) and rows % 4
    assert not whole[-1]["segments"][rows % 4 :].any() and (whole[-1]["segments"][: rows % 4, 0] == 1).all()
    limited = list(held_out(data, 4, limit_rows=6))
    assert len(limited) == 2 and np.array_equal(limited[0]["tokens"], whole[0]["tokens"])
    assert np.array_equal(limited[1]["tokens"][:2], whole[1]["tokens"][:2]) and not limited[1]["tokens"][2:].any()
    parts = [list(held_out(data, 4, rows=share)) for share in ([0, 1], [2, 3])]
    assert np.array_equal(np.concatenate([p[1]["tokens"] for p in parts]), whole[1]["tokens"])


def test_spread_rows_are_of_as_many_documents_as_there_can_be(sources):
    """No document gives a second window before every one has given one, and which one it gives is left to chance."""
    members = {name: np.arange(len(d.keys)) for name, d in sources.items()}
    rows, _ = pack(sources, members, dict(text=1, chat=1), LENGTH, PATCHES, spread=True)
    first = [row[0] for row in rows if row[0].source == 0]
    begun = [piece.document for piece in first]
    long = [piece for piece in first[:30] if len_of(sources["text"], piece.document) > 2 * LENGTH]
    assert len(set(begun[:30])) == 30 and len(long) > 8
    assert 0 < sum(piece.start == 0 for piece in long) < len(long)


def test_held_out_tokens_know_their_document(data, sources):
    keys = {int(key >> np.uint64(33)) for documents in sources.values() for key in documents.keys}
    for row in rows_of(data, "held_out"):
        assert {*row["document"][row["segments"] > 0].tolist()} <= keys and not row["document"][
            row["segments"] == 0
        ].any()
        ends = np.flatnonzero(np.diff(row["document"]))
        assert {*ends} <= {*np.flatnonzero(np.diff(row["segments"]))}


def test_packing_is_reused_and_the_same_in_another_process(data, inputs, tmp_path):
    def content(directory):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}

    def written():
        files = (p for p in data.directory.parent.rglob("*") if p.name != "digests.jsonl")
        return {p: p.stat().st_mtime_ns for p in files}

    before = written()
    again = prepare(config(inputs), LENGTH, VISION, data.directory.parent)
    assert again.digest == data.digest and written() == before
    longer = prepare(config(inputs), 2 * LENGTH, VISION, data.directory.parent)
    assert longer.digest != data.digest and len(list((data.directory.parent / "documents").iterdir())) == 2

    script = (
        "import sys; from pathlib import Path; from ministral_jax.data.config import DataConfig;"
        "from ministral_jax.data.prepare import prepare;"
        "from ministral_jax.data.pipeline import Order, batches; from ministral_jax.models.spec import PRESETS;"
        "vision = PRESETS['tiny-24b'].vision;"
        f"d = prepare(DataConfig.model_validate_json(sys.argv[1]), {LENGTH}, vision, Path(sys.argv[2]));"
        "b = next(batches(d, 4, Order(9), range(3, 4))); print(d.directory, b['tokens'].sum(),"
        "sum(i.patches.sum(dtype=int) for i in b.get('images', []) if i))"
    )
    command = [sys.executable, "-c", script, config(inputs).model_dump_json(), str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert content(Path(out[0])) == content(data.directory) and Path(out[0]).name == data.directory.name
    batch = next(batches(data, 4, Order(9), range(3, 4)))
    pixels = sum(images.patches.sum(dtype=int) for images in batch.get("images", []) if images)
    assert out[1:] == [str(batch["tokens"].sum()), str(pixels)]


def test_changed_inputs_are_packed_again(inputs, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(picture)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "q", "answer": "a"}))
    source = SourceConfig(kind="jsonl", path=str(rows))
    digests = [open_source("rows", source).digest]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(picture)
    digests.append(open_source("rows", source).digest)
    rows.write_text(json.dumps({"image": "a.png", "question": "q", "answer": "b"}))
    digests.append(open_source("rows", source).digest)
    digests.append(open_source("rows", source.model_copy(update=dict(limit=1))).digest)
    assert len(set(digests)) == 4


def test_built_in_sources(tmp_path):
    chosen = DataConfig(
        tokenizer=TOKENIZER,
        sources=dict(
            library=dict(kind="python-library", limit=6, weight=3), digits=dict(kind="digits", limit=40, weight=1)
        ),
        patches=64,
        held_out=0.25,
    )
    data = prepare(chosen, 128, VISION, tmp_path)
    assert data.counts["train"]["sources"]["digits"]["share"] == pytest.approx(0.25, abs=0.05)
    d = data.tokenizer
    rows = [(b["tokens"][r, 1:], b["answer_mask"][r, :-1] > 0) for b in held_out(data, 4) for r in range(4)]
    answers = "".join(d.decode(tokens[answered]) for tokens, answered in rows)
    assert answers.isdigit() and len(answers) == data.counts["held_out"]["sources"]["digits"]["documents"]
    text = open_source("library", SourceConfig(kind="python-library"))
    assert len(text.files) > 200 and not any("test" in Path(name).parts for name, _ in text.files)

    plain = DataConfig(tokenizer=TOKENIZER, sources=dict(library=dict(kind="python-library", limit=3)), held_out=0)
    data = prepare(plain, 128, None, tmp_path)
    assert set(next(batches(data, 2, Order(0)))) == {
        "tokens", "positions", "segments", "labels", "loss_mask", "answer_mask", "text_bytes",
    }  # fmt: skip
    with pytest.raises(UserError, match="no document is in the held_out split"):
        next(held_out(data, 2))
    (data.directory / "train.array_record").unlink()
    with pytest.raises(UserError, match=r"train.array_record is missing; delete"):
        batches(data, 4, Order(0))


def _pictures(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "fake.png").write_text("not an image")
    Image.new("RGB", (32, 32)).save(folder / "full.png")
    Image.new("RGB", (60, 41)).save(folder / "large.png")
    (folder / "zero.gif").write_bytes(b"GIF89a" + bytes([0, 0, 0, 0, 0, 0, 0]) + b";")


def asked_about(image):
    return f'{{"image": "{image}", "question": "q", "answer": "a"}}'


@pytest.mark.parametrize(
    ("path", "content", "options", "sentence"),
    [
        ("none.txt", None, {}, r"data.sources.s.path = '.*none.txt' matches no file; give a file, directory or glob"),
        ("*.md", None, {}, "matches no file"),
        ("sub", None, {}, r"matches no file \(\*.txt, \*.md\)"),
        ("a.txt", " \n", {}, "a.txt is empty"),
        ("a.txt", b"caf\xe9", {}, r"a.txt is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', {}, r"a.jsonl row 1: not UTF-8"),
        ("a.jsonl", b"\n", {}, "has no documents"),
        ("a.jsonl", "{'a': 1}", {}, "row 3: not JSON"),
        ("a.jsonl", "[1]", {}, "row 3: must be an object"),
        ("a.jsonl", '{"prompt": "a"}', {}, r"has \['prompt'\] but needs 'text', 'messages', or 'question' and"),
        ("a.jsonl", '{"text": " "}', {}, "row 3: 'text' must be text that is not empty"),
        ("a.jsonl", '{"question": "q", "answer": 7}', {}, "row 3: 'answer' must be text that is not empty, got 7"),
        ("a.jsonl", '{"images": "a.png", "question": "q", "answer": "a"}', {}, "must be a list of paths, got 'a.png'"),
        ("a.jsonl", asked_about("none.png"), {}, "row 3: image .*none.png does not exist"),
        ("a.jsonl", asked_about("http://x/y.png"), {}, "row 3: image 'http://x/y.png' is not a local file"),
        ("a.jsonl", asked_about("fake.png"), {}, r"row 3: image .*fake.png cannot be read \(cannot identify"),
        ("a.jsonl", asked_about("cut.png"), {}, "row 3: image .*cut.png cannot be read"),
        ("a.jsonl", asked_about("zero.gif"), {}, "row 3: image .*zero.gif (has no pixels|cannot be read)"),
        ("a.jsonl", asked_about("large.png"), {}, "row 3: image .* 60 x 41 = 2460 pixels; at most 2400 can be read"),
        ("a.jsonl", asked_about("full.png"), dict(patches=252), r"row 3 \(data.sources.s\) needs 256 image .* 252"),
        ("a.jsonl", asked_about("full.png"), dict(patches=0), "needs 256 .* but a row holds data.patches = 0"),
        ("a.jsonl", asked_about("full.png"), dict(patches=254), "data.patches = 254 must be a multiple of 4"),
        ("a.jsonl", asked_about("full.png"), dict(vision=None), "data.patches = 256 but the model has no vision"),
        ("a.jsonl", asked_about("full.png"), dict(vision=None, patches=0), "has an image but the model has no"),
        ("a.jsonl", asked_about("full.png"), dict(length=64), r"row 3 .* makes 78 tokens .* batch.length = 64"),
        ("a.txt", "a good text", dict(length=15), "batch.length = 15 is too short"),
        ("a.txt", "a good text", dict(held_out=0.999), "s has no document left to train on with data.held_out = 0.9"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named_and_leave_nothing(path, content, options, sentence, tmp_path, monkeypatch):
    """A row of JSONL stands in the third line."""
    monkeypatch.setattr("ministral_jax.data.images.MOST_PIXELS", 2400)
    (tmp_path / "sub").mkdir()
    _pictures(tmp_path)
    kind = "jsonl" if path.endswith(".jsonl") else "text"
    if isinstance(content, str):
        content = (f'{{"text": "fine"}}\n\n{content}\n' if kind == "jsonl" else content).encode()
    if content is not None:
        (tmp_path / path).write_bytes(content)
    options = dict(dict(patches=256, vision=VISION, length=128, held_out=0), **options)
    length, vision = options.pop("length"), options.pop("vision")
    chosen = DataConfig(tokenizer=TOKENIZER, sources=dict(s=dict(kind=kind, path=str(tmp_path / path))), **options)
    root = tmp_path / "root"
    with pytest.raises(UserError, match=sentence):
        prepare(chosen, length, vision, root)
    assert not list(root.glob("**/*.array_record")) and not list(root.glob(".*"))
    assert not list((root / "documents").glob(".*"))


def test_images_that_cannot_reach_their_share(tmp_path):
    sources = dict(text=dict(kind="python-library", limit=12, weight=1), digits=dict(kind="digits", limit=50, weight=1))
    chosen = DataConfig(tokenizer=TOKENIZER, sources=sources, held_out=0, patches=16)
    with pytest.raises(
        UserError, match=r"digits gets 1\d\.\d% of the tokens where its weight asks for 50.0%.*patches = 16"
    ):
        prepare(chosen, 128, VISION, tmp_path)


def test_a_mix_whose_packing_would_not_end_is_refused(tmp_path):
    """Every row begins with images, short sums fill it, and the longest of the other documents never find room."""
    kinds = dict(sums=("arithmetic", 4), images=("digit-sum", 11), forms=("instructions", 3), words=("repeat", 2))
    sources = {name: dict(kind=kind, weight=weight, limit=100) for name, (kind, weight) in kinds.items()}
    sources["sums"]["thinking"] = sources["images"]["thinking"] = False
    chosen = DataConfig(tokenizer=TOKENIZER, sources=sources, held_out=0, patches=96)
    with pytest.raises(UserError, match=r"of the tokens where its weight asks for .*data.patches = 96"):
        prepare(chosen, 128, VISION, tmp_path)


@pytest.mark.parametrize(
    "source", [None, dict(), dict(kind="digits", path="a"), dict(path="a", weight=0), dict(kind="csv", path="a")]
)
def test_bad_configs(source):
    with pytest.raises(ValidationError):
        DataConfig(sources={} if source is None else dict(s={"kind": "text", **source}))


def test_interrupted_writing_leaves_the_place_free(inputs, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    tokenizer = load_tokenizer(config(inputs).tokenizer, tmp_path)
    assert tokenizer.path.is_file()
    with monkeypatch.context() as patch:
        patch.setattr("ministral_jax.data.prepare.encode_row", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(inputs), LENGTH, VISION, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert prepare(config(inputs), LENGTH, VISION, tmp_path).counts["train"]["rows"] > 0


def test_what_is_joined_goes_by_content(data):
    """By the rows' content hashes, whatever the batch size, the host's share or the split's end."""
    known = {}
    for batch, hashes in chosen_rows(data, "train", [[i] for i in range(data.counts["train"]["rows"])]):
        known.setdefault(hashes[0], batch["tokens"][0])
    assert len(known) > 0.9 * data.counts["train"]["rows"] and all(len(found) == 16 for found in known)

    def join(hashes):
        return {"again": np.array([known[found] for found in hashes]).reshape(-1, data.length)}

    for size, rows in ((8, None), (6, [1, 3])):
        for batch in batches(data, size, Order(3), range(4), rows, join):
            np.testing.assert_array_equal(batch["again"], batch["tokens"])
    order = row_numbers(data, Order(3), None)
    assert sorted(order) == list(range(data.counts["train"]["rows"]))
    stream = chosen_rows(data, "train", [order[:4], [order[4], -1]])
    for batch, (again, hashes) in zip(batches(data, 4, Order(3), range(2)), stream, strict=True):
        full = [i for i, found in enumerate(hashes) if found is not None]
        np.testing.assert_array_equal(again["tokens"][full], batch["tokens"][full])
    assert hashes[1] is None and not again["segments"][1].any()


@pytest.mark.parametrize(("first", "count"), [(0, 5), (7, 9), (-3, 8), (-1, 9999), (5, 9999)])
def test_rows_of_an_order_are_those_that_batches_read(data, first, count):
    """From its first on, over the end of an epoch too, where the next one begins; a negative one is before that end."""
    whole = data.counts["train"]["rows"]
    order, count = Order(3, first % whole), min(count, 2 * whole)
    read = [row.tobytes() for batch in batches(data, 1, order, range(count)) for row in batch["tokens"]]
    numbers = row_numbers(data, order, count)
    assert len({*numbers}) == len(numbers)
    found = [batch["tokens"][0].tobytes() for batch, _ in chosen_rows(data, "train", numbers[:, None])]
    assert [*dict.fromkeys(found)] == [*dict.fromkeys(read)]


def test_joined_rows_of_a_split_that_ends_within_a_batch(data):
    rows = data.counts["held_out"]["rows"]
    ones = lambda hashes: {"one": np.ones((len(hashes), 3), np.float32)}
    whole = np.concatenate([b["one"] for b in held_out(data, 4, join=ones)])
    assert len(whole) == -(-rows // 4) * 4 and whole.sum() == 3 * rows and whole[rows:].sum() == 0
    last = list(held_out(data, 4, limit_rows=5, rows=[2, 3], join=ones))[-1]
    assert last["one"].shape == (2, 3) and not last["one"].any()


@pytest.mark.parametrize("key", ["tokens", "flags", "sizes", "grids", "patches"])
def test_a_content_hash_sees_every_part(key):
    record = {
        "tokens": np.arange(5, dtype=np.uint32), "flags": np.ones(5, np.uint8), "sizes": np.array([5], np.int32),
        "grids": np.ones((1, 2), np.int32), "patches": np.zeros((1, 12), np.uint8),
    }  # fmt: skip
    before = content_hash(save(record))
    assert content_hash(save(dict(reversed(record.items())))) == before
    record[key] = record[key].copy()
    record[key].flat[0] += 1
    assert content_hash(save(record)) != before


def test_windows_in_which_nothing_is_to_be_learnt_are_left_out(tmp_path):
    """A long question and a short answer: the windows before the answer would be updates by nothing."""
    rows = [{"question": f"row {n} " + 600 * "word ", "answer": "ok"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = dict(s=dict(kind="jsonl", path=str(tmp_path / "rows.jsonl")))
    data = prepare(config(tmp_path, sources=sources, held_out=0.0, patches=0), LENGTH, None, tmp_path / "data")
    found = rows_of(data, "train")
    assert all(row["loss_mask"].any() for row in found)
    assert sum(int(row["segments"].max()) for row in found) == 8  # the last window of each
    assert data.counts["train"]["sources"]["s"]["passes"] == 1
