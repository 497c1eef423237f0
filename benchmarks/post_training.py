"""Table and picture of docs/post_training.md from a finished `ministral-jax sweep configs/studies/post_training.yaml`.

python benchmarks/post_training.py runs/post_training --picture docs/post_training.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from study import mean_and_half

from ministral_jax.files import read_jsonl
from ministral_jax.runs.sweep_run import read_record
from ministral_jax.stages.manifest import finished

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
PICTURES = "sum of two digits in a picture, greedy"
TABLE = (
    ("SFT", "14b-sft", "accuracy_pictures", PICTURES),
    ("", "14b-sft", "pass@8_pictures", "the same, one of eight drawn"),
    ("SFT, working shown for half", "14b-cot", "accuracy_pictures", PICTURES),
    ("", "14b-cot", "accuracy_sums", "arithmetic, greedy"),
    ("GRPO", "14b-rl", "accuracy", "right, greedy"),
    ("", "14b-rl", "pass@1", "right, drawn"),
    ("", "14b-rl", "pass@8", "one of eight drawn is right"),
    ("", "14b-rl", "sampled_reward", "reward of drawn answers (0.9 right + 0.1 form)"),
    ("", "14b-rl", "reward_format", "working shown, greedy"),
    ("judge", "14b-reward", "judge_accuracy", "right about pairs, one in ten of which is mislabelled"),
    ("", "14b-reward", "judge_ece_before", "calibration error without its temperature"),
    ("", "14b-reward", "judge_ece", "with it"),
    ("", "14b-reward", "judge_ece_floor", "of a perfect judge of as many pairs"),
    ("ODPO", "14b-instruct", "win_rate", "win rate by rules on the form, a tie counting half"),
    ("", "14b-instruct", "sampled_loop_rate", "drawn answers that loop"),
)
"""What is told of which stage and figure."""


def evaluations(run: Path, stage: str) -> list[list[dict]]:
    """Of every seed. Raises `UserError`: a point is not finished."""
    paths = [run / point.stages[stage] for point in read_record(run).points]
    return [[r for r in read_jsonl(path / "metrics.jsonl") if r["kind"] == "eval"] for path in paths if finished(path)]


def table(run: Path) -> str:
    """Percent before, after and their change: means over seeds with the interval of all seeds; bold where it leaves out
    0. Rewards are percent of the highest."""
    lines = ["| stage | held-out, % | before | after | change |", "|---|---|---|---|---|"]
    for title, stage, metric, words in TABLE:
        ends = [(100 * records[0][metric], 100 * records[-1][metric]) for records in evaluations(run, stage)]
        before, after = (_told(values) for values in zip(*ends, strict=True))
        change, half = mean_and_half([after - before for before, after in ends])
        mark = "**" if abs(change) > half else ""
        lines.append(f"| {title} | {words} | {before} | {after} | {mark}{change:+.1f} ± {half:.1f}{mark} |")
    return "\n".join(lines)


def _told(values: Sequence[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.1f} ± {half:.1f}" if half > 0.05 else f"{mean:.1f}"


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
    figure.savefig(path, metadata={"Date": None})


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
