"""`ministral-jax generate`: prompts and rows in, text out, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from model_cases import random_params, vlm
from PIL import Image
from sampling_cases import placed

from ministral_jax import load
from ministral_jax.cli import main
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import export_tokenizer, load_tokenizer
from ministral_jax.distributed import processes
from ministral_jax.errors import UserError
from ministral_jax.interop.hf import export_hf
from ministral_jax.stages.base import load_stage

pytestmark = pytest.mark.usefixtures("quickly")
TEXTS = vlm(vocab=512, context=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights as a Hugging Face directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = load_tokenizer(TokenizerConfig(vocab=512, special=64), folder)
    file = export_tokenizer(tokenizer, folder, TEXTS.vision)
    export_hf(random_params(TEXTS), TEXTS, folder / "hf", "float32", [file])
    image = np.random.RandomState(0).randint(0, 256, (8, 12, 3)).astype(np.uint8)
    Image.fromarray(image).save(folder / "picture.png")
    return folder


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Nothing of the command's process stays, and it runs on one device."""
    monkeypatch.setattr(processes, "_job", processes._Job())
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)


@pytest.fixture
def say(checkpoint, monkeypatch, capsys):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(["generate", str(checkpoint / "hf"), "--max-tokens", "12", "--temperature", "0", *argv])
        return code, *capsys.readouterr()

    return run


def test_the_command_reads_prompts_images_and_rows(checkpoint, say, monkeypatch):
    picture = str(checkpoint / "picture.png")
    code, text, _ = say("--prompt", "import os")
    assert code == 0
    code, answer, _ = say("--chat", "--think", "--image", picture, "--prompt", "What?")
    assert code == 0 and answer.startswith("[THINK]") and answer[7:-1] != text[:-1]
    code, both, _ = say("--prompt", "import os", "--prompt", "while")
    assert code == 0 and both.startswith(f"== import os\n{text}== while\n")

    content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"prompt": "import os", "name": 7},
        {"messages": [{"role": "user", "content": content}]},
        {"prompt": "while"},
    ]
    source, output = checkpoint / "in.jsonl", checkpoint / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("ministral_jax.runs.generate.ROWS", 2)  # two batches, of which the first has the image
    code, nothing, _ = say("--jsonl", str(source), "--output", str(output))
    assert (code, nothing) == (0, "")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k in rows[n]} for n, row in enumerate(written)] == rows
    assert written[0]["completion"] + "\n" == text
    assert written[2]["completion"] + "\n" == both.split("== while\n")[1]
    for row in written:
        assert row["stopped"] == "stop" if row["tokens"][-1] == 2 else len(row["tokens"]) == 12
    code, _, error = say("--jsonl", str(source), "--output", str(output))
    assert code == 2 and "out.jsonl is there already" in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no rows"),
        ("{", "row 1: not JSON"),
        ('{"text": "a"}', "row 1: has ['text'] but needs 'messages', 'prompt'"),
        ('\n{"prompt": 3}', "row 2: 'prompt' must be text that is not empty, got 3"),
        ('{"prompt": "a", "images": ["gone.png"]}', "gone.png does not exist"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is from 'assistant' where"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "in turn"),
        (json.dumps({"prompt": "x y " * 200}), "tokens; the model's context of 128 leaves no room"),
    ],
)
def test_rows_that_cannot_be_read_write_nothing(say, tmp_path, rows, message):
    (tmp_path / "in.jsonl").write_text(rows)
    code, _, error = say("--jsonl", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert code == 2 and message in error and len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give --prompt TEXT"),
        (("--prompt", "a", "--jsonl", "b"), "give --prompt TEXT"),
        (("--prompt", "a", "--think"), "--think needs --chat"),
        (("--prompt", "a", "--top-p", "2"), "--top-p 2.0: input should be less than or equal to 1"),
        (("--prompt", "a", "--image", "nowhere.png"), "nowhere.png does not exist"),
    ],
)
def test_arguments_that_cannot_be(say, argv, message):
    code, _, error = say(*argv)
    assert code == 2 and message in error and len(error.splitlines()) == 1


def test_a_checkpoint_is_loaded_onto_a_mesh(checkpoint):
    (_, whole), (model, cut) = (load(checkpoint / "hf", placement=p) for p in (None, placed(dict(fsdp=2), 2)))
    assert model.spec == TEXTS and jax.tree.all(jax.tree.map(np.array_equal, whole, cut))
    assert len(cut["decoder"]["embed"].sharding.device_set) == 2


@pytest.mark.parametrize(
    "backend, given, dtype",
    [("cpu", [], "float32"), ("tpu", [], "bfloat16"), ("cpu", ["--dtype", "bfloat16"], "bfloat16")],
)
def test_it_runs_on_all_devices_in_bfloat16_but_on_a_cpu(checkpoint, monkeypatch, backend, given, dtype):
    loaded = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr("ministral_jax.runs.generate.load", lambda *found: loaded.append(found) or load(*found))
    assert main(["generate", str(checkpoint / "hf"), "--prompt", "import", "--max-tokens", "2", *given]) == 0
    ((_, found, place),) = loaded
    sizes = {axis: size for axis, size in place.mesh.shape.items() if size > 1}
    assert (found, sizes) == (dtype, {"fsdp": 4, "tensor": TEXTS.kv_heads})


def test_a_directory_that_is_no_checkpoint(capsys, tmp_path):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert (
        "neither a finished stage (manifest.json) nor a model's (config.json or params.json)" in capsys.readouterr().err
    )


def test_the_directory_of_an_export_stage_says_where_its_model_is(checkpoint, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "a"]) == 2
    message = f"the model is the directory {checkpoint / 'hf'}"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=re.escape(message)):
        load_stage(checkpoint)


def test_all_rows_that_cannot_be_used_are_named_or_left_out(checkpoint, say):
    source, output = checkpoint / "mixed.jsonl", checkpoint / "mixed-out.jsonl"
    rows = ['{"prompt": "import os"}', "{", '{"prompt": 3}', json.dumps({"prompt": "a " * 200}), '{"prompt": "while"}']
    source.write_text("\n".join(rows))
    code, _, said = say("--jsonl", str(source), "--output", str(output))
    assert code == 2 and not output.exists()
    reasons = r"row 2: not JSON .*; .*row 3: 'prompt' must be text .*; .*row 4: has \d+ tokens; the model's context"
    assert re.search(f"3 of 5 rows cannot be used: .*{reasons}", said)
    code, _, said = say("--jsonl", str(source), "--output", str(output), "--on-bad-row", "skip")
    assert code == 0 and re.search(f"3 of 5 rows are left out: .*{reasons}", said)
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["import os", "while"]
    source.write_text("{\n[]\n")
    code, _, said = say("--jsonl", str(source), "--output", str(checkpoint / "none.jsonl"), "--on-bad-row", "skip")
    assert code == 2 and "2 of 2 rows cannot be used" in said
