"""The null space of general ability: second moments, what to protect, and how to stay out of it.

Needs torch alone; safetensors where a basis file is read or written, matplotlib where a spectrum is drawn.
"""

from nspo_lightning.nullspace.basis import Basis, Spectrum, build_basis, build_soft_basis, decompose
from nspo_lightning.nullspace.basis_builder import bases_from_spectra
from nspo_lightning.nullspace.basis_set import Calibration
from nspo_lightning.nullspace.basis_settings import BasisSettings
from nspo_lightning.nullspace.calibration import UnheldLayersError, calibrate_modules
from nspo_lightning.nullspace.covariance import SecondMoment
from nspo_lightning.nullspace.criteria import CRITERIA, NoNullDirections, RankChoice, choose_rank, energy_left
from nspo_lightning.nullspace.diagnostics import LayerCertificate, certify, table_rows
from nspo_lightning.nullspace.domains import TO_LEARN, combine, domain_report, principal_cosines
from nspo_lightning.nullspace.layers import LayerPlan, ProtectedLayer, Refusal, plan_layers
from nspo_lightning.nullspace.passes import ForwardCall
from nspo_lightning.nullspace.projection import apply, component, project_start
from nspo_lightning.nullspace.store import load_calibration, save_calibration

__all__ = [
    "CRITERIA",
    "TO_LEARN",
    "Basis",
    "BasisSettings",
    "Calibration",
    "ForwardCall",
    "LayerCertificate",
    "LayerPlan",
    "NoNullDirections",
    "ProtectedLayer",
    "RankChoice",
    "Refusal",
    "SecondMoment",
    "Spectrum",
    "UnheldLayersError",
    "apply",
    "bases_from_spectra",
    "build_basis",
    "build_soft_basis",
    "calibrate_modules",
    "certify",
    "choose_rank",
    "combine",
    "component",
    "decompose",
    "domain_report",
    "energy_left",
    "load_calibration",
    "plan_layers",
    "principal_cosines",
    "project_start",
    "save_calibration",
    "table_rows",
]
