"""Writes one data set as shards of litdata, by its ``optimize``, and of WebDataset.

Run as a script, in the folder for them: ``optimize`` sets for good how children of its process are
started.
"""

import json
import os
import sys

import torch

N = 1000
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0


def row(index):
    return {"x": DATA[index].clone(), "row": index}


def main(path: str) -> None:
    import litdata
    import webdataset

    rows = list(range(N))
    # By default folders that all processes of the machine share, and each empties at its start.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = os.path.abspath("cache-of-chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = os.path.abspath("cache-of-data")
    litdata.optimize(row, rows, output_dir="lit", chunk_size=70, num_workers=1, verbose=False)
    for shard in range(4):
        with webdataset.TarWriter(f"rows-{shard}.tar") as shards:
            for index in rows[shard::4]:
                item = {"x.npy": DATA[index].numpy(), "row.cls": index}
                shards.write({"__key__": f"{index:06d}", **item})
    with open(path, "w") as file:
        json.dump(N, file)


if __name__ == "__main__":
    main(sys.argv[1])
