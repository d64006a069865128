"""One run as one HTML file: numbers, plots, and a viewer of traces coloured by reward.

The file holds everything it shows. A policy in it forbids the browser any request and any script
but the viewer's own; every text from outside is escaped. Plots and numbers need no script.

    content    tables and charts as data          text     what may stand in a page
    traces     traces as data, colour scales      svg      a chart as inline SVG
    summary    what an evaluation hands over      viewer   a set of traces as HTML
    run        run folders and score files        page     the file
    paper      a chart as PDF, by matplotlib
"""

from airl_fast.report.content import Cell, Chart, Estimate, Section, Series, Table
from airl_fast.report.page import write_report
from airl_fast.report.paper import save_chart
from airl_fast.report.run import report_run
from airl_fast.report.summary import CurvePoint, EvalSummary, ReliabilityBin
from airl_fast.report.traces import Piece, StepView, TraceSet, TraceView

__all__ = [
    "Cell",
    "Chart",
    "CurvePoint",
    "Estimate",
    "EvalSummary",
    "Piece",
    "ReliabilityBin",
    "Section",
    "Series",
    "StepView",
    "Table",
    "TraceSet",
    "TraceView",
    "report_run",
    "save_chart",
    "write_report",
]
