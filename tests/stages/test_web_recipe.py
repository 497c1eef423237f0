"""The recipe of docs/data.md for texts with pictures, run: trained and distilled on all of the text."""

from __future__ import annotations

import json

import numpy as np
from docs_blocks import blocks
from PIL import Image

from ministral_jax.cli import main
from ministral_jax.data.pipeline import held_out
from ministral_jax.data.prepare import prepare
from ministral_jax.recipe.load import load_recipe
from ministral_jax.stages.manifest import finished

SIZES = dict(layers=2, width=24, mlp_width=64, heads=2, kv_heads=1, head_width=8, vocab=2048, context=256)
SIZES |= dict(vision=dict(layers=1, width=16, mlp_width=24, heads=1, head_width=16, patch_size=2, max_image_size=16))


def test_the_recipe_of_the_docs_runs(tmp_path, monkeypatch, one_device):
    monkeypatch.chdir(tmp_path)
    (recipe,) = (b.text for b in blocks("yaml") if b.page == "docs/data.md" and "web.jsonl" in b.text)
    (rows,) = (b.text for b in blocks("json") if b.page == "docs/data.md")
    (row,) = (found for found in map(json.loads, rows.splitlines()) if "<image>" in found.get("text", ""))
    (tmp_path / "web.yaml").write_text(recipe)
    (tmp_path / "cats").mkdir()
    for name in row["images"]:
        Image.new("RGB", (16, 16), "orange").save(name)
    told = [{**row, "text": f"{row['text']} Seen {n} times."} for n in range(60)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))

    words = [f"stages.parent.model={json.dumps(SIZES)}", f"stages.pruned.model={json.dumps({'mlp_width': 32})}"]
    words += ["stages.pruned.evaluate.rows=4", "stages.pruned.calibration=1"]
    words += [
        word for name in ("parent", "short") for word in (f"stages.{name}.steps=8", f"stages.{name}.evaluate.rows=4")
    ]
    words += ["stages.short.optimizer.warmup=2", "stages.parent.optimizer.warmup=2"]
    assert main(["run", "web.yaml", *words, "--run-dir", "run"]) == 0

    stage = load_recipe("web.yaml", words).stages["short"]
    data = prepare(stage.data, 256, finished(tmp_path / "run" / "short").spec.vision, tmp_path / "run" / "data")
    (batch,) = held_out(data, 4, 4)
    texts = (batch["positions"][:, 1:] > 0) & ~np.isin(batch["tokens"][:, 1:], data.tokenizer.image_ids)
    assert (batch["loss_mask"][:, :-1] == texts).all() and texts.sum() > 100
    assert (batch["image_slot"] >= 0).sum() > 0.3 * (batch["segments"] > 0).sum()

    records = [json.loads(line) for line in (tmp_path / "run" / "short" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    assert last["kl"] < first["kl"] and "digit_accuracy" not in last and last["bits_per_byte"] > 0
