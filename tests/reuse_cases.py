"""A recipe of a few small stages beside its data, and runs of it: for tests of what runs keep, take and refuse."""

from pathlib import Path

import jax
import yaml

from ministral_jax.cli import main

CACHE = Path(jax.config.jax_compilation_cache_dir)
MODEL = {"layers": 2, "width": 16, "mlp_width": 32, "heads": 2, "kv_heads": 1, "head_width": 8, "vocab": 512}
MODEL |= {"context": 64, "vision": None}
ROWS = {"sequences": 2, "length": 32}
TRAIN = {"do": "train", "model": MODEL, "batch": ROWS, "evaluate": {"every": 99, "early": False, "rows": 2}}
BASELINE = {"baseline": True, "evaluate": {"rows": 2}}
CONSTANT = {"schedule": "constant", "warmup": 0}
RECIPE = {
    "name": "tried",
    "data": {
        "tokenizer": {"file": "tekken.json", "vocab": 512, "special": 64},
        "sources": {"web": {"kind": "jsonl", "path": "rows.jsonl"}},
        "held_out": 0.3,
    },
    "defaults": {"train": {key: value for key, value in TRAIN.items() if key != "do"}},
    "stages": {
        "parent": {"do": "train", "steps": 3},
        "pruned": {"do": "prune", "from": "parent", "model": {"mlp_width": 16}, "batch": ROWS, "calibration": 1},
        "hf": {"do": "export", "from": "pruned"},
        "steady": {"do": "train", "steps": 3, "optimizer": CONSTANT, "optional": True},
        "steady-hf": {"do": "export", "from": "steady", "optional": True},
        "decayed": {"do": "train", "steps": 5, "optimizer": {"schedule": "wsd", "warmup": 0}, "optional": True},
    },
}
ALL = ("parent", "pruned", "hf")


def write(home: Path, recipe: dict) -> Path:
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(home: Path, name: str, *words: str) -> int:
    run_dir = home / name
    if not run_dir.exists():
        run_dir.mkdir()
        (run_dir / "xla").symlink_to(CACHE)
    return main(["run", str(home / "recipe.yaml"), *words, "--run-dir", str(run_dir)])


def lines(capsys) -> str:
    return capsys.readouterr().err
