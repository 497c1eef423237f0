"""Where the time of the training loops went."""

from __future__ import annotations

from ministral_jax.report.collect import Run
from ministral_jax.report.markup import Child, Html, row, section, table
from ministral_jax.report.units import MISSING, duration, percent, plural
from ministral_jax.training.goodput import KINDS

_WORDS = {
    "start": "loading",
    "compile": "compiling",
    "data": "waiting for data",
    "generate": "generating answers",
    "score": "judging them",
    "step": "steps",
    "checkpoint": "saving",
    "evaluate": "evaluating",
    "lost": "lost to restarts",
    "down": "not running",
}


def goodput(run: Run) -> Html | None:
    timed = [stage for stage in run.stages if stage.time]
    if not timed:
        return None
    total = {kind: sum(stage.time.get(kind, 0.0) for stage in timed) for kind in KINDS}
    everything = sum(total.values())
    restarts = sum(stage.attempts - 1 for stage in timed)
    finding = f"{percent(total['step'] / everything)} of the loops\u2019 time went into training steps"
    if generated := total.get("generate"):
        finding += f", {percent(generated / everything)} into generating answers"
    lead = (
        "Steps include what the host waits for the device. Work that was done again after a restart counts as lost, "
        "the time from an attempt\u2019s last sign of life to the next attempt as not running. "
        + (f"In all {plural(restarts, 'restart')}." if restarts else "Nothing was restarted.")
    )
    shown = [kind for kind in KINDS if total[kind] > 0]
    shares = ["generate", "step"] if "generate" in shown else ["step"]
    rows = [row(stage.name, _cells(stage.time, shown, shares)) for stage in timed]
    rows.append(row("together", _cells(total, shown, shares), "total"))
    headers: list[Child] = [
        "stage",
        *(_WORDS[kind] for kind in shown),
        "together",
        *(f"in {_WORDS[k]}" for k in shares),
    ]
    return section("time", "Time", finding, lead, table("Time of the stages that train.", headers, rows))


def _cells(time: dict[str, float], shown: list[str], shares: list[str]) -> list[Child]:
    whole = sum(time.values())
    spent = [duration(time[kind]) if time.get(kind) else MISSING for kind in shown]
    return [*spent, duration(whole), *(percent(time.get(kind, 0.0) / whole) for kind in shares)]
