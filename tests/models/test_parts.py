"""Each of several processes reads only its part of a checkpoint, where that is possible."""

from __future__ import annotations

import json

import parts_worker
import pytest
import torch
import zoo
from processes import run_together
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.models.load import save_model
from kfade.models.weights import digest_weights

PROCESSES, BLOCKS = 4, 6
READ_IN_PARTS, READ_WHOLE = ("plain", "tied", "bfloat16", "uneven"), ("prefixed", "gguf")
pytestmark = pytest.mark.slow


def several_blocks(**options) -> LlamaForCausalLM:
    settings = {**zoo.GROUPED, "num_hidden_layers": BLOCKS, **options}
    return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "plain": several_blocks(),
        "tied": several_blocks(tie_word_embeddings=True),
        "bfloat16": several_blocks().bfloat16(),
        "uneven": several_blocks(intermediate_size=27),  # not a multiple of the processes
        "prefixed": several_blocks(),
    }
    for name, model in made.items():
        save_model(model, None, root / name)
    path = root / "prefixed" / "model.safetensors"  # names of the base model alone
    stored = {k.removeprefix("model."): v for k, v in load_file(path).items()}
    save_file(stored, path, {"format": "pt"})
    zoo.write_gguf(zoo.tiny("llama", torch.float32), root / "tiny.gguf")
    return {**{name: str(root / name) for name in made}, "gguf": str(root / "tiny.gguf")}


@pytest.fixture(scope="module")
def found(models, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("parts")
    run_together(PROCESSES, parts_worker.main, folder, models, said=folder, timeout=200)
    assert "each process has read the whole model" in (folder / "0/stderr").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def whole_bytes(path: str) -> tuple[dict[str, int], str]:
    """(bytes of each parameter, digest of all) of a model in one process."""
    model, _ = kfade.load_model(path, device="cpu", needs_tokenizer=False)
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    return sizes, digest_weights(model)


@pytest.mark.parametrize("name", [*READ_IN_PARTS, *READ_WHOLE])
def test_parts_make_the_whole(found, models, name):
    sizes, digest = whole_bytes(models[name])
    for rank in found:
        assert rank[name]["digest"] == digest
        assert rank[name]["kind"] == "LlamaForCausalLM"
        # Divided once: before there were any weights, or after all were read.
        assert rank[name]["empty"] == [name in READ_IN_PARTS]
    for parameter, size in sizes.items():
        own = [rank[name]["bytes"][parameter] for rank in found]
        if ".layers." in parameter:
            assert sum(own) == size
        else:  # embeddings, last norm and head
            assert own == [size] * PROCESSES


def test_a_process_holds_its_share_of_the_blocks(found, models):
    sizes, _ = whole_bytes(models["plain"])
    blocks = sum(size for name, size in sizes.items() if ".layers." in name)
    rest = sum(sizes.values()) - blocks
    one_block = blocks // BLOCKS
    for rank in found:
        held = sum(rank["plain"]["bytes"].values())
        assert held <= blocks / PROCESSES + rest + one_block
        assert held < 0.75 * sum(sizes.values())  # a whole copy would be seen
