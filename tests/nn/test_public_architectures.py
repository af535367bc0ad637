# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Small networks of transformers and timm, where these are installed: the bound with K components is that of a loop."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.nn import bayesian_, rank1_
from tests.infer.component_oracle import check_bound, classifier, standard_priors

pytestmark = [
    pytest.mark.filterwarnings("default"),  # theirs, and what is left out and run one by one
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

B, T = 4, 6
TEXT = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 12,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("ForSequenceClassification", SMALL),
    "DistilBert": ("ForSequenceClassification", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}),
    "GPT2": ("ForSequenceClassification", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}),
    "DebertaV2": ("ForSequenceClassification", SMALL | DEBERTA | {"type_vocab_size": 0}),
    "T5": ("Model", {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}),
    "Whisper": (
        "Model",
        {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "num_mel_bins": 8,
            "max_source_positions": 10, "max_target_positions": 12, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "CLIPVision": ("Model", SMALL | {"image_size": 8, "patch_size": 4}),
}  # fmt: skip


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 50, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, -2:] = 0
    return {
        "T5": {"input_ids": tokens, "decoder_input_ids": tokens},
        "Whisper": {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": tokens},
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


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_encoders(name: str, conversion: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, options = ENCODERS[name]
    config = getattr(transformers, f"{name}Config")(**TEXT | {"decoder_start_token_id": 0} | options)
    plain = getattr(transformers, name + kind)(config)
    given = inputs_of(name)

    def logits(net: Any, *inputs: torch.Tensor) -> torch.Tensor:
        out = net(**dict(zip(given, inputs, strict=True)))
        return out.logits if "logits" in out else out.last_hidden_state[..., -1, :3]

    check(plain, logits, tuple(given.values()), conversion)


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
