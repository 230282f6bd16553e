"""``python -m pyro_lightning`` is the console script."""

from pyro_lightning.cli import console

if __name__ == "__main__":
    console()
