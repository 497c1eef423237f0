"""What the compiler says of a stage's programs beside what is predicted, as a table on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ministral_jax.planning.compiler.compile import Compiled
from ministral_jax.planning.plan import StagePlan
from ministral_jax.planning.table import duration

GIB = 2**30
PHASES = {"cut": "surgery", "drawn": "examine", "generate": "examine"}
"""Of programs that are not called as their phase is."""


def compiled_view(stage: StagePlan, found: Sequence[Compiled]) -> Table:
    """A row for each program, everything of one device. The phase that is predicted also holds what lies beside the
    program: moments while there is an evaluation, the next batch during a step."""
    table = Table(title=f"{stage.name}: what the compiler allots", title_justify="left")
    for column in ("program", "compiled in", "arguments", "temporaries", "takes", "phase, predicted", "TFLOP", "sent"):
        table.add_column(column, justify="left" if column in ("program", "sent") else "right", no_wrap=True)
    for each in found:
        sizes = (f"{size / GIB:.1f} GiB" for size in (each.arguments, each.temporaries))
        flops = f"{each.flops / 1e12:,.1f}"
        table.add_row(
            each.name, duration(each.seconds), *sizes, _taken(each), _predicted(stage, each), flops, sent(each)
        )
    return table


def _taken(each: Compiled) -> Text:
    if each.available is None:
        return Text(f"{each.held / GIB:.1f} GiB")
    return Text(f"{each.held / GIB:.1f} of {each.available / GIB:.1f} GiB", style="red")


def _predicted(stage: StagePlan, each: Compiled) -> str:
    first = each.name.partition("/")[0]
    name = PHASES.get(first, first)
    phases = stage.memory.phases if stage.memory is not None else ()
    return next((f"{phase.total / GIB:.1f} GiB" for phase in phases if phase.phase == name), "")


def sent(each: Compiled) -> str:
    """GB by the axes of the mesh, most first."""
    found = Counter[tuple[str, ...]]()
    for traffic in each.traffic:
        found[traffic.axes] += traffic.sent
    parts = (f"{'+'.join(axes)} {count / 1e9:,.1f}" for axes, count in found.most_common(3) if count >= 5e7)
    return ", ".join(parts) + " GB" if found and found.most_common(1)[0][1] >= 5e7 else ""
