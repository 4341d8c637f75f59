"""Turns a run's folder into a page to look at: report/index.html, one file that needs nothing else."""

from cmscale.report.page import build_report

__all__ = ["build_report"]
