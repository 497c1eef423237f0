"""The page of settings, which is made from the classes that read them."""

import importlib.util
import re

from paths import ROOT


def made():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/settings_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_is_explained():
    """In its row, or in the text above its table. (Rules are axes by name, of which that text speaks as a whole.)"""
    page, unsaid, rows = made(), [], 0
    for section in page.page().split("\n## ")[1:]:
        text, _, table = section.partition("| setting |")
        if section.startswith("Rules "):
            continue
        for name, note in re.findall(r"^\| `(\w+)` \|.*?\| (.*?) \|$", table, re.M):
            rows += 1
            if not note.strip() and not re.search(rf"\b{name}\b", text.split("\n", 1)[1]):
                unsaid.append((section.split(" {")[0], name))
    assert rows > 150 and unsaid == []


def test_no_word_is_left_over():
    module = made()
    told = module.page()
    assert [key for key, words in module.WORDS.items() if words not in told] == []
