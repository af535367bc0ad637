# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Small networks of transformers and timm, where these are installed: bounds by loops, curvature by dense autograd."""

import copy
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call

from pyro_bnn.infer import ComponentLoopWarning, Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_, init_to_trained, rank1_
from tests.infer.component_oracle import check_bound, classifier, standard_priors

pytestmark = [
    pytest.mark.filterwarnings("default"),  # theirs, and what is left out and run one by one
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

B, T = 4, 6
TEXT = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10,
    "max_position_embeddings": 12,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("ForSequenceClassification", SMALL),
    "BertLM": ("ForMaskedLM", SMALL),
    "DistilBert": ("ForSequenceClassification", {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 10, "max_position_embeddings": 12}),
    "GPT2": ("ForSequenceClassification", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}),
    "DebertaV2": ("ForSequenceClassification", SMALL | DEBERTA | {"type_vocab_size": 0}),
    "T5": ("Model", {"d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 2}),
    "Whisper": (
        "Model",
        {
            "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 10, "decoder_ffn_dim": 10, "num_mel_bins": 8,
            "max_source_positions": 10, "max_target_positions": 12,
        },
    ),
    "ModernBert": ("ForSequenceClassification", SMALL | {"cls_token_id": 1, "sep_token_id": 2}),
    "Llama": ("ForSequenceClassification", SMALL | {"num_key_value_heads": 1}),
    "ViT": ("ForImageClassification", SMALL | {"image_size": 8, "patch_size": 4}),
    "CLIPVision": ("Model", SMALL | {"image_size": 8, "patch_size": 4}),
}  # fmt: skip


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 20, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, -2:] = 0
    return {
        "T5": {"input_ids": tokens, "decoder_input_ids": tokens},
        "Whisper": {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": tokens},
        "ViT": {"pixel_values": torch.randn(B, 3, 8, 8)},
        "CLIPVision": {"pixel_values": torch.randn(B, 3, 8, 8)},
        "GPT2": {"input_ids": tokens},
    }.get(name, {"input_ids": tokens, "attention_mask": mask})


def check(plain: Any, logits: Any, inputs: tuple[torch.Tensor, ...], conversion: str) -> None:
    prior = dist.Normal(0.0, 1.0)
    y = torch.randint(0, 3, (B,))
    check_bound(
        plain.double().eval(),
        rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior),
        lambda net: classifier(net, logits),
        lambda call: dist.Categorical(logits=logits(call, *inputs)).log_prob(y).sum(),
        (*inputs, y),
        standard_priors if conversion == "rank1" else lambda name: prior,
    )


def encoder(name: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A network in evaluation mode, its inputs, and three logits of its outputs."""
    transformers = pytest.importorskip("transformers")
    kind, options = ENCODERS[name]
    family = name.removesuffix("LM")
    config = getattr(transformers, f"{family}Config")(**TEXT | {"decoder_start_token_id": 0} | options)
    given = inputs_of(name)

    def logits(net: Any, *inputs: torch.Tensor) -> torch.Tensor:
        out = net(**dict(zip(given, inputs, strict=True)))
        if kind.endswith("Classification"):
            return out.logits
        return (out.logits if "logits" in out else out.last_hidden_state)[
            ..., -1, 3:6
        ]  # not the padding symbol

    return getattr(transformers, family + kind)(config).double().eval(), given, logits


@pytest.mark.every(2)
@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_encoders(name: str, conversion: str) -> None:
    plain, given, logits = encoder(name)
    check(plain, logits, tuple(given.values()), conversion)


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "GPT2", "ViT", "Llama", "T5"])
def test_laplace_of_encoders(name: str) -> None:
    """All weights, the last layer, and the linearised predictive, by dense autograd of the network before conversion."""
    plain, given, logits = encoder(name)
    x, y = tuple(given.values()), torch.randint(0, 3, (B,))
    net = bayesian_(copy.deepcopy(plain))

    def model(x: tuple[torch.Tensor, ...], y: Any = None) -> None:
        f = logits(net, *x)
        with pyro.plate("data", B, dim=-1):
            pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    guide = AutoLaplace(model, init_loc_fn=init_to_trained).initialize(x, y)
    space, u = guide.packed.space, guide.loc.detach()

    def outputs(u: torch.Tensor) -> torch.Tensor:
        return logits(lambda **kw: functional_call(plain, space.unpack(u), (), kw), *x)

    probs, J = outputs(u).softmax(-1), torch.autograd.functional.jacobian(outputs, u)
    fisher = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    ggn = torch.einsum("nci,ncd,ndj->ij", J, fisher, J)
    prior = torch.cat([prior_precision(plain, n, v) for n, v in space.unpack(u).items()])
    # Llama and T5 normalise in single precision
    accuracy = {
        "atol": (1e-7 if name in ("Llama", "T5") else 1e-12) * float(ggn.detach().max()),
        "rtol": 1e-7,
    }
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    torch.testing.assert_close(guide.precision, ggn + torch.diag(prior), **accuracy)
    J = J - (probs[:, None] @ J)  # a Categorical normalises its logits
    covariance = J @ torch.linalg.inv(ggn + torch.diag(prior)) @ J.mT
    found = guide.linearized_outputs(x)["obs"].covariance
    torch.testing.assert_close(found, covariance, rtol=1e-5, atol=1e-6)

    last = AutoLaplace.last_layer(model, structure="diagonal", init_loc_fn=init_to_trained).initialize(x, y)
    last.laplace_approximation((x, y), map_tolerance=float("inf"))
    head = last.active
    assert 0 < int(head.sum()) < 200
    expected = 1 / (ggn.diagonal() + prior)[head]
    torch.testing.assert_close(last.posterior.variance[head], expected, rtol=1e-6, atol=0.0)


def prior_precision(plain: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """Fan in of weights, and 1 for biases and tables of symbols."""
    module = plain.get_submodule(name.rpartition(".")[0])
    if value.dim() < 2 or isinstance(module, torch.nn.Embedding):
        fan_in = 1
    else:
        fan_in = value.shape[0] if type(module).__name__ == "Conv1D" else value[0].numel()
    return torch.full((value.numel(),), float(fan_in))


def test_layers_without_a_batch_can_be_left_out_to_run_together() -> None:
    """T5's relative positions are the same for all examples: without their table all components run at once."""
    plain, given, logits = encoder("T5")
    tables = [n for n, _ in plain.named_modules() if n.endswith("relative_attention_bias")]
    assert len(tables) == 2
    prior, y = dist.Normal(0.0, 1.0), torch.randint(0, 3, (B,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ComponentLoopWarning)
        check_bound(
            plain,
            lambda net: bayesian_(net, prior=prior, skip=tables),
            lambda net: classifier(net, logits),
            lambda call: dist.Categorical(logits=logits(call, *given.values())).log_prob(y).sum(),
            (*given.values(), y),
            lambda name: prior,
        )


def test_batches_of_tokenizers() -> None:
    """What tokenizers and collators return is a batch, and so are arguments of that kind inside the network."""
    transformers = pytest.importorskip("transformers")
    plain, given, _ = encoder("Bert")
    net = bayesian_(Whole(copy.deepcopy(plain)), prior=dist.Normal(0.0, 0.3))

    def model(input_ids: Any, attention_mask: Any, labels: Any = None) -> None:
        batch = transformers.BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})
        f = net(batch)
        with pyro.plate("data", len(input_ids), dim=-1):
            pyro.sample("obs", dist.Categorical(logits=f), obs=labels)

    batch = transformers.BatchEncoding({**given, "labels": torch.randint(0, 3, (B,))})
    guide = AutoMixture(model, 2)
    fit(model, guide, batch, num_steps=2, optim=0.01, elbo=Mixture_ELBO(), progress_bar=False)
    together = posterior_predictive(model, guide, batch, num_samples=3)
    assert together.vectorized
    for k in range(3):
        values = {n.removeprefix("net."): draw[k] for n, draw in together.draws.items()}
        values |= {n.removeprefix("net."): p for n, p in net.named_parameters()}  # normalisation was trained
        f = functional_call(plain, values, (), given).logits
        expected = dist.Categorical(logits=f).log_prob(batch["labels"])
        torch.testing.assert_close(together.log_likelihood[k], expected.detach(), rtol=1e-9, atol=0.0)


class Whole(torch.nn.Module):
    """A network that takes a batch as one argument."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(**batch).logits


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Beit", {"patch_size": 16, "use_shared_rel_pos_bias": True}),
        ("Xcit", {"patch_size": 16}),
        ("VisionTransformerRelPos", {"patch_size": 16, "rel_pos_type": "mlp"}),
    ],
)
def test_images(name: str, options: dict[str, Any], conversion: str) -> None:
    timm = pytest.importorskip("timm", exc_type=Exception)
    size = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    plain = getattr(timm.models, name)(**size, **options)
    check(plain, lambda net, x: net(x), (torch.randn(B, 3, 32, 32),), conversion)
