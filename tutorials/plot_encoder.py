# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Adapters of a text encoder
==========================

A small BERT learns to read from sentences without labels. Then a few hundred labelled ones teach it a task: from which
package does a sentence of documentation come? ``lora_`` puts low-rank adapters beside its frozen weights, and what the
labels leave open is where the posterior comes in: Laplace over the adapters (Laplace-LoRA), or a mixture over the
components of the adapters (``family="rank1"``). The texts are the docstrings of the packages that are installed here;
nothing is downloaded.
"""

import copy
import importlib
import inspect
import os
import random
import re
import time
import warnings
import zlib

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.diagnostics import metrics, table
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import FanInNormal, bayesian_, init_to_trained, lora_, merged_weights

try:
    from transformers import BertConfig, BertModel
except ImportError:  # a plain encoder of torch serves
    BertModel = None

SMOKE = "PYRO_BNN_SMOKE" in os.environ
READING, EPOCHS = (5, 1) if SMOKE else (700, 50)
WORDS, LENGTH, WIDTH = 2000, 24, 48
NAMES = ("numpy", "scipy", "sklearn", "torch", "pytorch", "python")
random.seed(1)
pyro.set_rng_seed(0)
torch.set_num_threads(1)

# %%
# Sentences
# ---------
#
# Four classes, and the standard library as a fifth that the network never sees. Package names are struck out.

PACKAGES = {
    "numpy": "numpy numpy.fft numpy.linalg numpy.ma numpy.random",
    "scipy": "scipy.integrate scipy.interpolate scipy.linalg scipy.optimize scipy.signal scipy.sparse scipy.spatial",
    "scikit-learn": "sklearn.cluster sklearn.decomposition sklearn.ensemble sklearn.linear_model sklearn.metrics "
    "sklearn.model_selection sklearn.neighbors sklearn.preprocessing sklearn.svm sklearn.tree",
    "torch": "torch torch.autograd torch.distributions torch.linalg torch.nn torch.nn.functional torch.optim",
    "Python": "argparse asyncio csv datetime decimal email http.client json logging os pathlib random socket "
    "subprocess threading unittest urllib.request zipfile",
}


def docstrings(modules):
    """Docstrings as lists of sentences of 7 to 24 words without code, each once, without the packages' names."""
    found, seen = [], set()
    for module in map(importlib.import_module, modules.split()):
        for name in dir(module):
            value = getattr(module, name) if name[0] != "_" else None
            texts = []
            for part in re.split(
                r"(?<=[a-z])\.\s+|\n\s*\n", (callable(value) and inspect.getdoc(value)) or ""
            ):
                words = tuple(w for w in re.findall("[a-z]+", part.lower()) if w not in NAMES)
                if (
                    7 <= len(words) <= LENGTH
                    and words not in seen
                    and not re.search(r"[>|_=`\[\]{}]|::|\.\.", part)
                ):
                    texts.append(words)
                    seen.add(words)
            found += [texts] if texts else []
    return random.sample(found, len(found))


def tokens(texts):
    """Words hashed to 2 ... WORDS - 1; 0 fills up."""
    rows = [[zlib.crc32(word.encode()) % (WORDS - 2) + 2 for word in words] for words in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of names that the packages are about to drop
    corpus = {package: docstrings(modules) for package, modules in PACKAGES.items()}
other = [words for texts in corpus.pop("Python") for words in texts]
train, held, test, reading = [], [], [], []
for label, texts in enumerate(corpus.values()):
    for part, size in ((held, 50), (test, 300)):  # whole docstrings that nobody reads before
        while sum(of == label for _, of in part) < size:
            part += [(words, label) for words in texts.pop(0)]
    reading += [t for t in texts if len(t) > 1]
    train += [(words, label) for words in random.sample([words for t in texts for words in t], 125)]
print(
    f"{len(train)} labelled sentences, {len(held)} held out, {len(test)} for the test, {len(other)} of Python, "
    f"{len(reading)} docstrings to read"
)
print(" ".join(train[0][0]), "->", list(PACKAGES)[train[0][1]])
(x_train, y_train), (x_held, y_held), (x_test, y_test) = (
    (tokens([words for words, _ in part]), torch.tensor([label for _, label in part]))
    for part in (train, held, test)
)
x_other = tokens(other)
loader = DataLoader(TensorDataset(x_train, y_train), batch_size=100, shuffle=True)

# %%
# Learning to read
# ----------------
#
# Without labels: among 64 sentences, which one stands in the same docstring as a given one? Encoder and loop are plain torch.


class Encoder(nn.Module):
    """Hidden states of tokens: BERT, or torch's own encoder where transformers is not installed."""

    def __init__(self):
        super().__init__()
        if BertModel is not None:
            size = {
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 2 * WIDTH,
            }
            self.bert = BertModel(
                BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **size), add_pooling_layer=False
            )
        else:
            self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens):
        if BertModel is not None:
            return self.bert(input_ids=tokens, attention_mask=(tokens > 0).long()).last_hidden_state
        places = self.places(torch.arange(LENGTH).expand_as(tokens))
        return self.encoder(self.words(tokens) + places, src_key_padding_mask=tokens == 0)


class Classifier(nn.Module):
    """The mean of the hidden states, and a linear head."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, 4)

    def features(self, tokens):
        there = (tokens > 0).unsqueeze(-1)
        return (self.encoder(tokens) * there).sum(1) / there.sum(1)

    def forward(self, tokens):
        return self.head(self.features(tokens))


pretrained = Classifier()
optimizer = torch.optim.Adam(pretrained.parameters(), 2e-3)
start = time.process_time()
for step in range(READING):
    pairs = [random.sample(texts, 2) for texts in random.sample(reading, 64)]
    left, right = (
        pretrained.features(tokens([words for pair in pairs for words in pair])).view(64, 2, -1).unbind(1)
    )
    scores = F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).mT / 0.1
    loss = F.cross_entropy(scores, torch.arange(64))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, READING - 1):
        print(
            f"step {step}: found {float((scores.argmax(-1) == torch.arange(64)).float().mean()):.0%} of the partners"
        )
print(f"{time.process_time() - start:.0f} s")

# %%
# All weights, as usual
# ---------------------
#
# Fine-tuning without a prior, for comparison: it ends overconfident.

tuned = copy.deepcopy(pretrained)
optimizer = torch.optim.Adam(tuned.parameters(), 1e-3)
for _ in range(EPOCHS):
    for tokens_batch, labels_batch in loader:
        optimizer.zero_grad()
        F.cross_entropy(tuned(tokens_batch), labels_batch).backward()
        optimizer.step()
tuned.eval()
with torch.no_grad():
    answers = {"all weights": (tuned(x_test).log_softmax(-1), tuned(x_other).log_softmax(-1))}

# %%
# Adapters
# --------
#
# Four components beside each projection that ``only`` admits; the head is new, and random as a whole. Without dropout,
# which a posterior takes the place of. The guide is a Delta until ``laplace_approximation``.


def adapted(family, **options):
    """The pretrained network with random adapters and a random head, and a Pyro model of the labels."""
    net = copy.deepcopy(pretrained).eval()
    lora_(
        net,
        rank=4,
        family=family,
        **options,
        only=lambda name, module: name.endswith(("query", "value", "linear1", "linear2")),
    )
    bayesian_(
        net, only="head", prior=dist.Normal(0.0, 1.0)
    )  # means of hidden states differ little: larger weights

    def model(tokens, label=None):
        logits = net.eval()(tokens)
        with pyro.plate("sentences", len(x_train), subsample=torch.arange(len(tokens))):
            return pyro.sample("package", dist.Categorical(logits=logits), obs=label)

    return net, model


start = time.process_time()
net, model = adapted("full")
guide = AutoLaplace(model, init_loc_fn=init_to_trained)
fit(model, guide, loader, num_epochs=EPOCHS, optim=0.005, progress_bar=False)
guide.laplace_approximation(loader, map_tolerance=float("inf"))
frozen = sum(p.numel() for p in net.parameters())
print(f"{guide.packed.space.dim} random numbers beside {frozen} frozen ones")
with torch.no_grad():
    weights = merged_weights(net, guide.median()) | {
        name: value for name, value in guide.median().items() if name.startswith("head")
    }
    merged = [
        torch.func.functional_call(pretrained.eval(), weights, (t,)).log_softmax(-1)
        for t in (x_test, x_other)
    ]
answers["adapters, MAP"] = tuple(merged)

# %%
# What multiplies the precision of the prior is chosen by the evidence, which takes the weights for the mode, or by the
# held-out sentences, which do not.


def predict_with(method, *data, **options):
    """Chooses the precision and predicts."""
    guide.optimize_hyperparameters(*data, method=method, **options)
    print(f"{method}: precision of the prior times {float(guide.tau.max()):.3g}")
    answers[f"Laplace, {method}"] = tuple(
        guide.predictive(t)["package"].logits.detach().log_softmax(-1) for t in (x_test, x_other)
    )


predict_with("evidence")
# single precision does not bear much smaller multipliers
predict_with("validation", (x_held, y_held), candidates=torch.logspace(-2, 2, 17).tolist())
print(f"{time.process_time() - start:.0f} s")

# %%
# A mixture over the components of the adapters
# ---------------------------------------------
#
# All components share A and B, which have the same prior as before and are estimated by MAP; each has its own four numbers
# per adapter, and its own head.

start = time.process_time()
net, model = adapted("rank1", weight_prior=FanInNormal())
guide = AutoMixture(model, num_components=4, init_scale=0.05, init_loc_fn=init_to_trained)
fit(
    model,
    guide,
    loader,
    num_epochs=EPOCHS,
    optim=0.005,
    elbo=Mixture_ELBO(),
    progress_bar=False,
)
print(f"{sum(p.numel() for p in guide.parameters())} numbers in the guide")
answers["rank-1 mixture"] = tuple(
    posterior_predictive(model, guide, (t,), num_samples=32).mean.mean(0).log() for t in (x_test, x_other)
)
print(f"{time.process_time() - start:.0f} s")

# %%
# Calibration
# -----------
#
# On sentences from docstrings that nobody has read, and on those of the standard library, where the best answer is
# to be unsure: how well does the entropy of the prediction tell them apart?

rows = {}
for name, (inside, outside) in answers.items():
    probs = inside.exp().unsqueeze(0)
    entropy = [-(p.exp() * p).sum(-1) for p in (inside, outside)]
    rows[name] = {
        "nll": metrics.nll(inside.gather(1, y_test[:, None]).T),
        "accuracy": metrics.accuracy(probs, y_test),
        "ece": metrics.ece(probs, y_test),
        "brier": metrics.brier(probs, y_test),
        "auroc of others": metrics.auroc(*entropy),
    }
print(table(rows, digits=3))

# %%
# Fine-tuning all weights ends overconfident. Most of the cure is that adapters are few and have a prior: their MAP is as
# accurate, and nearly calibrated. Laplace takes another step in the same direction, a small one where 500 sentences have
# settled 1,732 numbers. The mixture does no more than the MAP here: four factors per adapter are too few to disagree in.
# Nobody does well on the standard library, whose documentation reads much like the rest.
#
# Stated confidence against how often it is right; on the dashed line the two agree.

figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for name, (inside, _) in answers.items():
    confidence, answer = inside.exp().max(-1)
    order = confidence.argsort()
    groups = [g for g in order.chunk(10) if len(g)]
    ax.plot(
        [float(confidence[g].mean()) for g in groups],
        [float((answer[g] == y_test[g]).float().mean()) for g in groups],
        "o-",
        label=name,
    )
ax.plot([0.25, 1], [0.25, 1], "k--", lw=1)
ax.set(xlabel="stated confidence", ylabel="share of right answers")
ax.legend()
plt.show()
