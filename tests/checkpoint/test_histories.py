"""Random histories of a run folder: saves, kills, damage, rollbacks, world sizes, restarts.

A plain list of the committed checkpoints is kept beside the real folder; the checkpoint that a
start resumes from must follow from that list.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nextpt.base.collective import RankGroup
from nextpt.base.errors import NoValidCheckpointError
from nextpt.checkpoint.folders import checkpoint_folders, step_of
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.verification import verify_checkpoint
from nextpt.config import CheckpointSection
from tests.support.checkpoints import State, holds, on_ranks
from tests.support.file_operations import Killed, dying_at


class Save:
    """One committed checkpoint.

    Attributes:
        value: Value of its State, unique to this save.
        lineage: The saves that led to it, itself last.
    """

    def __init__(
        self, folder: Path, step: int, value: float, lineage: list[Save], loss: float | None
    ) -> None:
        self.folder, self.step, self.value, self.loss = folder, step, value, loss
        self.lineage = [*lineage, self]
        self.damaged = False


class Histories(RuleBasedStateMachine):
    @initialize(
        last=st.integers(2, 3), every=st.sampled_from([None, 3]), best=st.sampled_from([None, 1])
    )
    def begin(self, last: int, every: int | None, best: int | None) -> None:
        self.root = Path(tempfile.mkdtemp()) / "checkpoints"
        self.root.parent.mkdir(exist_ok=True)
        self.limits = {"keep_last": last, "keep_every": every, "keep_best": best}
        self.saves: list[Save] = []  # committed, in order
        self.lineage: list[Save] = []  # of the running job
        self.world_size, self.running, self.value, self.step = 1, False, 0.0, 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root.parent, ignore_errors=True)

    def present(self) -> list[Save]:
        """Committed and not removed, newest first.

        The name of a removed checkpoint may be reused.
        """
        last = {save.folder: save for save in self.saves}
        return [
            save
            for save in reversed(self.saves)
            if save.folder.exists() and last[save.folder] is save
        ]

    def good(self) -> list[Save]:
        return [save for save in self.present() if not save.damaged]

    # ---- actions

    @precondition(lambda self: not self.running)
    @rule(world_size=st.integers(1, 3))
    def start(self, world_size: int) -> None:
        good, any_folder = self.good(), bool(checkpoint_folders(self.root))
        try:
            self._start(world_size, "auto")
        except NoValidCheckpointError:
            assert not good and (any_folder or list(self.root.glob("*.damaged*")))
            shutil.rmtree(self.root)  # a person gives up
            self.saves = []
            return
        assert (self.lineage[-1:] == good[:1]) and not [
            s for s in self.present() if s.damaged and self.newer(s)
        ]

    def newer(self, save: Save) -> bool:
        return bool(self.lineage) and self.saves.index(save) > self.saves.index(self.lineage[-1])

    @precondition(lambda self: not self.running and self.good())
    @rule(data=st.data(), world_size=st.integers(1, 3))
    def roll_back(self, data: st.DataObject, world_size: int) -> None:
        """Start from an explicit step: the newest save of that step."""
        candidates = {save.step: save for save in reversed(self.present())}
        steps = sorted(step for step, save in candidates.items() if not save.damaged)
        if steps:
            step = data.draw(st.sampled_from(steps))
            self._start(world_size, step)
            assert self.lineage[-1] is candidates[step]

    def _start(self, world_size: int, resume: str | int) -> None:
        settings = CheckpointSection(resume=resume, **self.limits)

        def job(group: RankGroup) -> float | None:
            self.managers[group.rank] = CheckpointManager(
                self.root, settings, group, lambda text: None
            )
            checkpoint = self.managers[group.rank].resume()
            values = [
                save.value
                for save in self.saves
                if checkpoint is not None and holds(checkpoint, save.value)
            ]
            return values[0] if checkpoint else None

        self.managers: dict[int, CheckpointManager] = {}
        resumed = on_ranks(world_size, job, in_turn=True)
        assert len(set(resumed)) == 1
        self.lineage = next((save.lineage for save in self.saves if save.value == resumed[0]), [])
        self.world_size = world_size
        self.running = True
        self.step = self.lineage[-1].step if self.lineage else 0

    @precondition(lambda self: self.running)
    @rule(
        ahead=st.integers(1, 3),
        loss=st.sampled_from([None, 1.0, 2.0, 3.0]),
        at=st.none() | st.integers(0, 60),
    )
    def save(self, ahead: int, loss: float | None, at: int | None) -> None:
        """Train on and save; killed before operation `at`, if there are that many operations."""
        self.step, self.value = self.step + ahead, self.value + 1.0
        had, before = len(self.good()), set(checkpoint_folders(self.root))
        self.there = self.present()

        def job(group: RankGroup) -> None:
            manager = self.managers[group.rank]
            # The same ranks, in other threads than at the start
            manager.group = manager._writers = group
            manager.save(
                State(self.value, group.rank, group.world_size),
                {"step": self.step, "config": {}},
                {},
                loss,
            )

        try:
            with dying_at(self.root, at, watch=lambda: self.enough(had)):
                on_ranks(self.world_size, job, in_turn=True)
        except Killed:
            self.running = False
        new = [folder for folder in checkpoint_folders(self.root) if folder not in before]
        assert len(new) <= 1 and (new or not self.running)
        if new:
            save = Save(new[0], self.step, self.value, self.lineage, loss)
            assert step_of(save.folder) == self.step
            self.saves.append(save)
            self.lineage = save.lineage
        self.enough(had)

    def enough(self, had: int) -> None:
        """At every instant two valid checkpoints exist, or as many as there were."""
        assert sum(
            verify_checkpoint(folder, RankGroup.world()) is None
            for folder in checkpoint_folders(self.root)
        ) >= min(2, had)

    @precondition(lambda self: self.running)
    @rule()
    def kill(self) -> None:
        self.running = False

    @precondition(lambda self: self.good())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        save = data.draw(st.sampled_from(self.good()))
        names = sorted(path.name for path in save.folder.iterdir())
        path = save.folder / data.draw(st.sampled_from(names))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        save.damaged = True

    # ---- invariants

    @invariant()
    def what_is_kept_is_what_the_settings_say(self) -> None:
        """After an undisturbed save: the last of the lineage, every third, the best; bounded."""
        if (
            not getattr(self, "saves", None)
            or not self.running
            or any(save.damaged for save in self.saves)
        ):
            return
        present, line = self.present(), self.saves[-1].lineage
        if self.lineage is not line:
            return  # rolled back and not saved yet
        last, every, best = self.limits.values()
        values = {save.value for save in present}
        # An earlier save may have removed others
        line = [save for save in line if save in self.there] + line[-1:]
        assert {save.value for save in line[-last:]} <= values
        if every:
            assert {save.value for save in self.there if save.step % every == 0} <= values
            assert len([s for s in present if s.step % every]) <= 2 * last + (best or 0)
        else:
            assert len(present) <= 2 * last + (best or 0)
        measured = [save for save in line if save.loss is not None]
        if best and measured:
            lowest = min(save.loss for save in measured)
            assert next(save for save in measured if save.loss == lowest).value in values

    @invariant()
    def lines_are_recorded(self) -> None:
        for save in self.good() if getattr(self, "saves", None) else []:
            manifest = read_manifest(save.folder)
            for other in self.good():
                assert manifest.descends_from(read_manifest(other.folder)) == (
                    other in save.lineage
                )


def histories(examples: int) -> Callable[[], None]:
    return lambda: run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            # Shrinking takes minutes and shows little more
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )


@pytest.mark.thorough
def test_random_histories() -> None:
    histories(20)()


@pytest.mark.slow
def test_many_random_histories() -> None:
    histories(60)()
