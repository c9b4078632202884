"""What `watch` reads of a run: its complete checkpoints, its last step, its model and the folder of its event files.

The training writes to this folder at the same time and deletes checkpoints in it. Nothing here writes to it. Modules
that read tensors are imported late, so that a wrong folder is refused at once.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.config.recipe import read_recipe
from megatron_sfr.hf.families.family_registry import check_family
from megatron_sfr.hf.megatron.tracker import CONFIG as WRITTEN_LAST
from megatron_sfr.hf.megatron.tracker import complete_steps, step_folder
from megatron_sfr.storage.model_folders import CONFIG

RECIPE, EVENTS = "recipe.yaml", "tensorboard"


@dataclass(frozen=True)
class RunFolder:
    """The --save folder of a run."""

    folder: Path
    like: Path
    """A Hugging Face folder with the model's config, tokenizer and chat template."""

    def new_steps(self, known: Mapping[int, int]) -> list[int]:
        """The steps of complete checkpoints, oldest first, except those that are known and have not changed.

        known: {step: what `saved_at` returned}. A run that was started again may have written a step once more.
        """
        unchanged = {step for step, at in known.items() if self.saved_at(step) in (at, None)}
        return sorted(complete_steps(self.folder, unchanged))

    def saved_at(self, step: int) -> int | None:
        """When a checkpoint was completed, in nanoseconds since 1970; None if it is not there."""
        try:
            return (self.checkpoint(step) / WRITTEN_LAST).stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def checkpoint(self, step: int) -> Path:
        return self.folder / step_folder(step)

    def last_step(self, newest: int) -> int | None:
        """The step at which the run ends, by its recipe or else by the arguments in its newest checkpoint."""
        steps = _recipe(self.folder).get("train-iters") or self._stored_last_step(newest)
        return steps if type(steps) is int else None

    def _stored_last_step(self, newest: int) -> Any:
        from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint

        if self.saved_at(newest) is None:
            return None
        return Checkpoint(self.checkpoint(newest)).arguments().get("train_iters")

    def export(self, step: int, output: Path) -> None:
        """Writes a checkpoint as a Hugging Face folder; adapters are merged into the base that the run names.

        Raises:
            ValueError: the export could take the room that the run's next checkpoint needs.
        """
        from megatron_sfr.hf.adapter.stored_adapter import has_adapters
        from megatron_sfr.hf.export_hf import export_hf
        from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint

        folder = self.checkpoint(step)
        if output.parent.stat().st_dev == self.folder.stat().st_dev:
            needed = 2 * sum(file.stat().st_size for file in folder.iterdir())
            if (free := shutil.disk_usage(output.parent).free) < needed:
                raise ValueError(
                    f"{output.parent}: {free:,} bytes free; the export of {folder.name} and the run's next checkpoint "
                    f"need up to {needed:,}: make room, or choose --output on another disk"
                )
        export_hf(folder, output, like=self.like, merge=has_adapters(Checkpoint(folder)), progress=False)


def open_run(folder: Path, like: Path | None = None) -> RunFolder:
    """A run to watch, in an existing folder.

    like: by default the Hugging Face folder that the run started from, if its recipe names one.

    Raises:
        ValueError: neither `like` nor the recipe names a Hugging Face folder.
    """
    recipe = _recipe(folder)
    named = like or recipe.get("sfr-hf-load") or recipe.get("lora-base")
    if named is None:
        raise ValueError(
            f"{folder / RECIPE} names no Hugging Face model: give --like HF_DIR, a folder with the config and tokenizer"
        )
    if not (Path(named) / CONFIG).is_file():
        raise ValueError(f"{named} has no {CONFIG}: give --like HF_DIR, a folder with the model's config and tokenizer")
    check_family(Path(named))
    return RunFolder(folder, Path(named))


def events_of(folder: Path) -> Path:
    """The folder of a run's TensorBoard files.

    Raises:
        ValueError: the recipe names a folder that is not here.
    """
    recipe, default = _recipe(folder), folder / EVENTS
    named = recipe.get("tensorboard-dir")
    if named is None or Path(named) == Path(str(recipe.get("save"))) / EVENTS:
        return default  # also where the run's folder was moved
    if not Path(named).is_dir():
        raise ValueError(
            f"{folder / RECIPE}: tensorboard_dir {named} is not a folder here: start watch in the folder in which the "
            "run was started, or give --output DIR, which then gets the event files too"
        )
    return Path(named)


def _recipe(folder: Path) -> Mapping[str, Any]:
    """The resolved recipe that the run wrote into its folder; empty for a folder of another program."""
    return read_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else {}
