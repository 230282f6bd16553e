"""Train Pyro models on mini-batches with PyTorch Lightning, and get the full-data posterior."""

from pyro_lightning.calibration import pit_histogram
from pyro_lightning.checkpoint_io import AtomicCheckpointIO
from pyro_lightning.data import ArrayDataModule
from pyro_lightning.densities import log_predictive_density
from pyro_lightning.elbo import negative_elbo
from pyro_lightning.elbo_convergence import ELBOConvergence
from pyro_lightning.guide_check import GuideCheck
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.intervals import interval_coverage
from pyro_lightning.kl_annealing import KLAnnealing
from pyro_lightning.metrics import (
    CRPS,
    IntervalCoverage,
    LogPredictiveDensity,
    NegativeELBO,
    PITHistogram,
)
from pyro_lightning.module import PyroSVIModule
from pyro_lightning.posterior_monitor import PosteriorMonitor
from pyro_lightning.prediction import Prediction
from pyro_lightning.prediction_writer import PredictionWriter
from pyro_lightning.progress_bar import SVIProgressBar
from pyro_lightning.row_optim import RowAdam, RowAdamW
from pyro_lightning.rows import IndexedBatch, IndexedDataset
from pyro_lightning.scores import crps
from pyro_lightning.simulated_fits import simulation_based_calibration
from pyro_lightning.site_check import SiteCheck
from pyro_lightning.site_table import SiteTable
from pyro_lightning.sizes import batch_weight, dataset_size_of, mean_batch_size
from pyro_lightning.uniformity import CalibrationCheck, RankCheck
from pyro_lightning.watched import FailedBatch

__all__ = [
    "ArrayDataModule",
    "AtomicCheckpointIO",
    "CRPS",
    "CalibrationCheck",
    "DataPlateMessenger",
    "ELBOConvergence",
    "FailedBatch",
    "GuideCheck",
    "IndexedBatch",
    "IndexedDataset",
    "IntervalCoverage",
    "KLAnnealing",
    "LogPredictiveDensity",
    "NegativeELBO",
    "PITHistogram",
    "PosteriorMonitor",
    "Prediction",
    "PredictionWriter",
    "PyroSVIModule",
    "RankCheck",
    "RowAdam",
    "RowAdamW",
    "SVIProgressBar",
    "SiteCheck",
    "SiteTable",
    "batch_weight",
    "crps",
    "dataset_size_of",
    "interval_coverage",
    "log_predictive_density",
    "mean_batch_size",
    "negative_elbo",
    "pit_histogram",
    "simulation_based_calibration",
]
