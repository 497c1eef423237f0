"""One self-contained HTML page per run, and the family as a picture."""

from ministral_jax.report.family import family_figure
from ministral_jax.report.run import build_report

__all__ = ["build_report", "family_figure"]
