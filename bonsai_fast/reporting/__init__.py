"""A run as one page of HTML, and what is measured for it alone."""

from pathlib import Path

from bonsai_fast.reporting.completions import complete, save_completions


def write_report(run: Path) -> Path:
    return run / "report.html"


__all__ = ["complete", "save_completions", "write_report"]
