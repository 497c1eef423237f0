"""Tokens drawn per second against transformers' `generate` at the same shapes and batch, interleaved in one run.

    python benchmarks/rollout.py [--json FILE]

Each side is a process of its own that sleeps while the other is measured; rounds alternate, figures are medians. Text
only, float32, greedy, every row to the same length, key-value cache on both sides, reading the prompt included, what
is compiled once not. `speed_ratio` is ours ÷ theirs.

`generation_share`: of a GRPO step of the same model and as many rows (two prompts, eight completions each, one update),
the part of the time that goes into sampling.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hardware import processor

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD_WIDTH, VOCAB = 256, 1024, 6, 8, 2, 32, 8192
BATCH, PROMPT, NEW = 16, 64, 64


def ours():
    """A function that draws `NEW` tokens for each of `BATCH` prompts with this project's sampler."""
    import numpy as np

    from ministral_jax.sampling.engine import Prompt, SamplingOptions, generate

    vlm, place, params = model()
    options = SamplingOptions(max_completion_length=NEW, temperature=0)
    rng = np.random.default_rng(0)

    def run() -> int:
        prompts = [Prompt(row) for row in rng.integers(0, VOCAB, (BATCH, PROMPT)).tolist()]
        return sum(len(c.tokens) for c in generate(vlm, params, prompts, options, place))

    return run


def model():
    """The model of the benchmark, its mesh and its parameters."""
    from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
    from ministral_jax.models.spec import ModelSpec
    from ministral_jax.models.vlm import VLM
    from ministral_jax.stages.base import fresh_params

    sizes = dict(layers=LAYERS, width=WIDTH, mlp_width=MLP, heads=HEADS, kv_heads=KV_HEADS, head_width=HEAD_WIDTH)
    spec = ModelSpec(vocab=VOCAB, context=PROMPT + NEW, vision=None, **sizes)
    place = Placement(make_mesh(MeshConfig()), Rules())
    return VLM(spec), place, fresh_params(spec, 0, place)


def share():
    """A function that runs a GRPO step and gives the part of its time that sampling took."""
    from types import SimpleNamespace

    import jax
    import numpy as np

    from ministral_jax.alignment.rollout import begun as episode
    from ministral_jax.losses.head import LossHead
    from ministral_jax.losses.policy import PolicyOptions
    from ministral_jax.models.vlm import Compute
    from ministral_jax.sampling.engine import Prompt, SamplingOptions, generate
    from ministral_jax.stages.grpo import minibatches, objective
    from ministral_jax.stages.online import Answers
    from ministral_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
    from ministral_jax.training.state import init_state, make_step, state_shardings

    vlm, place, params = model()
    each, config, loss = 8, OptimizerConfig(lr=1e-6), PolicyOptions()
    stage = SimpleNamespace(num_generations=each, steps_per_generation=1, mask_truncated_completions=False, loss=loss)
    optimizer = make_optimizer(config, 1000)
    update = make_step(
        objective(vlm.spec, Compute(), loss, 1.0, LossHead(place)),
        optimizer,
        learning_rate(config, 1000),
        1,
        state_shardings(params, optimizer),
    )
    state = init_state(params, optimizer)
    options = SamplingOptions(completions_per_prompt=each, max_completion_length=NEW, temperature=1)
    rng = np.random.default_rng(0)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        prompts = [Prompt(row) for row in rng.integers(0, VOCAB, (BATCH // each, PROMPT)).tolist()]
        drawn = generate(vlm, state["params"], prompts, options, place)
        sampled = time.perf_counter()
        episodes = [episode(prompts[c.prompt], c) for c in drawn]
        samples = [SimpleNamespace(stopped=c.stopped, limit=NEW) for c in drawn]
        (batch,), _ = minibatches(stage, vlm.spec, Answers([], episodes, samples), rng.random(BATCH))
        state, _ = update(state, {}, place.place(batch, BATCH))
        jax.block_until_ready(state)
        return (sampled - started) / (time.perf_counter() - started)

    return run


def transformers_generate():
    """The same with a model of the same sizes in transformers."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_WIDTH,
            sliding_window=None,
        )
    ).eval()

    def run() -> int:
        tokens = torch.randint(0, VOCAB, (BATCH, PROMPT))
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        return (out.shape[1] - PROMPT) * BATCH

    return run


SIDES = {"ministral_jax": ours, "transformers": transformers_generate}
WORKERS = {**SIDES, "share": share}


def worker(side: str) -> None:
    """Answer each line on stdin with the tokens per second of one batch, or the share of sampling in one step."""
    run = WORKERS[side]()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        found = run()
        if side in SIDES:
            assert found == BATCH * NEW
            found /= time.perf_counter() - begun
        print(found, flush=True)


def start(side: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--worker", side]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"the {side} side failed to start")
    return process


def measure(process: subprocess.Popen) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(rounds: int) -> dict:
    processes = {side: start(side) for side in SIDES}
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for n in range(rounds):
        for side in list(SIDES) if n % 2 == 0 else reversed(SIDES):
            speeds[side].append(measure(processes[side]))
            print(f"round {n + 1}/{rounds}  {side:>14}  {speeds[side][-1]:8,.0f} tokens/s", flush=True)
    for process in processes.values():
        process.communicate()
    with start("share") as process:
        shares = [measure(process) for _ in range(rounds)]
        process.communicate()
    speed = {side: statistics.median(found) for side, found in speeds.items()}
    return {
        "speed_ratio": speed["ministral_jax"] / speed["transformers"],
        "generation_share": statistics.median(shares),
        "tokens_per_second": speed,
        "shape": {"batch": BATCH, "prompt": PROMPT, "completion": NEW},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "hardware": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    result = compare(args.rounds)
    for side, speed in result["tokens_per_second"].items():
        print(f"{side:>16}{speed:10,.0f} tokens/s")
    print(f"{'ours ÷ theirs':>16}{result['speed_ratio']:10.2f}")
    print(f"{'sampling':>16}{result['generation_share']:10.0%} of a GRPO step")
    print(result["versions"], result["hardware"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
