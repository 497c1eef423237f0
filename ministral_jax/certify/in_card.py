"""What a certificate says, as a section of the model card."""

from __future__ import annotations

import re
from pathlib import Path

from ministral_jax.certify.certificate import Certificate
from ministral_jax.certify.serving import Serving
from ministral_jax.files import write_text

TITLE = "## Certificate"


def put_in_card(path: Path, found: Certificate) -> None:
    """Write the section into a model card, in the place of an earlier one."""
    card = path.read_text(encoding="utf-8")
    card = re.sub(rf"^{TITLE}\n.*?(?=^## |\Z)", "", card, flags=re.M | re.S)
    write_text(path, f"{card.rstrip()}\n\n{TITLE}\n\n{section_of(found)}\n")


def section_of(found: Certificate) -> str:
    """Markdown."""
    if not found.holds:
        failed = [f"{check.name}: {check.said}" for check in found.checks if not check.holds]
        failed += [f"{r.reader} on {r.prompt}" for r in found.readings if not r.holds]
        failed += [f"{f.control} is not told by {f.reader}" for f in found.controls if not f.fails]
        return f"**Not certified against `{found.against}`**: {'; '.join(failed)}."
    checks = ", ".join(check.said for check in found.checks if check.name == "tensors")
    lines = [
        f"Certified against `{found.against}`: {checks}. Logits of the last {found.readings[0].positions} positions:\n",
        "| read by | prompt | KL, nats per token | largest difference of a logit | equal argmax |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in found.readings:
        lines.append(f"| {r.reader} | {r.prompt} | {r.kl:.2g} | {r.max_difference:.2g} | {r.argmax:.1%} |")
    if found.controls:
        names = ", ".join(dict.fromkeys(failure.control for failure in found.controls))
        lines.append(f"\nCopies with a fault are told from it by every reader: {names}.")
    if found.serving is not None:
        lines.append(f"\n{paces_of(found.serving)}.")
    return "\n".join(lines)


def paces_of(said: Serving) -> str:
    """In words."""
    text = f"The weights are {said.bytes / 1e6:,.1f} MB"
    if said.prompt_per_second is None or said.generated_per_second is None:
        return text
    paces = f"{said.prompt_per_second:,.0f} tokens of a prompt and {said.generated_per_second:,.0f} new ones"
    return f"{text}; llama.cpp reads {paces} in a second, on {said.machine}"
