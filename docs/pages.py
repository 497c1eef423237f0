"""Pages that are made while the site is built: the reference, by walking the package, the settings, the notebooks,
the changelog."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import settings_page
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "ministral_jax"


def on_config(config: Any) -> Any:
    """Give the made pages their places in the navigation."""
    titles = {"Reference": list(reference()), "Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks()]}
    for entry in config.nav:
        for title in entry.keys() & titles.keys():
            entry[title] = titles[title]
    return config


def on_files(files: Files, config: Any) -> Files:
    pages = reference() | {f"notebooks/{path.stem}.md": notebook(path) for path in notebooks()}
    pages["settings.md"] = settings_page.page()
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def reference() -> dict[str, str]:
    """A page for each room from the top of the package down, after one that lists them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join((PACKAGE, *parts)).removesuffix(".__init__")
        if summary(name) and not parts[-1].startswith("__main"):
            found.setdefault(parts[0] if len(parts) > 1 else "", []).append(name)
    rooms = {room: found[room] for room in sorted(found, key=place)}
    pages = {f"reference/{room or PACKAGE}.md": page(room, modules) for room, modules in rooms.items()}
    lines = []
    for room, modules in rooms.items():
        names = ", ".join(f"`{name.rpartition('.')[2]}`" for name in modules)
        lines.append(f"- [{room or PACKAGE}]({room or PACKAGE}.md): {names}")
    order = "Rooms from the top down: each imports from those below it, never from one above.\n"
    return {"reference/index.md": "\n".join(["# Reference", "", order, *lines, ""]), **pages}


def place(room: str) -> tuple[int, str]:
    """Of a room in the order of imports, which `[tool.importlinter]` of pyproject.toml holds; the package is first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer for contract in settings["contracts"] for layer in contract.get("layers", ())]
    order = [name.strip() for layer in layers for name in layer.replace("|", ":").split(":")]
    return (order.index(room) + 1 if room in order else len(order) + 1 if room else 0), room


def page(room: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {room or PACKAGE}", *(f"::: {name}" for name in modules)])


def summary(module: str) -> str:
    """The docstring of a module."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def notebooks() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.ipynb"))


def notebook(path: Path) -> str:
    """Its text and code; to see what it shows, run it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
