"""Which model an imported recording is of: from a file, from options, or recognised."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.errors import InputError
from traces.model import DTYPE_BYTES, ModelSpec
from traces.sizes import model_sizes, resize

#: Dimensions taken when neither the recording nor an option tells them.
DEFAULT_HIDDEN = 2048
DEFAULT_INTERMEDIATE = 2048


@dataclass(frozen=True)
class SpecOptions:
    """What the user said about the model; None where nothing was said.

    *file* is a JSON or TOML file with all fields of a :class:`ModelSpec`; *sizes* names a
    published model whose dimensions are taken; the other options change single fields.
    """

    file: Path | None = None
    sizes: str | None = None
    name: str | None = None
    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    expert_params: int | None = None
    dense_params: int | None = None
    kv_bytes_per_token: int | None = None
    dtype: str | None = None

    def given(self) -> dict[str, Any]:
        """The fields of a model spec that were said."""
        values = dataclasses.asdict(self)
        del values["file"], values["sizes"]
        return {name: value for name, value in values.items() if value is not None}

    def base(self) -> ModelSpec | None:
        """The spec in *file* with the other options applied, if there is a file."""
        if self.file is None:
            return None
        return dataclasses.replace(load_spec(self.file), **self.given())


@dataclass(frozen=True)
class Found:
    """What a recording itself tells of its model; None where it does not."""

    path: Path
    layers: int | None = None
    top_k: int | None = None
    experts: int | None = None
    published: str | None = None


def load_spec(path: Path) -> ModelSpec:
    """Read a :class:`ModelSpec` from a ``.json`` or ``.toml`` file."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: neither JSON nor TOML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected an object")
    return ModelSpec.from_dict(values, str(path))


def resolve(options: SpecOptions, found: Found) -> ModelSpec:
    """The model of a recording: a spec file, else what was recognised, else the options.

    Layers, experts and top-k must come from the recording or be said, and must agree where
    both tell. Other dimensions have defaults: hidden and intermediate 2048, expert_params
    3 x hidden x intermediate, dense_params layers x (4 x hidden^2 + hidden x experts),
    kv_bytes_per_token two hidden vectors per layer, bfloat16.
    """
    for name in ("layers", "top_k"):
        said, seen = getattr(options, name), getattr(found, name)
        if said is not None and seen is not None and said != seen:
            raise InputError(
                f"{found.path}: has {name} = {seen}, expected {said} as the option says"
            )
    model = options.base() or _published(options, found) or _assumed(options, found)
    for name in ("layers", "top_k"):
        seen = getattr(found, name)
        if seen is not None and seen != getattr(model, name):
            raise InputError(
                f"{found.path}: has {name} = {seen}, "
                f"expected {getattr(model, name)} as the model spec says"
            )
    return model


def _published(options: SpecOptions, found: Found) -> ModelSpec | None:
    """The model called by ``sizes``, else the one recognised; resized to what was routed."""
    name = options.sizes or found.published
    if name is None:
        return None
    model = model_sizes(name)
    given = options.given()
    routed = {
        field: given.get(field, getattr(found, field)) for field in ("layers", "experts", "top_k")
    }
    differs = [
        field for field, value in routed.items() if value not in (None, getattr(model, field))
    ]
    if differs:
        model = resize(_assumed(SpecOptions(**routed, name=given.get("name")), found), model)
    return dataclasses.replace(model, **given)


def _assumed(options: SpecOptions, found: Found) -> ModelSpec:
    sizes = {}
    for name in ("layers", "experts", "top_k"):
        value = getattr(options, name)
        value = getattr(found, name) if value is None else value
        if value is None:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{found.path}: does not tell the model's {name}, expected {flag}")
        sizes[name] = value
    given = options.given()
    hidden = given.get("hidden", DEFAULT_HIDDEN)
    intermediate = given.get("intermediate", DEFAULT_INTERMEDIATE)
    dtype = given.get("dtype", "bfloat16")
    layers = sizes["layers"]
    values = {
        "name": found.path.stem,
        "hidden": hidden,
        "intermediate": intermediate,
        "expert_params": 3 * hidden * intermediate,
        "dense_params": layers * (4 * hidden * hidden + hidden * sizes["experts"]),
        "kv_bytes_per_token": layers * 2 * hidden * DTYPE_BYTES.get(dtype, 2),
    }
    return ModelSpec(**{**values, **sizes, **given})
