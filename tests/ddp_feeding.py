"""Notes which rows each of two processes is fed, for each way of shuffling, and writes it as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from pyro_lightning import ArrayDataModule

ROWS = torch.arange(100)


class Watcher(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1].append(batch)
        return self.weight * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of_epochs(loaders, **options):
    """Rows by epoch and rank."""
    module = Watcher()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, **loaders)
    mine = torch.stack([torch.cat(epoch) for epoch in module.epochs])
    return module.all_gather(mine).transpose(0, 1).tolist(), trainer.is_global_zero


def main(path: str) -> None:
    seed_everything(0)
    found = {}
    for shuffle in (True, False, "blocks"):
        data = ArrayDataModule(ROWS, batch_size=8, shuffle=shuffle)
        found[str(shuffle)], first = rows_of_epochs({"datamodule": data})
    outside = ArrayDataModule(ROWS, batch_size=8).train_dataloader()
    found["outside"], first = rows_of_epochs({"train_dataloaders": outside})
    data = ArrayDataModule(ROWS, batch_size=8)
    found["unshared"], first = rows_of_epochs({"datamodule": data}, use_distributed_sampler=False)
    if first:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
