"""Tokenizer files of other versions: rendered as mistral-common renders that version, or refused."""

import json

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ministral_jax.data.chat import render
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import parse_messages, parse_tools
from ministral_jax.data.tokenizer import load_tokenizer
from ministral_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
U, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "w", "description": "", "parameters": {}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "w", "arguments": '{"c": "Rome"}'}}
CALLED = [U, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "9", "tool_call_id": "abcdefghi"}, A]  # fmt: skip
THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "4"}]}
CHATS = {
    "one turn": ([U, A], []),
    "turns": ([U, A, U, A], []),
    "neighbours": ([U, U, A, A, U, A], []),
    "system": ([SYSTEM, U, A], []),
    "tools": ([U, A], [TOOL]),
    "calls": ([SYSTEM, *CALLED], [TOOL]),
    "reasoning": ([U, THOUGHT], []),
}
REFUSED = {
    "v1": {*CHATS},
    "v2": {*CHATS},
    "v3": {"system", "tools", "calls", "reasoning"},
    "v7": {"tools", "calls", "reasoning"},
    "v11": {"tools", "calls", "reasoning"},
    "v13": set(),
}


@pytest.fixture(scope="module")
def versions(tokenizer, tmp_path_factory):
    """The tokenizer's file under other version numbers."""
    raw, found = json.loads(tokenizer.path.read_text()), {}
    for version in REFUSED:
        folder = tmp_path_factory.mktemp(version)
        (folder / "tekken.json").write_text(json.dumps(raw | {"config": raw["config"] | {"version": version}}))
        found[version] = load_tokenizer(TokenizerConfig(file=str(folder / "tekken.json")), folder / "cache")
    return found


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("version", REFUSED)
def test_a_version_is_rendered_as_it_is_or_refused(versions, version, chat):
    tokenizer, (raw, tools) = versions[version], CHATS[chat]
    arguments = parse_messages(raw, tokenizer.path, "row 7"), tokenizer, None, "row 7", parse_tools(tools, "row 7")
    if chat in REFUSED[version]:
        with pytest.raises(UserError, match=f"row 7: .*tekken.json is a file of {version}; .* as in v13 alone"):
            render(*arguments)
        return
    theirs = MistralTokenizer.from_file(str(tokenizer.path), ValidationMode.finetuning)
    request = ChatCompletionRequest.from_openai(json.loads(json.dumps(raw)), tools=tools or None)
    assert render(*arguments).tokens.tolist() == theirs.encode_chat_completion(request).tokens


def test_a_pointer_is_no_tokenizer(tmp_path):
    (tmp_path / "tekken.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"data.tokenizer.file = .*tekken.json' is a Git LFS pointer"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "tekken.json")), tmp_path)


@pytest.mark.parametrize("vocab", [None, 1024])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"version": "1.0", "model": {"vocab": {}}, "added_tokens": []}',
            r"\(has no 'config'\); give the model's own",
        ),
        (b"<html>", r"\(.*Expecting value"),
        (b'{"a": "\xe9"}', r"\(UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_sentence(tmp_path, content, said, vocab):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=f"tokenizer.json' is not a usable tekken.json {said}"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "tokenizer.json"), vocab=vocab), tmp_path)


def test_what_is_wrong_with_a_tokenizer_is_said_at_some_length(tokenizer, tmp_path):
    raw = json.loads(tokenizer.path.read_text())
    raw["config"]["default_vocab_size"] = -1
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "tekken.json")), tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda raw: raw["config"].update(default_num_special_tokens=10**9, default_vocab_size=10**9 + 256),
            "10000000",
        ),
        (lambda raw: raw["config"].update(default_num_special_tokens=-1), "it has -1 special tokens of 2048"),
        (lambda raw: raw["config"].update(default_vocab_size="2048"), "it has 64 special tokens of '2048'"),
        (
            lambda raw: raw["config"].update(default_vocab_size=10**9),
            "does not hold the 1000000000 tokens that it speaks",
        ),
        (lambda raw: raw["special_tokens"].reverse(), "its special tokens are not texts in the order of their ranks"),
        (lambda raw: raw["special_tokens"][3].update(token_str=3), "its special tokens are not texts in the order of"),
        (lambda raw: raw["special_tokens"][3].clear(), "has no 'rank'"),
        (lambda raw: raw.update(special_tokens="all"), "does not hold the 2048 tokens that it speaks of"),
        (lambda raw: raw.update(config=[]), "TypeError"),
        (lambda raw: raw["config"].update(pattern="x*"), "its pattern cannot split texts"),
    ],
)
def test_the_numbers_of_a_tokenizer_are_checked_before_its_entries_are_made(tokenizer, tmp_path, change, said):
    raw = json.loads(tokenizer.path.read_text())
    change(raw)
    (tmp_path / "tekken.json").write_text(json.dumps(raw))
    for vocab in (None, 1024):
        with pytest.raises(UserError, match=rf"is not a usable tekken.json \(.*{said}"):
            load_tokenizer(TokenizerConfig(file=str(tmp_path / "tekken.json"), vocab=vocab), tmp_path / "cache")
