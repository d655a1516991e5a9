"""Thin widgets over plain functions: whatever a widget shows, a function here or elsewhere returns without it."""

from helpers.course.widgets.batching import batching_simulator
from helpers.course.widgets.build import build_explorer
from helpers.course.widgets.chat import chat
from helpers.course.widgets.choices import START, Choice, bars, candidates, stream_choices
from helpers.course.widgets.experiments import experiment_runner
from helpers.course.widgets.memory import memory_calculator
from helpers.course.widgets.replay import fusion_replay
from helpers.course.widgets.sampling import sampling_explorer

__all__ = [
    "START",
    "Choice",
    "bars",
    "batching_simulator",
    "build_explorer",
    "candidates",
    "chat",
    "experiment_runner",
    "fusion_replay",
    "memory_calculator",
    "sampling_explorer",
    "stream_choices",
]
