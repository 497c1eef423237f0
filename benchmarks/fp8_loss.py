"""The loss of a small decoder trained with `compute.matmul: fp8` beside the same one's in bfloat16.

    python benchmarks/fp8_loss.py [--seeds 5] [--steps 300] [--json FILE]

Rows are drawn from a Markov chain of the second order, a new one for every seed, so that the least cross-entropy is
known: the chain's own entropy. Both arms begin with the same parameters and read the same rows. Printed is the mean
cross-entropy of the last tenth of the steps, in nats per token, and what fp8 adds to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hardware import processor
from ministral_jax.losses.chunked import cross_entropy
from ministral_jax.losses.evaluation import hidden
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix, init_params
from ministral_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from ministral_jax.training.state import init_state, make_step

SYMBOLS, CHOICES, ROWS, LENGTH = 8, 3, 8, 64
SPEC = ModelSpec(
    layers=2, width=64, mlp_width=128, heads=4, kv_heads=2, head_width=16, vocab=32, context=LENGTH, vision=None
)
ARMS = {"bfloat16": Compute(dtype="bfloat16"), "fp8": Compute(dtype="bfloat16", matmul="fp8")}


class Chain:
    """Two symbols choose one of three that may follow, with probabilities of their own."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.follow = self.rng.integers(0, SYMBOLS, (SYMBOLS, SYMBOLS, CHOICES))
        self.chance = self.rng.dirichlet(np.ones(CHOICES), (SYMBOLS, SYMBOLS))

    def entropy(self) -> float:
        """Nats per symbol, by the symbols of a long row."""
        table = np.zeros((SYMBOLS, SYMBOLS, SYMBOLS))
        first, second = np.indices((SYMBOLS, SYMBOLS))
        for choice in range(CHOICES):
            np.add.at(table, (first, second, self.follow[..., choice]), self.chance[..., choice])
        each = -(table * np.log(np.maximum(table, 1e-30))).sum(-1)
        row = self.rows(64, 1024)
        return float(each[row[:, :-1], row[:, 1:]].mean())

    def rows(self, count: int, length: int) -> np.ndarray:
        found = np.zeros((count, length), np.int32)
        found[:, :2] = self.rng.integers(0, SYMBOLS, (count, 2))
        for t in range(2, length):
            at = found[:, t - 2], found[:, t - 1]
            chosen = (self.rng.random((count, 1)) > self.chance[at].cumsum(-1)).sum(-1).clip(0, CHOICES - 1)
            found[:, t] = self.follow[at][np.arange(count), chosen]
        return found


def train(compute: Compute, seed: int, steps: int) -> float:
    """Nats per token, mean of the last tenth of the steps."""
    model, config = VLM(SPEC, compute), OptimizerConfig(lr=2e-3, warmup=20)
    optimizer = make_optimizer(config, steps)

    def loss(params, frozen, batch):
        states = hidden(model, params, batch)
        total, metrics = cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"])
        return total, {"loss": metrics["ce"]}

    step = make_step(loss, optimizer, learning_rate(config, steps))
    state = init_state(init_params(SPEC, jax.random.key(seed)), optimizer)
    chain, losses = Chain(seed), []
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    mask = np.where(positions >= 1, 1.0, 0.0).astype(np.float32)  # the first token's next has no pair before it
    for _ in range(steps):
        rows = chain.rows(ROWS, LENGTH + 1)
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:], "positions": positions, "loss_mask": mask}
        state, metrics = step(state, {}, batch | {"segments": np.ones_like(positions)})
        losses.append(metrics["loss"])
    last = jnp.stack([total / count for total, count in losses[-max(steps // 10, 1) :]])
    return float(last.mean())


def measure(seeds: int, steps: int) -> dict:
    found = {name: [train(compute, seed, steps) for seed in range(seeds)] for name, compute in ARMS.items()}
    added = [fp8 / bf16 - 1 for bf16, fp8 in zip(*found.values(), strict=True)]
    entropy = [Chain(seed).entropy() for seed in range(seeds)]
    return dict(loss=found, entropy=entropy, added=added, steps=steps, hardware=processor(), jax=jax.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    figures = measure(args.seeds, args.steps)
    print(f"{'seed':>6}{'entropy':>12}{'bfloat16':>12}{'fp8':>12}{'added':>9}")
    for seed, row in enumerate(zip(figures["entropy"], *figures["loss"].values(), figures["added"], strict=True)):
        print(f"{seed:>6}{row[0]:>12.4f}{row[1]:>12.4f}{row[2]:>12.4f}{row[3]:>9.2%}")
    print(f"{'mean':>6}{'':>36}{statistics.mean(figures['added']):>9.2%}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
