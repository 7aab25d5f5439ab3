"""Pages of the API, one for each package, made from docstrings."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "reference/api"
PACKAGES = ("rlhf", "reward", "policy", "launch")


def titles() -> dict[str, str]:
    """The pages, with their names in the navigation."""
    return {f"{FOLDER}/{package}.md": package for package in _modules()}


def pages() -> dict[str, str]:
    return {f"{FOLDER}/{package}.md": _page(package, modules) for package, modules in _modules().items()}


def _modules() -> dict[str, list[str]]:
    """Modules by the package that they lie in."""
    found: dict[str, list[str]] = {}
    for name in PACKAGES:
        for path in sorted((ROOT / name).rglob("*.py")):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            modules = found.setdefault(package, [])
            if not path.stem.startswith("__"):
                modules.append(f"{package}.{path.stem}")
    return {package: modules for package, modules in found.items() if modules}


def _page(package: str, modules: list[str]) -> str:
    return "\n".join([f"# {package}\n", *(f"::: {module}\n" for module in modules)])
