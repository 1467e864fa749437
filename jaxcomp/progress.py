"""A progress bar on standard error that is not there when nobody watches."""


class Progress:
    """Counts steps towards a total.

    Args:
      title: what is going on.
      total: number of steps.
      shown: whether to draw anything.
    """

    def __init__(self, title: str, total: int, shown: bool):
        self._bar = None
        if shown and total:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total)
            self._bar.start()

    def advance(self, what: str) -> None:
        """One step is done; ``what`` was it."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=what[-40:])

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
