"""Rows as people bring them: read as meant, or refused by name; never a wrong document that says nothing."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ministral_jax.data.chat import TRAINABLE, render
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.documents import tokenise
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
U, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4967200000\n"


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture
def read(tmp_path):
    """Documents of rows, or of a file's bytes."""

    def documents(*rows, prompts=False, path="rows.jsonl"):
        file = tmp_path / path
        text = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
        file.write_bytes(text)
        source = open_source("s", SourceConfig(kind="jsonl", path=str(file)))
        return list(read_documents(source, prompts))

    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return documents


def shown(document) -> list:
    """Parts of the user's first message, images by their names."""
    first = next(message for message in document.messages if message.role == "user")
    return [part.name if isinstance(part, Path) else part for part in first.parts if part != ""]


TALK = {"messages": [user("<image>What is this?"), A]}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (TALK | {"images": ["cat.png"]}, ["cat.png", "What is this?"]),
        (TALK | {"image": "cat.png"}, ["cat.png", "What is this?"]),
        ({"messages": [U, A], "images": ["cat.png", "dog.png"]}, ["cat.png", "dog.png", "2+2?"]),
        (
            {"messages": [user("a<image>b<image>"), A], "images": ["cat.png", "dog.png"]},
            ["a", "cat.png", "b", "dog.png"],
        ),
        (
            {"messages": [user([{"type": "text", "text": "see <image>"}]), A], "images": ["dog.png"]},
            ["see ", "dog.png"],
        ),
        ({"question": "<image>?", "answer": "a", "image": "cat.png"}, ["cat.png", "?"]),
        (
            {"messages": [user([{"type": "image"}, {"type": "text", "text": "?"}]), A], "images": ["cat.png"]},
            ["cat.png", "?"],
        ),
        (
            {
                "messages": [user([{"type": "text", "text": "?", "image": None}, {"type": "image", "text": None}]), A],
                "image": "dog.png",
            },
            ["?", "dog.png"],
        ),
        (
            {"messages": [user([{"type": "image", "url": "cat.png"}, {"type": "text", "text": "?"}]), A]},
            ["cat.png", "?"],
        ),
        ({"messages": [U, A], "images": [{"bytes": None, "path": "cat.png"}]}, ["cat.png", "2+2?"]),
    ],
)
def test_images_named_beside_the_messages_are_shown(read, row, parts):
    assert shown(read(row)[0]) == parts
    assert shown(read(row, prompts=True)[0]) == parts


def test_images_of_a_later_turn_stand_there(read):
    (document,) = read({"messages": [U, A, user("<image>And this?"), A], "images": ["cat.png"]})
    assert [part if isinstance(part, str) else part.name for part in document.messages[2].parts if part] == [
        "cat.png", "And this?",
    ]  # fmt: skip
    assert shown(read({"prompt": [U], "images": ["cat.png"]}, prompts=True)[0]) == ["cat.png", "2+2?"]
    assert shown(read({"prompt": "<image>a", "image": "cat.png"}, prompts=True)[0]) == ["cat.png", "a"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (TALK | {"images": ["nope.png"]}, "image .*nope.png does not exist"),
        (TALK | {"images": ["cat.png", "dog.png"]}, "says <image>, .* 1 times but 2 images are named beside"),
        (TALK | {"images": []}, "says <image>, .* 1 times but 0 images are named beside"),
        (TALK, "says <image>, .* 1 times but 0 images"),
        (TALK | {"image_path": "cat.png"}, "'image_path' is not read; name images as 'image' or 'images'"),
        ({"question": "<image>?", "answer": "a"}, "says <image>, .* 1 times but 0 images"),
        ({"messages": [user([{"type": "image"}, {"type": "text", "text": "?"}]), A]}, "an image that has no path, 1 t"),
        (
            {"messages": [user([{"type": "image", "image": "cat.png", "text": None}]), A], "images": ["dog.png"]},
            "has images in its messages and beside them",
        ),
        (
            {"messages": [user([{"type": "text", "text": "?", "image": "cat.png"}]), A]},
            "text of a message from user has 'image', which is not read",
        ),
        (
            {"messages": [U, {**A, "content": [{"type": "thinking", "thinking": "so", "closed": False}]}]},
            "thinking of a message from assistant has 'closed', which is not read",
        ),
        ({"messages": [U, A], "weight": 0}, "'weight' is not read; give turns a 'weight' of 0 or 1"),
        ({"messages": [U, A], "loss_mask": [0, 1]}, "'loss_mask' is not read"),
        ({"messages": [U, A], "rejected": "5"}, "has 'rejected' but no 'chosen'; a pair needs both"),
        ({"messages": [U, A], "rejected_response": "5"}, "'rejected_response' is not read; a pair is 'chosen' and"),
        ({"messages": [U, {**A, "train": False}]}, "message from assistant has 'train', which is not read"),
        (b'{"text": "a", "text": "b"}\n', "the key 'text' stands twice"),
        (
            {
                "messages": [
                    U,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "parameters": {"c": 1}}}],
                    },
                ]
            },
            "tool call f has 'parameters', which is not read; accepted are .'arguments', 'name'.",
        ),
        (
            {"messages": [U, A], "tools": [{"type": "function", "function": {"name": "f", "input_schema": {"a": 1}}}]},
            "tool f has 'input_schema', which is not read",
        ),
        (TALK | {"images": ["cat.png"], "image": "dog.png"}, "has 'image' and 'images'; name all of them in 'images'"),
        (
            {"messages": [{"role": "system", "content": "<image>"}, U, A], "images": ["cat.png"]},
            "<image> stands in a message that is not the user's",
        ),
        (
            {"messages": [U, {**A, "content": "see <image>"}], "images": ["cat.png"]},
            "in a message that is not the user's",
        ),
        ({"messages": [U, A], "prompt": "3+3?"}, "'messages' do not hold the prompt, '3\\+3\\?'; give one of the two"),
        ({"messages": [user([{"type": "image", "image": "cat.png"}]), A], "images": ["dog.png"]}, "and beside them"),
        ({"text": "<image>a cat", "images": ["nope.png"]}, "image .*nope.png does not exist"),
        (
            {"text": "a <image> cat", "images": ["cat.png", "dog.png"]},
            "<image> 1 times but 2 images are named beside it; 'dog.png' is not shown",
        ),
        ({"text": "<image> <image>a cat", "images": ["cat.png"]}, "<image> 2 times but 1 images are named"),
        ({"text": "a <image> cat", "images": []}, "<image> 1 times but 0 images are named"),
        ({"text": "a cat", "images": "cat.png"}, "'images' must be a list of paths, got 'cat.png'"),
        ({"text": "a cat", "images": ["cat.png"], "image": "dog.png"}, "has 'image' and 'images'"),
        ({"text": "a cat", "images": [{"bytes": "x"}]}, "an image must be the path of a file, got {'bytes': 'x'}"),
        ({"text": "a cat", "image": "https://a.b/cat.png"}, "'https://a.b/cat.png' is not a local file"),
        ({"text": "<image> <image>", "images": ["cat.png", "dog.png"]}, "'text' is nothing but images"),
        ({"messages": [U, A], "videos": ["a.mp4"]}, "'videos' is not read; there are only text and images"),
        ({"messages": [U, A], "system": "Be brief."}, "'system' is not read; begin 'messages' with one from the role"),
        ({"messages": [U, A], "functions": [{"name": "f"}]}, "'functions' is not read; offer functions as 'tools'"),
        (
            {"messages": [U, {**A, "reasoning_content": "hm"}]},
            "from assistant has 'reasoning_content', which is not read",
        ),
        ({"messages": [{**U, "wieght": 1}, A]}, "message from user has 'wieght', which is not read"),
        ({"messages": [{**U, "name": "Bob"}, A]}, "message from user has 'name', which is not read"),
        ({"messages": [{**U, "weight": 1}, A]}, "weight 1 of a message from user"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "weight 0.5 of a message from assistant must be 0 or 1"),
        ({"messages": [U, {**A, "weight": True}]}, "weight True of"),
        ({"messages": [U, {**A, "weight": 0}]}, "every turn of the assistant has weight 0"),
        ({"messages": [U, {**A, "weight": 0}, A]}, "follows another of the assistant with another weight"),
        ({"messages": "[{", "tools": None}, "'messages' is a string that holds no JSON"),
        ({"messages": [U, A], "tools": "weather"}, "'tools' is a string that holds no JSON, 'weather'"),
        ({"messages": [U, A], "tools": '{"name": "f"}'}, "'tools' must be a list of functions"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(read, row, sentence):
    with pytest.raises(UserError, match=f"row 1: .*{sentence}") as error:
        read(row)
    assert "\n" not in str(error.value)


def targets(document, tokenizer) -> list[str]:
    rendered = render(document.messages, tokenizer, None, "here", document.tools)
    on = np.flatnonzero(rendered.flags & TRAINABLE)
    runs = np.split(rendered.tokens[on], np.flatnonzero(np.diff(on) > 1) + 1)
    return [tokenizer.decode(run.tolist()) for run in runs]


def test_a_turn_of_weight_0_is_read_but_not_learnt(read, tokenizer):
    wrong, again = {**A, "content": "5", "weight": 0}, user("Wrong. Again?")
    (bad,) = read({"messages": [U, wrong, again, {**A, "weight": 1}]})
    assert [text.removesuffix("</s>") for text in targets(bad, tokenizer)] == ["4"]
    (plain,) = read({"messages": [U, {**A, "content": "5"}, again, A]})
    assert len(targets(plain, tokenizer)) == 2
    tokens = [render(d.messages, tokenizer, None, "here").tokens.tolist() for d in (bad, plain)]
    assert tokens[0] == tokens[1]


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
RESULT = {"role": "tool", "tool_call_id": "1", "content": "4"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"text": "hello", "messages": None, "images": None, "tools": None}, {"text": "hello"}),
        ({"text": None, "messages": [U, A], "tools": None}, {"messages": [U, A]}),
        ({"question": "q", "answer": "a", "image": None, "images": None}, {"question": "q", "answer": "a"}),
        ({"messages": [{**U, "tool_calls": None}, {**A, "weight": None, "refusal": None}]}, {"messages": [U, A]}),
        ({"messages": [U, {**A, "prefix": False, "tool_calls": None}]}, {"messages": [U, A]}),
        ({"messages": [U, A], "system": "", "history": [], "videos": [], "audios": []}, {"messages": [U, A]}),
        ({"text": "hello", "images": [], "messages": float("nan"), "tools": float("nan")}, {"text": "hello"}),
        (b'\xef\xbb\xbf{"text": "hello"}\n', {"text": "hello"}),
        (b' {"text": "hello"}\r\n', {"text": "hello"}),
        (
            {"messages": [U, A], "tools": [{"type": None, "function": {**TOOL["function"], "parameters": "{}"}}]},
            {"messages": [U, A], "tools": [TOOL]},
        ),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": [json.dumps(CALLS[0])]}, RESULT, A]},
            {"messages": [U, {"role": "assistant", "tool_calls": CALLS}, RESULT, A]},
        ),
        ({"messages": [U, A], "tools": json.dumps([TOOL])}, {"messages": [U, A], "tools": [TOOL]}),
        ({"messages": [U, A], "tools": ""}, {"messages": [U, A]}),
        ({"messages": json.dumps([U, A])}, {"messages": [U, A]}),
        ({"messages": json.dumps(json.dumps([U, A])), "images": []}, {"messages": [U, A]}),
        ({"messages": [U, A], "tools": [json.dumps(TOOL)]}, {"messages": [U, A], "tools": [TOOL]}),
        ({"messages": [U, A], "tools": json.dumps(json.dumps([TOOL]))}, {"messages": [U, A], "tools": [TOOL]}),
        ({"messages": [U, A], "tools": "null"}, {"messages": [U, A]}),
        ({"messages": [U, A], "prompt": " 2+2?"}, {"messages": [U, A]}),
        ({"messages": [U, A], "prompt": [U]}, {"messages": [U, A]}),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": json.dumps(CALLS)}, RESULT, A]},
            {"messages": [U, {"role": "assistant", "tool_calls": CALLS}, RESULT, A]},
        ),
        ({"messages": [user("a"), user("b"), A]}, {"messages": [user("a\n\nb"), A]}),
        (
            {"messages": [U, {**A, "content": "4"}, {**A, "content": "5"}]},
            {"messages": [U, {**A, "content": "4\n\n5"}]},
        ),
    ],
)
def test_two_spellings_of_a_row_are_the_same_document(read, row, same, tokenizer):
    (ours,), (theirs,) = read(row), read(same)
    assert (ours.text, ours.tools, ours.columns) == (theirs.text, theirs.tools, theirs.columns)
    if ours.messages:
        tokens = [render(d.messages, tokenizer, None, "here", d.tools).tokens.tolist() for d in (ours, theirs)]
        assert tokens[0] == tokens[1]


def test_a_prompt_that_holds_messages_as_json(read):
    assert shown(read({"prompt": json.dumps([U])}, prompts=True)[0]) == ["2+2?"]
    for letters in ("[1, 2]", "[what?", json.dumps([{"a": 1}]), "[]"):
        assert shown(read({"prompt": letters}, prompts=True)[0]) == [letters]


def test_a_byte_order_mark_where_two_files_were_joined(read):
    assert [d.text for d in read({"text": "a"}, b'\xef\xbb\xbf{"text": "b"}\n')] == ["a", "b"]


def test_keys_that_are_not_learnt_are_said(tmp_path, tokenizer, capfd):
    rows = [{"text": "a", "question": "q", "id": 1}, {"question": "q", "answer": "a", "context": "c", "prompt": "p"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source("talk", SourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl")))
    tokenise(source, tokenizer, None, tmp_path / "documents")
    said = "data.sources.talk: keys that are not learnt, but for rewards: context, id, prompt, question"
    assert said in capfd.readouterr().err


def test_what_is_not_learnt_is_a_column_of_a_prompt(read):
    (document,) = read({"prompt": "q", "weight": 0.5, "rejected": "5"}, prompts=True)
    assert document.columns == {"weight": 0.5, "rejected": "5"}


def test_null_is_absent_in_prompts_too(read):
    (document,) = read({"prompt": None, "messages": [U], "tools": None, "answer": None}, prompts=True)
    assert shown(document) == ["2+2?"] and document.columns == {}


WRONG = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": [U, A], "rejected": [U, WRONG], "messages": [U, A], "score_chosen": 8.0},
        {"prompt": "2+2?", "chosen": [U, A], "rejected": [U, WRONG]},
        {"chosen": [U, A], "rejected": [U, WRONG]},
        {"prompt": [U], "chosen": [A], "rejected": [WRONG]},
        {"prompt": [U], "chosen": "4", "rejected": "5", "messages": None},
        {"prompt": json.dumps([U]), "chosen": json.dumps([U, A]), "rejected": json.dumps([U, WRONG])},
        {"prompt": " 2+2?\n", "chosen": [U, A], "rejected": [U, WRONG]},
        {"prompt": U, "chosen": A, "rejected": WRONG},
    ],
)
def test_a_preference_given_as_two_conversations(read, row):
    ab, ba = read(row)
    assert ab.messages[0].parts == ("user: 2+2?\nA: 4\nB: 5\nBetter: A or B?",)
    assert ba.messages[0].parts == ("user: 2+2?\nA: 5\nB: 4\nBetter: A or B?",)
    (prompt,) = read(row, prompts=True)
    assert shown(prompt) == ["2+2?"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"chosen": [U, A], "rejected": [user("3+3?"), WRONG]}, "must differ in their last message alone"),
        ({"chosen": [U, A, U, A], "rejected": [U, WRONG]}, "must differ in their last message alone"),
        ({"prompt": "3+3?", "chosen": [U, A], "rejected": [U, WRONG]}, "do not begin with the prompt, '3\\+3"),
        ({"messages": [U, U, A], "chosen": [U, A], "rejected": [U, WRONG]}, "'messages' are neither"),
        ({"chosen": [U, A], "rejected": [U, A]}, "chosen and rejected are the same"),
        ({"chosen": [U, U], "rejected": [U, WRONG]}, "chosen: roles"),
        ({"prompt": "2+2?", "chosen": [], "rejected": [A]}, "'chosen' must be text that is not empty, got \\[\\]"),
    ],
)
def test_conversations_that_are_no_preference(read, row, sentence):
    with pytest.raises(UserError, match=f"row 1: .*{sentence}"):
        read(row)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda text: b"\xef\xbb\xbf" + text])
def test_compressed_files_and_byte_order_marks(read, compress):
    row = json.dumps({"text": "héllo"}, ensure_ascii=False).encode() + b"\n"
    assert [document.text for document in read(compress(row), path="a.jsonl")] == ["héllo"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ('{"text": "a"}'.encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        (b"\x28\xb5\x2f\xfd....", "is compressed by zstd; decompress it"),
        (gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "is damaged or cut short"),
        (gzip.compress(b'{"text": "a"}', mtime=0)[:14] + b"\xff" * 20, "is damaged or cut short"),
        (bz2.compress(b'{"text": "a"}')[:-10], "is damaged or cut short"),
        (b"BZh9garbage garbage", "is damaged or cut short"),
        (lzma.compress(b'{"text": "a"}')[:-10], "is damaged or cut short"),
        (gzip.compress(bz2.compress(b'{"text": "a"}'), mtime=0), "is compressed twice"),
        (gzip.compress('{"text": "a"}'.encode("utf-16"), mtime=0), "is UTF-16; convert it to UTF-8"),
        ('{"text": "a"}'.encode("utf-16-le"), "begins with zero bytes, as UTF-16 does"),
        ('{"text": "a"}'.encode("utf-16-be"), "begins with zero bytes, as UTF-16 does"),
        ('{"text": "a"}'.encode("utf-32"), "is UTF-32"),
        (b"PAR1" + bytes(60), "is Parquet; write its rows as JSON lines"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_files_that_are_no_text(tmp_path, content, sentence, kind):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"file {sentence}"):
        list(read_documents(open_source("s", SourceConfig(kind=kind, path=str(tmp_path / "file")))))


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_what_is_packed_is_not_unpacked_without_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("ministral_jax.data.jsonl.MOST_LINE", 1000)
    monkeypatch.setattr("ministral_jax.data.sources.MOST_TEXT", 1000)
    source = SourceConfig(kind=kind, path=str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(gzip.compress(b'{"text": "' + b"a" * 900 + b'"}'))
    assert len(list(read_documents(open_source("s", source)))) == 1
    (tmp_path / "file").write_bytes(gzip.compress(b"a" * 1001))
    with pytest.raises(UserError, match=r"file( row 1:)? is longer than 1000 bytes; divide it"):
        list(read_documents(open_source("s", source)))


def test_a_text_with_zero_bytes_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"name.txt" + bytes(92) + b"0000644")
    with pytest.raises(UserError, match=r"a.txt is no text: it has zero bytes"):
        list(read_documents(open_source("s", SourceConfig(kind="text", path=str(tmp_path)))))


def test_a_directory_says_what_it_leaves_out(tmp_path, capfd):
    row = b'{"text": "a"}\n'
    files = {"a.jsonl": row, "b.jsonl.gz": gzip.compress(row), "D.JSONL": row, "e.ndjson": row}
    for name, content in {**files, "c.jsonl.zst": b"", "c.json": row, ".hidden": b""}.items():
        (tmp_path / name).write_bytes(content)
    source = open_source("mix", SourceConfig(kind="jsonl", path=str(tmp_path)))
    assert {name for name, _ in source.files} == set(files) and len(list(read_documents(source))) == 4
    assert f"data.sources.mix: of {tmp_path} is not read: 1 .json, 1 .zst" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("files", "path", "read", "said"),
    [
        (["a.jsonl", ".cache/b.jsonl", "._c.jsonl"], "", 1, "is not read: 2 hidden"),
        (["a.txt", ".ipynb_checkpoints/a.txt", ".git/description.txt"], "", 1, "is not read: 2 hidden"),
        (["a.jsonl", "b/c.jsonl"], "*", 1, "is not read: 1 directory"),
        (["a.jsonl", "b/c.jsonl"], "**/*.jsonl", 2, None),
        (["a[1]/b.jsonl"], "a[1]", 1, None),
        (["c.jsonl.zst", "d.json"], "", 0, "matches no file .* what is there is not read: 1 .json, 1 .zst"),
        ([".hidden.jsonl"], "", 0, "what is there is not read: 1 hidden"),
        (["a.jsonl", "empty.jsonl"], "", 1, "is not read: 1 empty"),
        (["empty.jsonl"], "empty.jsonl", 0, "what is there is not read: 1 empty"),
        (["a.jsonl", "../linked/b.jsonl"], "", 1, "is not read: 1 linked directory"),
        (["a.jsonl"], "/dev/null", 0, "/dev/null is no file that can be read again"),
        (["a.jsonl"], "hdfs://bucket/a.jsonl", 0, "hdfs: is neither read nor written"),
    ],
)
def test_what_of_a_directory_is_read_and_what_is_said(tmp_path, capfd, files, path, read, said):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else b'{"text": "a"}\n')
        if name.startswith("../"):
            (tmp_path / "link").symlink_to((tmp_path / name).parent)
    place = path if "://" in path else str(tmp_path / path)
    config = SourceConfig(kind="text" if files[0].endswith("txt") else "jsonl", path=place)
    if not read:
        with pytest.raises(UserError, match=said):
            open_source("s", config)
        return
    assert len(list(read_documents(open_source("s", config)))) == read
    assert (said or "") in capfd.readouterr().err


@pytest.mark.parametrize("path", ["", "*.jsonl"])
def test_a_link_to_nothing_is_no_file_to_pass_over(tmp_path, path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data.sources.s: .*b.jsonl is a link to a file that is not there"):
        open_source("s", SourceConfig(kind="jsonl", path=str(tmp_path / path)))


def test_half_a_character_is_replaced(read):
    documents = read(b'{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert [document.text for document in documents] == ["half �", "whole \U0001f600"]


def test_a_run_of_blanks_that_the_tokenizer_cannot_cut(tmp_path, tokenizer):
    (tmp_path / "blanks.txt").write_text("start\n" + " " * 1_100_000 + "end\n")
    source = open_source("s", SourceConfig(kind="text", path=str(tmp_path / "blanks.txt")))
    with pytest.raises(UserError, match=r"blanks.txt: cannot be tokenised .*a run of a million blanks"):
        tokenise(source, tokenizer, None, tmp_path / "documents")
