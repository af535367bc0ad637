# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which family each latent site of a mixture guide gets."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer.autoguide.utils import helpful_support_errors
from torch.distributions import biject_to

from pyro_bnn.infer.autoguide.components import FAMILIES, INDEX, LatentSite, is_real
from pyro_bnn.infer.autoguide.initialization import site_hint

#: A family for all sites, a mapping from site names (or patterns) to families, or a callable of name and site.
ComponentLike = str | Mapping[str, str] | Callable[[str, Any], str | None]


def site_role(site: Any) -> str | None:
    """What the layer that owns a site says it is."""
    return site_hint(site).get("role")


def check_kind(kind: str) -> str:
    """Refuses a name that is not that of a family."""
    if kind not in FAMILIES:
        raise ValueError(f"unknown component family {kind!r}; choose from {list(FAMILIES)}.")
    return kind


def choose_kind(component: ComponentLike, rest: str, name: str, site: Any, has_factors: bool) -> str:
    """The family of a site by the arguments of :class:`AutoMixture` and by what its layer says of it."""
    default: str | None = None
    if isinstance(component, str):
        default = component
    elif isinstance(component, Mapping):
        key = _matching_pattern(component, name)
        if key is not None:
            return component[key]
    else:
        kind = component(name, site)
        if kind is not None:
            return check_kind(kind)
    role = site_role(site)
    if role == "base":
        return "point"
    if has_factors and role != "factor":
        return rest
    return default or "normal"


def describe_site(name: str, site: Any, kind: str, num_components: int) -> LatentSite:
    """What the guide needs to know of a site, once its family is found to suit it."""
    fn, value, frames = site["fn"], site["value"], site["cond_indep_stack"]
    for frame in frames:
        if frame.full_size is not None and frame.full_size != frame.size:
            if site_role(site) is not None:
                raise ValueError(
                    f"site {name!r} of a layer is drawn inside the plate {frame.name!r}, so that every example would have "
                    "its own: call the network before the plate."
                )
            raise ValueError(
                f"site {name!r} is latent inside the subsampled plate {frame.name!r}, which AutoMixture does not "
                "support: give it its own guide in an AutoGuideList."
            )
    support = fn.support
    if site_role(site) == "index":
        size = fn.enumerate_support(expand=False).shape[0]
        if size != num_components:
            raise ValueError(
                f"site {name!r} distinguishes {size} components, but the guide has {num_components}: convert "
                "the network with the same num_components."
            )
        shape = value.shape
        return LatentSite(name, INDEX, support, 0, shape, shape, frames, "index")
    if support.is_discrete:
        raise ValueError(f"site {name!r} is discrete ({fn}); AutoMixture takes continuous sites.")
    if kind == "cauchy" and not is_real(support):
        raise ValueError(f"site {name!r} has support {support}, but Cauchy components need the real line.")
    if kind == "low_rank" and frames:
        raise ValueError(
            f"site {name!r} is in the plate {frames[0].name!r}, which low-rank components do not allow: "
            "give it another family by component={...}."
        )
    with helpful_support_errors(site):
        raw_shape = biject_to(support).inv(value).shape
    return LatentSite(
        name, FAMILIES[kind], support, fn.event_dim, value.shape, raw_shape, frames, site_role(site)
    )


def check_component_keys(component: ComponentLike, nodes: Mapping[str, Any]) -> None:
    """Refuses a key of a mapping that names no site."""
    if isinstance(component, Mapping):
        used = {_matching_pattern(component, name) for name in nodes}
        unused = sorted(set(component) - used)
        if unused:
            raise ValueError(
                f"component has keys {unused} that match no site; the sites are {sorted(nodes)[:20]}."
            )


def _matching_pattern(patterns: Mapping[str, str], name: str) -> str | None:
    if name in patterns:
        return name
    last = name.rpartition(".")[2]
    if last in patterns:
        return last
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
