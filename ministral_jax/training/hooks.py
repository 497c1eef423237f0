"""What the loop does beside its steps: measure speed, watch the loss, take a profile."""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from pydantic import Field

from ministral_jax.distributed.chips import chip_of
from ministral_jax.files import is_remote
from ministral_jax.places import put_files
from ministral_jax.settings import Frozen
from ministral_jax.training.profiling import write_table


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of all devices together, or None where it is not known (a CPU)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops * jax.device_count()


class GuardConfig(Frozen):
    """What happens when a step's loss or gradient is NaN or infinite, or the loss stays far above what is usual.

    `stop` ends the run. `rollback` goes back to the newest saved state and leaves out the batches since then, at most
    `rollbacks` times in a row of a process's life.
    """

    action: Literal["stop", "rollback"] = "stop"
    spike: float | None = Field(default=3, gt=0)
    """A loss is far if it exceeds the usual one by more than this times its size, its deviation, or 1, whichever is the
    largest: so at a loss near 0, or below, only leaps count. Usual is the lowest median of `window` losses in a row, or
    what there is of the first window; deviations are absolute, their median counts. null: no loss is too far."""
    patience: int = Field(default=5, ge=1)
    """Steps in a row whose loss is far before anything happens. Nothing is saved meanwhile."""
    window: int = Field(default=50, ge=1)
    rollbacks: int = Field(default=3, ge=0)


class BadStep(Exception):
    """A step that must not be gone on from."""

    def __init__(self, step: int, loss: float, what: str):
        super().__init__(what)
        self.step, self.loss = step, loss


class Guard:
    """Watches the loss and the gradient of every step, from what `note` has told of the steps before."""

    def __init__(self, config: GuardConfig, recent: Sequence[float] = (), usual: float = math.inf):
        self._config, self._usual, self._far = config, usual, 0
        self._recent = deque(recent, maxlen=config.window)

    @property
    def calm(self) -> bool:
        """Whether the loss of the last step was not far."""
        return self._far == 0

    def note(self) -> dict[str, Any]:
        """Small JSON: what is usual after the last step."""
        return {"recent": [*self._recent], "usual": self._usual} if self._recent else {}

    def check(self, step: int, loss: float, gradient_norm: float = 0.0) -> None:
        """Raise `BadStep` when one of them is not finite, or the loss was far too often in a row."""
        if not math.isfinite(loss):
            raise BadStep(step, loss, f"the loss is {loss} at step {step}")
        if not math.isfinite(gradient_norm):  # of a finite loss: the parameters are spoilt, the next loss would say so
            raise BadStep(step, loss, f"the norm of the gradient is {gradient_norm} at step {step}")
        if (spike := self._config.spike) is None:
            return
        limit = self._usual + spike * max(1.0, abs(self._usual), _deviation(self._recent))
        if loss <= limit or not self._recent:
            self._far = 0
            full = len(self._recent) == self._config.window
            self._recent.append(loss)
            self._usual = min(statistics.median(self._recent), self._usual if full else math.inf)
            return
        self._far += 1
        if self._far >= self._config.patience:
            often = f", as in the {self._far} steps up to it" if self._far > 1 else ""
            allowed = f"where {self._usual:.4g} is usual and guard.spike = {spike:g} allows {limit:.4g}"
            raise BadStep(step, loss, f"the loss is {loss:.6g} at step {step}, {allowed}{often} (null allows any)")


def _deviation(losses: Collection[float]) -> float:
    """The median of the absolute deviations from the median."""
    if not losses:
        return 0.0
    middle = statistics.median(losses)
    return statistics.median(abs(loss - middle) for loss in losses)


class Speed:
    """Tokens per second and MFU between two steps whose figures were read, without what stood between others."""

    def __init__(self, tokens_per_step: int, flops_per_step: float):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops()
        self.restart()

    def restart(self) -> None:
        """Speed is measured from the next step's figures on: what happened before them was not a step."""
        self._since: tuple[int, float] | None = None

    def of(self, step: int, tokens_drawn: float = 0.0) -> dict[str, float]:
        """`tokens_per_second`, `tokens_per_second_per_device` and, where the peak is known, `mfu`."""
        now = time.monotonic()
        if self._since is None:
            self._since = (step, now)
            return {}
        rate = (step - self._since[0]) / (now - self._since[1])
        tokens = (self._tokens or tokens_drawn) * rate
        found = {"tokens_per_second": tokens, "tokens_per_second_per_device": tokens / jax.device_count()}
        if self._peak is not None and self._flops:
            found["mfu"] = self._flops * rate / self._peak
        return found


class ProfileConfig(Frozen):
    """A trace of `steps` steps from step `start` on (counted from 1), by `jax.profiler`, in `<stage>/profile`, and in
    `<stage>/profile/scopes.json` where their time went."""

    start: int = Field(default=5, ge=1)
    steps: int = Field(default=3, ge=1)


class Profiler:
    """Takes the trace that was asked for, and tells where the time of its steps went."""

    def __init__(self, config: ProfileConfig | None, directory: Path, say: Callable[[str], None]):
        self._config, self._say, self._steps, self._place = config, say, 0, directory / "profile"
        self._tracing = False

    def before(self, step: int) -> None:
        if self._config is not None and step == self._config.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow down what is measured
            self._directory = Path(tempfile.mkdtemp()) if is_remote(self._place) else self._place
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._tracing, self._steps = True, 0

    def after(self, step: int, state: Any) -> None:
        if self._tracing and self._config is not None:
            self._steps += 1
            if step >= self._config.start + self._config.steps - 1:
                jax.block_until_ready(state)  # else the trace would end before what it is of
                self.close()

    def close(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0 and (table := write_table(self._directory, max(self._steps, 1))) is not None:
            for line in table.lines():
                self._say(f"profile: {line}")
        if is_remote(self._place):
            put_files(self._directory, self._place)
            shutil.rmtree(self._directory, ignore_errors=True)
