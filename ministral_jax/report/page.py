"""One self-contained HTML page for a run: no script, nothing fetched, readable in the dark and on paper."""

from __future__ import annotations

import os
from pathlib import Path

from ministral_jax.report import curves, details, post, results, stored, time
from ministral_jax.report.collect import Run, read_run
from ministral_jax.report.family import family_figure
from ministral_jax.report.markup import Child, Html, el
from ministral_jax.report.style import PAGE_CSS
from ministral_jax.report.units import duration, listing

_SECTIONS = (
    ("numbers", "Numbers", results.numbers),
    ("recovery", "Distillation", results.recovery),
    ("images", "Images", results.images),
    ("text", "Text", results.texts),
    ("post", "Post-training", post.post_training),
    ("parent", "Parent", details.parent),
    ("stored", "Stored teacher", stored.stored),
    ("surgery", "Surgery", details.surgery),
    ("cost", "Size and cost", details.cost),
    ("stages", "Stages", details.stages),
    ("time", "Time", time.goodput),
    ("curves", "Curves", curves.curves),
)


def build_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and `<run_dir>/family.svg` from whatever the run has produced so far.

    Returns:
        path of the page.

    Raises:
        UserError: `run_dir` is not a run's directory.
    """
    run = read_run(Path(run_dir))
    page = Path(run_dir) / "report.html"
    write(page, render(run))
    if any(model.made for model in run.models):
        write(page.with_name("family.svg"), family_figure(run.summary))
    return page


def write(path: Path, text: str) -> None:
    """At once: a reader, or a crash, never meets half a page."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def render(run: Run) -> str:
    sections = [(anchor, label, made) for anchor, label, make in _SECTIONS if (made := make(run))]
    title = results.headline(run)
    footer = [details.versions(run), el("p", "One file; it loads nothing and runs no script.")]
    return document(f"run {run.name}", title, _status(run), results.family(run), sections, footer)


def document(
    subject: str, title: str, lead: str, hero: Child, sections: list[tuple[str, str, Html]], footer: Child
) -> str:
    """A whole page: its head with the style sheet, title and lead, links to its sections (anchor, label, content)."""
    links = [el("a", label, href=f"#{anchor}") for anchor, label, _ in sections]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{subject.partition(' ')[2]}: {title}"),
        el("style", Html(PAGE_CSS)),
    )
    header = el(
        "header",
        el("p", f"ministral_jax \u00b7 {subject}", class_="eyebrow"),
        el("h1", title),
        el("p", lead, class_="lead"),
        el("nav", links, aria_label="Sections"),
    )
    main = el("main", hero, [made for _, _, made in sections])
    return "<!DOCTYPE html>\n" + el("html", head, el("body", header, main, el("footer", footer)), lang="en") + "\n"


def _status(run: Run) -> str:
    done = [stage for stage in run.stages if stage.state == "finished"]
    begun = [stage.name for stage in run.stages if stage.state == "unfinished"]
    text = f"{len(done)} of {len(run.stages)} stages finished"
    if run.wall_seconds is not None:
        text += f", in {duration(run.wall_seconds)}"
    return text + (f"; begun: {listing(begun)}." if begun else ".")
