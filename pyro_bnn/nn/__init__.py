# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian layers and conversions of torch networks."""

from pyro_bnn.nn.attention import Rank1MultiheadAttention
from pyro_bnn.nn.bayesian import BayesianLinear
from pyro_bnn.nn.conv import (
    Rank1Conv1d,
    Rank1Conv2d,
    Rank1Conv3d,
    Rank1ConvTranspose1d,
    Rank1ConvTranspose2d,
    Rank1ConvTranspose3d,
)
from pyro_bnn.nn.convert import bayesian_, rank1_
from pyro_bnn.nn.embedding import Rank1Embedding
from pyro_bnn.nn.folding import fold_
from pyro_bnn.nn.hierarchical import ClosedFormPrior, HierarchicalPrior, LearnedScalePrior
from pyro_bnn.nn.lora import lora_, merged_weights
from pyro_bnn.nn.packed import unpack_site
from pyro_bnn.nn.priors import FanInNormal
from pyro_bnn.nn.rank1 import Rank1Linear
from pyro_bnn.nn.rank1_options import Rank1Options
from pyro_bnn.nn.recurrent import Rank1GRU, Rank1GRUCell, Rank1LSTM, Rank1LSTMCell, Rank1RNN, Rank1RNNCell
from pyro_bnn.nn.sites import init_to_trained

__all__ = [
    "BayesianLinear",
    "ClosedFormPrior",
    "FanInNormal",
    "HierarchicalPrior",
    "LearnedScalePrior",
    "Rank1Conv1d",
    "Rank1Conv2d",
    "Rank1Conv3d",
    "Rank1ConvTranspose1d",
    "Rank1ConvTranspose2d",
    "Rank1ConvTranspose3d",
    "Rank1Embedding",
    "Rank1GRU",
    "Rank1GRUCell",
    "Rank1LSTM",
    "Rank1LSTMCell",
    "Rank1Linear",
    "Rank1MultiheadAttention",
    "Rank1Options",
    "Rank1RNN",
    "Rank1RNNCell",
    "bayesian_",
    "fold_",
    "init_to_trained",
    "lora_",
    "merged_weights",
    "rank1_",
    "unpack_site",
]
