"""The machine of this process."""

import jax

from ministral_jax.distributed.placement import MeshConfig
from ministral_jax.planning import here
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import StageWork


def test_a_cpu_is_a_machine_of_its_devices_with_measured_peaks(monkeypatch):
    monkeypatch.setattr(here, "measured_peaks", lambda: (8e10, 4e10))
    machine = here.here()
    count = jax.device_count()
    assert (machine.name, machine.devices, machine.chip.platform) == ("here", count, "cpu")
    assert (machine.chip.flops, machine.chip.hbm_bandwidth) == (8e10 / count, 4e10 / count)
    mesh = machine.mesh(MeshConfig())
    assert mesh.size == count and list(mesh.devices.flat) == jax.devices()
    assert stage_time(StageWork((), ()), mesh, machine).seconds == 0


def test_peaks_are_work_by_the_time_of_the_fastest_round(monkeypatch):
    ticks = iter([0, 9, 10, 10.5, 20, 20.25, 30, 31, 40, 41, 50, 51] * 2)  # the first round compiles
    monkeypatch.setattr(here.time, "perf_counter", lambda: next(ticks))
    assert here.measured_peaks() == (2 * 512**3 / 0.25, 3 * 4 * 2**22 / 0.25)
