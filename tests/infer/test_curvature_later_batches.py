# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Programs whose first rows show nothing of what they do with later ones, though the autograd graph keeps the names of its nodes. The
reference is one ``autograd.grad`` per output of the plain function.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.ops.notice import CurvatureWarning
from tests.common import assert_close
from tests.infer.test_curvature_programs import MLP, Cube, Program, scripted_layer


def far(x):
    """Rows of a second kind, shape (N, 1)."""
    return (x[:, :1] > 1.5).to(x)


def gated(w, x):
    """A branch that no call shows, closed for rows of the first kind."""
    h = F.linear(x, w["a"], w["b"]) + far(x) * F.linear(x, Cube.apply(w["a"]))
    return torch.tanh(h) @ w["c"]


def chosen_where(w, x):
    """Rows of a second kind go through a function mapped over rows."""
    hidden = torch.vmap(lambda row: torch.tanh(w["a"] @ row))(x)
    return torch.where(far(x) > 0, hidden, torch.tanh(F.linear(x, w["a"], w["b"]))) @ w["c"]


def chosen_by_index(w, x):
    """An index that depends on the data picks the layer of each row."""
    layers = torch.stack([torch.tanh(F.linear(x, w["a"], w["b"])), scripted_layer(x, w["a"], w["b"])])
    return layers[far(x)[:, 0].long(), torch.arange(len(x))] @ w["c"]


def permuted(w, x):
    """Rows go through the first layer in another order where rows of a second kind are among them."""
    order = torch.where(far(x).any(), torch.arange(len(x)).roll(1), torch.arange(len(x)))
    h = torch.tanh(F.linear(x[order], w["a"], w["b"]))
    return h.index_select(0, order.argsort()) @ w["c"]


PROGRAMS = {
    "gated": gated,
    "chosen_where": chosen_where,
    "chosen_by_index": chosen_by_index,
    "permuted": permuted,
}
NODES = {
    "gated": "CubeBackward",
    "chosen_where": "MmBackward",
    "chosen_by_index": "MmBackward",
    "permuted": "linear",
}


def rows(n, *, second):
    x = torch.rand(n, 3)
    x[:, 0] += 2.0 * second
    return x


def case_of(name, sizes=(20, 20, 15)):
    """A program and batches of which the last ones hold rows of the second kind."""
    torch.manual_seed(3)
    batches = [rows(n, second=i > 0) for i, n in enumerate(sizes)]
    return Program(PROGRAMS[name], MLP, batches[0]), batches


def targets(case, x, error):
    return (case.forward(case.values, x) + error * torch.randn(len(x), 2)).detach()


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("error", [0.3, 0.0])  # scores, or none in the whole data
def test_batches(name, error):
    case, batches = case_of(name)
    data = [(x, targets(case, x, error)) for x in batches]
    dense = case.precision(batches)
    for order in (data, data[::-1]):
        assert_close(quietly(case.fit, order).precision, dense, rtol=1e-8, atol=1e-9)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["gated", "chosen_where", "chosen_by_index"])
@pytest.mark.parametrize("error", [0.3, 0.0])
def test_parts_of_one_batch(name, error):
    """The package cuts the batch itself; rows of the second kind come last."""
    case, (first, second) = case_of(name, (90, 60))
    x = torch.cat([first, second])
    guide = quietly(case.fit, (x, targets(case, x, error)))
    assert_close(guide.precision, case.precision([x]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("error", [0.3, 0.0])
@pytest.mark.parametrize("structure", ["diagonal", "block", "function_space", "low_rank"])
def test_structures(structure, error):
    case, batches = case_of("gated")
    data = [(x, targets(case, x, error)) for x in batches]
    dense = case.precision(batches)
    guide = quietly(case.fit, data, structure=structure, rank=len(dense))
    if structure == "diagonal":
        expected = torch.diag(dense.diagonal())
    elif structure == "block":
        sizes = [v.numel() for v in case.values.values()]
        expected = torch.block_diag(*(b.split(sizes, 1)[i] for i, b in enumerate(dense.split(sizes))))
    else:
        expected = dense
    assert_close(guide.posterior.multiply(torch.eye(len(dense))), expected, rtol=1e-7, atol=1e-7)


def test_kronecker_factors_of_some_batches_only_are_refused():
    case, batches = case_of("gated")
    data = [(x, targets(case, x, 0.3)) for x in batches]
    with (
        pytest.warns(CurvatureWarning, match="CubeBackward"),
        pytest.raises(ValueError, match="different ways"),
    ):
        case.fit(data, structure="kronecker")


def test_rows_with_a_score_of_zero_are_looked_at_where_they_are_most():
    """A second batch of which only the rows of the first kind have errors."""
    case, (first, second) = case_of("gated", (20, 8))
    x = torch.cat([rows(6, second=False), second])
    y = targets(case, x, 0.0)
    y[:6] += 0.3
    guide = quietly(case.fit, [(first, targets(case, first, 0.3)), (x, y)])
    assert_close(guide.precision, case.precision([first, x]), rtol=1e-8, atol=1e-9)


def test_the_gradient_is_that_of_dense_autograd():
    case, batches = case_of("gated")
    data = [(x, targets(case, x, 0.3)) for x in batches]
    guide = quietly(case.fit, data)
    leaves = {k: v.clone().requires_grad_() for k, v in case.values.items()}
    value = sum(0.5 * ((case.forward(leaves, x) - y) / 0.5).square().sum() for x, y in data)
    value = value + sum(0.5 * v.square().sum() for v in leaves.values())
    value.backward()
    norm = torch.cat([v.grad.reshape(-1) for v in leaves.values()]).norm()
    assert_close(guide.map_report.gradient_norm, norm, rtol=1e-8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_message_names_what_was_not_seen(name):
    case, batches = case_of(name)
    data = [(x, targets(case, x, 0.3)) for x in batches]
    with pytest.warns(CurvatureWarning, match=f"'a'.*through.*{NODES[name]}"):
        case.fit(data)


def test_batches_of_the_first_kind_pass_in_silence():
    case, batches = case_of("gated")
    x = rows(40, second=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        case.fit([(batches[0], targets(case, batches[0], 0.3)), (x, targets(case, x, 0.3))])
