"""The memory that a piece of work really takes, from torch's profiler, which sees each allocation on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def measured_peak(build: Callable[[], Callable[[], object]]) -> int:
    """Most bytes alive while the work that ``build()`` returns is done, counted from before it was built."""
    gc.collect()  # what earlier work left would be seen to go, and not to come
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as before:
        work = build()
    steady = sum(event.nbytes() for event in _memory(before))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as during:
        work()
    alive = peak = steady
    for event in _memory(during):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _memory(profiled: profile) -> list:
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())
