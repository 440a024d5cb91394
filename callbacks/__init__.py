"""Lightning callbacks, one a file.

Importing them needs torch, lightning and torchmetrics, and none of the libraries of language models. Those at work in
a run of `GRPOModule` ask the module for more, see `protocols`.
"""

from nspo_lightning.callbacks.capability_guard import CapabilityGuard
from nspo_lightning.callbacks.curvature_anchor import CurvatureAnchor
from nspo_lightning.callbacks.diagnosis import Diagnosis
from nspo_lightning.callbacks.end_together import EndTogether
from nspo_lightning.callbacks.exact_resume import ExactResume
from nspo_lightning.callbacks.general_kl import GeneralKL
from nspo_lightning.callbacks.general_text import GeneralText
from nspo_lightning.callbacks.last_checkpoint import LastCheckpoint
from nspo_lightning.callbacks.last_on_exception import LastOnException
from nspo_lightning.callbacks.null_space_projection import NullSpaceProjection
from nspo_lightning.callbacks.ogpsa import OGPSA
from nspo_lightning.callbacks.prediction_writer import PredictionWriter
from nspo_lightning.callbacks.run_progress import RunProgress
from nspo_lightning.callbacks.run_report import RunReport
from nspo_lightning.callbacks.sample_completions import SampleCompletions
from nspo_lightning.callbacks.test_report import TestReport

__all__ = [
    "OGPSA",
    "CapabilityGuard",
    "CurvatureAnchor",
    "Diagnosis",
    "EndTogether",
    "ExactResume",
    "GeneralKL",
    "GeneralText",
    "LastCheckpoint",
    "LastOnException",
    "NullSpaceProjection",
    "PredictionWriter",
    "RunProgress",
    "RunReport",
    "SampleCompletions",
    "TestReport",
]
