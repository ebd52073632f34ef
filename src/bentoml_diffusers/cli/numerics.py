"""The option that makes the bits of an image independent of where its weights lie in memory."""

from __future__ import annotations

import os

import click

# MKL takes other kernels for matrices that do not begin at a multiple of 64 bytes, as those in a
# mapped file do, unless it is told so before its first call:
# "Getting Reproducible Results", Intel oneMKL developer guide.
_VARIABLE, _VALUE = "MKL_CBWR", "AUTO,STRICT"


def _apply(_context: click.Context, _option: click.Parameter, is_on: bool) -> None:
    if not is_on:
        return
    current = os.environ.setdefault(_VARIABLE, _VALUE)
    if current != _VALUE:
        raise click.BadParameter(
            f"{_VARIABLE} is {current!r} in the environment, expected {_VALUE!r}; unset it"
        )


reproducible_option = click.option(
    "--reproducible",
    is_flag=True,
    expose_value=False,
    callback=_apply,
    help=f"Same bits wherever the weights lie in memory (sets {_VARIABLE}={_VALUE}).",
)
