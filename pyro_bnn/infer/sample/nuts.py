# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""NUTS chains that start from a fitted guide and record what ArviZ wants to know."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.infer.initialize import check_observations, run_model
from pyro_bnn.infer.predict.draws import Draws, component_draws, posterior_draws
from pyro_bnn.infer.sample.log_density import LogDensity, log_density
from pyro_bnn.infer.sample.result import ChainResult, NUTSResult
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.model.data import Arguments, Batch, Batches
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.flat import StartFlatSites, is_flat
from pyro_bnn.model.handlers import latent_names, sample_sites
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import plates_of
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.options import require_count

_Nuts: Any = NUTS

#: Arguments of the kernel that need its own potential energy.
_MODELS_OWN = {
    "potential_fn",
    "transforms",
    "max_plate_nesting",
    "jit_compile",
    "jit_options",
    "ignore_jit_warnings",
}


class RecordingNUTS(_Nuts):
    """
    Pyro's NUTS, with the warm-up and the statistics of every transition kept and a mass matrix to start from.

    An :class:`~pyro.infer.MCMC` run of one chain with this kernel is exported with its warm-up and all statistics;
    :func:`nuts` runs several.

    :param callable model: a Pyro model.
    :param covariance: covariance of the unconstrained latents in the order of their sorted names; the inverse mass
        matrix to start from.
    :param LogDensity density: the log density of the model, if that evaluates faster than the model itself.
    :param kwargs: arguments of :class:`~pyro.infer.NUTS`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(0.0, scale), obs=y)
        >>> kernel = RecordingNUTS(model)
        >>> mcmc = MCMC(kernel, num_samples=5, warmup_steps=3, disable_progbar=True)
        >>> mcmc.run(torch.ones(4))
        >>> found = recorded_run(mcmc)
        >>> found.sample_stats["energy"].shape, found.warmup["scale"].shape, bool((found.warmup["scale"] > 0).all())
        (torch.Size([1, 5]), torch.Size([1, 3]), True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        covariance: Tensor | None = None,
        density: LogDensity | None = None,
        **kwargs: Any,
    ) -> None:
        self._density = density
        super().__init__(model, full_mass=covariance is not None, **kwargs)
        if covariance is not None:
            self.mass_matrix_adapter = _StartingMass(covariance)
        self.records: list[dict[str, float]] = []
        self.warmup: list[dict[str, Tensor]] = []
        self._warmup_size = 0
        self._divergent = 0

    @property
    def potential_fn(self) -> Any:
        """The potential energy as a function of unconstrained values by site, which Pyro makes of the model or takes."""
        return self._potential_fn

    @potential_fn.setter
    def potential_fn(self, found: Any) -> None:
        self._potential_fn = found if found is None or self._density is None else self._energy

    def _energy(self, params: Mapping[str, Tensor]) -> Tensor:
        density: Any = self._density
        return -density(torch.cat([params[name].reshape(-1) for name in density.space.slices]))

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares a chain; called by :class:`~pyro.infer.MCMC`."""
        super().setup(warmup_steps, *args, **kwargs)
        self.records, self.warmup = [], []
        self._warmup_size, self._divergent = warmup_steps, 0

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition; called by :class:`~pyro.infer.MCMC`."""
        is_warmup = len(self.records) < self._warmup_size
        step_size = float(self.step_size)
        # Pyro keeps a running mean of acceptance rates, which its public logging() rounds
        before = self._mean_accept_prob
        potential = float(self.potential_fn(params).detach())  # some models take derivatives themselves
        with _Moves() as moves:
            result = super().sample(params)
        count = len(self.records) + 1 - (0 if is_warmup else self._warmup_size)
        if is_warmup:
            self.warmup.append(
                {n: self.transforms[n].inv(v) if n in self.transforms else v for n, v in result.items()}
            )
            divergent = 0  # the kernel counts none of the warm-up
        else:
            divergent = len(self.diagnostics()["divergences"])
        self.records.append(
            {
                "step_size": step_size,
                "tree_depth": float(moves.depth),
                "energy": potential + moves.kinetic,
                # undo the running mean that the kernel keeps
                "acceptance_rate": before + count * (self._mean_accept_prob - before),
                "diverging": float(divergent > self._divergent),
            }
        )
        self._divergent = divergent
        return result


class _StartingMass(BlockMassMatrix):
    """An inverse mass matrix that adapts from a given covariance on."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        self.covariance = covariance

    def configure(self, mass_matrix_shape: dict[Any, Any], *args: Any, **kwargs: Any) -> None:
        super().configure(mass_matrix_shape, *args, **kwargs)
        self.inverse_mass_matrix = dict.fromkeys(mass_matrix_shape, self.covariance)


class _Moves(Messenger):
    """The kinetic energy and the number of doublings of a transition, from what the kernel draws."""

    def __init__(self) -> None:
        super().__init__()
        self.kinetic, self.depth = 0.0, 0

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"].startswith("r_t="):
            self.kinetic += 0.5 * float(msg["value"].square().sum())
        elif msg["name"].startswith("direction_t="):
            self.depth += 1


def check_plates(sites: Mapping[str, Any]) -> None:
    """Refuses plates that are subsampled: a chain needs all of the data in every step."""
    for plate in (plate for site in sites.values() for plate in plates_of(site).values()):
        if plate.size != plate.full_size:
            raise ValueError(
                f"nuts: plate {plate.name!r} has {plate.size} of its {plate.full_size} rows. NUTS needs all of them in every step: "
                "pass the whole data, with subsample_size equal to the size of the plate or left out."
            )


def starting_points(guide: Any, num_chains: int, batch: Batch) -> Draws:
    """
    One point per chain, by site of shape ``(C,) + site shape``: draws of different components of a mixture guide, draws of
    another guide, which may need the batch for that.
    """
    if getattr(guide, "num_components", 1) > 1:
        parts = component_draws(guide, -(-num_chains // guide.num_components))
        # draw j of every component before draw j + 1 of any
        return {n: v.transpose(0, 1).flatten(0, 1)[:num_chains] for n, v in parts.items()}
    return posterior_draws(guide, num_chains, batch)


def _laplace_covariance(guide: Any, names: list[str], batch: Batch) -> Tensor | None:
    """The covariance of a Gaussian guide over the packed latents, in the order of sorted names."""
    if not isinstance(guide, AutoContinuous):
        return None
    args, kwargs = batch
    posterior: Any = guide.get_posterior(*args, **kwargs)
    covariance = getattr(posterior, "covariance_matrix", None)
    if covariance is None:
        return None
    prototype: Any = guide.prototype_trace
    blocks, start = {}, 0
    for name, site in prototype.iter_stochastic_nodes():
        size = biject_to(site["fn"].support).inv(site["value"]).numel()
        blocks[name] = torch.arange(start, start + size)
        start += size
    if sorted(blocks) != names:
        return None
    order = torch.cat([blocks[name] for name in names])
    return covariance.detach()[order][:, order]


def nuts(
    model: Callable[..., Any],
    data: Any,
    *,
    guide: Any = None,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 4,
    use_mass_matrix: bool = True,
    progress_bar: bool = True,
    **kwargs: Any,
) -> NUTSResult:
    """
    Runs NUTS, with chains that start from a fitted guide.

    The chains of a mixture guide start in different components. The covariance of a Gaussian guide over packed
    latents (a Laplace approximation with a dense covariance, :class:`~pyro.infer.autoguide.AutoMultivariateNormal`)
    becomes the dense inverse mass matrix to start from, and adaptation goes on from there. Chains run one after the
    other in this process, on the :func:`~pyro_bnn.infer.log_density` of the model where it has one (not if an argument of
    the kernel asks for more, as ``jit_compile``); networks are in evaluation mode.

    :param callable model: a Pyro model.
    :param data: one batch with the full data.
    :param guide: a fitted guide; by default chains start at draws from the prior.
    :param int num_samples: draws per chain.
    :param int warmup_steps: steps of adaptation per chain.
    :param int num_chains: the number of chains.
    :param bool use_mass_matrix: whether to take the covariance of the guide.
    :param bool progress_bar: whether to show a bar per chain, in terminals and notebooks.
    :param kwargs: arguments of :class:`~pyro.infer.NUTS`, such as ``target_accept_prob``.
    :return: draws and statistics, which :func:`~pyro_bnn.diagnostics.to_datatree` and
        :func:`~pyro_bnn.infer.posterior_predictive` take.
    :raises ValueError: for a number of draws, steps or chains that is none, if there are several batches, if the model observes
        nothing in the data, or if the guide lacks one of its sites.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> run = nuts(model, torch.ones(5), num_samples=20, warmup_steps=20, num_chains=2, progress_bar=False)
        >>> run.samples["z"].shape, sorted(run.sample_stats)[0]
        (torch.Size([2, 20]), 'acceptance_rate')
    """
    require_count("num_samples", num_samples)
    require_count("warmup_steps", warmup_steps, least=0)
    require_count("num_chains", num_chains)
    batches = list(Batches(data))
    if len(batches) != 1:
        raise ValueError(f"nuts needs the full data as one batch, and found {len(batches)} batches.")
    (batch,) = batches
    with local_parameters(), evaluation_mode(model):
        with poutine.block():
            trace = run_model(model, batch)
        if any(batch):  # a density without data needs no observation
            check_observations(trace, batch)
        sites = sample_sites(trace)
        check_plates(sites)
        if any(is_flat(site) for site in sites.values()):
            model = StartFlatSites()(model)
        names = sorted(latent_names(trace))
        points = None if guide is None else starting_points(guide, num_chains, batch)
        missing = sorted(set(names) - set(names if points is None else points))
        if missing:
            raise ValueError(f"nuts: the guide has no draws of the sites {missing}, which the model samples.")
        covariance = _laplace_covariance(guide, names, batch) if use_mass_matrix else None
        density = None if kwargs.keys() & _MODELS_OWN else _density(model, batch)
        chains = []
        for chain in range(num_chains):
            start = None
            if points is not None:
                unconstrained = {n: biject_to(sites[n]["fn"].support).inv(points[n][chain]) for n in names}
                start = {n: value.detach().clone() for n, value in unconstrained.items()}
            mcmc = MCMC(
                RecordingNUTS(model, covariance, density, **kwargs),
                num_samples=num_samples,
                warmup_steps=warmup_steps,
                initial_params=start,
                disable_progbar=not (progress_bar and shows_bars()),
            )
            mcmc.run(*batch[0], **batch[1])
            chains.append(mcmc)
    samples = {n: torch.stack([chain.get_samples()[n] for chain in chains]) for n in names}
    return _collect(samples, [chain.kernel for chain in chains])


def _density(model: Callable[..., Any], batch: Batch) -> LogDensity | None:
    """The log density of a model, ``None`` if the model has to run for it in every step anyway."""
    try:
        density = log_density(model, Arguments(*batch))
        density.value_and_gradient(torch.zeros(density.size, dtype=density.dtype, device=density.device))
    except ValueError as error:  # what it refuses, NUTS may take
        logger.info("nuts: runs of the model, since it has no log density on a packed vector: %s", error)
        return None
    return None if density.reason else density


def _collect(samples: dict[str, Tensor], kernels: list[RecordingNUTS]) -> NUTSResult:
    """Draws by site and what the kernels of the chains have recorded."""
    size = len(kernels[0].warmup)

    def stats(part: slice) -> dict[str, Tensor]:
        rows = [kernel.records[part] for kernel in kernels]
        found = {
            key: torch.tensor([[row[key] for row in chain] for chain in rows], dtype=torch.float64)
            for key in kernels[0].records[0]
        }
        return found | {"diverging": found["diverging"].bool(), "tree_depth": found["tree_depth"].long()}

    warmup = {
        n: torch.stack([torch.stack([row[n] for row in k.warmup]) for k in kernels]) for n in samples if size
    }
    return NUTSResult(samples, stats(slice(size, None)), warmup, stats(slice(size)) if size else {})


def recorded_run(posterior: Any) -> ChainResult | None:
    """
    The draws, warm-up and statistics of a :class:`~pyro_bnn.infer.ChainResult`, or of :class:`~pyro.infer.MCMC` with one chain
    of :class:`RecordingNUTS`; ``None`` for all other posteriors.
    """
    if isinstance(posterior, ChainResult):
        return posterior
    kernel = getattr(posterior, "kernel", None)
    if not (isinstance(posterior, MCMC) and isinstance(kernel, RecordingNUTS) and posterior.num_chains == 1):
        return None
    return _collect(dict(posterior.get_samples(group_by_chain=True)), [kernel])
