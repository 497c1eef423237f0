"""Recipes with a planted setting, and what is found wrong with them."""

from dataclasses import replace

from ministral_jax import yaml12
from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.findings.find import find
from ministral_jax.planning.findings.finding import Context, Finding
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.stage import Item, PhaseMemory, StageMemory, stage_memory
from ministral_jax.planning.timing.roofline import Part, PhaseTime, StageTime, stage_time
from ministral_jax.recipe.types import Recipe

TEACHERS = dict.fromkeys(
    ("parent", "teacher", "instruct-teacher", "reasoning-teacher"), PRESETS["mistral-small-3.1-24b"]
)


def taking(step: float, **phases: float) -> StageTime:
    """Seconds of one pass of phases."""
    given = {"step": step, **phases}.items()
    parts = {name: (Part("matmul", "matmul", seconds),) for name, seconds in given}
    rare = {"step": 1.0} | dict.fromkeys(phases, 1e-9)
    return StageTime(tuple(PhaseTime(name, rare[name], each, 0, 0, {}) for name, each in parts.items()), 0)


def holding(phase: str, weights: float, other: float, host: float = 0, written: float = 0) -> StageMemory:
    """In GB."""
    items = (Item("student: weights", int(weights * 1e9)), Item("activations", int(other * 1e9)))
    phases = (PhaseMemory("evaluate", items[:1]), PhaseMemory(phase, items))
    return StageMemory(phases, int(host * 1e9), int(written * 1e9))


def planted(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` of stages, `limits` or `launch`; only what they are of is validated anew."""
    changed: dict[tuple[str, ...], dict] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        path = key.split(".")
        count = 2 if path[0] == "stages" else 1
        place = tuple(path[:count])
        part = recipe.stages[place[1]] if count == 2 else getattr(recipe, place[0])
        node = changed.setdefault(place, part.model_dump(mode="json", by_alias=True))
        for step in path[count:-1]:
            node = node[step]
        node[path[-1]] = yaml12.load(text)
    stages = {
        place[1]: type(recipe.stages[place[1]]).model_validate(raw) for place, raw in changed.items() if place[1:]
    }
    others = {
        place[0]: type(getattr(recipe, place[0])).model_validate(raw) for place, raw in changed.items() if not place[1:]
    }
    return recipe.model_copy(update={"stages": {**recipe.stages, **stages}, **others})


def found(family, machine, stage, settings=(), memory=None, times=None, slices=1):
    recipe, specs = family
    recipe = planted(recipe, settings)
    if any(".model." in setting for setting in settings):
        specs = {**specs, stage: recipe.stages[stage].resolve(Context(recipe, specs, (), None).graph, "")}
    of_stage = lambda given: {} if given is None else {stage: given}
    on = parse_machine(machine, slices)
    return find(Context(recipe, specs, (stage,), on, of_stage(memory), of_stage(times)))


LONG, SHORT, GRPO, ODPO = "14b-base", "14b-short", "14b-stem", "14b-instruct"
V5P, TORUS, H100 = "v5p:4x4x4", "v5p:4x4x8", "h100:32"
NODES = ("mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1")


def predicted(family, stage, settings):
    recipe, specs = family
    context = Context(planted(recipe, settings), specs, (stage,), parse_machine(V5P))
    work, mesh = context.work[stage], context.jobs[stage].mesh
    memory = {stage: stage_memory(work, mesh, context.machine.hosts)}
    times = {stage: stage_time(work, mesh, context.machine)}
    return find(replace(context, memory=memory, times=times))


def of_stage(stage: str, settings: list[str]) -> list[str]:
    return [word if word.startswith(("launch.", "limits.")) else f"stages.{stage}.{word}" for word in settings]


def new(before: list[Finding], after: list[Finding]) -> list[Finding]:
    return [finding for finding in after if finding not in before]
