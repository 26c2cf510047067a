"""A tiny random model of every type that transformers can sample text from, and what becomes of each here.

`python tests/tiny_models.py` writes the table of docs/models.md anew.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from aipo_graph.config import Policy
from aipo_graph.engines.decoder import Decoder
from aipo_graph.errors import AipoError
from aipo_graph.learn import lora
from aipo_graph.learn.model import check_rows

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
CONTEXT = 128
UNTRIED = {
    "blt", "cohere_compass_text", "dbrx", "deepseek_v2", "deepseek_v4", "doge", "dots1", "emu3", "fuyu", "gemma3", "gemma3n",
    "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "kimi_linear", "llama4", "ministral", "mllama", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5",
    "qwen3_5_moe", "qwen4_exp", "reformer", "zamba", "zamba2",
}  # fmt: skip
"""Types whose config does not shrink by the names below, images and sound among them."""
WIDE = ("hidden_size", "d_model", "n_embd", "n_inner", "d_embed", "embedding_size", "emb_dim", "dim", "word_embed_proj_dim", "lru_width")
INNER = ("intermediate_size", "ffn_dim", "d_ff", "dff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner")
DEEP = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "num_experts",
    "n_routed_experts", "num_local_experts", "moe_num_experts", "mamba_n_heads", "mamba_num_heads", "conv_kernel",
)  # fmt: skip
TWO = ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "linear_num_key_heads", "linear_num_value_heads")
ONE = ("n_group", "topk_group", "mamba_n_groups", "n_groups", "bos_token_id")
EIGHT = (
    "head_dim", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_d_state",
    "ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
SIXTEEN = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "sliding_window",
    "attention_window_size", "window_size", "local_attention", "attention_chunk_size", "mamba_d_head", "mamba_head_dim", "index_block_size",
)  # fmt: skip
LONG = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
SMALL: dict[str, Any] = {
    **dict.fromkeys(WIDE, 32), **dict.fromkeys(INNER, 64), **dict.fromkeys(DEEP, 2), **dict.fromkeys(HEADS, 4), **dict.fromkeys(TWO, 2),
    **dict.fromkeys(ONE, 1), **dict.fromkeys(EIGHT, 8), **dict.fromkeys(SIXTEEN, 16), **dict.fromkeys(LONG, CONTEXT),
    "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2, "layerdrop": 0.0, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu")
TYPE: dict[str, dict[str, Any]] = {
    **{key: {"num_key_value_heads": 4} for key in LATENT},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64, "global_head_dim": 8, "num_global_key_value_heads": 2,
    },
    "prophetnet": {"num_decoder_layers": 2, "num_encoder_layers": 2},
}  # fmt: skip


def tiny(kind: str, **settings: object) -> Any:
    """A random model of ``kind``, far from uniform, so that a wrong mask or position shows."""
    made = CONFIG_MAPPING[kind]
    default = made().to_dict()
    fixed = {name for name in SMALL if isinstance(getattr(made, name, None), property)}
    small = {name: value for name, value in SMALL.items() if default.get(name) is not None and name not in fixed}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**{**small, **TYPE.get(kind, {}), **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def adapted(model: Any) -> str:
    """What LoRA does with the model, its merged weights compared with its own forward under adapters that are not zero."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    names = {name: value.clone() for name, value in model.named_parameters()}
    experts = lora._fused_experts(model)
    lora.attach(model, Policy(lora_rank=2), 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():  # an adapter that is not part of the forward never leaves zero
        model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None and parameter.grad.any():
                parameter.add_(parameter.grad.sign(), alpha=0.05)
        own = model(input_ids=ids, use_cache=False).logits
        merged = {name: value.clone() for name, value in lora.merged(model)}
        assert merged.keys() == names.keys()
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.zero_()
            else:
                value.copy_(merged[name.replace(".base_layer", "")])
        apart = float((model(input_ids=ids, use_cache=False).logits - own).abs().max())
    assert apart <= 1e-3 * max(1.0, float(own.abs().max())), f"merged weights are {apart} off"
    return "yes, experts too" if experts else "yes"


def outcome(kind: str) -> tuple[str, str, str]:
    """Whether the type trains, with LoRA, and in the embedded engine; else why not, without what numbers and versions change."""

    def line(error: AipoError, who: str) -> str:
        text = str(error)
        if layers := re.search(r"it has (\[.*\]) layers", text):
            return f"no: {layers[1].replace(chr(39), '`')} layers"
        known = {"with a cache its logprobs move": "with a cache its logprobs move", "cannot be learned:": "sees later tokens"}
        return "no: " + next((short for words, short in known.items() if words in text), f"{who} refuses")

    found, model = [], tiny(kind)
    steps = {
        "its forward": lambda: check_rows(model, "float32"),
        "its cache": lambda: Decoder(model, CONTEXT),
        "peft": lambda: adapted(model),
    }
    for who, step in steps.items():  # only the last changes the model
        try:
            said = step()
            found.append(said if isinstance(said, str) else "yes")
        except AipoError as error:
            found.append(line(error, who))
    trains, embedded, adapts = found
    return trains, adapts if trains == "yes" else "no", embedded if trains == "yes" else "no"


def listed() -> dict[str, tuple[str, ...]]:
    """The page's table by type."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {first.strip("`"): tuple(cell.strip() for cell in rest) for first, *rest in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = sys.argv[1:] or [kind for kind in TYPES if kind not in UNTRIED]
    table = [f"| `{kind}` | {' | '.join(outcome(kind))} |" for kind in kinds]
    if sys.argv[1:]:
        print("\n".join(table))
    else:
        head = PAGE.read_text(encoding="utf-8").split("| model type |")[0]
        PAGE.write_text(
            head + "\n".join(["| model type | all weights | LoRA | embedded engine |", "| --- | --- | --- | --- |", *table, ""])
        )
