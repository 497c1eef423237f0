"""Table and picture of docs/post_training.md from a finished `ministral-jax sweep configs/studies/post_training.yaml`.

python benchmarks/post_training.py runs/post_training --picture docs/post_training.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from study import mean_and_half

from ministral_jax.files import read_jsonl

BLUE, RED, GREEN, GREY = "#2f5d8a", "#b3552e", "#3f7d4e", "#8a8a8a"
PANELS = (
    (
        "SFT: held-out questions",
        (
            ("14b-sft", "accuracy_pictures", "two digits in a picture", BLUE),
            ("14b-cot", "accuracy_pictures", "the same, working shown", GREEN),
            ("14b-cot", "accuracy_sums", "arithmetic, working shown", RED),
        ),
    ),
    (
        "GRPO: held-out questions",
        (
            ("14b-rl", "accuracy", "right, greedy", BLUE),
            ("14b-rl", "pass@8", "one of eight is right", RED),
            ("14b-rl", "reward_format", "shows its working", GREEN),
        ),
    ),
    ("ODPO: held-out", (("14b-instruct", "win_rate", "win rate", BLUE), ("14b-instruct", "loop_rate", "loops", RED))),
    (
        "Judge: held-out pairs",
        (
            ("14b-reward", "judge_accuracy", "right", BLUE),
            ("14b-reward", "judge_ece_before", "calibration error, raw", GREY),
            ("14b-reward", "judge_ece", "calibrated", RED),
        ),
    ),
)
TABLE = (
    ("14b-sft", ("accuracy_pictures", "accuracy_sums")),
    ("14b-cot", ("accuracy_pictures", "accuracy_sums")),
    ("14b-rl", ("accuracy", "pass@1", "pass@8", "reward", "sampled_reward", "reward_format")),
    ("14b-reward", ("judge_accuracy", "judge_ece_before", "judge_ece", "judge_ece_floor")),
    ("14b-instruct", ("win_rate", "sampled_loop_rate", "loop_rate")),
)


def evaluations(run: Path, stage: str) -> list[list[dict]]:
    """Of every seed."""
    paths = sorted(run.glob(f"shared/{stage}-*/metrics.jsonl"))
    return [[r for r in read_jsonl(path) if r["kind"] == "eval"] for path in paths]


def table(run: Path) -> str:
    """Before, after and change: means over seeds with the interval of all seeds; bold where it leaves out 0."""
    lines = ["| stage | held-out | before | after | change | seeds that rose |", "|---|---|---|---|---|---|"]
    for stage, metrics in TABLE:
        for metric in metrics:
            ends = [(records[0][metric], records[-1][metric]) for records in evaluations(run, stage)]
            changes = [after - before for before, after in ends]
            before, after = (f"{mean:.3f} ± {half:.3f}" for mean, half in map(mean_and_half, zip(*ends, strict=True)))
            change, half = mean_and_half(changes)
            mark = "**" if abs(change) > half else ""
            rose = f"{sum(change > 0 for change in changes)} of {len(changes)}"
            lines.append(
                f"| `{stage}` | {metric} | {before} | {after} | {mark}{change:+.3f} ± {half:.3f}{mark} | {rose} |"
            )
    return "\n".join(lines)


def picture(run: Path, path: Path) -> None:
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for stage, metric, label, colour in lines:
            seeds = evaluations(run, stage)
            for n, records in enumerate(seeds):
                values = [record[metric] for record in records]
                steps = [record["step"] for record in records]
                axes.plot(steps, values, color=colour, linewidth=1.1, alpha=0.8, label=None if n else label)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylim(0, 1)
        axes.set_xlabel("steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, metavar="FILE")
    args = parser.parse_args()
    print(table(args.run))
    if args.picture:
        picture(args.run, args.picture)


if __name__ == "__main__":
    main()
