# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hessian-free Laplace: variances of functionals from point estimates, without forming a Hessian.

With :math:`L` the negative log joint density and :math:`f_j` scalar functionals of the latents, let
:math:`\theta_j(\lambda) = \arg\min L - \lambda f_j`. As :math:`\lambda\to0` the displacement per unit of
:math:`\lambda` is :math:`d_j = P^{-1} g_j`, with :math:`P = \nabla^2 L` and :math:`g_j = \nabla f_j` at the MAP, so
that :math:`g_i^\top d_j` is the linearised Laplace covariance of :math:`f_i` and :math:`f_j`.

Source: McInerney and Kallus (2024), "Hessian-free Laplace in Bayesian deep learning", and (2025), "Variation due to
regularization tractably recovers Bayesian deep learning". The limit follows from the implicit function theorem.
"""

from pyro_bnn.infer.hfl.api import covariance, regvar, solve, variance
from pyro_bnn.infer.hfl.certificate import Certificate
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.evidence import HFLEvidence, log_evidence, optimize_hyperparameters
from pyro_bnn.infer.hfl.influence import Influence, influence
from pyro_bnn.infer.hfl.regvar import RegVarScore
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.run import Method
from pyro_bnn.infer.hfl.training.first_order import FirstOrder
from pyro_bnn.infer.hfl.training.run import TrainingRun

__all__ = [
    "Certificate",
    "FirstOrder",
    "HFLEvidence",
    "HFLResult",
    "HFLWarning",
    "Influence",
    "Method",
    "RegVarScore",
    "TrainingRun",
    "covariance",
    "influence",
    "log_evidence",
    "optimize_hyperparameters",
    "regvar",
    "solve",
    "variance",
]
