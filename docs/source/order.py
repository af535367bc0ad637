# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The order of the tutorials in the gallery: from the first look to special interests."""

ORDER = (
    "plot_quickstart.py",
    "plot_convert_trained.py",
    "plot_in_between.py",
    "plot_laplace.py",
    "plot_hfl.py",
    "plot_rank1_ood.py",
    "plot_encoder.py",
    "plot_larger_model.py",
    "plot_arviz_workflow.py",
    "plot_nuts_from_guide.py",
    "plot_sampling.py",
    "plot_svi_checkpoint.py",
    "plot_rank1_priors.py",
    "plot_hierarchical_priors.py",
)


def position(filename: str) -> tuple[int, str]:
    """A tutorial that is not named comes last."""
    return ORDER.index(filename) if filename in ORDER else len(ORDER), filename
