"""Each peer computes what kfade computes, on a tiny Llama: against a slow formula, same labels.

python -m pytest benchmarks/peers
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peer
import peers
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
SEQUENCES, LENGTH, VOCABULARY = 7, 13, 300
# Float32 sums in different orders, seen relative to the largest entry.
TOLERANCE = 1e-4


def installed(name):
    wanted = pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name}")
    return pytest.param(name, marks=wanted)


NAMES = [installed(name) for name in peers.PEERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {**{f"w{i}": i for i in range(VOCABULARY - 1)}, "<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokens_ST():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


@pytest.fixture
def likeliest(monkeypatch):
    """Every library's label is the likeliest token, so that results can be compared."""

    def best(p, num_samples=1, **options):
        return p.argmax(dim=-1, keepdim=True)

    def draw(p_NV, key_N):
        return torch.nn.functional.one_hot(p_NV.argmax(dim=1), p_NV.shape[1]) - p_NV

    draw.__name__ = "likeliest"
    monkeypatch.setattr(torch, "multinomial", best)
    monkeypatch.setattr(torch.Tensor, "multinomial", best)
    monkeypatch.setattr(peer, "sample_labels", lambda p_NV: p_NV.argmax(dim=1))
    monkeypatch.setattr(peer, "sampled_labels", draw)


def slowly(folder, tokens_ST):
    """(A, S) and each sequence's ∇W of every feed-forward weight, one sequence at a time."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    layers = {n: m for n, m in model.named_modules() if n.split(".")[-2:-1] == ["mlp"]}
    layers = {n: m for n, m in layers.items() if isinstance(m, torch.nn.Linear)}
    seen = {}
    for name, layer in layers.items():

        def note(module, inputs, output, name=name):
            output.retain_grad()
            seen[name] = (inputs[0], output)

        layer.register_forward_hook(note)
    a, s, gradients = {}, {}, {name: [] for name in layers}
    count = tokens_ST[:, 1:].numel()
    for row in tokens_ST:
        model.zero_grad()
        log_p_TV = model(row[None, :-1]).logits[0].log_softmax(dim=-1)
        log_p_TV.max(dim=-1).values.sum().backward()
        for name, (inputs, output) in seen.items():
            x, g = inputs[0].detach(), output.grad[0]
            a[name] = a.get(name, 0) + x.T @ x / count
            s[name] = s.get(name, 0) + g.T @ g / count
            gradients[name].append(layers[name].weight.grad.clone())
    return {name: (a[name], s[name]) for name in layers}, gradients


def close(ours, slow):
    assert (ours.double() - slow).abs().max() < TOLERANCE * slow.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_factors_and_eigenvalues(name, batch, folder, tokens_ST, likeliest):
    slow, gradients = slowly(folder, tokens_ST)
    library = peers.PEERS[name](folder, peer.Settings(batch=batch))
    assert library.cannot("ekfac") is None
    library.covariance(tokens_ST)
    factors = library.factors()
    assert len(factors) == 6
    if name == "kfade":
        slow = peer.with_unit_trace(slow)
    for layer, (a, s) in factors.items():
        close(a, slow[layer][0])
        close(s, slow[layer][1])
    library.ekfac(tokens_ST)
    count = tokens_ST[:, 1:].numel()
    for layer, grid in library.eigenvalues().items():
        # Bases of close eigenvalues are not unique: compared is what no basis changes, and the
        # largest entry, whose eigenvectors stand alone.
        each = torch.stack(gradients[layer])
        assert grid.double().sum() == pytest.approx(each.square().sum().item() / count, rel=1e-4)
        q_in, q_out = (torch.linalg.eigh(m).eigenvectors for m in slow[layer])
        rotated = (q_out.T @ each @ q_in).square().sum(0) / count
        assert grid.max().item() == pytest.approx(rotated.max().item(), rel=1e-3)
        # Negative control: the correction moves the largest entry by more than the tolerance.
        a_values, s_values = (torch.linalg.eigvalsh(m) for m in slow[layer])
        assert abs(a_values.max() * s_values.max() / rotated.max() - 1) > 0.01


def test_labels_follow_the_probabilities():
    torch.manual_seed(0)
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    labels_N = peer.sample_labels(p_V.expand(100_000, -1))
    shares = labels_N.bincount(minlength=6) / 100_000
    assert (shares[p_V == 0] == 0).all()
    assert (shares - p_V).abs().max() < 5 * (0.25 / 100_000) ** 0.5


def test_curvlinops_has_no_bfloat16(folder):
    pytest.importorskip("curvlinops")
    library = peers.Curvlinops(folder, peer.Settings(dtype="bfloat16"))
    assert "bfloat16 sums" in library.cannot("covariance")


def test_a_configuration_alone_gives_the_same_random_weights_each_time(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    one, other = (peer.Kfade(tmp_path, peer.Settings(layers="1")) for _ in range(2))
    assert len(one.targets) == 3  # of one of the two blocks
    for first, second in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_worker(name, dtype, folder, tokens_ST, tmp_path):
    save_file({"tokens": tokens_ST}, tmp_path / "tokens.safetensors")
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    options = {
        "peer": name,
        "job": "ekfac",
        "dtype": dtype,
        "sequences": SEQUENCES,
        "length": LENGTH,
        "batch": 2,
        "model": folder,
        "tokens": tmp_path / "tokens.safetensors",
        "threads": 1,
    }
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["peer"], report["job"]) == (name, "ekfac")
    if (name, dtype) == ("curvlinops", "bfloat16"):
        assert "bfloat16" in report["cannot"]
        return
    assert set(report["seconds"]) == {"covariance", "eigh", "lambda", "total"}
    assert sum(report["seconds"].values()) <= 2 * report["seconds"]["total"]
    assert report["tokens"] == SEQUENCES * (LENGTH - 1)
    assert min(report["peak_bytes"].values()) >= report["rss_after_load"] * 0.9
