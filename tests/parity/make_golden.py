"""Write `tests/golden/*.safetensors`: what `transformers` computes for the cases of `tests/model_cases.py`.

    python tests/parity/make_golden.py

A file holds a whole saved model (its config.json as metadata, its tensors under `weights/`), the logits of every
document under `logits/` and the gradients of the tests' loss under `grads/`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import oracle  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from model_cases import CASES  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

GOLDEN = HERE.parent / "golden"


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for seed, (name, case) in enumerate(CASES.items()):
        model = oracle.build(case.spec, seed)
        logits, grads = oracle.run(model, case)
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            config = (Path(scratch) / "config.json").read_text()
            weights = load_file(Path(scratch) / "model.safetensors")
        tensors = {f"weights/{k}": v for k, v in weights.items()}
        tensors |= {f"logits/{i}": v for i, v in enumerate(logits)} | {f"grads/{k}": v for k, v in grads.items()}
        save_file(tensors, GOLDEN / f"{name}.safetensors", {"config": config, "versions": versions})
        print(name, (GOLDEN / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
