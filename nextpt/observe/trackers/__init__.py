"""Trackers: listeners that carry a run's events to TensorBoard, Weights & Biases or MLflow, each switched on by a key.

A tracker is a `Listener` (nextpt/events.py): it hears every event on rank 0 and is closed at the
end. JSON lines is the one in nextpt/events.py that needs no library.
"""

from nextpt.observe.trackers.choice import check_trackers, open_trackers

__all__ = ["check_trackers", "open_trackers"]
