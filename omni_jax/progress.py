"""The progress bar of the commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, enabled: bool, *, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar on stderr that goes away at the end.

    Args:
      label: stands before the bar.
      total: how much there is to do; None where it is not known.
      enabled: False draws nothing.
      in_bytes: amounts are bytes, shown with their rate; else they are counted.
    Yields:
      The function that advances it: by 1, or by the amount it is given; `label=` replaces the label.
    """
    if not enabled:
        yield lambda amount=1, label=None: None
        return
    from rich import progress as bars
    from rich.console import Console

    shown = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *shown, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount=1, label=None: bar.update(task, advance=amount, description=label)
