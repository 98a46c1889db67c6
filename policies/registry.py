"""Finding policies and forecasters by name, file or entry point, and building them.

``lru``, ``predictive:horizon=4``, ``my.py:Mine``, ``my.py:Mine:width=3`` and names that other
distributions announce under the entry points ``expertflow.policies``,
``expertflow.forecasters`` and ``expertflow.schedulers``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
import typing
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from policies.base import Forecaster, Policy
from policies.scheduling import BatchScheduler
from traces.errors import InputError, first_line, kind_and_line
from traces.names import did_you_mean

T = TypeVar("T")


def parameter(
    default: Any, help: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """Declare a tunable of a policy: its default, meaning and range.

    The command line, ``simctl policies`` and later the tuner all read it from here.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


class Registry(Generic[T]):
    """Names of one *kind* of plug-in (base class *base*), and how to build them."""

    def __init__(self, kind: str, base: type[T], package: str, group: str) -> None:
        self.kind = kind
        self._base = base
        self._package = package
        self._group = group
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Make a class selectable by *name*; a second one of that name is an error."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise InputError(
                    f"{self.kind} {name!r}: registered twice, by "
                    f"{self._classes[name].__qualname__} and {cls.__qualname__}"
                )
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def classes(self) -> dict[str, type[T]]:
        """Every known class by name, built-in ones and those of other distributions."""
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            for point in entry_points(group=self._group):
                self._classes.setdefault(point.name, point.load())
        return dict(sorted(self._classes.items()))

    def build(self, text: str) -> T:
        """Build what *text* asks for; every mistake in it is one :class:`InputError`."""
        cls, options = self._find(text)
        return self.construct(cls, options, text)

    def _find(self, text: str) -> tuple[type[T], str]:
        head, _, rest = text.partition(":")
        if head.endswith(".py"):
            class_name, _, options = rest.partition(":")
            return self._from_file(Path(head), class_name), options
        classes = self.classes()
        if head not in classes:
            raise InputError(
                f"unknown {self.kind} {head!r}{did_you_mean(head, classes)} "
                f"(known: {', '.join(classes)}; or path/to/file.py:Class)"
            )
        return classes[head], rest

    def _from_file(self, path: Path, class_name: str) -> type[T]:
        if not path.is_file():
            raise InputError(f"{self.kind} file {path}: not found")
        module = _import_file(path, self.kind)
        found = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, self._base)
            and value.__module__ == module.__name__
        ]
        if not class_name and len(found) == 1:
            class_name = found[0]
        if class_name not in found:
            what = f"no {self.kind} class {class_name!r}" if class_name else "no class was named"
            raise InputError(
                f"{self.kind} file {path}: {what}, expected one of {', '.join(found) or 'none'}"
            )
        cls: type[T] = getattr(module, class_name)
        if not cls.__dict__.get("name"):
            cls.name = f"{path.name}:{class_name}"  # type: ignore[attr-defined]
        return cls

    def construct(self, cls: type[T], options: str, text: str) -> T:
        """A *cls* with *options* (``name=value,…``); *text* is what the user wrote, for errors."""
        name = getattr(cls, "name", cls.__name__)
        fields = parameters(cls)
        values: dict[str, Any] = {}
        for item in filter(None, options.split(",")):
            key, equals, value = item.partition("=")
            key = key.strip()
            if not equals:
                # A class may let its first parameter go without its name: routing-path:FILE.
                key, value = getattr(cls, "leading", ""), item
                if not key or values:
                    raise InputError(f"{self.kind} {text!r}: {item!r} found, expected key=value")
            if key not in fields:
                raise InputError(
                    f"{self.kind} {name!r}: unknown parameter {key!r}{did_you_mean(key, fields)} "
                    f"(known: {', '.join(fields) or 'none'})"
                )
            values[key] = _convert(value.strip(), fields[key], f"{self.kind} {name!r}: {key}")
        try:
            return cls(**values)
        except Exception as error:
            raise InputError(f"{self.kind} {name!r}: {first_line(error)}") from error


def parameters(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The tunables of a policy or forecaster class: its dataclass fields."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def values_of(plugin: object) -> dict[str, Any]:
    """The tunables of *plugin* as they are set."""
    return {name: getattr(plugin, name) for name in parameters(type(plugin))}


def _convert(text: str, field: dataclasses.Field[Any], where: str) -> Any:
    kind = _type_of(field)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
    except (KeyError, ValueError):
        raise InputError(f"{where} is {text!r}, expected {kind.__name__}") from None
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if isinstance(value, int | float) and (
        value != value or (low is not None and value < low) or (high is not None and value > high)
    ):
        bounds = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
        raise InputError(f"{where} is {value}, expected {bounds}")
    return value


def _type_of(field: dataclasses.Field[Any]) -> type[Any]:
    kind = field.type
    if isinstance(kind, str):
        kind = {"int": int, "float": float, "str": str, "bool": bool}.get(kind, str)
    origin = typing.get_origin(kind)
    return str if origin is not None or not isinstance(kind, type) else kind


def _import_file(path: Path, kind: str) -> ModuleType:
    name = f"_expertflow_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{kind} file {path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{kind} file {path}: does not import ({kind_and_line(error)})") from error
    return module


POLICIES: Registry[Policy] = Registry(
    "policy",
    Policy,  # type: ignore[type-abstract]
    "policies.builtin",
    "expertflow.policies",
)
FORECASTERS: Registry[Forecaster] = Registry(
    "forecaster",
    Forecaster,  # type: ignore[type-abstract]
    "policies.forecasters",
    "expertflow.forecasters",
)

SCHEDULERS: Registry[BatchScheduler] = Registry(
    "scheduler",
    BatchScheduler,  # type: ignore[type-abstract]
    "policies.schedulers",
    "expertflow.schedulers",
)

register = POLICIES.register
register_scheduler = SCHEDULERS.register
register_forecaster = FORECASTERS.register
