"""Which models this package adds: one file and one yaml each; the folder is the registry, the yaml's name is the class."""

import pkgutil
from functools import cache
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
# In a wheel the yaml files travel inside the package; in a checkout they stand beside it.
PROPERTIES = next(
    (folder for folder in (PACKAGE_FOLDER / "properties", PACKAGE_FOLDER.parent / "properties") if folder.is_dir()),
    PACKAGE_FOLDER / "properties",
)


@cache
def model_files() -> dict[str, str]:
    """Class name of every model of this package -> the module that holds it. Imports none of them."""
    modules = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    names = sorted(path.stem for path in (PROPERTIES / "model").glob("*.yaml"))
    return {name: f"{__name__}.{name.lower()}" for name in names if name.lower() in modules}
