"""The recipe: one YAML file, typed, with `key=value` overrides and one-sentence errors.

Layers, later ones win: field defaults < `defaults:` of the stage's kind < the stage < overrides from the command line.
A stage's `data` is merged over the recipe's. Nothing is read from environment variables.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.data.config import DataConfig
from ministral_jax.distributed.placement import MeshConfig, Rules
from ministral_jax.distributed.processes import Limits
from ministral_jax.launching.job import LaunchConfig
from ministral_jax.losses.chunked import LossOptions
from ministral_jax.losses.policy import PolicyOptions
from ministral_jax.losses.preference import PreferenceOptions
from ministral_jax.models.vlm import Compute
from ministral_jax.pruning.score import PruneOptions
from ministral_jax.settings import Frozen
from ministral_jax.teachers.codecs import Codec, SampledCodec

ModelRef = str | dict[str, Any]
"""A preset's name, or overrides of the source's spec (of `preset:` when given)."""


class OptimizerConfig(Frozen):
    """Optax optimiser, with the learning rate as a function of the step."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    warmup: int = Field(default=20, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The last step's learning rate as a share of `lr`; `wsd` decays linearly over the last fifth of the steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only, never to norm gains."""
    clip: float = Field(default=1.0, gt=0)
    """Global gradient norm above which the gradient is scaled down."""


class BatchConfig(Frozen):
    """Global batch: `sequences` packed rows of `length` tokens, its gradient accumulated over `microbatches`."""

    sequences: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=2)
    microbatches: int = Field(default=1, ge=1)

    @field_validator("microbatches")
    @classmethod
    def _divides(cls, value: int, info: Any) -> int:
        if info.data.get("sequences", value) % value:
            raise ValueError(f"must divide batch.sequences = {info.data['sequences']}")
        return value

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class EvaluateConfig(Frozen):
    """Held-out evaluation at step 0, at powers of two below `every`, at multiples of `every`, and at the last step."""

    every: int = Field(default=100, ge=1)
    rows: int = Field(default=64, ge=1)
    """Held-out rows, in file order."""


class CheckpointConfig(Frozen):
    """Resume state every `every` steps, the newest `keep` kept, and for good those of multiples of `keep_every`."""

    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)


class GuardConfig(Frozen):
    """What happens when a step's loss is NaN, infinite, or above `spike` times the median of the last `window`.

    `stop` ends the run. `rollback` goes back to the newest saved state and leaves out the batches since then, at most
    `rollbacks` times in a row of a process's life.
    """

    action: Literal["stop", "rollback"] = "stop"
    spike: float | None = Field(default=None, gt=1)
    window: int = Field(default=50, ge=1)
    rollbacks: int = Field(default=3, ge=0)


class Stage(Frozen):
    """What every stage has: a source stage, unless it makes its model from nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, populate_by_name=True)

    source: str | None = Field(default=None, alias="from")
    optional: bool = False
    """Run only when it is named, when another stage needs it, or with `--all`."""
    mesh: MeshConfig = MeshConfig()
    sharding: Rules = Rules()


class DataStage(Stage):
    """A stage that reads packed rows."""

    seed: int = 0
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    compute: Compute = Compute()


class Steps(Frozen):
    """What the training loop is told, whatever it trains on."""

    steps: int = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()


class Looped(DataStage, Steps):
    """A stage that trains on packed rows."""

    evaluate: EvaluateConfig = EvaluateConfig()


class TrainStage(Looped):
    """Next-token training of every parameter, the vision tower included, from random initialisation."""

    do: Literal["train"]
    model: ModelRef


class ImportStage(Stage):
    """Read a Hugging Face directory into the cascade."""

    do: Literal["import"]
    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"


class PruneStage(DataStage):
    """Calibrate, score and cut `from` to the sizes of `model`."""

    do: Literal["prune"]
    source: str = Field(alias="from")
    model: ModelRef
    calibration: int = Field(default=16, ge=1)
    """Batches of calibration data."""
    options: PruneOptions = PruneOptions()
    evaluate: EvaluateConfig = EvaluateConfig()


class RecordStage(DataStage):
    """Run `from`, a teacher, over the training rows once and write what students need of its distribution."""

    do: Literal["record"]
    source: str = Field(alias="from")
    rows: int | None = Field(default=None, ge=1)
    """Training rows, the first ones in the order of `seed`, as a student with that seed reads them; None is all."""
    held_out_rows: int = Field(default=64, ge=1)
    """Held-out rows, in file order, whose hidden states are kept for exact evaluations."""
    codec: Codec = SampledCodec()
    shard: int = Field(default=32, ge=1)
    """Rows in one file."""
    store: str | None = None
    """Where the store is written: a path, or a URL such as gs://bucket/name; None is in the stage's directory."""


class StoredTeacher(Frozen):
    """A teacher whose distribution a record stage has written."""

    store: str
    """The record stage."""


def _kind_of_teacher(value: Any) -> str:
    return "str" if isinstance(value, str) else "StoredTeacher"


AnyTeacher = Annotated[
    Annotated[str, Tag("str")] | Annotated[StoredTeacher, Tag("StoredTeacher")], Discriminator(_kind_of_teacher)
]


class DistillStage(Looped):
    """Make the student's next-token distribution equal the teacher's. The vision tower is frozen."""

    do: Literal["distill"]
    model: ModelRef | None = None
    teacher: AnyTeacher
    """The stage whose model teaches, or `{store: the record stage}`."""
    teacher_sharding: Rules | None = None
    """Where the teacher lies; None is like the student."""
    loss: LossOptions = LossOptions()
    baseline: bool = False
    """Also run `<stage>-scratch`: same shape, data, tokens and teacher, but decoder and projector drawn at random."""

    @property
    def teacher_stage(self) -> str:
        """The stage that the targets come from: the teacher itself, or the one that recorded it."""
        return self.teacher if isinstance(self.teacher, str) else self.teacher.store


class GenerateConfig(Frozen):
    """Held-out prompts, answered at every evaluation, and how the answers are scored."""

    prompts: int = Field(default=64, ge=1)
    """Held-out ones, in a fixed order, the sources by their weights."""
    completions: int = Field(default=1, ge=1)
    """Of each prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    rewards: RewardsConfig


class SFTStage(Looped):
    """Learn what the assistant says in conversations, with or without a teacher. The vision tower is frozen.

    With a teacher the loss is the distillation loss, `loss.ce_weight` the share of the cross-entropy.
    """

    do: Literal["sft"]
    source: str = Field(alias="from")
    model: ModelRef | None = None
    teacher: AnyTeacher | None = None
    teacher_sharding: Rules | None = None
    loss: LossOptions = LossOptions(ce_weight=0.5)
    generate: GenerateConfig | None = None

    @property
    def teacher_stage(self) -> str | None:
        return self.teacher.store if isinstance(self.teacher, StoredTeacher) else self.teacher


class RewardStage(Looped):
    """A pairwise judge: learn to say which of two answers is better, then calibrate how sure it is."""

    do: Literal["reward"]
    source: str = Field(alias="from")
    pairs: int = Field(default=256, ge=4)
    """Held-out pairs: every other one fits the temperature, the rest measure it."""


class OnlineEvaluateConfig(GenerateConfig):
    """When held-out prompts are answered: as the evaluations of the other loops."""

    every: int = Field(default=50, ge=1)


class OnlineStage(Stage, Steps):
    """A stage that learns from what its own model answers. A step samples, judges and then updates.

    A prompt is a conversation of the sources up to the assistant's last turn. The vision tower is frozen.
    """

    source: str = Field(alias="from")
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    compute: Compute = Compute()
    prompts: int = Field(default=16, ge=1)
    """New ones in every step."""
    microbatches: int = Field(default=1, ge=1)
    """Over which the gradient of an update is accumulated."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; a longer prompt is an error that names its row."""
    max_completion_length: int | dict[int, int] = 256
    """Tokens; or by the step from which it holds, the first of them 0: `{0: 16384, 400: 24576}`."""
    on_error: Literal["drop", "stop"] = "drop"
    """What becomes of a run when a reward raises, times out or is not a number; `drop` leaves the completion out."""
    workers: int = Field(default=2, ge=1)
    """Processes that score completions, on each host."""
    reward_seconds: float = Field(default=10, gt=0)
    """For one completion."""
    evaluate: OnlineEvaluateConfig

    @field_validator("max_completion_length")
    @classmethod
    def _from_the_first_step(cls, value: int | dict[int, int]) -> int | dict[int, int]:
        lengths = {0: value} if isinstance(value, int) else value
        if 0 not in lengths or min(lengths) < 0 or min(lengths.values()) < 1:
            raise ValueError("must be at least 1, and say what holds from step 0 on")
        return value

    def completion_length(self, step: int) -> int:
        """Tokens that the completions of a step (counted from 0) may have."""
        if isinstance(self.max_completion_length, int):
            return self.max_completion_length
        return self.max_completion_length[max(first for first in self.max_completion_length if first <= step)]


class ODPOStage(OnlineStage):
    """Online DPO: of two answers to a prompt, make the one that the judge prefers more likely."""

    do: Literal["odpo"]
    temperature: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    judge: str | None = None
    """A reward stage; or none, and `rewards` decide."""
    rewards: RewardsConfig | None = None
    reward_temperature: float = Field(default=1.0, gt=0)
    """The first answer wins with probability sigmoid of the rewards' difference over this."""
    tools: str | None = None
    """`package.module:function`, called with a tool's name and its arguments: what it returns is the tool's result."""
    tool_rounds: int = Field(default=2, ge=1)
    """How often an answer may call tools."""
    loss: PreferenceOptions = PreferenceOptions()

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.judge is None) == (self.rewards is None):
            raise ValueError("needs either a `judge`, the name of a reward stage, or `rewards`")
        return self


class GRPOStage(OnlineStage):
    """Group relative policy optimisation, as in Magistral: no reference, no KL."""

    do: Literal["grpo"]
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    num_generations: int = Field(default=8, ge=2)
    """Completions of each prompt, compared with each other."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Updates into which the prompts of a step are split."""
    num_iterations: int = Field(default=1, ge=1)
    """How often a step goes over its completions."""
    mask_truncated_completions: bool = False
    """Whether the tokens of completions that reached the limit are left out of the loss."""
    rewards: RewardsConfig
    loss: PolicyOptions = PolicyOptions()

    @field_validator("steps_per_generation")
    @classmethod
    def _divides(cls, value: int, info: Any) -> int:
        if info.data.get("prompts", value) % value:
            raise ValueError(f"must divide prompts = {info.data['prompts']}")
        return value


class ExportStage(Stage):
    """Write `from` as a Hugging Face directory, tokenizer included."""

    do: Literal["export"]
    source: str = Field(alias="from")
    dtype: Literal["float32", "bfloat16"] = "float32"


AnyStage = Annotated[
    TrainStage
    | ImportStage
    | PruneStage
    | RecordStage
    | DistillStage
    | SFTStage
    | RewardStage
    | ODPOStage
    | GRPOStage
    | ExportStage,
    Field(discriminator="do"),
]


KINDS = ("train", "import", "prune", "record", "distill", "sft", "reward", "odpo", "grpo", "export")
"""What a stage may `do`."""


class Family(Frozen):
    """Which finished stages the summary and the report compare: the parent and, by name, each child's last stage."""

    parent: str
    children: dict[str, str] = Field(default_factory=dict)


class Recipe(Frozen):
    """A whole cascade."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    stages: dict[str, AnyStage]
    family: Family | None = None
    limits: Limits = Limits()
    launch: LaunchConfig = LaunchConfig()

    @field_validator("stages")
    @classmethod
    def _names_are_directories(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"stage name {name!r} must be letters, digits, '-' and '_'")
        return stages

    def dump(self) -> dict[str, Any]:
        """JSON-ready form with every default filled in; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)
