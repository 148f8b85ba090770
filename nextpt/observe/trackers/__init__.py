"""Trackers: listeners that send a run's events to TensorBoard, Weights & Biases or MLflow.

A tracker is a `Listener` (nextpt/events.py): it gets every event on rank 0 and is closed at the
end. The one that writes JSON lines is in nextpt/events.py and needs no library.
"""

from nextpt.observe.trackers.choice import check_trackers, open_trackers

__all__ = ["check_trackers", "open_trackers"]
