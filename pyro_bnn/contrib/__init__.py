# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Doors from other libraries, each imported only by who asks for it."""
