# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Programs as users write them, times the operations of this package, each cell against a reference that knows nothing of it.

``python -m tests.programs`` runs the matrix and writes ``docs/source/exactness.rst``.
"""
