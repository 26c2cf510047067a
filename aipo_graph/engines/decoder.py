"""A causal LM over slots of a KV cache: the torch half of the embedded engine.

Column ``c`` of a slot holds position ``c`` of its row, so rows of any length share a forward, nothing is ever shifted, and masks
follow from positions alone. Notation: B rows, Q new tokens per row, W cache columns, H heads, D head width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from aipo_graph.config import Config
from aipo_graph.errors import ConfigError, EngineError, first_line
from aipo_graph.forward import (
    EXACT,
    MISFITS,
    affordable,
    borders,
    gap,
    own_logprobs,
    probe_rows,
    scaled_from,
    use_exact_attention,
)

LAYERS = {"full_attention", "sliding_attention"}
SERVER = "; use engine.kind = server or vllm"
BLOCK = 256
"""Tokens of a large vocabulary whose probabilities a draw adds up first."""


@dataclass(slots=True)
class _Place:
    """Where a forward writes: slots [B, 1], the last of them, one column per new token [B, Q]; and the width W it attends to."""

    slots: torch.Tensor
    last: int
    columns: torch.Tensor
    width: int
    dense: bool
    """The slots are 0 … B-1, so that the cache can be read in place."""


class _Slots(CacheLayerMixin):
    """KV of one layer, [slots, H, columns, D], written in place and grown on demand."""

    place: _Place
    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        self._fit(place.last + 1, place.width)
        self.keys[place.slots, :, place.columns] = key_states.transpose(1, 2)
        self.values[place.slots, :, place.columns] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : place.width], self.values[:, :, : place.width]
        slots = slice(place.last + 1) if place.dense else place.slots[:, 0]
        return keys[slots], values[slots]

    def move(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        self._fit(int(target.max()) + 1, width)
        for kept in (self.keys, self.values):
            kept[target, :, :width] = kept[source, :, :width]

    def _fit(self, rows: int, width: int) -> None:
        old = self.keys, self.values
        if rows <= old[0].shape[0] and width <= old[0].shape[2]:
            return
        rows, columns = max(rows, old[0].shape[0]), max(old[0].shape[2], math.ceil(width / 32) * 32)
        # Zeros, not empty: a masked column is multiplied by 0, which would let a stray NaN through.
        self.keys, self.values = (kept.new_zeros(rows, kept.shape[1], columns, kept.shape[3]) for kept in old)
        for new, kept in zip((self.keys, self.values), old, strict=True):
            new[: kept.shape[0], :, : kept.shape[2]] = kept

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return self.place.width

    def get_max_length(self) -> int:
        return -1


class Decoder:
    """Feeds rows of any lengths through a Hugging Face causal LM.

    Raises EngineError for a model whose attention cannot be reproduced (recurrent, chunked, …) or whose positions are scaled by the
    longest row, found at construction by the config and by comparing with the model's own forward of each row alone.
    """

    def __init__(self, model: Any, max_context: int) -> None:
        self.model = model.eval()
        self.device: torch.device = model.device
        self._last_position = max_context - 1
        self._text = text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        if (border := scaled_from(model.config)) and border < max_context:
            raise self._refusal(f"past {border} tokens the longest row scales all rows' positions; set engine.max_context = {border}")
        kinds = set(getattr(text, "layer_types", None) or ())
        if kinds - LAYERS:
            raise self._refusal(f"it has {sorted(kinds - LAYERS)} layers{SERVER}")
        self._slides = "sliding_attention" in kinds or not kinds
        self._mixed = "sliding_attention" in kinds  # such models take one mask per kind
        use_exact_attention(model)
        self._check()
        self.reset()

    def _refusal(self, reason: str) -> EngineError:
        return EngineError(f"the local engine cannot sample {type(self.model).__name__}: {reason}")

    def reset(self) -> None:
        """Forgets every slot."""
        self._layers = [_Slots() for _ in range(self._text.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    @torch.inference_mode()
    def forward(self, slots: Sequence[int], token_ids: list[list[int]], starts: list[int]) -> torch.Tensor:
        """Logits [B, V] after the last of token_ids [B, Q], which go to distinct slots [B] at positions from starts [B]."""
        ids = torch.tensor(token_ids, device=self.device)
        columns = torch.tensor(starts, device=self.device)[:, None] + torch.arange(ids.shape[1], device=self.device)
        dense = isinstance(slots, range) and slots.start == 0
        place = _Place(torch.tensor(slots, device=self.device)[:, None], max(slots), columns, max(starts) + ids.shape[1], dense)
        for layer in self._layers:
            layer.place = place
        output = self.model(
            input_ids=ids,
            attention_mask=self._masks(columns, place.width),
            position_ids=columns.clamp(max=self._last_position),  # padding may reach past the context
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    @torch.inference_mode()
    def move(self, pairs: Sequence[tuple[int, int]], width: int) -> None:
        """Copies the first ``width`` columns of slots, all at once: (source, target) pairs."""
        source, target = torch.tensor(pairs, device=self.device).T
        for layer in self._layers:
            layer.move(source, target, width)

    def _masks(self, columns: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks [B, 1, Q, W]: position c sees columns <= c, within the window where the model has one."""
        dtype = self.model.dtype
        lowest = torch.finfo(dtype).min
        age = columns[:, None, :, None] - torch.arange(width, device=self.device)
        full = torch.zeros(age.shape, dtype=dtype, device=self.device).masked_fill_(age < 0, lowest)
        window = getattr(self._text, "sliding_window", None)
        if not window or not self._slides:
            return full
        sliding = full.masked_fill(age >= window, lowest)
        return {"full_attention": full, "sliding_attention": sliding} if self._mixed else sliding

    def _check(self) -> None:
        """The model's own forward of each row alone against rows of several lengths, fed in parts and in changing company.

        Unusual attention must fail here, not bend the logprobs. One row goes past every length in the config at which attention changes.
        What the decoder itself goes by, the sliding window, is shortened in the config meanwhile where the model is too large for a row
        that long on its device; the row then ends at what a few seconds pay for, or past the longest border of another kind.
        """
        limit, lengths = affordable(self.model), borders(self.model.config)
        window = lengths.pop("sliding_window", 0)
        shorten = limit <= window <= self._last_position
        others = [length for length in lengths.values() if length <= self._last_position]
        longest = max([24, *others, *([] if shorten else [window])]) + 8
        rows = probe_rows([min(length, self._last_position + 1) for length in (9, longest, 17)], self.vocab_size)
        if shorten:
            self._text.sliding_window = 8
        try:
            apart = max(gap(found.float().log_softmax(-1), own_logprobs(self.model, row)) for found, row in self._fed(rows))
        except MISFITS as error:
            raise self._refusal(f"{first_line(error)}{SERVER}") from error
        finally:
            if shorten:
                self._text.sliding_window = window
        if not apart <= EXACT.get(self.model.dtype, 0.5):
            raise self._refusal(f"with a cache its logprobs move by {apart:.2g}{SERVER}")

    def _fed(self, rows: list[list[int]]) -> list[tuple[torch.Tensor, list[int]]]:
        """(logits [V] after a row, the row) for each: fed but for three tokens, padded beside another, then a token at a time."""
        self.reset()
        slots, fed = (1, 0, 2), [max(0, len(row) - 3) for row in rows]
        for together in ((0, 1), (2,)):
            width = max(fed[i] for i in together)
            if width:
                self.forward(
                    [slots[i] for i in together], [rows[i][: fed[i]] + [0] * (width - fed[i]) for i in together], [0 for _ in together]
                )
        last: dict[int, torch.Tensor] = {}
        for group in ((0, 1, 2), (1,), (0, 2), (2, 1), (0,)):
            ready = [i for i in group if fed[i] < len(rows[i])]
            if ready:
                found = self.forward([slots[i] for i in ready], [[rows[i][fed[i]]] for i in ready], [fed[i] for i in ready])
                for i, logits in zip(ready, found, strict=True):
                    last[i], fed[i] = logits, fed[i] + 1
        return [(last[i], row) for i, row in enumerate(rows)]


def torch_device(config: Config) -> str:
    """`run.device`, with auto made cuda where there is one, else cpu."""
    return config.run.device if config.run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def device_here(config: Config) -> str:
    """`torch_device` of this machine. Raises ConfigError for a GPU that is not there."""
    kind, _, index = (device := torch_device(config)).partition(":")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"run.device = {device!r}: torch sees {count} GPUs here; say auto or cpu")
    return device


@torch.inference_mode()
def draw(logits: torch.Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """Ids [B] from logits [B, V] by inverse CDF in float64, and their logprobs; temperature 0 takes the arg-max, logprobs at 1.

    Raises FloatingPointError if a logprob is not finite.
    """
    scores_BV = logits.float()
    if set(temperatures) - {0, 1}:
        scores_BV = scores_BV / torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)[:, None]
    uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    if logits.shape[-1] > BLOCK:
        drawn_B, norm_B = _by_blocks(scores_BV, uniforms_B)
    else:
        scores_BV, norm_B = scores_BV.log_softmax(-1), torch.zeros((), device=logits.device)
        drawn_B = _inverse_cdf(scores_BV.exp(), uniforms_B)
    if 0 in temperatures:
        greedy_B = torch.tensor([temperature == 0 for temperature in temperatures], device=logits.device)[:, None]
        drawn_B = torch.where(greedy_B, scores_BV.argmax(-1, keepdim=True), drawn_B)
    chosen_B = scores_BV.gather(-1, drawn_B) - norm_B
    if not torch.isfinite(chosen_B).all():
        raise FloatingPointError("the logits are not finite, so the weights are broken")
    return drawn_B[:, 0].tolist(), chosen_B[:, 0].tolist()


def _inverse_cdf(weights_BN: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    cdf_BN = weights_BN.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_BN, uniforms_B * cdf_BN[:, -1:], right=True).clamp_(max=weights_BN.shape[-1] - 1)


def _by_blocks(scores_BV: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The draw among sums of BLOCK tokens, then within one: ids [B, 1], and the log of the sum of exp(scores) [B, 1].

    Float64 sums over the whole of a large vocabulary would cost more than the model's step.
    """
    highest_B = scores_BV.amax(-1, keepdim=True)
    weights_BV = (scores_BV - highest_B).exp_()
    weights_BNK = pad(weights_BV, (0, -weights_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass_BN = weights_BNK.sum(-1).double()
    block_B = _inverse_cdf(mass_BN, uniforms_B)
    cdf_BN = mass_BN.cumsum(-1)
    before_B = cdf_BN.gather(-1, block_B) - mass_BN.gather(-1, block_B)
    left_B = ((uniforms_B * cdf_BN[:, -1:] - before_B) / mass_BN.gather(-1, block_B)).clamp_(0, 1 - 1e-12)  # 1 would be past its tokens
    inside_BK = weights_BNK[torch.arange(len(weights_BNK), device=block_B.device), block_B[:, 0]]
    drawn_B = block_B * BLOCK + _inverse_cdf(inside_BK, left_B)
    return drawn_B.clamp_(max=scores_BV.shape[-1] - 1), highest_B + cdf_BN[:, -1:].log().float()
