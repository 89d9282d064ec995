"""Which model families can be unlearned with? A tiny random instance of each is tried.

    python benchmarks/families.py [MODEL_TYPE ...]

For every model type that transformers maps to a causal language model: its default configuration
made tiny (:func:`tiny_config`, fields by their names), random float32 weights, random tokens. Tried
are ``unlearn`` by EK-FAC to a measured KL of 1e-5 nats, small enough that predictions must hold;
an update's apply and revert; a saved folder; generation in a batch against one prompt at a time;
and ``unlearn`` in bfloat16. Writes ``benchmarks/results/families.jsonl`` and ``docs/models.md``;
with model types as arguments it only prints. ``--page`` writes the page from the results.

A family works where everything passes, works in part where ``unlearn`` does and something else
does not, is refused where kfade says why not in a line of its own, and crashes where anything else
is raised. No failure is hidden: each is in the table in its own words.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from experiments.lab.records import DOCS, RESULTS, Record, read, table, write
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kfade.data.sequences import TokenSequence
from kfade.errors import InputError
from kfade.evaluate.generation import Decoding, generate
from kfade.method.settings import Correction, Run
from kfade.method.size import StepSize
from kfade.method.unlearn import unlearn
from kfade.models.layers import choose_targets
from kfade.models.load import frozen
from kfade.models.targets import Target
from kfade.runtime.provenance import versions

FILE, PAGE = RESULTS / "families.jsonl", DOCS / "models.md"
VOCABULARY, SECONDS = 64, 60
KL, TOLERANCE = 1e-5, 0.1  # nats; of measured over predicted, whose error grows as √KL
KL_EXPERTS = (1e-8, 1e-9)  # where a larger step changes which experts run, and outputs jump
ALPHA = 0.05  # of other steps, whose size need not be met

ENCODERS = "an encoder, a decoder only by option"
CROSS = "the decoder of an encoder-decoder or of a multimodal model"
LEFT_OUT = {
    **dict.fromkeys(
        [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
            "reformer",
        ],
        ENCODERS,
    ),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "git",
            "marian",
            "mbart",
            "mllama",
            "moshi",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ],
        CROSS,
    ),
    "blt": "reads bytes in patches; no tiny instance of its five parts was made",
    **dict.fromkeys(
        ["gemma4_assistant", "gemma4_unified_assistant"],
        "drafts for another model, whose hidden states it reads",
    ),
}
"""Model type -> why it is not tried."""

NUMBERS = {  # a field's name, which many families share -> its tiny value
    "hidden_size d_model n_embd embedding_dim word_embed_proj_dim lru_width attention_hidden_size "
    "embedding_size adapter_in_dim hidden_size_per_layer_input ple_embed_dim router_hidden_size "
    "dim_model_base": 32,
    "intermediate_size ffn_dim n_inner dff dim_ff ffn_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
    "moe_shared_expert_intermediate_size": 24,
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": VOCABULARY,
    "num_hidden_layers n_layer n_layers num_layers num_blocks": 2,
    "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads "
    "num_query_groups": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "linear_num_value_heads linear_num_heads index_n_heads n_mamba_heads": 2,
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim rotary_dim dim_head "
    "kv_channels swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "query_pre_attn_scalar": 8,
    "num_experts n_routed_experts num_local_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k": 2,
    "n_shared_experts num_shared_experts moe_num_shared_experts topk_group n_group "
    "num_expert_group first_k_dense_replace num_dense_layers": 1,
    "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank laurel_rank adapter_rank gated_norm_rank": 8,
    "state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size time_step_rank "
    "mamba_dt_rank block_size": 8,
    "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length "
    "original_max_position_embeddings": 128,
    "sliding_window attention_window_size sliding_window_size window_size attention_chunk_size "
    "local_attention": 8,
    "zero_expert_num index_topk index_topk_blocks": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range init_std": 0.2,
}
TINY = {name: value for names, value in NUMBERS.items() for name in names.split()}
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
"""Fields with one entry a layer: tiny models have each kind once, in a repeated pattern."""


INDEXER = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "bamba": {**MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "inkling_text": {"unpadded_vocab_size": VOCABULARY},
    "qwen4_exp_text": INDEXER,
    "dots3_note_text": {"num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [24] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {"kv_channels": 16, "attention_head_dim": 16, "attention_hidden_size": 64},
}
"""What the names alone do not tell."""


def tiny_config(model_type: str) -> Any:
    """The default configuration of a model type, made small by the names of its fields."""
    kind = CONFIG_MAPPING[model_type]
    with contextlib.redirect_stdout(io.StringIO()):
        default = kind()
        config = kind(**_shrunk(default, model_type))
    return config


def _shrunk(default: Any, model_type: str) -> dict[str, Any]:
    fields = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            small[name] = type(value)(**_shrunk(value, value.model_type)).to_dict()
        elif name in TINY and is_size(name, value):
            small[name] = TINY[name]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # a latent serves every head
        small["num_key_value_heads"] = small["num_attention_heads"]
    kinds = {name: fields[name] for name in KINDS if isinstance(fields.get(name), list)}
    if kinds:
        patterns = {name: list(dict.fromkeys(value)) for name, value in kinds.items()}
        layers = max(2, *(len(pattern) for pattern in patterns.values()))
        for name, pattern in patterns.items():
            small[name] = [pattern[i % len(pattern)] for i in range(layers)]
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if name in small:
                small[name] = layers
    return small | OVERRIDES.get(model_type, {})


def is_size(name: str, value: Any) -> bool:
    """Whether a field holds a number, or one is made of it where it holds none."""
    if value is None:
        return name in ("head_dim", "num_key_value_heads")
    return isinstance(value, int | float) and not isinstance(value, bool)


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """A random float32 model of it; no matrix is left at zero or at one value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.std() == 0:
            nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # the experts of each token
            numbers = torch.arange(buffer.numel()) % model.config.n_routed_experts
            buffer.copy_(numbers.view(buffer.shape))
    return model.eval()


def sequences(count: int, seed: int, length: int = 12) -> list[TokenSequence]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [TokenSequence(tuple(row), (False, *[True] * (length - 1))) for row in tokens]


class Ends:
    """All that generation asks of a tokenizer."""

    eos_token_id = 2


class Slow(Exception):
    """The time that a family has is over."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Slow(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(model_type: str) -> dict[str, Any]:
    """What the family does; never raises but for an interrupt."""
    start = time.perf_counter()
    row: Record = {}
    try:
        with time_limit(SECONDS):
            row["stage"] = "build"
            model = tiny_model(model_type)
            row["class"] = type(model).__name__
            row["experts"] = has_experts(model)
            row["stage"] = "unlearn"
            row.update(unlearned(model))
            for name, test in PARTS.items():
                row["stage"] = name
                try:
                    row[name] = test(model)
                except Slow:
                    raise
                except Exception as error:
                    row[name] = in_words(error)
        row["outcome"] = "works" if passed(row) else "in part"
    except InputError as error:
        row.update(outcome="refused", reason=str(error))
    except Exception as error:
        row.update(outcome="crash", reason=in_words(error))
        if row["stage"] == "build":
            row["outcome"] = "not built"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def in_words(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, InputError):
        return f"refused: {error}"
    text = " ".join((str(error).strip() or "no message").split())
    return f"{type(error).__name__}: {text}"[:300]


def has_experts(model: Any) -> bool:
    """Whether it is a mixture of experts, by its parameters' names."""
    names = [name for name, _ in model.named_parameters()]
    return any(part in name for name in names for part in ("expert", "moe", "router"))


def data() -> dict[str, list[TokenSequence]]:
    return {"forget": sequences(3, 1), "retain": sequences(8, 2), "held_out": sequences(4, 3)}


def unlearned(model: nn.Module) -> dict[str, Any]:
    """One step at a KL at which predictions must hold; (measured / predicted) of both."""
    chosen = choose_targets(model)
    for kl in KL_EXPERTS if has_experts(model) else (KL,):
        run = Run(targets=chosen.targets, steps=1, correction=Correction(count=0))
        update = unlearn(model, **data(), size=StepSize(kl=kl), run=run)
        [step] = update.provenance["steps"]
        objective = step["measured_objective_change"] / step["predicted_objective_change"]
        if abs(objective - 1) <= TOLERANCE:
            break
    return {
        "asked_kl": kl,
        "targets": len(chosen.targets),
        "weights": sorted({weight_of(target) for target in chosen.targets}),
        "left_out": chosen.summary,
        "kl": step["measured_kl"] / step["exact_kl"],
        "objective": objective,
        "rises": step["measured_objective_change"] > 0,
    }


def weight_of(target: Target) -> str:
    """A target's name within its block; one name for all experts of a layer."""
    name = target.name.split(f".{target.block}.", 1)[-1]
    return f"{name.partition('[')[0]}[e]" if target.is_routed else name


def applied(model: Any) -> bool:
    """An update moves the logits; reverting brings them back to rounding; within a ``with``,
    exactly."""
    update = unlearn(model, **data(), size=StepSize(alpha=ALPHA))
    before = logits(model)
    with update.applied_to(model):
        inside = logits(model)
    exact = torch.equal(logits(model), before)
    update.apply(model)
    same = torch.equal(logits(model), inside)
    update.revert(model)
    size = (inside - before).norm()
    return exact and same and bool(size > 0) and bool((logits(model) - before).norm() < 0.01 * size)


def exported(model: Any) -> bool:
    """A saved folder loads to the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    return torch.equal(logits(again), logits(model))


def generated(model: Any) -> bool:
    """Greedy continuations in a batch, and each prompt by itself."""
    prompts = [list(s.tokens[:n]) for s, n in zip(sequences(3, 4), (9, 5, 3), strict=True)]
    return _continued(model, prompts, 10**6) == _continued(model, prompts, 1)


def _continued(model: Any, prompts: Sequence[Sequence[int]], budget: int) -> dict[int, list[int]]:
    return dict(generate(model, Ends(), prompts, Decoding(6, budget)))


def in_bfloat16(model: Any) -> bool:
    """A step well above rounding."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        low = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    [step] = unlearn(low, **data(), size=StepSize(alpha=ALPHA)).provenance["steps"]
    return 0 < step["measured_kl"] < math.inf and step["measured_objective_change"] > 0


def logits(model: Any) -> torch.Tensor:
    """On a few tokens."""
    tokens_BT = torch.tensor([s.tokens for s in sequences(2, 5)])
    with frozen(model), torch.no_grad():
        return model(input_ids=tokens_BT, use_cache=False).logits


PARTS = {
    "apply": applied,
    "export": exported,
    "generation": generated,
    "bfloat16": in_bfloat16,
}
"""What else is tried, once ``unlearn`` works."""


def passed(row: dict[str, Any]) -> bool:
    """Whether all that was tried is as it should be."""
    near = all(abs(row[name] - 1) <= TOLERANCE for name in ("kl", "objective"))
    return near and row["rises"] and all(row[name] is True for name in PARTS)


def page(results: dict[str, Record]) -> str:
    """The Markdown page."""
    versions = results["versions"]
    rows = {name: row for name, row in results.items() if name != "versions"}
    tried = {name: row for name, row in rows.items() if row["outcome"] != "left out"}
    outcomes = ("works", "in part", "refused", "crash", "not built")

    def counts(chosen: Sequence[Record]) -> list[str]:
        numbers = [sum(row["outcome"] == outcome for row in chosen) for outcome in outcomes]
        return [str(number) for number in (len(chosen), *numbers)]

    dense = [row for row in tried.values() if row.get("experts") is False]
    experts = [row for row in tried.values() if row.get("experts")]
    summary = [
        ["dense and hybrid", *counts(dense)],
        ["mixtures of experts", *counts(experts)],
        ["all", *counts(list(tried.values()))],
    ]
    order = sorted(tried, key=lambda name: (tried[name]["outcome"], name))
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["outcome"] == "left out":
            reasons.setdefault(row["reason"], []).append(name)
    return PAGE_TEXT.format(
        transformers=versions["transformers"],
        torch=versions["torch"],
        summary=table(
            "families | tried | work | in part | refused | crash | no tiny instance", summary
        ),
        kl=KL,
        kl_experts=KL_EXPERTS,
        families=table(
            "family | outcome | KL | objective | weights changed by default | what does not work",
            [cells(name, tried[name]) for name in order],
        ),
        reasons="\n".join(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()),
    )


PAGE_TEXT = """\
# Model families

Made by `python benchmarks/families.py`, which says what is tried and when a family
works; numbers are in `benchmarks/results/families.jsonl`. Each is a tiny random instance
(transformers {transformers}, torch {torch}).

{summary}

KL: measured over what the exact quadratic form predicts. Objective: its measured change
over the predicted one. Both at a KL of {kl:.0e} nats per token, of mixtures of experts
{kl_experts[0]:.0e}, or where that changes which experts run {kl_experts[1]:.0e}; right
within 10 %.

{families}

Not tried:

{reasons}
"""


def cells(model_type: str, row: Record) -> list[str]:
    name = model_type + (" (experts)" if row.get("experts") else "")
    if "kl" not in row:
        return [name, row["outcome"], "", "", "", in_a_cell(row["stage"], row["reason"])]
    failed = [in_a_cell(part, row.get(part)) for part in PARTS if row.get(part) is not True]
    weights = ", ".join(weight.removesuffix(".weight") for weight in row["weights"])
    ratios = [f"{row['kl']:.3f}", f"{row['objective']:.3f}"]
    return [name, row["outcome"], *ratios, weights, "; ".join(failed)]


def in_a_cell(stage: str, value: Any) -> str:
    text = "differs" if value is False else str(value)
    return f"{stage}: {text}".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(page(read(FILE)), encoding="utf-8")
        return
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows: dict[str, Record] = {}
    for model_type in given.families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in LEFT_OUT:
            rows[model_type] = {"outcome": "left out", "reason": LEFT_OUT[model_type]}
            continue
        row = rows[model_type] = attempt(model_type)
        said = {k: row.get(k) for k in ("outcome", "stage", "reason", "kl", "objective", *PARTS)}
        print(model_type, f"{row['seconds']} s", {k: v for k, v in said.items() if v}, flush=True)
    if not given.families:
        results = {"versions": versions(), **rows}
        write(FILE, results)
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
