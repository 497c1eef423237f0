"""The real family, read once."""

import pytest
from finding_cases import TEACHERS
from paths import ROOT

from ministral_jax.recipe.load import load_recipe, order, resolve_specs


@pytest.fixture(scope="session")
def family():
    """The recipe of the real family, with the sizes that its imports have."""
    recipe = load_recipe(ROOT / "configs" / "ministral3.yaml", made=lambda name: TEACHERS)
    return recipe, resolve_specs(recipe, order(recipe), TEACHERS)
