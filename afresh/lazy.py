"""Names that a package hands on from its files, each imported when it is first asked for: no face loads torch.

PEP 562 asks for one function a package; that is less than a dependency (lazy_loader) and the stub files it would need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def handed_on(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` (PEP 562) for names that stand in files of ``package``, or of another one.

    Args:
        package: ``__name__`` of the face.
        homes: name → module below ``package``, as in ``"terms.amg"``; of another package with a slash in front, as in
            ``"/curate.duplicates"``.
    """

    def getattribute(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[1:] if home.startswith("/") else f"{package}.{home}"), name)

    return getattribute
