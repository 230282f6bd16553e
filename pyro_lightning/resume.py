"""Going on with a fit from a checkpoint, as if it had not been interrupted."""

from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from pyro_lightning import _lightning, _lightning_resuming
from pyro_lightning.random_states import set_generator_states, set_random_states
from pyro_lightning.rank_zero import warn
from pyro_lightning.rest_of_epoch import draws_rows, generators_of, rest_of, seeds_of, set_seeds
from pyro_lightning.saved_fits import RESUME_KEY, SavedFits


class Resume(SavedFits):
    """Puts back what a checkpoint holds of a fit, before the next step.

    Lightning counts the batches of an epoch that were done, and begins the epoch's rows anew. Here
    the same rows are drawn again, and those that are done left out.
    """

    # -- loading -------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read where a fit stands that goes on.

        Raises:
            ValueError: In the middle of an epoch, when there were more processes, or fewer.
        """
        super().on_load_checkpoint(checkpoint)
        if not _lightning.resumes_fit(self) or "loops" not in checkpoint:
            return
        state = self._fit_state
        state.progress = _lightning_resuming.settle_progress(checkpoint["loops"]["fit_loop"])
        state.loaded = checkpoint.get(RESUME_KEY)
        if state.loaded is None:
            warn(
                "the checkpoint has no random states: it was not written by this version. The fit "
                "goes on with other noise and another order of rows than it would have had.",
                stacklevel=2,
            )
            return
        saved, world = len(state.loaded["ranks"]), self.trainer.world_size
        if saved != world and state.progress.batches:
            raise ValueError(
                f"the checkpoint was saved by {saved} processes in the middle of an epoch, after "
                f"{state.progress.batches} batches of each, and there are {world} now: the rows "
                f"that are left cannot be shared out anew. Resume with {saved}, or from a "
                "checkpoint of an epoch's end."
            )
        if saved != world:
            warn(
                f"the checkpoint was saved by {saved} processes, and there are {world} now: the "
                "fit goes on with other batches than it would have had.",
                stacklevel=2,
            )

    def _follow_loader(self, batch: Any) -> None:
        """Read the loader's sizes; refuse to train on without what a checkpoint holds."""
        if self._fit_state.progress is not None:
            raise RuntimeError(
                "a fit that goes on from a checkpoint was to begin where it stands, in "
                f"{type(self).__name__}.on_train_start: have yours call super().on_train_start()"
            )
        super()._follow_loader(batch)

    # -- going on ------------------------------------------------------------------------------

    def _put_back(self, snapshot: dict[str, Any]) -> None:
        set_random_states(snapshot["random"], self.trainer.strategy.root_device)
        for loaders, states in zip(self._loaders(), snapshot["loaders"], strict=True):
            for loader, kept in zip(loaders, states, strict=False):
                generators = generators_of(loader)
                if len(generators) == len(kept):
                    set_generator_states(generators, kept)

    def on_train_start(self) -> None:
        """Go on where the checkpoint stands, as the last thing before the next step.

        Raises:
            ValueError: In the middle of an epoch, when the loader has another number of batches.
        """
        super().on_train_start()
        progress = self._fit_state.progress
        if progress is None:
            return
        trainer, loaded = self.trainer, self._fit_state.loaded
        rank: dict[str, Any] = {}
        if loaded is not None:
            rank = self._restore(loaded, progress)
        if progress.batches is None:
            _lightning_resuming.begin_epoch(trainer)
            if progress.in_epoch_end:
                _lightning_resuming.step_plateau_schedulers(trainer, trainer.current_epoch - 1)
        else:
            self._go_on_in_epoch(progress.batches, rank)
            in_validation = loaded is not None and loaded["in_validation"]
            _lightning_resuming.go_on(
                trainer,
                validated=not (in_validation or progress.in_batch_end),
                batch_over=loaded is not None and loaded["batch_over"],
            )
        if loaded is not None and loaded["should_stop"]:
            self._stop(in_epoch=progress.batches is not None)
        # Before the first batch of an epoch its rows are still to be drawn.
        if rank and progress.batches != 0:
            self._put_back(rank["now"])
        self._fit_state.loaded = self._fit_state.progress = None

    def _restore(
        self, loaded: dict[str, Any], progress: _lightning_resuming.Progress
    ) -> dict[str, Any]:
        """Put back what is no random state; returns what was this process's own."""
        trainer = self.trainer
        count = loaded["num_training_batches"]
        if progress.batches and count != trainer.num_training_batches:
            raise ValueError(
                f"the checkpoint stands after {progress.batches} of {count} batches of an epoch, "
                f"and the loader has {trainer.num_training_batches} now. Resume with the loader "
                "that it had, or from a checkpoint of an epoch's end."
            )
        trainer.callback_metrics.update(loaded["metrics"])
        if loaded.get("loaders_of_epoch") is not None:
            _lightning_resuming.set_loaded_in_epoch(trainer, loaded["loaders_of_epoch"])
        if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.accumulate_grad_batches = loaded["accumulate_grad_batches"]
        if trainer.global_rank >= len(loaded["ranks"]):
            return {}
        rank: dict[str, Any] = loaded["ranks"][trainer.global_rank]
        if rank["epoch"] is not None:
            total, rows = rank["epoch"]
            self._epoch = total.to(self.device), rows
        if self._baselines is not None and rank["baselines"] is not None:
            self._baselines.set_extra_state(rank["baselines"])
        if self._compiled is not None and rank.get("compiled"):
            self._compiled.go_on(rank["compiled"])
        for name, parameter in self.named_parameters():
            if name in (rank["gradients"] or {}):
                parameter.grad = rank["gradients"][name].to(parameter.device)
        return rank

    def _go_on_in_epoch(self, batches: int, rank: dict[str, Any]) -> None:
        """Have the loaders draw the rows of the epoch again, without those that are done."""
        trainer, loaders = self.trainer, _lightning.loaders_of(self.trainer, "training")
        self._fit_state.epoch_began = began = rank.get("epoch_began")
        if any(_is_stateful(loader) for loader in loaders):
            return  # Lightning has given it back its state
        for loader, seeds in zip(loaders, rank.get("seeds", ()), strict=False):
            if len(seeds) == len(seeds_of(loader)):
                set_seeds(loader, seeds)
        if began is not None:
            self._put_back(began)
        rests = [rest_of(loader, self._done_of(loader, batches)) for loader in loaders]
        _lightning_resuming.put_loaders(trainer, [loader for loader, _ in rests])
        self._fit_state.replaced = loaders
        _lightning_resuming.iterate(trainer, batches)
        for number, (_, rest) in enumerate(rests):
            if batches and not rest.skip():  # a loader whose __iter__ is a generator
                _lightning_resuming.take_first(trainer, number)

    def _stop(self, in_epoch: bool) -> None:
        """Stop as the fit that was saved was about to, by a callback's decision."""
        rank_zero_info(
            "The checkpoint is of a fit that was about to stop, and stops here, too. To train on, "
            "say for how long: Trainer(min_epochs=...)."
        )
        self._fit_state.stops = in_epoch and _lightning_resuming.stop_after_epoch(self.trainer)
        self.trainer.should_stop = not self._fit_state.stops

    def _give_back_loaders(self) -> None:
        if self._fit_state.replaced is not None:
            _lightning_resuming.put_loaders(self.trainer, self._fit_state.replaced)
            self._fit_state.replaced = None

    def _done_of(self, loader: Any, batches: int) -> int:
        """Count the batches of a loader that were taken since it last began."""
        length = len(loader) if hasattr(loader, "__len__") and draws_rows(loader) else batches
        if batches > length and _lightning_resuming.cycles(self.trainer):
            warn(
                "a loader that is shorter than the epoch has begun again in the epoch that goes "
                "on: its rows now come in another order than they would have.",
                stacklevel=2,
            )
            return (batches - 1) % length + 1
        return min(batches, length)

    def on_train_epoch_start(self) -> None:
        """Begin an epoch with the loaders of the fit."""
        self._give_back_loaders()
        super().on_train_epoch_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Leave the loaders of the fit where they were, once others have begun in their place."""
        self._give_back_loaders()
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Log the epoch; one that goes on ends as any other."""
        super().on_train_epoch_end()
        _lightning_resuming.end_restart(self.trainer)
        self.trainer.should_stop |= self._fit_state.stops


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
