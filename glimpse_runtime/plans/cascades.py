# SPDX-License-Identifier: Apache-2.0
"""Methods one behind the other, and plans that are written in a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans.registry import make_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENDINGS = (".yaml", ".yml", ".toml")


def cascade(*plans: PrunePlan) -> PrunePlan:
    """All stages of the plans, in this order; each judges what the ones before it left.

    Raises:
        GlimpseError: no plan, something else than a plan, or stages that cannot follow each other; the text says why.
    """
    for plan in plans:
        if not isinstance(plan, PrunePlan):
            raise GlimpseError(f"cascade: expected plans, found {plan!r}")
    if not plans:
        raise GlimpseError("cascade: expected at least one plan, found none")
    return PrunePlan("+".join(p.name for p in plans), tuple(stage for p in plans for stage in p.stages))


def from_file(path: str | Path, modules: GlimpseModules | None = None) -> PrunePlan:
    """A plan from a YAML or TOML file: `plan` (a registered name) with `options`, or `cascade`, a list of such.

        cascade:
          - plan: divprune
            options: {ratio: 0.5}
          - plan: glimpse

    Args:
        modules: for methods that need learned modules.

    Raises:
        GlimpseError: the file cannot be read, or says something that is not known here.
    """
    path = Path(path)
    said = _read(path)
    try:
        if "cascade" in said:
            _check_keys(said, ("cascade",), "cascade")
            parts = said["cascade"]
            if not isinstance(parts, list) or not parts:
                raise GlimpseError(f"cascade: expected a list of plans, found {parts!r}")
            return cascade(*(_plan(part, modules) for part in parts))
        return _plan(said, modules)
    except GlimpseError as error:
        raise type(error)(f"{path.name}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix not in ENDINGS:
        raise GlimpseError(
            f"plan file: expected one that ends with {', '.join(ENDINGS)}; found {path.name!r}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            said: Any = tomllib.loads(text)
        else:
            import yaml  # few runs read a plan from a file

            try:
                said = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise GlimpseError(f"{path.name}: expected YAML, found {_one_line(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise GlimpseError(f"{path.name}: expected TOML, found {_one_line(error)}") from error
    except OSError as error:
        raise GlimpseError(f"plan file: expected one to read, found {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise GlimpseError(f"{path.name}: expected UTF-8, found {_one_line(error)}") from error
    if not isinstance(said, Mapping):
        raise GlimpseError(f"{path.name}: expected 'plan' with 'options', or 'cascade'; found {said!r}")
    return said


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_keys(said: Mapping[Any, Any], known: tuple[str, ...], needed: str) -> None:
    unknown = [key for key in said if key not in known]
    if needed not in said or unknown:
        found = ", ".join(map(repr, unknown or said)) or "nothing"
        raise GlimpseError(f"expected 'plan' with 'options', or 'cascade'; found {found}")


def _plan(said: Any, modules: GlimpseModules | None) -> PrunePlan:
    if not isinstance(said, Mapping):
        raise GlimpseError(f"expected 'plan' with 'options', found {said!r}")
    _check_keys(said, ("plan", "options"), "plan")
    name, options = said["plan"], said.get("options")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise GlimpseError(f"plan {name!r}: options: expected names with values, found {options!r}")
    if "modules" in options:
        raise GlimpseError(
            f"plan {name!r}: options: modules: expected none, they come with the model; found {options['modules']!r}"
        )
    given = {str(key): _as_python(value) for key, value in options.items()}
    return make_for(name, modules, **given)


def _as_python(value: Any) -> Any:
    """Options that are lists in a file are tuples in Python."""
    return tuple(_as_python(part) for part in value) if isinstance(value, list) else value
