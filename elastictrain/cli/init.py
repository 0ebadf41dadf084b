"""`elastictrain init`: a config to begin with, where there is no copy of the repository."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from elastictrain.errors import ConfigError

RECIPE = "jobs/llm_tiny.yaml"
"""In the repository; the package has the same file, and a test holds the two together."""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write; not there yet.")] = Path("llm_tiny.yaml"),
) -> None:
    """Write a config to begin with.

    A small language model on two workers, one of which is killed halfway; every line says what it is for.
    """
    text = files("elastictrain.cli").joinpath(Path(RECIPE).name).read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text.replace(RECIPE, str(file)))
    except FileExistsError:
        raise ConfigError(f"{file} is there already: name another file") from None
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from None
    typer.echo(f"elastictrain train {file}")
