"""Streams shards from the current folder through workers; writes what fits were fed as JSON.

Run as a script: workers are forked, and one that is forked from a process with threads, such as
other tests leave, may wait for ever for what a thread held.
"""

import json
import sys
from pathlib import Path

import torch
from stream_support import (
    N,
    RowsSeen,
    SavedAt,
    lit_loader,
    mean_of,
    web_loader,
    web_rows,
    webdataset,
)
from support import quiet_trainer

from pyro_lightning import PyroSVIModule, dataset_size_of

FOLDER, WORKERS = Path.cwd(), 2


def fit(loader, epochs, *callbacks, dataset_size=None, ckpt=None):
    """What a fit was fed, and where it stood in the end."""
    svi, seen = PyroSVIModule(mean_of, dataset_size=dataset_size), RowsSeen()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[seen, *callbacks])
    trainer.fit(svi, loader, ckpt_path=ckpt)
    return {
        "epochs": {str(epoch): batches for epoch, batches in seen.epochs.items()},
        "rows": seen.rows(),
        "dataset_size": svi.dataset_size,
        "steps": trainer.global_step,
    }


def main(path: str) -> None:
    loader = lit_loader(FOLDER, WORKERS)
    size = dataset_size_of(loader)
    found = {"size": size, "visited": torch.cat([batch["row"] for batch in loader]).tolist()}
    for shuffle in (False, True):
        found[f"litdata, {shuffle}"] = fit(lit_loader(FOLDER, WORKERS, shuffle=shuffle), 2)
    found["webdataset"] = fit(web_loader(FOLDER, WORKERS, shuffle=True), 2, dataset_size=N)
    loader = webdataset.WebLoader(web_rows(FOLDER), batch_size=None, num_workers=WORKERS)
    found["webloader"] = fit(loader, 1, dataset_size=N)
    saved = Path(path).with_name("step-27.ckpt")
    shuffled = lambda: lit_loader(FOLDER, WORKERS, shuffle=True)  # noqa: E731
    found["first"] = fit(shuffled(), 2, SavedAt(27, saved))
    found["rest"] = fit(shuffled(), 3, ckpt=saved)
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
