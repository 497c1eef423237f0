"""Until `stages.verbs` lands."""

from types import SimpleNamespace as N

from ministral_jax.stages.figures import ANSWERS, HELD_OUT, KL, Curve, Figure

JUDGE = (
    Figure("judge_accuracy", "pairs judged right", "share", "higher"),
    Figure("judge_ece_before", "judge's ECE, raw", "share", "lower"),
    Figure("judge_ece", "judge's ECE", "share", "lower"),
)
RECORD = (
    Figure("bytes_per_token", "bytes per token", "bytes per token", "lower"),
    Figure("tail_mass", "tail mass", "share", "lower"),
)


def verbs():
    return {
        "train": N(figures=HELD_OUT, curve=Curve("ce")),
        "import": N(figures=(), curve=None),
        "export": N(figures=(), curve=None),
        "prune": N(figures=(Figure("kl_to_source", "KL to the source", "nats per token", "lower"),), curve=None),
        "distill": N(figures=(KL, *HELD_OUT), curve=Curve("kl")),
        "record": N(figures=RECORD, curve=None),
        "sft": N(figures=(*HELD_OUT, *ANSWERS), curve=Curve("ce", "ce")),
        "reward": N(figures=(*HELD_OUT[:2], *JUDGE), curve=Curve("judge_accuracy", None, "step")),
        "grpo": N(figures=ANSWERS, curve=Curve("reward", "reward", "step")),
        "odpo": N(
            figures=(*ANSWERS, Figure("win_rate", "win rate", "share", "higher")), curve=Curve("win_rate", None, "step")
        ),
    }
