"""Pyro's amortised LDA: each word's topic is summed out, a network guesses a document's topics."""

from functools import partial
from itertools import permutations

import pyro
import pyro.distributions as dist
import torch
from example_support import BatchPlate, assert_same_steps, fit
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO
from torch import nn

TOPICS, VOCABULARY, WORDS = 3, 12, 40
# Each topic has four words of its own, and all words at times.
TRUTH = torch.eye(TOPICS).repeat_interleave(VOCABULARY // TOPICS, dim=-1) * 0.225 + 1 / 120


def documents(count, seed):
    """Word numbers of documents, a row each, that mostly keep to one topic or two."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mix = dist.Dirichlet(torch.full((TOPICS,), 0.3)).sample((count,))
        return torch.multinomial(mix @ TRUTH, WORDS, replacement=True)


def make(plate):
    def model(words):
        with pyro.plate("topics", TOPICS):
            weights = pyro.sample("topic_weights", dist.Gamma(1.0 / TOPICS, 1.0))
            topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(VOCABULARY)))
        with plate(words):
            mix = pyro.sample("mix", dist.Dirichlet(weights))
            with pyro.plate("words", WORDS):  # to the left of the documents, as in the example
                topic = pyro.sample("topic", dist.Categorical(mix), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(topics[topic]), obs=words.T)

    def guide(predictor, words):
        gamma = pyro.param("gamma", lambda: torch.ones(TOPICS), constraint=constraints.positive)
        alpha = pyro.param("alpha", start, constraint=constraints.greater_than(0.5))
        with pyro.plate("topics", TOPICS):
            pyro.sample("topic_weights", dist.Gamma(gamma, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(alpha))
        pyro.module("predictor", predictor)
        with plate(words):
            counts = nn.functional.one_hot(words, VOCABULARY).sum(1) / WORDS
            # A Dirichlet below 1 is unbounded at the edges, so a point estimate keeps off them.
            mix = 0.97 * predictor(counts.to(alpha.dtype)) + 0.03 / TOPICS
            pyro.sample("mix", dist.Delta(mix, event_dim=1))

    torch.manual_seed(0)
    layers = nn.Linear(VOCABULARY, 32), nn.Sigmoid(), nn.Linear(32, TOPICS), nn.Softmax(dim=-1)
    return model, partial(guide, nn.Sequential(*layers))


def start():
    """Topics that differ a little, so that they can part."""
    return 1.0 + torch.rand(TOPICS, VOCABULARY)


def elbo():
    return TraceEnum_ELBO(max_plate_nesting=2)


def test_same_steps_as_pyro():
    assert_same_steps(make, documents(24, seed=0), elbo=elbo(), plate="documents")


def test_topics_are_recovered():
    model, guide = make(BatchPlate("documents"))
    words = documents(500, seed=1)
    svi = fit(
        model, guide, words, batch_size=50, epochs=80, lr=0.05, elbo=elbo(), data_plate="documents"
    )
    found = svi.posterior_samples(100)["topic_words"].mean(0)
    distances = [
        float((found[list(order)] - TRUTH).abs().sum(-1).max() / 2)
        for order in permutations(range(TOPICS))
    ]
    # Total variation of the worst topic: 0.03 to 0.05 with four seeds, 0.6 for words all alike.
    assert min(distances) < 0.1
