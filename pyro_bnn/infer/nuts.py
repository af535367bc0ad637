# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""NUTS chains that start from a fitted guide and record what ArviZ wants to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.infer.initialize import check_observations, run_model
from pyro_bnn.infer.predict.draws import Draws, component_draws, posterior_draws
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.model.data import Batch, Batches
from pyro_bnn.model.flat import StartFlatSites, is_flat
from pyro_bnn.model.handlers import latent_names, sample_sites
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import plates_of

_Nuts: Any = NUTS


class RecordingNUTS(_Nuts):
    """
    Pyro's NUTS, with the warm-up and the statistics of every transition kept and a mass matrix to start from.

    An :class:`~pyro.infer.MCMC` run of one chain with this kernel is exported with its warm-up and all statistics;
    :func:`nuts` runs several.

    :param callable model: a Pyro model.
    :param covariance: covariance of the unconstrained latents in the order of their sorted names; the inverse mass
        matrix to start from.
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

    def __init__(self, model: Callable[..., Any], covariance: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(model, full_mass=covariance is not None, **kwargs)
        self.covariance = covariance
        self._kinetic: Any = None
        self._depth = 0
        self.records: list[dict[str, float]] = []
        self.warmup: list[dict[str, Tensor]] = []

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares a chain; called by :class:`~pyro.infer.MCMC`."""
        super().setup(warmup_steps, *args, **kwargs)
        if self.covariance is not None:
            names = tuple(sorted(self.initial_params))
            self.mass_matrix_adapter.inverse_mass_matrix = {names: self.covariance}
            if self._adapter.adapt_step_size:
                self._adapter.reset_step_size_adaptation(self._initial_params)
        self.records, self.warmup = [], []

    def _kinetic_energy(self, r_unscaled: Any) -> Any:
        value = super()._kinetic_energy(r_unscaled)
        if self._kinetic is None:
            self._kinetic = value
        return value

    def _build_tree(
        self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: Any, tree_depth: int, energy: Any
    ) -> Any:
        self._depth = max(self._depth, tree_depth + 1)
        return super()._build_tree(z, r, z_grads, log_slice, direction, tree_depth, energy)

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition; called by :class:`~pyro.infer.MCMC`."""
        self._kinetic, self._depth = None, 0
        step_size, divergences = self.step_size, len(self._divergences)
        before = self._mean_accept_prob
        potential = self._potential_energy_last
        result = super().sample(params)
        if self._t <= self._warmup_steps:
            self.warmup.append(
                {n: self.transforms[n].inv(v) if n in self.transforms else v for n, v in result.items()}
            )
        count = self._t - self._warmup_steps if self._t > self._warmup_steps else self._t
        self.records.append(
            {
                "step_size": float(step_size),
                "tree_depth": float(self._depth),
                "energy": float(potential + self._kinetic) if potential is not None else float("nan"),
                # undo the running mean that the kernel keeps
                "acceptance_rate": before + count * (self._mean_accept_prob - before),
                "diverging": float(len(self._divergences) > divergences),
            }
        )
        return result


@dataclass
class NUTSResult:
    """
    Chains of :func:`nuts`.

    :param samples: draws by site, shape ``(chains, draws) + site shape``.
    :param sample_stats: ``step_size``, ``tree_depth``, ``energy``, ``acceptance_rate`` and ``diverging`` of every
        draw, shape ``(chains, draws)``.
    :param warmup: draws of the warm-up.
    :param warmup_stats: statistics of the warm-up.
    """

    samples: dict[str, Tensor]
    sample_stats: dict[str, Tensor]
    warmup: dict[str, Tensor]
    warmup_stats: dict[str, Tensor]

    @property
    def num_chains(self) -> int:
        """The number of chains."""
        return len(next(iter(self.samples.values())))

    def get_samples(self, group_by_chain: bool = False) -> Draws:
        """
        The draws, as :meth:`pyro.infer.MCMC.get_samples` returns them.

        :param bool group_by_chain: whether the chains keep their own dimension.
        :return: draws by site.
        """
        if group_by_chain:
            return dict(self.samples)
        return {name: value.flatten(0, 1) for name, value in self.samples.items()}


def check_plates(sites: Mapping[str, Any]) -> None:
    """
    :param sites: the sample sites of a model.
    :raises ValueError: if a plate is subsampled, naming it: a chain needs all of the data in every step.
    """
    plates = {plate.name: plate for site in sites.values() for plate in plates_of(site).values()}
    for plate in plates.values():
        if plate.size != plate.full_size:
            raise ValueError(
                f"nuts: plate {plate.name!r} has {plate.size} of its {plate.full_size} rows. NUTS needs all of them in every step: "
                "pass the whole data, with subsample_size equal to the size of the plate or left out."
            )


def starting_points(guide: Any, num_chains: int, batch: Batch) -> Draws:
    """
    One point per chain: draws of different components of a mixture guide, draws of another guide.

    :param guide: an initialised guide.
    :param int num_chains: the number of points C.
    :param batch: arguments of the guide, for guides that need them.
    :return: by site, a tensor of shape ``(C,) + site shape``.
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
    other in this process.

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
    :raises ValueError: if there are several batches, if the model observes nothing in the data, or if the guide lacks
        one of its sites.

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
    batches = list(Batches(data))
    if len(batches) != 1:
        raise ValueError(f"nuts needs the full data as one batch, and found {len(batches)} batches.")
    args, model_kwargs = batches[0]
    with local_parameters():
        with poutine.block():
            trace = run_model(model, batches[0])
        if args or model_kwargs:  # a density without data needs no observation
            check_observations(trace, batches[0])
        sites = sample_sites(trace)
        check_plates(sites)
        if any(is_flat(site) for site in sites.values()):
            model = StartFlatSites()(model)
        names = sorted(latent_names(trace))
        points = None if guide is None else starting_points(guide, num_chains, batches[0])
        missing = sorted(set(names) - set(names if points is None else points))
        if missing:
            raise ValueError(f"nuts: the guide has no draws of the sites {missing}, which the model samples.")
        covariance = _laplace_covariance(guide, names, batches[0]) if use_mass_matrix else None
        samples: list[Draws] = []
        kernels: list[RecordingNUTS] = []
        for chain in range(num_chains):
            initial = None
            if points is not None:
                initial = {
                    n: biject_to(sites[n]["fn"].support).inv(points[n][chain]).detach().clone() for n in names
                }
            kernel = RecordingNUTS(model, covariance, **kwargs)
            mcmc = MCMC(
                kernel,
                num_samples=num_samples,
                warmup_steps=warmup_steps,
                initial_params=initial,
                disable_progbar=not (progress_bar and shows_bars()),
            )
            mcmc.run(*args, **model_kwargs)
            samples.append({n: v[None] for n, v in mcmc.get_samples().items()})
            kernels.append(kernel)
    return _collect({n: torch.cat([s[n] for s in samples]) for n in names}, kernels)


def _collect(samples: dict[str, Tensor], kernels: list[RecordingNUTS]) -> NUTSResult:
    """Draws by site and what the kernels of the chains have recorded."""
    size = len(kernels[0].warmup)

    def stats(part: slice) -> dict[str, Tensor]:
        found = {
            key: torch.tensor(
                [[row[key] for row in kernel.records[part]] for kernel in kernels], dtype=torch.float64
            )
            for key in kernels[0].records[0]
        }
        return found | {"diverging": found["diverging"].bool(), "tree_depth": found["tree_depth"].long()}

    warmup = {
        n: torch.stack([torch.stack([row[n] for row in k.warmup]) for k in kernels]) for n in samples if size
    }
    return NUTSResult(samples, stats(slice(size, None)), warmup, stats(slice(size)) if size else {})


def recorded_run(posterior: Any) -> NUTSResult | None:
    """
    The draws, warm-up and statistics of a run whose kernel has recorded them.

    :param posterior: any posterior.
    :return: the result of :func:`nuts` itself, that of an :class:`~pyro.infer.MCMC` run of one chain with
        :class:`RecordingNUTS`, ``None`` for all others.
    """
    if isinstance(posterior, NUTSResult):
        return posterior
    kernel = getattr(posterior, "kernel", None)
    if not (isinstance(posterior, MCMC) and isinstance(kernel, RecordingNUTS) and posterior.num_chains == 1):
        return None
    return _collect(dict(posterior.get_samples(group_by_chain=True)), [kernel])
