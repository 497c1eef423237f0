"""The table of the study of long context: loss and needles by position, before and after the long stage.

python benchmarks/long_context.py runs/long_context

Columns are octaves of the position within a document: nats per token there, and of the needles asked about there the
share whose digit is the most probable token. After the long stage it is the mean over its seeds with the interval in
which that of all seeds lies, 19 times of 20 (Student's t); bold where the difference from the first arm, seed by seed,
leaves out zero. Before it there is one model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study import mean_and_half

from ministral_jax.losses.held_out import Octave
from ministral_jax.models.spec import RopeSpec
from ministral_jax.runs.sweep_run import read_record
from ministral_jax.stages.manifest import finished

FROM = 64
"""The first octave that is shown."""
Figures = dict[str, list[float]]
"""By column, a value for each seed."""


def arm_name(rope: RopeSpec) -> str:
    """What it adds to rotary positions."""
    yarn = f"YaRN {rope.yarn_factor:g}" if rope.yarn_factor > 1 else ""
    temperature = f"temperature {rope.temperature_beta:g}" if rope.temperature_beta else ""
    return " + ".join(filter(None, (yarn, temperature))) or "plain"


def columns(positions: tuple[Octave, ...]) -> dict[str, float]:
    """Loss and needles of the octaves that are shown."""
    shown = [octave for octave in positions if octave.start >= FROM]
    loss = {f"loss at {octave.start} to {2 * octave.start - 1}": octave.ce for octave in shown}
    return loss | {
        f"needles at {octave.start} to {2 * octave.start - 1} ({octave.answers:g})": octave.accuracy
        for octave in shown
        if octave.accuracy is not None
    }


def read(sweep_dir: Path) -> dict[tuple[str, str], Figures]:
    """By arm and stage. The points of an arm are its seeds. Raises `UserError`: a point is not finished."""
    found: dict[tuple[str, str], Figures] = {}
    for point in sorted(read_record(sweep_dir).points, key=lambda point: point.settings["stages.long.seed"]):
        for stage in ("before", "long"):
            manifest = finished(sweep_dir / point.stages[stage])
            figures = found.setdefault((arm_name(manifest.spec.rope), stage), {})
            for column, value in columns(manifest.held_out.positions if manifest.held_out else ()).items():
                figures.setdefault(column, []).append(value)
    return found


def table(found: dict[tuple[str, str], Figures]) -> str:
    """Markdown."""
    head = list(found["plain", "long"])
    lines = [f"| {' | '.join(['positions', 'long stage', *head])} |", "|---" * (len(head) + 2) + "|"]
    for stage, when in (("before", "before"), ("long", "after")):
        for arm in dict.fromkeys(arm for arm, _ in found):
            cells = [_cell(found[arm, stage][column], found["plain", stage][column]) for column in head]
            lines.append(f"| {' | '.join([arm, when, *cells])} |")
    return "\n".join(lines)


def _cell(values: list[float], plain: list[float]) -> str:
    if len(set(values)) == 1:
        return f"{values[0]:.3f}"
    mean, half = mean_and_half(values)
    change, around = mean_and_half([ours - theirs for ours, theirs in zip(values, plain, strict=True)])
    mark = "**" if abs(change) > around else ""
    return f"{mark}{mean:.3f} ± {half:.3f}{mark}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of the finished sweep")
    print(table(read(parser.parse_args().sweep)))
