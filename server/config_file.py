"""`fen serve --config FILE`: the options of the command line as the keys of a TOML file."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from engine.messages import EngineOptions
from server.settings import ServerSettings


def read_config(ctx: typer.Context, path: str | None) -> str | None:
    """Makes the file's values the defaults of the command's options: a flag or a variable wins over them."""
    if path is not None:
        try:
            with Path(path).expanduser().open("rb") as file:
                entries = tomllib.load(file)
        except OSError as error:
            raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{path} is not TOML: {error}") from None
        ctx.default_map = {
            name: value for key, value in entries.items() for name, value in [_entry(ctx, path, key, value)]
        }
    return path


def _entry(ctx: typer.Context, path: str, key: str, value: Any) -> tuple[str, Any]:
    """-> the parameter's name and the value, checked. Raises BadParameter naming the key."""
    fields = {
        field.name: field for struct in (EngineOptions, ServerSettings) for field in msgspec.structs.fields(struct)
    }
    options = {parameter.name: parameter for parameter in ctx.command.params if parameter.name in fields}
    name = key.replace("-", "_")
    if name not in options:
        known = [known.replace("_", "-") for known in options if known]
        near = difflib.get_close_matches(key.replace("_", "-"), known, 1, 0.0)
        raise typer.BadParameter(f"{path}: there is no option {key!r}; the nearest is {near[0]!r}")
    if isinstance(value, str) and fields[name].type == list[str]:
        value = [value]
    if name == "price" and type(value) in (int, float):  # or the name of a device
        value = str(value)
    try:
        value = msgspec.convert(value, fields[name].type)
        options[name].process_value(ctx, value)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(f"{path}: {key}: {str(error)[:1].lower()}{str(error)[1:]}") from None
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{path}: {key}: {error.message.removeprefix('Value error, ')}") from None
    return name, value


ConfigOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        help="A TOML file with options as keys, such as max-queue = 64; the command line and the environment win.",
    ),
]
