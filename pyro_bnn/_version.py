# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""The package version, alone so that the build can read it without importing torch."""

__version__ = "0.2.0"
