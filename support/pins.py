"""Which installed packages are not those of constraints.txt. The standard library and packaging alone: it must always run."""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
INSTALL = "pip install -r requirements.txt"


def installed() -> dict[str, str]:
    """The version of every installed package; of two copies on the path the one that Python imports, the first."""
    packages = reversed(list(importlib.metadata.distributions()))
    return {canonicalize_name(package.name): package.version for package in packages if package.name}


def differing(constraints: Path = CONSTRAINTS) -> dict[str, tuple[str, str]]:
    """By name, the version that is installed and the one that is pinned, where they differ. A package that is absent does not."""
    found, different = installed(), {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pin = Requirement(line.split(" #")[0])
        version = found.get(canonicalize_name(pin.name))
        if pin.name == "setuptools" or version is None or (pin.marker and not pin.marker.evaluate()):
            continue  # a virtual environment brings setuptools
        if not pin.specifier.contains(version, prereleases=True):
            different[pin.name] = version, str(pin.specifier).lstrip("=")
    return different


def differences() -> str:
    """The same in words, those that the recipe itself asks for first; an empty string where there are none."""
    asked = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-cpu.txt"))
    order = {name: place for place, name in enumerate(re.findall(r"^[\w.-]+(?===|\s)", asked, re.MULTILINE))}
    found = sorted(differing().items(), key=lambda item: order.get(item[0].replace("-", "_"), order.get(item[0], 999)))
    several = [f"{name} is {has}, {wants} is pinned" for name, (has, wants) in found]
    more = f" and {len(several) - 8} more" if len(several) > 8 else ""
    return "; ".join(several[:8]) + more
