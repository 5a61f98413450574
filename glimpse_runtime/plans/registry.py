# SPDX-License-Identifier: Apache-2.0
"""Pruning methods by name: the ones of this package, and those that users add."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, overload

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan

Factory: TypeAlias = "Callable[..., PrunePlan]"
Scaled: TypeAlias = "Callable[[float], Mapping[str, Any]]"
F = TypeVar("F", bound="Callable[..., PrunePlan]")


@dataclass(frozen=True)
class Entry:
    """A method under its name.

    Attributes:
        factory: makes its plan from options.
        scaled: what a scale in (0, 1] means for its options: the larger, the more tokens stay; None: its `ratio`, if it has one.
    """

    factory: Factory
    scaled: Scaled | None = None

    @property
    def options(self) -> list[str]:
        """Names that the factory knows."""
        return list(inspect.signature(self.factory).parameters)

    def scale(self, name: str) -> Scaled:
        """Raises GlimpseError: nothing scales it."""
        if self.scaled is None and "ratio" not in self.options:
            raise GlimpseError(
                f"plan {name!r}: a common budget: expected a method with an option 'ratio', or registered with scaled=..., "
                f"found options {self.options}"
            )
        return self.scaled or (lambda scale: {"ratio": scale})


DEFAULT = "default"
"""In place of a plan: the one that the model was loaded with."""

_ENTRIES: dict[str, Entry] = {}


@overload
def register(name: str, factory: None = None, *, scaled: Scaled | None = None) -> Callable[[F], F]: ...
@overload
def register(name: str, factory: F, *, scaled: Scaled | None = None) -> F: ...
def register(name: str, factory: Any = None, *, scaled: Scaled | None = None) -> Any:
    """Give a method a name, as a call or as a decorator of its factory.

    Args:
        factory: makes a `PrunePlan` from keyword options; all but `modules` have defaults, or have to be given each time.
        scaled: options for a scale in (0, 1], with which `at_budget` looks for a budget; None: {"ratio": scale}.

    Raises:
        GlimpseError: the name is taken by another factory, or is none; the factory cannot be called.
    """
    if factory is None:
        return lambda made: register(name, made, scaled=scaled)
    if not isinstance(name, str) or not name:
        raise GlimpseError(f"register: name: expected a name, found {name!r}")
    if name == DEFAULT:
        raise GlimpseError(
            f"register: name: expected another one than {name!r}, which means the model's own plan"
        )
    if not callable(factory):
        raise GlimpseError(
            f"register {name!r}: factory: expected a function that returns a PrunePlan, found {factory!r}"
        )
    if name in _ENTRIES and _ENTRIES[name].factory is not factory:
        raise GlimpseError(
            f"register: name: expected one that is free, found {name!r}, which is {_ENTRIES[name].factory!r}"
        )
    _ENTRIES[name] = Entry(factory, scaled)
    return factory


def names() -> list[str]:
    """Of all methods, in alphabetical order."""
    return sorted(_ENTRIES)


def entry(name: str) -> Entry:
    """Raises GlimpseError: no method has this name."""
    if not isinstance(name, str) or name not in _ENTRIES:
        raise GlimpseError(f"plan: expected one of {', '.join(names())}; found {name!r}")
    return _ENTRIES[name]


def make(name: str, **options: Any) -> PrunePlan:
    """The plan of a method.

    Raises:
        GlimpseError: no method has this name, it does not know an option or lacks one, or an option's value is out of range.
    """
    found = entry(name)
    parameters = inspect.signature(found.factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(set(options) - set(parameters))
        if unknown:
            raise GlimpseError(
                f"plan {name!r}: options: expected some of {', '.join(parameters)}; found {', '.join(unknown)}"
            )
    lacking = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    lacking = [option for option in lacking if option not in options]
    if lacking:
        raise GlimpseError(f"plan {name!r}: options: expected {', '.join(lacking)}, found none")
    plan = found.factory(**options)
    if not isinstance(plan, PrunePlan):
        raise GlimpseError(f"plan {name!r}: expected its factory to return a PrunePlan, found {plan!r}")
    return plan


def make_for(name: str, modules: GlimpseModules | None, **options: Any) -> PrunePlan:
    """As `make`, with a model's learned modules for a method that takes some.

    Raises:
        GlimpseError: as `make`; or it takes modules, and there are none.
    """
    if "modules" in entry(name).options and "modules" not in options:
        if modules is None:
            raise GlimpseError(f"plan {name!r}: modules: expected learned modules, found none")
        options["modules"] = modules
    return make(name, **options)


def resolve(value: PrunePlan | str | None, modules: GlimpseModules | None = None) -> PrunePlan | None:
    """What a caller may give for a plan: a plan, a registered name (its defaults), or None, which stays None."""
    if value is None or isinstance(value, PrunePlan):
        return value
    if isinstance(value, str):
        return make_for(value, modules)
    raise GlimpseError(f"plan: expected a PrunePlan, one of {', '.join(names())}, or None; found {value!r}")
