"""Lists the feature networks of evaluations without importing them, as their modules need torch."""

import importlib
import pkgutil

PACKAGE = "cmscale.evaluation.features"
_COMMON = "extractor"  # the module that all networks share


def feature_networks() -> list[str]:
    """The names that `evaluate.features` may have: the modules in the folder of feature networks, sorted."""
    package = importlib.import_module(PACKAGE)  # its __init__.py imports nothing
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != _COMMON)


def known_network(name: str) -> str:
    """Returns `name`. Raises ValueError if no feature network has it."""
    if name not in feature_networks():
        raise ValueError(f"got {name!r}; allowed: {', '.join(feature_networks())}")
    return name
