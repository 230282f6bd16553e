"""A command line whose model is of its own arguments, not of those that a checkpoint holds."""

from typing import Any


class OwnArguments:
    """Goes before ``LightningCLI`` among bases: has it take no arguments of a checkpoint.

    With ``--ckpt_path`` it would make the model by the hyperparameters in the file, which may name
    any class or function to import and to call. Those of the user's command line and YAML stand.
    """

    config: Any
    _resumed_from: Any = None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; put the path away, which ``LightningCLI`` looks for next."""
        super().parse_arguments(parser, args)  # type: ignore[misc]
        mine = self.config.get(self.config.get("subcommand"))
        self._resumed_from = mine.pop("ckpt_path", None) if mine else None

    def before_instantiate_classes(self) -> None:
        """Put the path back."""
        super().before_instantiate_classes()  # type: ignore[misc]
        if self._resumed_from is not None:
            self.config[self.config["subcommand"]]["ckpt_path"] = self._resumed_from
