"""The report of a run: one self-contained page of HTML."""

from bonsai_fast.evaluation.completions import PROMPTS, complete, save_completions
from bonsai_fast.report.page import write_report
from bonsai_fast.report.run_record import RunRecord

__all__ = ["PROMPTS", "RunRecord", "complete", "save_completions", "write_report"]
