"""One distillation step against a plain transformers + torch loop, or against Tunix, at the same shapes, interleaved.

    python benchmarks/train_step.py [--against transformers] [--vocab N] [--json FILE]
    python benchmarks/train_step.py --against tunix --python VENV/bin/python

Tunix (google-tunix) wants other versions of JAX and Flax, so `--python` is the interpreter of an environment with it;
its side is its trainer's own compiled step with its Llama 3, `LogitStrategy` at temperature 1 and no weight for labels.
Each side is a process of its own that sleeps while the other is measured; rounds alternate, figures are medians.
Text only, float32, forward KL over the full vocabulary, AdamW, clipped gradient. Memory is the largest resident set of
the whole process (imports and compilation included). `speed_ratio` and `memory_ratio` are ours ÷ theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hardware import processor

WIDTH, MLP_TEACHER, MLP_STUDENT, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH = 256, 2048, 1024, 6, 8, 2, 32
SEQUENCES, LENGTH = 8, 256


def ours(vocab: int):
    """A function that runs one step of this project's own training state, loss and update."""
    import numpy as np

    from ministral_jax.distributed.host_memory import trim_after_compiling
    from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
    from ministral_jax.losses.chunked import LossOptions
    from ministral_jax.losses.head import LossHead
    from ministral_jax.models.spec import ModelSpec
    from ministral_jax.models.vlm import VLM, Compute
    from ministral_jax.stages.base import fresh_params
    from ministral_jax.stages.teaching import distillation
    from ministral_jax.teachers.teacher import online_targets
    from ministral_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
    from ministral_jax.training.state import init_state, make_step

    trim_after_compiling()  # as a run does
    sizes = dict(layers=LAYERS, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, head_width=HEAD_WIDTH, vocab=vocab)
    student = ModelSpec(mlp_width=MLP_STUDENT, context=LENGTH, vision=None, **sizes)
    teacher = ModelSpec(mlp_width=MLP_TEACHER, context=LENGTH, vision=None, **sizes)
    config = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
    optimizer = make_optimizer(config, 1000)
    place = Placement(make_mesh(MeshConfig()), Rules())
    teaching = online_targets(teacher, Compute(), place.rules)
    loss = distillation(VLM(student, Compute()), LossOptions(), LossHead(place), teaching)
    step = make_step(loss, optimizer, learning_rate(config, 1000))
    state = init_state(fresh_params(student, 0), optimizer)
    frozen = {"teacher": fresh_params(teacher, 1)}
    rng = np.random.default_rng(0)

    def run() -> float:
        nonlocal state
        tokens = rng.integers(0, vocab, (SEQUENCES, LENGTH)).astype(np.int32)
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        mask = np.ones(tokens.shape, np.float32)
        batch = {"tokens": tokens, "positions": positions, "segments": np.ones_like(tokens), "loss_mask": mask}
        batch["labels"] = np.roll(tokens, -1, axis=1)
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"][0])

    return run


def transformers_loop(vocab: int):
    """A function that runs one step of the loop one would write with transformers and torch."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    def model(mlp_width: int) -> MistralForCausalLM:
        return MistralForCausalLM(
            MistralConfig(
                vocab_size=vocab,
                hidden_size=WIDTH,
                intermediate_size=mlp_width,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                head_dim=HEAD_WIDTH,
                sliding_window=None,
                use_cache=False,
            )
        )

    torch.manual_seed(0)
    student, teacher = model(MLP_STUDENT), model(MLP_TEACHER).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def run() -> float:
        tokens = torch.randint(0, vocab, (SEQUENCES, LENGTH))
        with torch.no_grad():
            target = torch.log_softmax(teacher(tokens).logits, -1)
        ours = torch.log_softmax(student(tokens).logits, -1)
        loss = torch.nn.functional.kl_div(
            ours.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def tunix_trainer(vocab: int):
    """A function that runs one step of Tunix's distillation trainer."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.distillation import distillation_trainer as distillation
    from tunix.distillation.strategies.logit import LogitStrategy
    from tunix.models.llama3.model import Llama3, ModelConfig

    def model(mlp_width: int, seed: int) -> Llama3:
        config = ModelConfig(
            num_layers=LAYERS,
            vocab_size=vocab,
            embed_dim=WIDTH,
            hidden_dim=mlp_width,
            num_heads=HEADS,
            head_dim=HEAD_WIDTH,
            num_kv_heads=KV_HEADS,
            rope_theta=1_000_000,
            norm_eps=1e-5,
        )
        return Llama3(config, rngs=nnx.Rngs(seed))

    causal = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (SEQUENCES, LENGTH))
    logits = lambda model, input_tokens, input_mask: model(input_tokens, positions, None, causal)[0]
    labels = lambda input_tokens, input_mask: jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), vocab)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))
    trainer = distillation.DistillationTrainer(
        model(MLP_STUDENT, 0),
        model(MLP_TEACHER, 1),
        LogitStrategy(logits, logits, labels, temperature=1.0, alpha=1.0),
        optimizer,
        distillation.TrainingConfig(eval_every_n_steps=10**9),
    )
    step = trainer.jit_train_and_eval_step()[0]
    rng, mask = np.random.default_rng(0), np.ones((SEQUENCES, LENGTH), bool)

    def run() -> float:
        tokens = rng.integers(0, vocab, (SEQUENCES, LENGTH)).astype(np.int32)
        batch = trainer._prepare_inputs(distillation.TrainingInput(input_tokens=tokens, input_mask=mask))
        return float(step(batch)[0])  # which has the model and the optimiser with it

    return run


SIDES = {"ministral_jax": ours, "transformers": transformers_loop, "tunix": tunix_trainer}
VERSIONS = {"transformers": ("torch", "transformers"), "tunix": ("google-tunix", "jax", "flax")}


def worker(side: str, steps: int, vocab: int) -> None:
    """Answer each line on stdin with the seconds of `steps` steps and the peak resident set in bytes so far."""
    run = SIDES[side](vocab)
    for _ in range(2):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        for _ in range(steps):
            run()
        seconds = time.perf_counter() - begun
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]), flush=True)


def start(side: str, python: str, steps: int, vocab: int) -> subprocess.Popen:
    command = [python, __file__, "--worker", side, "--steps", str(steps), "--vocab", str(vocab)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "ready":
        if not line:
            raise SystemExit(f"the {side} side failed to start")
    return process


def measure(process: subprocess.Popen) -> tuple[float, int]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return tuple(json.loads(process.stdout.readline()))


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    """Of packages that an interpreter finds."""
    words = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(subprocess.run([python, "-c", words], check=True, capture_output=True, text=True).stdout)


def compare(other: str, python: str, rounds: int, steps: int, vocab: int) -> dict:
    interpreters = {"ministral_jax": sys.executable, other: python}
    processes = {side: start(side, its, steps, vocab) for side, its in interpreters.items()}
    seconds: dict[str, list[float]] = {side: [] for side in processes}
    peak = dict.fromkeys(processes, 0)
    for n in range(rounds):
        for side in list(processes) if n % 2 == 0 else reversed(processes):
            spent, peak[side] = measure(processes[side])
            seconds[side].append(spent / steps)
            print(
                f"round {n + 1}/{rounds}  {side:>14}  {SEQUENCES * LENGTH / seconds[side][-1]:8,.0f} tokens/s",
                flush=True,
            )
    for process in processes.values():
        process.communicate()
    speed = {side: SEQUENCES * LENGTH / statistics.median(times) for side, times in seconds.items()}
    return {
        "speed_ratio": speed["ministral_jax"] / speed[other],
        "memory_ratio": peak["ministral_jax"] / peak[other],
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "vocab": vocab,
        "versions": {
            "ministral_jax": versions(sys.executable, ("jax", "flax")),
            other: versions(python, VERSIONS[other]),
        },
        "hardware": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=VERSIONS, default="transformers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the other side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.steps, args.vocab)
    result = compare(args.against, args.python, args.rounds, args.steps, args.vocab)
    print(f"\n{'':>16}{'tokens/s':>12}{'peak memory':>14}")
    for side in result["peak_bytes"]:
        print(f"{side:>16}{result['tokens_per_second'][side]:12,.0f}{result['peak_bytes'][side] / 1e9:11.2f} GB")
    print(f"{'ours ÷ theirs':>16}{result['speed_ratio']:12.2f}{result['memory_ratio']:14.2f}")
    print(result["versions"], result["hardware"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
