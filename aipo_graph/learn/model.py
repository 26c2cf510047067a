"""A Hugging Face causal LM: load, log-probabilities of given tokens, save."""

import copy
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from aipo_graph.errors import ConfigError, TrainError, first_line
from aipo_graph.forward import (
    EXACT,
    MISFITS,
    affordable,
    borders,
    own_logprobs,
    probe_rows,
    read_config,
    read_weights,
    scaled_from,
    use_exact_attention,
)
from aipo_graph.learn import lora, shards
from aipo_graph.learn.checkpoint import atomic_directory

CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Most logits in memory at once: what a CPU's caches hold, and 256 MiB of float32 elsewhere."""
_alone: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""What :func:`applies_head_only` found."""


def load_model(path: str | Path, *, dtype: str = "float32", device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal LM from a directory or a hub name, in eval mode: no dropout, so that it learns on the probabilities it samples with.

    Of several ranks the first has it on the CPU, the others on the meta device, for ``shard``. Raises ConfigError where there is no model,
    EngineError where its weights cannot be loaded.
    """
    config = shards.from_first(lambda: read_config(path))
    kept: list[Any] = []  # on the first rank alone: too much to send
    shards.from_first(lambda: kept.append(read_weights(path, dtype, config)))
    if not kept:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    return (kept[0] if shards.world()[1] > 1 else kept[0].to(device)).eval()


def fast_attention(device: torch.device, dtype: str) -> str | None:
    """flash-attn where its package is installed, on CUDA in bfloat16, all it computes in; else None: transformers' choice, sdpa.

    Both are exact and take memory linear in the length. Neither needs an attention mask for rows padded right: they are causal.
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return "flash_attention_3" if is_flash_attn_3_available() else "flash_attention_2" if is_flash_attn_2_available() else None


def choose_attention(model: PreTrainedModel, dtype: str) -> None:
    """Sets :func:`fast_attention` where the model can use it, else sdpa or, where that leaves something out, eager attention."""
    if name := fast_attention(model.device, dtype):
        with suppress(ValueError, ImportError):  # an architecture or a build of the package without it
            model.set_attn_implementation(name)
            return
    use_exact_attention(model)


def save_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    *,
    dtype: str,
    source: str,
    adapter: Any = None,
) -> None:
    """A Hugging Face model directory in ``dtype`` with the tokenizer of ``source``, the model that was trained, there whole or not at all;
    with ``adapter/`` beside the merged weights for LoRA.

    A generation config that sets up sampling and leaves it off, which some models ship and transformers refuses to write, turns it on.
    Of several ranks the first writes. Raises ConfigError where the directory cannot be written.
    """
    directory, first = Path(directory), shards.world()[0] == 0
    state = {name: tensor.to("cpu", getattr(torch, dtype) if tensor.is_floating_point() else None) for name, tensor in weights if first}
    adapted = None if adapter is None else lora.state(adapter)

    def write() -> None:
        if directory.exists() and not (directory / "config.json").exists():
            raise ConfigError(f"export: {str(directory)!r} exists and is no model directory; give another name")
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True
        try:
            with atomic_directory(directory) as temporary:
                model.save_pretrained(temporary, state_dict=state)
                config = copy.deepcopy(model.config)
                config.dtype = dtype  # save_pretrained names that of the master weights
                config.save_pretrained(temporary)
                AutoTokenizer.from_pretrained(source).save_pretrained(temporary)
                if adapted is not None:
                    lora.save(adapter, adapted, temporary / "adapter", source)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"export: {str(directory)!r} cannot be written ({first_line(error)})") from error

    shards.from_first(write)


@torch.no_grad()
def applies_head_only(model: PreTrainedModel) -> bool:
    """Whether its logits are the head's output on the decoder's states as it is; only then can they be had for some tokens alone.

    Compared once a model, on a short text.
    """
    if model not in _alone:
        ids = torch.tensor(probe_rows([8], model.config.get_text_config().vocab_size), device=model.device)
        _alone[model] = False
        with suppress(*MISFITS):  # no decoder or head where transformers' methods look for them
            states, head = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, model.get_output_embeddings()
            _alone[model] = torch.allclose(head(states), model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    return _alone[model]


def packs(model: PreTrainedModel, dtype: str) -> bool:
    """Whether rows are learned from end to end in one, which flash attention tells apart by their positions: no work goes into padding.

    Other attention would make a mask of all tokens by all, and a state that runs on from row to row would mix them. Never seen on CUDA.
    """
    if model._is_stateful or not model.config._attn_implementation.startswith("flash"):
        return False
    with suppress(ConfigError):
        check_rows(model, dtype, packed=True)
        return True
    return False


@torch.no_grad()
def check_rows(model: PreTrainedModel, dtype: str, *, packed: bool = False) -> None:
    """Compares log-probabilities of rows of several lengths, padded in one batch, with the model's own forward of each prefix alone.

    One row goes past every length in the config at which attention changes, as far as a few seconds pay for it. Raises ConfigError for a
    model that sees what follows a token or the rows beside it, or that drops out while it is trained. ``dtype``: what it computes in.
    """
    name, text = type(model).__name__.removeprefix("FSDP"), model.config.get_text_config()
    most = min(getattr(text, "max_position_embeddings", None) or 64, affordable(model), scaled_from(model.config) or 2**30)
    longest = max([12, *(length + 4 for length in borders(model.config).values() if length + 4 <= most)])
    lengths = [min(length, most) for length in (5, longest, 9)]
    rows = probe_rows(lengths, text.vocab_size)
    ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], device=model.device)
    mask = torch.arange(ids.shape[1], device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    first = [1] if packed else []  # where what another row left shows most
    places = [(i, t) for i, length in enumerate(lengths) for t in (*first, length // 2, length - 1)]
    try:
        found, _ = token_logprobs(model, ids, mask, packed=packed)
        apart = max(abs(float(found[i, t] - own_logprobs(model, rows[i][:t])[rows[i][t]])) for i, t in places)
    except MISFITS as error:
        raise ConfigError(f"policy.model: {name} cannot be learned from token ids alone ({first_line(error)}); use another") from error
    if not apart <= EXACT[getattr(torch, dtype)]:
        raise ConfigError(
            f"policy.model: {name} cannot be learned: log-probabilities of a text alone and in a batch are {apart:.2g} apart; it sees "
            "later tokens or other rows, or drops out under train.gradient_checkpointing: set that to false, or use another model"
        )


def _score(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    every = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    own = every.gather(-1, targets[:, None])[:, 0]
    known = every.detach()  # after all that the backward pass needs, where its recomputation stops
    return own, -known.exp().mul_(known).nansum(-1)


def token_logprobs(
    model: PreTrainedModel, token_ids: Tensor, mask: Tensor, temperature: float = 1.0, *, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """log p(token t | tokens < t) in column t, and the entropy of that distribution: f32 [B, T] each, 0 where ``mask`` is false.

    The one place where predictions are shifted onto the tokens they predict; nothing predicts column 0, which is 0. Rows are padded right,
    where a causal model does not see the padding, so no attention mask is needed. The head runs on wanted tokens only, in chunks
    that are recomputed in the backward pass: logits [tokens, vocabulary] never exist as a whole, except for models that transform theirs.
    Rows past the length from which a model scales its positions by the longest row have a forward of their own. Raises TrainError where
    that scale has more than two values. ``packed``: see :func:`packs`.
    """
    # The parts of a sharded model meet in what counts as its forward.
    forward: Any = model.row_logprobs if isinstance(model, FSDPModule) else partial(row_logprobs, model)
    found = forward(token_ids, mask, temperature, packed)
    if not torch.is_grad_enabled():
        shards.settle(model)
    return found


def row_logprobs(model: PreTrainedModel, token_ids: Tensor, mask: Tensor, temperature: float, packed: bool) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of a model whose weights are here."""
    far, border = far_rows(model, mask), scaled_from(model.config)
    if far is None or border is None:
        return _row_logprobs(model, token_ids, mask, temperature, packed)
    logprobs, entropy = (torch.zeros(token_ids.shape, device=token_ids.device) for _ in range(2))
    for rows, width in ((far, token_ids.shape[1]), (~far, border + 1)):
        if rows.any():
            found = _row_logprobs(model, token_ids[rows, :width], mask[rows, :width], temperature, packed)
            logprobs[rows, :width], entropy[rows, :width] = found
    return logprobs, entropy


def far_rows(model: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """bool [B]: rows with a token predicted from more others than a scale of positions holds for; None where there is no such scale.

    Raises TrainError where the scale has more than two values.
    """
    border = scaled_from(model.config)
    if border is None:
        return None
    far = mask[:, border + 1 :].any(1)
    if far.any() and border >= model.config.get_text_config().max_position_embeddings:
        raise TrainError(f"a row has more than {border} tokens, past which its length scales all its positions; lower rollout.max_tokens")
    return far


def _row_logprobs(model: PreTrainedModel, token_ids: Tensor, mask: Tensor, temperature: float, packed: bool) -> tuple[Tensor, Tensor]:
    logprobs = torch.zeros(token_ids.shape, device=token_ids.device)
    places, targets = mask[:, 1:], token_ids[:, 1:][mask[:, 1:]]
    if not len(targets):
        return logprobs, logprobs
    inputs = {"input_ids": token_ids[:, :-1]}
    if packed:
        columns = torch.arange(places.shape[1], device=mask.device).expand_as(places)
        kept = columns <= (columns * places).amax(1, keepdim=True)  # up to the row's last wanted token
        inputs, places = {"input_ids": inputs["input_ids"][kept][None], "position_ids": columns[kept][None]}, places[kept]
    head: nn.Module = nn.Identity()
    if applies_head_only(model):
        states, head = model.get_decoder()(**inputs, use_cache=False).last_hidden_state, model.get_output_embeddings()
    else:
        states = model(**inputs, use_cache=False).logits
    states = states.flatten(0, 1).index_select(0, places.flatten().nonzero().squeeze(1))
    size = max(1, CHUNK["cpu" if states.device.type == "cpu" else "cuda"] // model.config.get_text_config().vocab_size)
    if len(targets) <= size:
        parts = [_score(head, states, targets, temperature)]
    else:
        pairs = zip(states.split(size), targets.split(size), strict=True)
        parts = [checkpoint(_score, head, state, target, temperature, use_reentrant=False) for state, target in pairs]
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    index = (rows, columns + 1)
    entropy = logprobs.index_put(index, torch.cat([e for _, e in parts]))
    return logprobs.index_put(index, torch.cat([p for p, _ in parts])), entropy
