"""Config section `run`: name, folder and seed of a run."""

from __future__ import annotations

from nextpt.config.section import Section, key


class RunSection(Section):
    """Identity of the run."""

    name: str = key(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run and of its folder",
        aliases=("run_name", "experiment_name", "wandb_run_name", "exp_name"),
    )
    dir: str | None = key(
        None,
        is_path=True,
        may_change=True,
        description="run folder; runs/NAME unless set",
        aliases=("output_dir", "out_dir", "save_dir", "save_folder", "run_dir"),
    )
    seed: int = key(
        0,
        ge=0,
        lt=2**31,
        description="seed of the initialisation and of the data order",
        aliases=("random_seed", "data_seed"),
    )
