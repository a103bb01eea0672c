"""Hyper-parameters over time: traced from an optimizer, or simulated ahead of time; printed, drawn, compared.

schedule.simulate(scheduler, steps=200).lr     # what will come, exactly, with nothing touched
schedule.compare({"step": "StepLR(50)", "cosine": "CosineAnnealingLR(50)"}, steps=200).plot()
"""

from __future__ import annotations

from probe.schedule.command import add_command, run
from probe.schedule.expression import parse
from probe.schedule.recorder import Recorder
from probe.schedule.simulation import compare, simulate
from probe.schedule.trace import Comparison, Trace

__all__ = ["Comparison", "Recorder", "Trace", "add_command", "compare", "parse", "run", "simulate"]
