"""Tables as text."""

from __future__ import annotations


def text_of(table) -> str:
    """A table of rich, as wide as it needs to be: no line is folded."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1000)
    console.width = Measurement.get(console, console.options, table).maximum
    with console.capture() as capture:
        console.print(table)
    return capture.get()
