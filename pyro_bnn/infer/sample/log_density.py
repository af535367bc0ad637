# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The log density of any Pyro model on its packed latent vector: what samplers run on."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.infer.initialize import check_observations, run_model
from pyro_bnn.infer.sample.callbacks import Arrays, on_arrays, on_jax
from pyro_bnn.infer.sample.collapse import collapsed
from pyro_bnn.infer.sample.evaluation import Evaluator
from pyro_bnn.infer.sample.joint import Joint, Share, moving_supports, unvalidated
from pyro_bnn.model.data import Arguments, Batch, Batches, as_batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import latent_names, sample_sites
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.packed import PackedModel, moved_from
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import close
from pyro_bnn.ops.described import Described


class LogDensity(Described):
    r"""
    The log density of a model given data as a function of its packed latents, which :func:`log_density` makes.

    .. math:: \ell(u) = \log p(\theta(u), D) + \log|\det \partial\theta/\partial u|

    Called with ``u`` of shape ``(p,)`` or, for ``C`` chains, ``(C, p)``, it returns the density, of shape ``()`` or ``(C,)`` and
    the type of ``u``; the result can be differentiated once by autograd. The sum over data points is formed in double precision.

    :ivar space: the packed vector: ``dim``, ``slices``, ``pack`` and ``unpack``; without latents that are integrated out, which
        ``packed.space`` has too.
    :ivar size: its length ``p``.
    :ivar dtype: the type in which the model computes.
    :ivar device: where its latents are.
    :ivar gradients: how many gradients at one vector were computed by now; ``C`` in a call with ``C`` chains.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> density = log_density(model, torch.ones(3))
        >>> value, gradient = density.value_and_gradient(torch.tensor([[0.0], [1.0]]))
        >>> gradient, density.gradients
        (tensor([[ 3.],
                [-1.]]), 2)
        >>> bool(density(torch.zeros(1)) == value[0])
        True
    """

    def __init__(self, evaluator: Evaluator, shares: list[Share], kept: list[Batch]) -> None:
        self._evaluator, self._shares, self._first, self._batches = evaluator, shares, kept[0], len(kept)
        self.packed, self.space = evaluator.joint.packed, evaluator.joint.space
        self.size = self.space.dim
        self.dtype, self.device = evaluator.anchors.dtype, evaluator.anchors.device
        self.gradients = 0

    @property
    def reason(self) -> str:
        """Why the model runs in every evaluation, or chains are not evaluated together; empty if a recording of it does."""
        return self._evaluator.reason

    def described(self) -> tuple[str, dict[str, str]]:
        """What it is, for its ``repr``."""
        rows = {"batches": str(self._batches), "gradients": f"{self.gradients:,}"}
        return f"log density of {self.size:,} latents", rows | (
            {"reason": self.reason} if self.reason else {}
        )

    def __call__(self, u: Tensor) -> Tensor:
        """The log density, shape ``()`` or ``(C,)``; see the class."""
        return _Value.apply(u, self) if u.requires_grad else self.value_and_gradient(u)[0]

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """
        The log density and its gradient, detached, at one vector or for several chains in one pass.

        :param u: packed vectors, shape ``(p,)`` or ``(C, p)``.
        :return: the density, shape ``()`` or ``(C,)``, and the gradient, of the shape of ``u``. A chain at which they are not
            finite does not change those of the others; where the model's linear algebra fails both are NaN. The memory is
            that of ``C`` gradients.
        :raises ValueError: if ``u`` does not have such a shape.
        :raises ChangedModelError: if the model computes something else than when the density was made.
        """
        rows = self._rows(u)
        value, gradient = self._evaluator(rows, self._shares[0], keep=0)
        for i, share in enumerate(self._shares[1:], 1):
            more = self._evaluator(rows, share, keep=i)
            value, gradient = value + more[0], gradient + more[1]
        return self._given(value, u), self._given(gradient, u)

    def batch_value_and_gradient(
        self, u: Tensor, batch: Any, factor: float | Tensor, once: Iterable[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""
        :math:`\log p(u) + c \log p(B\mid u)` and its gradient for any batch :math:`B` of the model's arguments, detached.

        Batches of one shape share a recording. The factor :math:`N/B` of subsampled plates does not enter: ``factor`` is all
        there is. It does not multiply the terms ``once``, which are in every batch: a factor of the latents, a table.

        :param u: packed vectors, shape ``(p,)`` or ``(C, p)``; all of them see this batch.
        :param batch: what the model is called with, in any form that data have.
        :param factor: :math:`c`.
        :param once: names of observed sites and factors; by default :attr:`repeated`.
        :return: as :meth:`value_and_gradient`.
        """
        self._require_batches("batch_value_and_gradient")
        rows = self._rows(u)
        names = self.repeated if once is None else frozenset(once)
        share = Share(as_batch(batch), scaled=True, once=names)
        scale = torch.as_tensor(factor, dtype=torch.float64, device=rows.device)
        value, gradient = self._evaluator(rows, share, scale)
        return self._given(value, u), self._given(gradient, u)

    def numpy(self) -> Arrays:
        """
        The density for samplers that work on NumPy arrays.

        With nutpie, whose draws are packed vectors (:attr:`space` unpacks them)::

            from nutpie.compiled_pyfunc import from_pyfunc

            p, log_prob = density.size, density.numpy()
            model = from_pyfunc(
                p, lambda: log_prob, lambda *_: lambda u: {"u": u}, [np.dtype("float64")], [(p,)], ["u"]
            )
            tree = nutpie.sample(model, draws=500, tune=500, chains=4)

        :return: a function of an array of shape ``(p,)`` that returns a float and an array of shape ``(p,)``, the gradient; of an
            array of shape ``(C, p)`` it returns arrays of shape ``(C,)`` and ``(C, p)``.

        Example::

            >>> import numpy as np, pyro, pyro.distributions as dist
            >>> density = log_density(lambda: pyro.sample("z", dist.Normal(0.0, 2.0)), ())
            >>> density.numpy()(np.array([4.0]))[1]
            array([-1.])
        """
        return on_arrays(self)

    def jax(self) -> Callable[[Any], Any]:
        """
        The density for samplers in JAX, which must be installed.

        The function runs under :func:`jax.jit`; :func:`jax.grad` differentiates it once, and :func:`jax.vmap` evaluates all chains
        in one pass. With NumPyro and blackjax, whose draws are packed vectors (:attr:`space` unpacks them)::

            log_prob = density.jax()

            kernel = numpyro.infer.NUTS(potential_fn=lambda u: -log_prob(u))
            mcmc = numpyro.infer.MCMC(kernel, num_warmup=500, num_samples=500)
            mcmc.run(jax.random.key(0), init_params=jnp.zeros(density.size))

            kernel = blackjax.nuts(log_prob, step_size=0.1, inverse_mass_matrix=jnp.ones(density.size))
            state = kernel.init(jnp.zeros(density.size))

        :return: a function of a JAX array of shape ``(p,)`` that returns a scalar.
        """
        return on_jax(self)

    def restrict(self, u: Tensor) -> Tensor:
        """
        The latents that are not integrated out.

        :param u: packed vectors of all latents, shape ``(..., P)``, in the order of ``packed.space``.
        :return: packed vectors of this density, shape ``(..., p)``; ``u`` itself where nothing is integrated out.
        :raises ValueError: if ``u`` does not have such a shape.
        """
        self._require_width(u, self.packed.space.dim)
        return self._evaluator.joint.restrict(u)

    def complete(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """
        All latents, those that are integrated out drawn given the others: with ``u`` from this density they are from the posterior.

        :param u: packed vectors of this density, shape ``(..., p)``.
        :return: packed vectors of all latents, shape ``(..., P)``, in the order of ``packed.space``, and the log density of what was
            drawn, float64, shape ``(...)``; NaN where the density is.
        :raises ValueError: if ``u`` does not have such a shape, or what is drawn is not Gaussian.

        Example::

            >>> import pyro, pyro.distributions as dist
            >>> def model(y):
            ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("obs", dist.Normal(z, scale), obs=y)
            >>> whole, part = (log_density(model, torch.ones(3), collapse=names) for names in (None, "z"))
            >>> u = torch.zeros(part.size)
            >>> v, log_prob = part.complete(u)
            >>> part.size, v.shape, bool(abs(part(u) + log_prob - whole(v)) < 1e-5)
            (1, torch.Size([2]), True)
        """
        self._require_width(u, self.size)
        whole, log_prob = self._evaluator.joint.complete(u.detach().to(self.dtype))
        return self._given(whole, u), log_prob

    @staticmethod
    def _require_width(u: Tensor, size: int) -> None:
        if not u.dim() or u.shape[-1] != size:
            raise ValueError(f"u must have shape (..., {size}), found {tuple(u.shape)}.")

    @cached_property
    def repeated(self) -> frozenset[str]:
        """The observed sites and factors that do not belong to rows of the data, and count once whatever the batches are."""
        self._require_batches("repeated")
        if len(self._shares) > 1:
            return frozenset.intersection(*(share.left_out for share in self._shares[1:]))
        latent, packed = self._evaluator.anchors[0], self.packed
        found = packed.rows(latent, self._first, 1)
        names = packed.likelihood_names(packed.trace(latent, self._first))
        return frozenset(n for n in names if found and n not in found[0].axes)

    def _require_batches(self, what: str) -> None:
        if self.space is not self.packed.space:
            raise ValueError(
                f"{what}: latents that are integrated out depend on all data: make the log density without collapse."
            )

    def _rows(self, u: Tensor) -> Tensor:
        if u.dim() not in (1, 2) or u.shape[-1] != self.size:
            raise ValueError(
                f"u must have shape ({self.size},) or (C, {self.size}), one packed vector or one per chain, found "
                f"{tuple(u.shape)}."
            )
        self.gradients += len(u) if u.dim() == 2 else 1
        return u.detach().to(self.dtype)

    def _given(self, found: Tensor, u: Tensor) -> Tensor:
        return found.to(u.dtype if u.is_floating_point() else self.dtype)


class _Value(torch.autograd.Function):
    """The log density, with its gradient from the same pass."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, density: LogDensity) -> Tensor:
        value, gradient = density.value_and_gradient(u)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return weight.unsqueeze(-1) * gradient, None


@torch.inference_mode(False)
@torch.enable_grad()  # some models take derivatives themselves
def log_density(
    model: Callable[..., Any], data: Any, *, guide: Any = None, collapse: str | Sequence[str] | None = None
) -> LogDensity:
    r"""
    The log density of a model given data, on the packed vector of its latents in unconstrained space.

    The model's operations are recorded when it is first evaluated, and replayed without the model's Python code and Pyro's
    handlers, for one vector or for several chains in one pass, wherever this can be trusted: no value of a latent decides what
    is computed, nothing is random or changed in place, and recordings agree with runs of the model. Everywhere else the model
    itself runs, and :attr:`LogDensity.reason` says why. Plates, masks, scales and factors count as in
    :meth:`pyro.poutine.Trace.log_prob_sum`; networks are in evaluation mode. Tensors that the model reads (parameters, weights
    that are not sampled) may change their values between calls. The data may not, nor may numbers of Python that the model
    reads; occasional comparisons with the model find out if they do.

    :param callable model: a Pyro model with continuous latents.
    :param data: the data, with observations: one batch, or several, whose densities are added; they are kept in memory.
    :param guide: a guide over the packed latents of the same model, to make sure that its vectors are those of the density.
    :param collapse: names of latent sites, or of modules for all of their sites, that are integrated out in closed form: given all other
        latents they are Gaussian, as the weights of the last layer of a network with Gaussian noise and a Gaussian prior. This is
        compared with the model on random lines, both ways, up to a thousand standard deviations from the mode: at first, at chains in
        turn later on, and at vectors of which they are drawn (:meth:`LogDensity.complete`). What is not Gaussian farther away or elsewhere only
        is not seen. A gradient takes second derivatives in them and a decomposition of their precision; where this is not positive
        definite beyond rounding errors, value and gradient are NaN.
    :return: the density.
    :raises ValueError: if the model observes nothing in the data, or data that are not finite; if the data are a part of a
        plate only; if a latent is discrete, or its support depends on other latents; if the model is not a function of its
        latents, or the likelihood of none; if what is to be integrated out is not Gaussian, or the model cannot be run at
        several of its values together.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)
        >>> density = log_density(model, (torch.ones(5, 2), torch.ones(5)))
        >>> density.size, density.space.slices["noise"], density.value_and_gradient(torch.zeros(20, 3))[1].shape
        (3, slice(2, 3, None), torch.Size([20, 3]))
    """
    batches = Batches(data)
    kept = list(batches)
    evaluator = evaluator_of(model, kept[0])
    packed, latent = evaluator.joint.packed, evaluator.anchors[0]
    _require_same_space(packed.space, guide)
    shares = _shares(packed, latent, kept, batches.is_single)
    if packed.likelihood_names(packed.trace(latent, kept[0])):
        packed.require_function(latent, _again(kept, batches.is_single), derivatives=False)
    if collapse is None:
        return LogDensity(evaluator, shares, kept)
    joint = collapsed(evaluator.joint, collapse, shares)
    anchors = joint.restrict(evaluator.anchors)
    joint.require(anchors)
    return LogDensity(Evaluator(joint, anchors), [joint.share], kept)


@torch.inference_mode(False)
@torch.enable_grad()
def evaluator_of(model: Callable[..., Any], batch: Batch) -> Evaluator:
    """The density of a model on batches like a first one, with observations; its first anchor is a run of the model."""
    with evaluation_mode(model) as modules, local_parameters(), poutine.block():
        trace = run_model(model, batch)
    _require_continuous(trace)
    packed = PackedModel(model, trace, modules)
    values: dict[str, Any] = {n: trace.nodes[n]["value"] for n in latent_names(trace)}
    latent = packed.space.pack({n: value.detach() for n, value in values.items()})
    moving = _moving(packed, latent, batch)
    packed.validated -= moving  # at these latents the data may lie outside
    for name in moving:
        trace.nodes[name]["fn"] = unvalidated(trace.nodes[name]["fn"])
    if any(batch):  # a density without data needs no observation
        check_observations(trace, batch)
    joint = Joint(packed, moving)
    return Evaluator(joint, _anchors(joint, latent, Share(batch)))


def _anchors(joint: Joint, latent: Tensor, share: Share) -> Tensor:
    """Three packed vectors, at which the density is finite if such are found, the first of them that of a run."""
    zero = torch.zeros_like(latent)
    rows = [latent, moved_from(latent), moved_from(zero), latent / 2, moved_from(latent / 2) / 2, zero]
    finite = (u for u in rows if all(bool(x.isfinite().all()) for x in joint.evaluate(u, share)))
    return torch.stack([*islice(finite, 3), *rows][:3])


def _require_continuous(trace: Trace) -> None:
    sites, latents = sample_sites(trace), latent_names(trace)
    if not latents:
        raise ValueError("log_density: the model samples no latent site.")
    discrete = [n for n in latents if sites[n]["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"log_density: the latent sites {discrete} are discrete, and a packed vector holds real numbers. Sum over them in the "
            "model: observe a mixture (pyro.distributions.MixtureSameFamily, MaskedMixture) in their place. If they are what is observed, the "
            "data lack the observations."
        )


def _require_same_space(space: LatentSpace, guide: Any) -> None:
    trace = getattr(guide, "prototype_trace", None)
    if trace is None:
        return
    theirs = LatentSpace(trace).slices
    if list(theirs.items()) != list(space.slices.items()):
        raise ValueError(
            f"log_density: the packed vector of the guide is {theirs}, and that of the model {space.slices}: pass the model for "
            "which the guide was made."
        )


def _moving(packed: PackedModel, latent: Tensor, batch: Batch) -> frozenset[str]:
    """The observed sites whose support depends on latents; raises if that of a latent site does."""
    sites = sample_sites(packed.trace(latent.clone().requires_grad_(), batch))
    parts = packed.space.split(latent)
    others = sample_sites(packed.trace(moved_from(latent), batch))
    for name, part in parts.items():
        here, there = (biject_to(s[name]["fn"].support)(part).detach() for s in (sites, others))
        if not close(here, there):
            raise ValueError(
                f"log_density: the support of the latent site {name!r} depends on other latents, and the map to unconstrained "
                "space is one and the same. Sample it on a fixed support, such as the unit interval, and scale it: "
                "pyro.deterministic(name, low + (high - low) * x)."
            )
    return frozenset(moving_supports(sites)) - parts.keys()


def _shares(packed: PackedModel, latent: Tensor, kept: list[Batch], single: bool) -> list[Share]:
    """What each batch contributes, by a run of all of them."""
    shares: list[Share] = []
    for batch, trace in zip(kept, packed.traces(latent, _again(kept, single)), strict=True):
        packed.check_observations(trace)
        shares.append(Share(batch, packed.left_out(trace), prior=not shares))
    return shares


def _again(kept: list[Batch], single: bool) -> Any:
    """Batches that were read as data again."""
    return Arguments(*kept[0]) if single else [Arguments(*batch) for batch in kept]
