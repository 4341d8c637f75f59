"""Writes a run's report: report/index.html, one self-contained page."""

from cmscale.report.page import build_report

__all__ = ["build_report"]
