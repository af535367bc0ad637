# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Reference chains of a one-hidden-layer regression: NumPyro's NUTS on the hidden layer alone.

Given the hidden layer, the network is linear in its output layer, whose Gaussian prior and Gaussian noise make it a
Bayesian linear regression: with :math:`\Phi` the hidden units (and a column of ones) times the prior scales of the
output weights,

.. math:: p(y \mid h) = N(y; 0, \Phi\Phi^T + \sigma^2 I), \qquad
          w \mid h, y \sim N(A^{-1}\Phi^T y/\sigma^2, A^{-1}), \quad A = I + \Phi^T\Phi/\sigma^2.

Chains run on h in units of its prior's standard deviations and draw w from its conditional afterwards, so that their
draws are draws of the posterior of all weights. What makes the posterior of all weights hard, the output weights that
follow every move of the hidden ones, is integrated out: on the UCI sets the step size is ten times as large.

The mass matrix is the mean Hessian of the potential over recent draws, E[H]. For a Gaussian that is the inverse covariance,
and a few Hessians suffice, since the prior makes each of them nonsingular. A covariance estimated from draws would
need several times as many draws as dimensions: with fewer, its regularised null space pins the chain to where it
started, and split R-hat of predictions does not always show it.

The chains need the extra ``gold`` (numpyro). Without it :func:`chains` runs Pyro's NUTS on all weights, which costs far
more.
"""

import importlib.util
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from uci_models import Member

from pyro_bnn.infer import nuts

MISSING = "NumPyro is not installed (pip install 'pyro-bnn[gold]')"


def available() -> bool:
    """Whether the extra is there."""
    return importlib.util.find_spec("numpyro") is not None


class HiddenLayer:
    """
    The posterior of the hidden layer, in float64.

    :param member: network, prior scales and noise.
    :param data: inputs of shape (N, D) and targets of shape (N,).
    """

    def __init__(self, member: Member, data: tuple[Tensor, Tensor]) -> None:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        assert member.guide is not None
        self.model, self.space, self.data = member.model, member.guide.packed.space, data
        x, y = (jnp.asarray(value.numpy()) for value in data)
        scales = {name: jnp.asarray(value.detach().numpy()) for name, value in member.scales.items()}
        hidden, inputs = member.settings.hidden, x.shape[1]
        cut, precision = hidden * inputs, self.model.noise**-2
        if member.settings.activation != "tanh":
            raise ValueError(
                f"the derivative is written for tanh units, and these are {member.settings.activation}"
            )
        identity = jnp.eye(hidden + 1)
        prior = jnp.append(jnp.full(hidden, scales["2.weight"]), scales["2.bias"])
        first = jnp.broadcast_to(scales["0.weight"], (hidden, inputs))
        self.size = cut + hidden

        def layer(z: Any) -> tuple[Any, Any]:
            return first * z[:cut].reshape(hidden, inputs), scales["0.bias"] * z[cut:]

        def parts(z: Any) -> tuple[Any, ...]:
            weight, bias = layer(z)
            units = jnp.tanh(x @ weight.T + bias)
            phi = jnp.concatenate([units, jnp.ones((len(x), 1))], 1) * prior
            root = jnp.linalg.cholesky(identity + precision * (phi.T @ phi))
            inverse_root = jax.scipy.linalg.solve_triangular(root, identity, lower=True)
            projected = inverse_root @ (precision * (phi.T @ y))
            return units, phi, root, inverse_root, projected, inverse_root.T @ projected

        def value_and_gradient(z: Any) -> tuple[Any, Any]:
            units, phi, root, inverse_root, projected, mean = parts(z)
            value = (
                0.5 * (precision * (y @ y) - projected @ projected + z @ z) + jnp.log(jnp.diag(root)).sum()
            )
            # d value / d phi, of which automatic differentiation would make several triangular solves
            pull = precision * (phi @ (inverse_root.T @ inverse_root) - jnp.outer(y - phi @ mean, mean))
            pull = prior[:-1] * pull[:, :-1] * (1 - units * units)
            return value, z + jnp.concatenate(
                [(first * (pull.T @ x)).reshape(-1), scales["0.bias"] * pull.sum(0)]
            )

        def output_layer(z: Any, key: Any) -> Any:
            _, _, root, _, _, mean = parts(z)
            noise = jax.random.normal(key, mean.shape)
            return mean + jax.scipy.linalg.solve_triangular(root, noise, lower=True, trans=1)

        def whole(z: Any, key: Any) -> Any:
            weight, bias = layer(z)
            return jnp.concatenate([weight.reshape(-1), bias, prior * output_layer(z, key)])

        def output_energy(z: Any, w: Any) -> Any:
            _, _, root, _, _, mean = parts(z)
            return 0.5 * jnp.square(root.T @ (w / prior - mean)).sum() - jnp.log(jnp.diag(root)).sum()

        def curvature(z: Any) -> Any:
            _, push = jax.linearize(lambda z: value_and_gradient(z)[1], z)
            return jax.lax.map(push, jnp.eye(self.size))

        self.potential: Any = jax.custom_vjp(lambda z: value_and_gradient(z)[0])
        self.potential.defvjp(value_and_gradient, lambda gradient, cotangent: (cotangent * gradient,))
        self._whole = jax.jit(jax.vmap(whole))
        self._output_energy, self._curvature = output_energy, jax.jit(curvature)
        self.check()

    def mean_curvature(self, z: Any, floor: float = 0.1) -> Any:
        """
        The mean Hessian of the potential, made positive definite by the absolute values of its eigenvalues.

        :param z: points, shape (S, size).
        :param floor: smallest eigenvalue; the prior alone has 1.
        """
        import numpy as np

        mean = np.mean([np.asarray(self._curvature(point)) for point in z], 0)
        values, vectors = np.linalg.eigh((mean + mean.T) / 2)
        return (vectors * np.maximum(np.abs(values), floor)) @ vectors.T

    def weights(self, z: Any, seed: int) -> Tensor:
        """Packed weights of the whole network, shape (S, p), whose output layer is drawn from its conditional."""
        import jax
        import numpy as np

        keys = jax.random.split(jax.random.PRNGKey(seed), len(z))
        # in parts, since the hidden units of all inputs under all draws take gigabytes
        parts = [np.array(self._whole(z[i : i + 500], keys[i : i + 500])) for i in range(0, len(z), 500)]
        return torch.from_numpy(np.concatenate(parts))

    def check(self, points: int = 4) -> None:
        """
        Asserts that potential plus conditional are the Pyro model's log joint density up to a constant, and the
        derivative that of the potential, at random points.
        """
        import jax
        import numpy as np

        rng, constants = np.random.default_rng(0), []
        x, y = self.data
        for k in range(points):
            z = rng.normal(size=self.size)
            packed = self.weights(z[None], k)
            sites = {name: value[0] for name, value in self.space.unpack(packed).items()}
            conditioned = pyro.poutine.condition(self.model, sites)
            joint = float(pyro.poutine.trace(conditioned).get_trace(x, y).log_prob_sum())
            mine = self.potential(z) + self._output_energy(z, packed[0, self.size :].numpy())
            constants.append(float(mine) + joint)
            direction, step = rng.normal(size=self.size), 1e-5
            slope = float(self.potential(z + step * direction) - self.potential(z - step * direction)) / (
                2 * step
            )
            gradient = np.asarray(jax.grad(self.potential)(z))
            # values have about ten digits: relative to the lengths, since the product may cancel
            size = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
            np.testing.assert_allclose(gradient @ direction, slope, rtol=0, atol=1e-6 * size)
        # 1e-10 of the largest term that enters: the sum of squares of the targets over the noise
        largest = float(y.square().sum()) / self.model.noise**2
        np.testing.assert_allclose(constants, constants[0], rtol=0, atol=1e-10 * largest)


class Sampler:
    """
    NumPyro's NUTS on one posterior; chains start at draws of the prior.

    The adaptation has three rounds of equal length. The first has the prior's precision for its mass matrix, the others
    the mean Hessian over the second half of the round before; the last mass matrix and step size are kept.

    :param target: what to sample.
    :param warmup: steps of adaptation.
    :param depth: largest tree depth.
    :param points: draws that enter a mass matrix.
    :param accept: the acceptance probability that the step size aims at: curvature varies along a chain, and a step
        that is right on average leads to divergences where it is largest.
    :param max_step: the largest step size after the adaptation. A chain that adapts where the curvature is small finds a
        larger one, with which it diverges, and stays, where the curvature is larger.
    """

    rounds = 3

    def __init__(
        self,
        target: HiddenLayer,
        warmup: int,
        *,
        depth: int = 7,
        points: int = 48,
        accept: float = 0.9,
        max_step: float = math.inf,
    ) -> None:
        import jax
        import jax.numpy as jnp

        self.target, self.depth, self.points = target, depth, points
        self.accept, self.max_step = accept, max_step
        self.round, self.warmup = warmup // self.rounds, warmup // self.rounds * self.rounds
        kernel, _ = self.start(jax.random.PRNGKey(0), jnp.zeros(target.size), None)

        def step(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps, state.diverging)

        # compiled once for all chains and rounds, since the mass matrix is part of the state
        self.steps = jax.jit(
            lambda state, length: jax.lax.scan(step, state, None, length), static_argnames="length"
        )

    def start(self, key: Any, z: Any, mass: Any | None) -> tuple[Any, Any]:
        """A kernel and its state at z, at the beginning of a round."""
        import numpy as np
        from numpyro.infer import NUTS

        kernel = NUTS(
            potential_fn=self.target.potential,
            dense_mass=True,
            adapt_mass_matrix=False,
            inverse_mass_matrix=np.eye(self.target.size) if mass is None else np.linalg.inv(mass),
            max_tree_depth=self.depth,
            target_accept_prob=self.accept,
        )
        return kernel, kernel.init(key, self.round, z, (), {})

    def chain(self, seed: int, draws: int, path: Path | None = None, block: int = 50) -> dict[str, Any]:
        """
        One chain.

        :param seed: of start and moves.
        :param draws: steps after the adaptation.
        :param path: a file that keeps the chain: it goes on from there, and ends where it is long enough.
        :param block: steps between two updates of the file.
        :return: ``z`` of shape (draws, size), ``diverging`` per draw, ``gradients`` and ``seconds`` with the adaptation.
        """
        import jax
        import numpy as np

        key = jax.random.PRNGKey(seed)
        blocks: list[Any] = []
        state, seconds, total = None, 0.0, self.warmup + draws
        if path and path.exists():
            state, blocks, seconds = pickle.loads(path.read_bytes())
        while (done := sum(len(part[0]) for part in blocks)) < total:
            start = time.process_time()
            length = min(block, total - done)
            if done < self.warmup:
                length = min(length, self.round - done % self.round)
                if done % self.round == 0:
                    state = self.next_round(jax.random.fold_in(key, done), blocks)
            elif done == self.warmup:
                adapted = state.adapt_state
                step = np.minimum(adapted.step_size, self.max_step)
                state = state._replace(adapt_state=adapted._replace(step_size=step))
            state, found = self.steps(state, length)
            state, found = jax.tree.map(np.array, (state, found))
            blocks.append(found)
            seconds += time.process_time() - start
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pickle.dumps((state, blocks, seconds)))
        z, gradients, diverging = (np.concatenate(parts)[:total] for parts in zip(*blocks, strict=True))
        return {
            "z": z[self.warmup :],
            "diverging": diverging[self.warmup :],
            "gradients": int(gradients.sum()),
            "seconds": seconds,
        }

    def next_round(self, key: Any, blocks: list[Any]) -> Any:
        """The state with which a round of the adaptation begins."""
        import jax
        import numpy as np

        if not blocks:
            return self.start(key, jax.random.normal(key, (self.target.size,)), None)[1]
        z = np.concatenate([part[0] for part in blocks])
        recent = z[-(self.round // 2) :]
        points = recent[:: math.ceil(len(recent) / self.points)]
        return self.start(key, z[-1], self.target.mean_curvature(points))[1]


def chains(
    member: Member,
    data: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    cache: Path | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """
    Draws of the posterior of a member's weights under its prior scales and noise.

    :param member: a fitted member.
    :param data: inputs and targets.
    :param shape: chains, steps of adaptation and draws per chain.
    :param seed: of the first chain.
    :param cache: where to keep the chains, as ``CACHE_0``, ``CACHE_1`` ...
    :param options: of :class:`Sampler`.
    :return: packed draws of shape (chains, draws, p), and what the run cost.
    """
    number, warmup, draws = shape
    report: dict[str, Any] = {"chains": number, "warmup": warmup, "draws": draws}
    if not available():
        run = nuts(
            member.model,
            data,
            num_chains=number,
            warmup_steps=warmup,
            num_samples=draws,
            guide=member.guide,
            progress_bar=False,
            adapt_mass_matrix=False,  # fewer draws than weights
            max_tree_depth=8,
            jit_compile=True,
            ignore_jit_warnings=True,
        )
        return member.guide.packed.space.pack(run.samples), report | {
            "sampler": "Pyro NUTS",
            "diverging": int(run.sample_stats["diverging"].sum()),
        }
    target = HiddenLayer(member, data)
    sampler = Sampler(target, warmup, **options)
    found = []
    for k in range(number):
        path = cache and cache.with_name(f"{cache.name}_{k}")
        found.append(sampler.chain(seed + k, draws, path))
        print(f"chain {k}: {found[-1]['seconds']:.0f} s", flush=True)
    return torch.stack([target.weights(run["z"], seed + k) for k, run in enumerate(found)]), report | {
        "sampler": "NumPyro NUTS on the hidden layer",
        "diverging": int(sum(run["diverging"].sum() for run in found)),
        "gradients": sum(run["gradients"] for run in found),
        "sampling_seconds": round(sum(run["seconds"] for run in found), 1),
    }


def mixing(values: Tensor) -> dict[str, float]:
    """
    How well chains agree on a function.

    :param values: shape (chains, draws, N).
    :return: split R-hat and effective sample size over the N values.
    """
    r_hat = split_gelman_rubin(values)
    # one by one, since Pyro's memory is quadratic in the draws
    size = torch.stack([effective_sample_size(value, 0, 1) for value in values.unbind(-1)])
    return {
        "r_hat": float(r_hat.max()),
        "r_hat_median": float(r_hat.median()),
        "r_hat_below_1.01": float((r_hat < 1.01).double().mean()),
        "ess": float(size.min()),
        "ess_median": float(size.median()),
    }
