# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What is scored: predictions and observations in any of their forms, read once and checked."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.infer.predict.predictive import PosteriorPredictive, SitePrediction

#: What an array of predictions of labels holds: probabilities of all classes ``(S, N, C)`` or ``(N, C)``, of the
#: second of two ``(S, N)``, or labels that were drawn ``(S, N)``.
Kind = Literal["classes", "binary", "labels"]


def as_prediction(source: Any, site: str | None = None) -> SitePrediction:
    """
    Reads predictions at one observed site from any of the forms that the scores take.

    :param source: a :class:`~pyro_bnn.infer.PosteriorPredictive`, a
        :class:`~pyro_bnn.infer.SitePrediction`, or an ArviZ tree with ``posterior_predictive``,
        ``observed_data`` or ``log_likelihood``.
    :param str site: the observed site; needed if there are several.
    :return: the predictions, with chains joined.
    :raises ValueError: if the site is not given and there are several, or is not there.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import posterior_predictive
        >>> as_prediction(posterior_predictive(model, {"w": torch.zeros(4)}, (x, x))).mean.shape
        torch.Size([4, 3])
    """
    if isinstance(source, SitePrediction):
        return source
    if isinstance(source, PosteriorPredictive):
        return source[_choose(list(source), site)]
    present = source.children if hasattr(source, "children") else source.groups()
    wanted = ("posterior_predictive", "log_likelihood", "observed_data", "constant_data")
    groups = {name: source[name] for name in wanted if name in present}
    names = sorted({str(v) for n, group in groups.items() if n != "constant_data" for v in group.data_vars})
    name = _choose(names, site)

    def read(group: str, name: str = name) -> Tensor | None:
        if group not in groups or name not in groups[group].data_vars:
            return None
        variable = groups[group][name]
        value = torch.as_tensor(np.array(variable.values))
        return value.flatten(0, 1) if "draw" in variable.dims else value

    samples = read("posterior_predictive")
    labels = samples is not None and not samples.is_floating_point()
    mask, log_likelihood = read("constant_data", f"{name}_mask"), read("log_likelihood")
    if mask is not None and log_likelihood is not None:
        log_likelihood = _with_masked(log_likelihood, mask)
    kind = "classes" if labels else "numeric"
    return SitePrediction(samples, None, None, read("observed_data"), log_likelihood, (), kind, mask)


def _with_masked(log_likelihood: Tensor, mask: Tensor) -> Tensor:
    """The densities of a tree, which holds those of the observations that count, ``(S, n)``, at their places."""
    if log_likelihood.shape[1:] == mask.shape[: log_likelihood.dim() - 1]:
        return log_likelihood
    while mask.dim() > 1 and int(mask.sum()) != log_likelihood.shape[-1]:
        mask = mask.any(-1)
    whole = log_likelihood.new_zeros(log_likelihood.shape[:1] + mask.shape)
    whole[:, mask] = log_likelihood
    return whole


def _choose(names: list[str], site: str | None) -> str:
    if site is None and len(names) == 1:
        return names[0]
    if site not in names:
        raise ValueError(f"site={site!r}: choose one of the observed sites {names}.")
    return site


def need(value: Any, what: str) -> Tensor:
    """The tensor; refused by the name ``what`` if there is none."""
    if value is None:
        raise ValueError(f"the score needs {what}, which the prediction does not hold.")
    return torch.as_tensor(value)


def check_numbers(value: Tensor, name: str, *, infinite: bool = False) -> Tensor:
    """The tensor, in single precision at least, integers in double; refused if it is empty or holds NaN (or infinities)."""
    if value.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(value.shape)} is empty: there is nothing to score.")
    if not value.is_floating_point():
        return value.double()
    bad = int((value.isnan() if infinite else ~value.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} holds {bad} entries that are {'NaN' if infinite else 'not finite'}: "
            "a score of the others would hide them. Find out why, or leave out the points."
        )
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def observed_only(value: Tensor, mask: Tensor | None, lead: int) -> Tensor:
    """
    Leaves out masked observations, which flattens the dimensions of the mask.

    :param value: shape ``lead dimensions + batch + ...``.
    :param mask: ``True`` where there is an observation, shape ``batch`` or ``batch + event``; ``None`` for everywhere.
    :param lead: the number of dimensions, of draws, left of the batch.
    """
    if mask is None or bool(mask.all()):
        return value
    own = value.shape[lead:]
    mask = mask.to(value.device)
    while mask.dim() > len(own):  # a density of whole events counts where any of their elements is observed
        mask = mask.any(-1)
    if mask.shape != own[: mask.dim()]:
        raise ValueError(
            f"the mask of the prediction has shape {tuple(mask.shape)}, its values {tuple(own)}: expected the batch shape "
            "of the observed site."
        )
    if not bool(mask.any()):
        raise ValueError("all observations are masked: there is nothing to score.")
    return value[(slice(None),) * lead + (mask,)]


class Scored:
    """
    What a score was given: a plain array ``(S, N, ...)``, or the prediction at a site, without masked observations.

    :param source: an array, or a prediction in any of its forms.
    :param site: the observed site.
    :param name: of the argument, for errors.
    """

    def __init__(self, source: Any, site: str | None, name: str) -> None:
        self.name = name
        is_array = isinstance(source, (Tensor, np.ndarray, list, tuple, float, int))
        self.array = torch.as_tensor(source) if is_array else None
        self.prediction = None if is_array else as_prediction(source, site)

    def draws(self, field: str, *, infinite: bool = False) -> Tensor:
        """One field of the prediction (samples where it has no mean), or the array, with the S draws first."""
        return check_numbers(self.values(field), self.name, infinite=infinite)

    def values(self, field: str) -> Tensor:
        """The same unchecked."""
        if self.prediction is not None:
            value: Tensor | None = getattr(self.prediction, field)
            value = self.prediction.samples if value is None and field == "mean" else value
            return observed_only(need(value, field), self.prediction.mask, 1)
        assert self.array is not None
        if self.array.dim() < 2:
            raise ValueError(
                f"{self.name} has shape {tuple(self.array.shape)}, expected (S, N, ...) with the draws in the first dimension: "
                f"of a single draw pass {self.name}[None]."
            )
        return self.array

    def observations(self, given: Any, name: str) -> Tensor:
        """The observations: given ones, or those of the prediction."""
        if self.prediction is None:
            return check_numbers(need(given, name), name)
        value = need(self.prediction.observed if given is None else given, name)
        return check_numbers(observed_only(value, self.prediction.mask, 0), name)


def draws_and_observations(source: Any, observed: Any, site: str | None, field: str) -> tuple[Tensor, Tensor]:
    """Predictions under draws ``(S, *shape)`` and observations ``shape``, finite numbers both; see :class:`Scored`."""
    scored = Scored(source, site, field)
    value = scored.draws(field)
    y = scored.observations(observed, "observed").to(value.device)
    _require_shape(y, value.shape[1:], "observed", scored.name, value)
    return value, y


def _require_shape(y: Tensor, shape: torch.Size, name: str, against: str, value: Tensor) -> None:
    if y.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(y.shape)}, but {against} of shape {tuple(value.shape)} holds {len(value)} draws of "
            f"shape {tuple(shape)}: the two must be equal, since (N,) and (N, 1) would be paired N * N times."
        )


def probabilities_and_labels(
    source: Any, labels: Any, site: str | None, kind: Kind | None
) -> tuple[Tensor, Tensor]:
    """Mean probabilities ``(N, C)`` and labels ``(N,)``; see :func:`~pyro_bnn.diagnostics.metrics.mean_probs`."""
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(map(repr, get_args(Kind)))}")
    scored = Scored(source, site, "probs")
    y = scored.observations(labels, "labels")
    if scored.array is not None:
        value, kind = scored.array, _kind_of(scored.array, y, kind)
        if kind == "classes" and value.dim() == y.dim() + 1:
            value = value[None]  # averaged already
    else:
        assert scored.prediction is not None
        value = scored.values("mean")
        if scored.prediction.mean is not None and scored.prediction.kind == "classes":
            kind = "classes"
        kind = kind or ("binary" if value.is_floating_point() else "labels")
        if kind == "classes" and y.shape == value.shape[1:]:
            y = _from_one_hot(y)
    slack = max(1e-4, 2 * torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
    value, y = check_numbers(value, "probs"), y.to(value.device)
    _require_shape(y, value.shape[1:-1] if kind == "classes" else value.shape[1:], "labels", "probs", value)
    if kind == "labels":
        drawn = _check_labels(value, None, "probs (labels that were drawn)")
        classes = 1 + int(max(drawn.max(), y.max()))
        return torch.nn.functional.one_hot(drawn, classes).double().mean(0), _check_labels(y, classes)
    _check_probabilities(value, kind, slack)
    mean = value.mean(0)
    mean = mean if kind == "classes" else torch.stack([1 - mean, mean], -1)
    return mean, _check_labels(y, mean.shape[-1])


def _kind_of(value: Tensor, y: Tensor, kind: Kind | None) -> Kind:
    """What an array holds, by its shape; refused where two readings are possible."""
    if value.dim() == y.dim() + 2:
        found: list[Kind] = ["classes"]
    else:
        single: Kind = "binary" if value.is_floating_point() else "labels"
        found = ["classes"] if value.shape[:-1] == y.shape else []
        found += [single] if value.shape[1:] == y.shape else []
    if not found:
        raise ValueError(
            f"probs has shape {tuple(value.shape)} and labels {tuple(y.shape)}: expected probabilities of shape (S, N, C) or "
            "(N, C), or those of the second of two classes, (S, N), with N labels."
        )
    if kind is None and len(found) > 1:
        raise ValueError(
            f"probs of shape {tuple(value.shape)} with labels of shape {tuple(y.shape)} can be read in two ways: pass "
            f"kind='classes' for probabilities (N, C) that were averaged, or kind={found[1]!r} for "
            f"{'probabilities of the second of two classes' if found[1] == 'binary' else 'labels'} under S draws, (S, N)."
        )
    if kind is not None and kind not in found and not (kind == "labels" and found[-1] == "binary"):
        raise ValueError(
            f"kind={kind!r} does not fit probs of shape {tuple(value.shape)} and labels of shape {tuple(y.shape)}."
        )
    return kind or found[0]


def _from_one_hot(y: Tensor) -> Tensor:
    if not _is_one_hot(y):
        raise ValueError(
            "labels: the rows of one-hot observations must hold a single 1 and zeros; of soft labels nll(prediction) is the "
            "score."
        )
    return y.argmax(-1)


def _is_one_hot(y: Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all()) and bool((y.sum(-1) == 1).all())


def is_soft(prediction: SitePrediction) -> bool:
    """Whether the observations are probabilities of classes, not labels."""
    y, mean = prediction.observed, prediction.mean
    if prediction.kind != "classes" or y is None or mean is None or y.shape != mean.shape[1:]:
        return False
    y = observed_only(y, prediction.mask, 0)
    return not _is_one_hot(y) and bool((y >= 0).all()) and bool(((y.sum(-1) - 1).abs() < 1e-4).all())


def _check_probabilities(value: Tensor, kind: Kind, slack: float) -> None:
    if bool((value < 0).any()) or bool((value > 1 + slack).any()):
        raise ValueError(
            f"probs ranges from {float(value.min()):.4g} to {float(value.max()):.4g}: probabilities lie between 0 and 1 "
            "(of logits take the softmax or sigmoid first)."
        )
    worst = float((value.sum(-1) - 1).abs().max()) if kind == "classes" else 0.0
    if worst > slack:
        raise ValueError(
            f"probs of shape {tuple(value.shape)}: probabilities sum to one over the classes, in the last dimension, but "
            f"some differ by {worst:.3g}."
        )


def _check_labels(y: Tensor, classes: int | None, name: str = "labels") -> Tensor:
    """Labels as integers; negative or fractional numbers, and those that are no class, are refused."""
    bad = (y != y.round()) | (y < 0)
    bad = bad if classes is None else bad | (y >= classes)
    if bool(bad.any()):
        among = "0, 1, ..." if classes is None else f"0, ..., {classes - 1}"
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are no class, such as {float(y[bad][0]):g}: expected whole numbers "
            f"{among}. Mask missing labels in the model, or leave them out."
        )
    return y.long()


def check_probability(value: float, name: str) -> float:
    """The nominal probability of an interval, between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value!r}: expected a probability between 0 and 1, such as 0.9.")
    return float(value)
