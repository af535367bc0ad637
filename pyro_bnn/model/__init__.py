# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Pyro model as inference sees it: its data, plates, sites, packed latent vector, parameters and networks."""
