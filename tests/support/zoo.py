"""Every Mixture-of-Experts family that the installed transformers ships, as a tiny random model on
the CPU.

The list of families is read from the installed package, so what a newer release brings is in it by
itself: it is built by the generic part, or fails by name until it gets a line in `OVERRIDES` or
`WHY_NOT`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.rules import how_dropped
from moe_inspect.model.find import find_routers
from moe_inspect.model.routers import SELECTION_BIAS
from moe_inspect.text import join_first
from moe_inspect.training import LossAudit, audit_loss
from moe_inspect.training.passes import COEFFICIENTS

VOCABULARY = 300
PACKAGE = Path(hf.__file__).parent / "models"
# Doge and ViTPose have a *MoE and no *Experts
ROUTED = re.compile(r"^class (\w+(?:Experts|MoE|Moe))\b", re.MULTILINE)


MODELING = PACKAGE.glob("*/modeling_*.py")
FAMILIES = sorted({f.parent.name for f in MODELING if ROUTED.search(f.read_text(encoding="utf-8"))})

# Which class of a family: the first of these that it has. All run on text alone. A family without a
# text-only language model is built with its towers, which its inputs leave idle.
ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")
ENDINGS += ("ForBlockDiffusion", "Backbone")
# its first ForConditionalGeneration is abstract
CLASSES = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}

CRASHES = {  # upstream, by release
    "5.17": {"doge": "TypeError in its decoder layer: it drops out a tuple as if it were a tensor"}
}
# families without a known loss, which they have in later releases: what is said of them
FAILS, REPORTS_NONE = "the model fails on this batch", "the model reports none"
ODD_LOSSES = {
    "5.17": {
        **dict.fromkeys(("dbrx", "granitemoe", "granitemoe_swa", "granitemoehybrid"), FAILS),
        **dict.fromkeys(("granitemoeshared", "switch_transformers"), FAILS),
        **dict.fromkeys(("glm4v_moe", "qwen3_vl_moe"), REPORTS_NONE),
        "jetmoe": "",  # it counts the routers of its attention twice
    }
}
RELEASE = hf.__version__.rpartition(".")[0]
NO_FORMULA: dict[str, str] = ODD_LOSSES.get(RELEASE, {})
WHY_NOT: dict[str, str] = {
    "vitpose_backbone": (
        "a vision backbone without a language model, and without a router: the data set's index "
        "picks the expert"
    ),
    **CRASHES.get(RELEASE, {}),
}
# the tokens of a batch change each other's routing: only batches of one unpadded sequence mean
# anything
ALONE = {"doge", "nllb_moe"}


def of(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# A value for every field of a config, or of a config in it, that has the name.
SMALL: dict[str, Any] = {
    # tokens
    **of(VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **of(0, "bos_token_id"),
    **of(1, "pad_token_id eos_token_id"),
    **of(256, "max_position_embeddings max_seq_len"),
    # layers: one dense, then sparse ones, where a family knows the difference
    **of(
        4, "num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers"
    ),
    **of(1, "num_dense_layers first_k_dense_replace n_layers_per_attn_res_block"),
    **of(2, "encoder_sparse_step decoder_sparse_step"),
    **of(2, "num_sparse_encoder_layers num_sparse_decoder_layers"),
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    # experts
    **of(8, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **of(3, "num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts"),
    **of(1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    "n_group": 4,
    "topk_group": 2,
    # widths
    **of(32, "hidden_size d_model"),
    **of(48, "intermediate_size dense_intermediate_size intermediate_size_mlp"),
    **of(48, "encoder_ffn_dim decoder_ffn_dim d_ff"),
    **of(24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    **of(24, "expert_ffn_hidden_size moe_shared_expert_intermediate_size share_expert_dim"),
    **of(24, "ffn_hidden_size shared_experts_intermediate_size"),
    **of(16, "moe_hidden_size router_hidden_size"),
    **of(8, "hidden_size_per_layer_input"),
    **of(0.3, "initializer_range init_std"),
    # attention
    **of(4, "num_attention_heads num_heads n_heads swa_num_attention_heads"),
    **of(4, "encoder_attention_heads decoder_attention_heads"),
    **of(2, "num_key_value_heads kv_n_heads swa_num_key_value_heads index_n_heads o_groups"),
    **of(8, "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim"),
    **of(8, "kv_channels d_kv hc_lowrank sliding_window sliding_window_size"),
    **of(16, "q_lora_rank kv_lora_rank o_lora_rank rel_extent"),
    # all: the scores of so few index heads are often tied at zero, and the padding would break the
    # ties
    "index_topk": 64,
    # linear attention and state spaces
    **of(8, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim"),
    **of(4, "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads"),
    **of(2, "linear_num_key_heads n_groups"),
    **of(8, "mamba_d_state ssm_state_size chunk_size mamba_chunk_size"),
    # towers
    "depth": 1,
    "image_size": 28,
    "max_image_size": 32,
    "num_position_embeddings": 16,
    **of(32, "out_hidden_size output_dim output_channels"),
    **of(32, "projector_hidden_size projection_intermediate_size"),
    "mlp_dim": 48,
    "downsample_channels": [32, 32],
    "hidden_sizes": [8, 8, 8, 8],
    "downsample_hidden_size": 8,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 4, "head_dim": 8}


def mrope(section: list[int]) -> dict[str, Any]:
    default = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return {"rope_parameters": {**default, "mrope_section": section}}


def tower(model_type: str, **fields: Any) -> dict[str, Any]:
    return {**TOWER, "model_type": model_type, **fields}


GEMMA4_VISION = tower("gemma4_vision", position_embedding_size=16)
LINEAR_THEN_FULL = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]

# What no name tells: fields that must fit each other, switches that are off by default, names of
# one family alone.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR_THEN_FULL},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "hc_mult": 2,
    },
    "diffusion_gemma": {
        # the canvas sees what the cache keeps: nothing but padding, if short
        "text_config": {"global_head_dim": 8, "sliding_window": 64},
        "vision_config": GEMMA4_VISION,
        "canvas_length": 5,
    },
    "doge": {"is_moe": True, "num_experts": 16},  # a product of two sets of keys: a square number
    "dots3_note": {
        **of(4, "swa_num_attention_heads swa_num_key_value_heads"),
        **of(16, "swa_q_lora_rank swa_kv_lora_rank swa_head_dim"),
        **of(8, "swa_qk_nope_head_dim swa_v_head_dim"),
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 16], **mrope([1, 1, 2])}},
    "gemma4": {"enable_moe_block": True, "global_head_dim": 8},
    "glm4v_moe": {"text_config": mrope([2, 1, 1])},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_kpool": 2, "hc_mult": 2}},
    "granitemoehybrid": {"layer_types": LINEAR_THEN_FULL, "mamba_expand": 1},
    "hy_v4_vl": {"text_config": mrope([2, 1, 1])},
    "inkling2_loop": {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": LINEAR_THEN_FULL},
    "kolibri1_1": {"head_dim": 16, "index_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4},
    "mistral_large4": {"vision_config": tower("pixtral")},
    "qwen3_omni_moe": {"vision_start_token_id": 151652},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Released with towers, where `model_class` picks the text-only class: what the config of the class
# that is saved needs.
WITH_TOWERS: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": tower("idefics3_vision", image_size=28, patch_size=14)},
    "gemma4": {"vision_config": GEMMA4_VISION, "audio_config": tower("gemma4_audio")},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "llama4": {"vision_config": {"vision_output_dim": 32}},
    "minimax_m3_vl": {"vision_config": tower("minimax_m3_vl_vision", patch_size=14, image_size=28)},
    "qwen3_5_moe": {},
    "qwen4_exp": {},
}
# a release may lack some
WITH_TOWERS = {family: parts for family, parts in WITH_TOWERS.items() if family in FAMILIES}

# standard deviation of selection biases: enough to change choices, not so much that they alone
# choose
SPREAD = 0.07


def _classes(family: str) -> dict[str, type[hf.PreTrainedModel]]:
    classes: dict[str, type] = {}
    for file in sorted((PACKAGE / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        own = (c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__)
        models = (c for c in own if inspect.isclass(c) and issubclass(c, hf.PreTrainedModel))
        classes |= {c.__name__: c for c in models}
    return classes


def model_class(family: str) -> type[hf.PreTrainedModel]:
    classes = _classes(family)
    named = (n for end in ENDINGS for n in classes if n.endswith(end))
    return classes[CLASSES.get(family) or next(named)]


def _shrink(kind: type[hf.PreTrainedConfig], overrides: dict[str, Any]) -> hf.PreTrainedConfig:
    fields = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    values = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention shares no key heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= overrides
    for name, part in kind.sub_configs.items():
        if part is not hf.AutoConfig:
            values[name] = _shrink(part, overrides.get(name, {}))
    return kind(**copy.deepcopy(values))  # a config may change what it is given


def config(family: str, **overrides: Any) -> hf.PreTrainedConfig:
    """`overrides`: values that replace those of `SMALL` and `OVERRIDES`."""
    return _shrink(model_class(family).config_class, OVERRIDES.get(family, {}) | overrides)


def build(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = SPREAD,
    **overrides: Any,
) -> Any:
    """A tiny random model in eval mode whose routers do choose: what a checkpoint would bring and
    random weights leave at a constant (selection biases, scales, a table of hashed experts, one
    family's gate) is random too. `spread`: standard deviation of the selection biases."""
    torch.manual_seed(seed)
    model = model_class(family)._from_config(config(family, **overrides), dtype=dtype)
    return _with_choices(model, spread)


def _with_towers(family: str) -> type[hf.PreTrainedModel]:
    classes = _classes(family).items()
    return next(kind for name, kind in classes if name.endswith("ForConditionalGeneration"))


def build_with_towers(family: str, seed: int = 0) -> Any:
    """As `build`, of the class that is released where the family has one of text alone too."""
    kind = _with_towers(family)
    # in transformers 5.17: any
    is_any = kind.config_class.sub_configs.get("text_config") is hf.AutoConfig
    text = config(family).to_dict() if is_any else OVERRIDES.get(family, {})
    whole = _shrink(kind.config_class, {"text_config": text, **WITH_TOWERS[family]})
    torch.manual_seed(seed)
    return _with_choices(kind._from_config(whole, dtype=torch.float32))


def _with_choices(model: Any, spread: float = SPREAD) -> Any:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"(e_score_correction_bias|expert_bias|balancing_biases)$", name):
            tensor.data.normal_(std=spread)
        elif name.endswith("per_expert_scale"):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith("tid2eid"):
            V, K = tensor.shape
            tensor.data = torch.rand(V, SMALL["n_routed_experts"]).argsort(1)[:, :K]
        elif name.endswith("router.gate.weight") and not tensor.any():
            tensor.data.normal_(std=0.3)
    return model.eval()


def token_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded random token ids."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths)), 1)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids[mask] = rng.integers(2, VOCABULARY, mask.sum())
    arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def inputs(family: str, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded random token ids, and for a decoder of its own unpadded ones, one more a row."""
    batch = token_batch(lengths, seed)
    if "decoder_input_ids" in inspect.signature(model_class(family).forward).parameters:
        decoded = token_batch([max(lengths) + 1] * len(lengths), seed + 1)
        batch["decoder_input_ids"] = decoded["input_ids"]
        # a decoder that reads the encoder's cache masks both at once and goes on counting
        if hasattr(config(family), "canvas_length"):
            after, masks = torch.arange(max(lengths) + 1), (batch, decoded)
            batch["decoder_position_ids"] = torch.tensor(lengths)[:, None] + after
            both = torch.cat([of["attention_mask"] for of in masks], dim=1)
            batch["decoder_attention_mask"] = both
    return batch


def alone(batch: dict[str, torch.Tensor], row: int, length: int) -> dict[str, torch.Tensor]:
    """One row of `inputs`, unpadded."""
    one = {name: values[row : row + 1] for name, values in batch.items()}
    one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
    if "decoder_attention_mask" in one:
        S = length + one["decoder_input_ids"].shape[1]
        one["decoder_attention_mask"] = torch.ones(1, S, dtype=torch.long)
    return one


def recorded(
    model: Any, path: Path, *batches: dict[str, torch.Tensor], **options: Any
) -> moe_inspect.Trace:
    """The trace of these forward passes."""
    with moe_inspect.record(model, path, **options), torch.no_grad():
        for batch in batches:
            model(**batch)
    return moe_inspect.open_trace(path)


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits [B, S, C]."""
    with torch.no_grad():
        return model(**batch).logits


def dropped(model: Any) -> str:
    """How experts are dropped in a model: in all layers, or in which of them."""
    layers: dict[str, list[int]] = {}
    for site in find_routers(model):
        layers.setdefault(how_dropped(site), []).append(site.layer)
    if len(layers) == 1:
        return next(iter(layers))
    said = ((how, "s" * (len(of) > 1), join_first(of)) for how, of in sorted(layers.items()))
    return "; ".join(f"{how} in layer{plural} {of}" for how, plural, of in said)


def families_section(rows: list[tuple[str, ...]], with_towers: dict[str, tuple[str, str]]) -> str:
    """How each family is traced, as a section in Markdown. `rows`: family, class that was loaded,
    way of tracing, effect of a dropped expert. `with_towers`: family → (class, way)."""
    kinds = "dispatch", "tap", "adapter", "refused"
    dispatch, tap, adapter, refused = (
        sum(row[2].startswith(kind) for row in rows) for kind in kinds
    )
    groups: dict[tuple[str, ...], list[str]] = {}  # families with the same findings share a row
    for family, loaded, *findings in rows:
        groups.setdefault(tuple(findings), []).append(family_label(family, loaded))
    table = [f"| {' | '.join(of)} | {', '.join(names)} |" for of, names in groups.items()]
    towers = ", ".join(
        f"{saved} ({how})" if saved == loaded else f"{saved} ({how}; loaded as {loaded})"
        for family, (loaded, how) in with_towers.items()
        for saved in [_with_towers(family).__name__]
    )
    return f"""\
## Model families

Of the {len(rows)} Mixture-of-Experts families of transformers {hf.__version__}, {dispatch} can be \
traced by dispatch or tap, {tap} by tap and {adapter} by an adapter; {refused} is refused.
`make test-families` saves a tiny random model of each, runs `moe-inspect trace DIRECTORY`, and \
compares the trace with what the model executes, found without the hook. It writes this section.
The second column states what [`intervene(drop=…)`](../../docs/interventions.md) does; `replay`, \
`force` and `shuffle` work in each. The class that is loaded is named unless it ends with \
`ForCausalLM`.

| traced by | a dropped expert | families |
|---|---|---|
{chr(10).join(table)}

Saved as multimodal models, whose language model is recorded while text is fed: {towers}."""


def family_label(family: str, loaded: str) -> str:
    """The family's name, and the class that was loaded if it is not one of text alone."""
    return family if loaded.endswith("ForCausalLM") or not loaded else f"{family} ({loaded})"


def state_of(model: Any) -> list[Any]:
    """Every attribute of every module; of hooks, how many there are (their counters move on)."""
    return [
        (name, type(m), sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if "hooks" in k})
        for name, m in model.named_modules()
    ]


# --- the balancing losses

# without a second sparse layer a pooled loss is one of each router; a router that picks two
SEVERAL: dict[str, dict[str, Any]] = {
    "flint": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "phimoe": {"num_experts_per_tok": 2},
}
LOSS_LENGTHS = [24, 17, 24, 20]
LOSS_COLUMNS = ("families", "loss", "factor", "f counts", "other experts ran", "of each pass")
LOSS_COLUMNS += ("selection bias",)
NONE, NOT_COMPUTED = "none is stated, none is computed", "no loss is computed"
NOT_JUDGED = "not judged: of zero experts too"
BIASES = {"good": "of the choice alone"}  # by the severity of what is found


@cache
def audited(family: str) -> tuple[Any, LossAudit]:
    """Once: its row of the page and its test say what the same audit finds."""
    model = build(family, **SEVERAL.get(family, {}))
    return model, audit_loss(model, inputs(family, LOSS_LENGTHS[: 1 if family in ALONE else None]))


def states_loss(family: str) -> bool:
    """Whether its config states a coefficient."""
    text = config(family).get_text_config()
    owners = (text, getattr(text, "ffn_config", None))
    return any(hasattr(owner, name) for owner in owners for name in COEFFICIENTS)


def biases_of(model: Any) -> dict[str, torch.Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: of for name, of in tensors if name.rpartition(".")[2] in SELECTION_BIAS}


def changed_biases(family: str, model: Any) -> list[str]:
    """The selection biases that a pass in training changes."""
    before = {name: bias.detach().clone() for name, bias in biases_of(model).items()}
    model.train()(**inputs(family, LOSS_LENGTHS[:1]))
    return [name for name, of in biases_of(model).items() if not torch.equal(of, before[name])]


def loss_row(family: str) -> tuple[str, ...]:
    """Row of the table in `losses_section`."""
    try:
        model, audit = audited(family)
    except MoeInspectError as error:
        if "cannot be watched in training" not in str(error):
            raise
        return family, "not known: layers run several times in a pass", *[""] * 5
    module = sys.modules[type(model).__module__]
    function = getattr(module, "load_balancing_loss_func", None)
    said = {f.kind: f for f in audit.findings}
    formula, apart, bias = audit.formula, said.get("loss_other_choice"), said.get("loss_bias")
    unseen = NOT_JUDGED if biases_of(model) else ""
    steers = unseen if bias is None else BIASES[bias.severity]
    assert not changed_biases(family, model), "a pass updates a selection bias"
    if not states_loss(family):
        assert "loss_none" in said
        return family, NONE, "", "", "", "", steers
    if formula is None:
        known = NOT_COMPUTED if function is None else "not known: product keys"
        return family, known, "", "", "", "", steers
    names = {"all routers": "pooled", "router": "each router"}
    names["sequence, all routers"] = "pooled, of each sequence"
    by = " or ".join(dict.fromkeys(names.get(f.by, f.by) for f in (formula, *audit.either)))
    padding = "padding counted" if formula.padding else ""
    only = f"without {len(audit.moves_R) - _of_kind(model, formula.only)} hash layer"
    loss = ", ".join([by, *[padding] * bool(padding), *[only] * bool(formula.only)])
    share = f"{apart.values['share']:.0%}" if apart is not None else ""
    each = "" if math.isnan(audit.accumulated) else f"{audit.accumulated / 2:.2f}"
    return family, loss, f"{audit.factor:.4g}", formula.chosen, share, each, steers


def _of_kind(model: Any, kind: str) -> int:
    return sum(type(site.logits_module).__name__ == kind for site in find_routers(model))


def losses_section(rows: list[tuple[str, ...]]) -> str:
    """Findings of `audit_loss` in each family, as a section in Markdown."""
    silent = [row for row in rows if row[1] == NONE]
    biased = [row[0] for row in silent if row[6]]
    unbiased = [row[0] for row in silent if not row[6]]
    unjudged = [row[0] for row in silent if row[6] == NOT_JUDGED]
    pooled = [row[0] for row in rows if row[1].startswith("pooled")]
    by_logits = [row[0] for row in rows if "logit" in row[3]]
    not_computed = [row[0] for row in rows if row[1] == NOT_COMPUTED]
    families: dict[tuple[str, ...], list[str]] = {}  # families with the same findings share a row
    for family, *findings in rows:
        if findings[0] != NONE:
            families.setdefault(tuple(findings), []).append(family)
    by_number = sorted(families, key=lambda findings: -len(families[findings]))
    table = [LOSS_COLUMNS, ["---"] * len(LOSS_COLUMNS)]
    table += [(", ".join(families[findings]), *findings) for findings in by_number]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return f"""\
## Balancing losses of transformers

[`audit_loss`](../../docs/training.md#check-the-balancing-loss) on {len(rows)} families of \
transformers {hf.__version__}, each as a tiny random model; \
{sum(map(states_loss, (row[0] for row in rows)))} state the
coefficient of a balancing loss. Written by `make test-families`.

{chr(10).join(lines)}

- **loss**: Switch's E · Σ f · P (arXiv:2101.03961), pooled over all routers or per router. P is \
the softmax of the router logits.
- **factor**: reported ÷ formula: k (or 2 for two stacks), because f is counted per token.
- **f counts**: the experts that ran ("all choices"), or the experts with the largest logits.
- **other experts ran**: share of decisions in which other experts ran than f counts.
- **of each pass**: contribution of a pass to the loss when the Trainer accumulates gradients, ÷ \
the coefficient. It should be 1 ÷ the number of passes.
- **selection bias**: it should steer the choice of experts and no gate weight.

No loss is computed by the other {len(silent)} families. {len(biased)} of them have a selection \
bias, which no training pass updates, so you must update it: {", ".join(biased)}. \
(The bias of {", ".join(unjudged)} is not judged, because it covers zero experts too.) The others: \
{", ".join(unbiased)}. The paper of deepseek_v2 \
([arXiv:2405.04434](https://arxiv.org/abs/2405.04434)) balances by three losses.

Their docstrings cite equations (4) to (6) of Switch Transformer. They differ from these:

- **Pooled over layers** ({len(pooled)} families): Switch's loss is per layer. If it is pooled, \
[single layers can collapse](../../docs/training.md#how-soon-alarms-fire).
- **Another load than the one that runs** ({len(by_logits)}: {", ".join(by_logits)}): f counts \
the largest router logits, but the router chooses by scores plus a selection bias, in groups, or \
by capacity.
- **Gradient accumulation**: with N passes, the balancing loss weighs N times as much. The model \
adds it in its forward, and the Trainer does not divide the loss if the model takes \
`num_items_in_batch`.
- **Off by default**: it is computed only with `output_router_logits=True`, which no config sets.
- **Stated but not computed** ({len(not_computed)}: {", ".join(not_computed)}): no code reads the \
coefficient.
"""
