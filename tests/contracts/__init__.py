# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What every layer, guide, bound, curvature and likelihood has to satisfy. A new one is tested by calling the functions
of the module of its kind, or by deriving from its class, before tests of its own are added.
"""
