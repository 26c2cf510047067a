"""The learner: a batch in, better weights out. Bad steps are skipped, checkpoints resume bit for bit."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from aipo_graph.config import Config, Loss
from aipo_graph.errors import ConfigError, TrainError
from aipo_graph.learn import checkpoint, lora, shards
from aipo_graph.learn.batch import AGENT, POLICY, ROUNDING, Batch, fault
from aipo_graph.learn.loss import Sums, aipo_loss, forms, merge, summarise
from aipo_graph.learn.model import (
    check_rows,
    choose_attention,
    far_rows,
    load_model,
    packs,
    row_logprobs,
    save_model,
    token_logprobs,
)
from aipo_graph.load import own
from aipo_graph.types import Learned, Trace, TraceGroup, derive_seed

# --- what an update makes of each token: for people who look at traces

Row = Iterator[tuple[float | None, ...]]
"""Of each of a row's tokens: logprob, ratio, advantage, coefficient."""


def learned_rows(logprobs: Tensor, batch: Batch, loss: Loss, budget: int) -> Iterator[Row]:
    """One of each row of ``batch``, from the learner's ``logprobs``, f32 [B, T]. Coefficients are read off the loss's own gradient."""
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        aipo_loss(leaf, torch.zeros_like(leaf), batch, loss, budget=budget)[0].backward()
    assert leaf.grad is not None
    agent = batch.source == AGENT
    behaviour = torch.where(agent & batch.behaviour_logprobs.isnan(), math.log(loss.behaviour), batch.behaviour_logprobs)
    scale = torch.where(agent, batch.agent_tokens / loss.agent_weight if loss.agent_weight else 0.0, float(batch.policy_tokens))
    unit = torch.where(agent, 1.0, batch.advantages) if loss.agent == "echo" else batch.advantages
    values = (logprobs, (logprobs - behaviour).exp(), batch.advantages, 0.0 - leaf.grad * scale / unit)  # 0.0, and never -0.0
    shown = torch.stack([torch.where(batch.mask & value.isfinite(), value, math.nan) for value in values], -1)
    for row, length in zip(shown, batch.lengths.tolist(), strict=True):
        yield (tuple(None if math.isnan(x) else float(f"{x:.4g}") for x in token) for token in row[:length].tolist())


def _learned(trace: Trace, rows: Iterator[Row]) -> Learned:
    """The rows that `pack` made of a trace, in its own order of tokens."""
    threads = dict(zip(trace.threads, rows, strict=False))
    tokens = [token for segment in trace.segments for token in islice(threads[segment.thread], len(segment.token_ids))]
    return Learned(*zip(*tokens, strict=True)) if tokens else Learned((), (), (), ())


# --- the learner

BAD_STEPS = 3
"""Bad steps in a row that end a run."""
KEPT = 2
"""Checkpoints on disk: the second is for a damaged first."""
logger = logging.getLogger(__name__)


class Learner:
    """Holds the policy being trained and its optimizer; for ``loss.kl_weight`` also the frozen starting policy, which with LoRA is the
    same model with its adapter off.

    All weights are trained, kept in float32, or LoRA adapters in float32 on weights in ``policy.dtype``; with bfloat16 the forward runs
    under autocast. ``version`` is the number of steps done, skipped ones included: the cursor into the run. ``updates`` counts
    optimizer steps.

    Over several ranks, where torch's default process group was initialised before: one Learner in each, built with the same config and
    each on its own ``device``, the current one of its process. Every method is then called on all ranks in the same order, with equal
    arguments: the whole batch, of which each rank runs a part. All return and raise the same, but for a fault of one rank alone, which the
    others notice when the group times out. Weights and adapters come whole on every rank, by iterators that all have to exhaust. ``save``
    needs a folder that all ranks see. One rank's weights differ from those of several by rounding.
    """

    def __init__(self, config: Config, model_path: str | Path, device: torch.device | str = "cpu") -> None:
        own.cache_clear()
        forms(config.loss)
        self.config = config
        self.model_path = model_path
        self.device = torch.device(device)
        policy = config.policy
        self.model = load_model(model_path, dtype=policy.dtype if policy.lora_rank else "float32", device=device)
        seed, experts = derive_seed(config.run.seed, "lora"), config.engine.kind == "local"  # vLLM takes no adapters of fused experts
        self.adapted = lora.attach(self.model, policy, seed, experts=experts) if policy.lora_rank else None
        self.frozen: dict[str, Any] | None = None
        """What an adapter means nothing without."""
        if self.adapted is not None:
            self.frozen = {"alpha": policy.lora_alpha, "model": shards.from_first(partial(lora.fingerprint, self.model))}
        shards.shard(self.model, self.device, row_logprobs)
        choose_attention(self.model, policy.dtype)
        self.reference: PreTrainedModel | None = None
        if config.loss.kl_weight > 0:
            self.reference = self.model
            if self.adapted is None:
                self.reference = load_model(model_path, dtype=policy.dtype, device=device).requires_grad_(False)
                shards.shard(self.reference, self.device, row_logprobs)
                choose_attention(self.reference, policy.dtype)
        if config.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():  # it needs training mode, but only of the layers: dropout below them stays off
                module.training = hasattr(module, "gradient_checkpointing")
        with self._autocast():
            self.packed = packs(self.model, policy.dtype)
            if not self.packed:
                check_rows(self.model, policy.dtype)
        shards.settle(self.model)
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        setting = config.optimizer
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=setting.lr, betas=setting.betas, weight_decay=0.0, fused=True)
        self.version = self.updates = self.bad_steps = self.idle_steps = 0

    def step(self, batch: Batch) -> dict[str, float]:
        """All updates of one batch (epochs x minibatches); its metrics, which describe the rows that have a gradient.

        Guards, in order: advantages finite, logprobs finite and at most 0, something to train on, loss finite, gradient norm finite. At the
        first bad one the step ends with ``skipped`` 1 and ``skipped/REASON`` 1: no parameter, optimizer state or random state is touched
        by that update. Raises TrainError after three bad steps in a row, or ``train.patience`` steps in a row with nothing to train on.
        """
        self.version += 1
        metrics = {
            **{f"batch_{name}": float(count) for name, count in batch.counts.items()},
            "policy_tokens": float(batch.policy_tokens),
            "agent_tokens": float(batch.agent_tokens),
            "skipped": 0.0,
        }
        if reason := _fault(batch):
            return metrics | {"trainable_tokens": 0.0} | self._skip(reason)
        metrics["trainable_tokens"] = float(batch.trainable(self.config.loss).sum())
        if not metrics["trainable_tokens"]:
            self.idle_steps += 1
            if self.idle_steps >= self.config.train.patience:
                raise TrainError(
                    f"step {self.version}: nothing to train on for {self.idle_steps} steps (train.patience): every trace failed or every "
                    "group's rewards are equal; easier problems, more traces or agents that help"
                )
            return metrics
        self.idle_steps = 0
        sums: Sums = {}
        before = self.updates
        train = self.config.train
        if train.minibatches > 1:
            batch = self._with_old_logprobs(batch, None)
        for epoch in range(train.epochs):
            seed = derive_seed(self.config.run.seed, "minibatches", self.version, epoch)
            for part in batch.minibatches(train.minibatches, seed):
                sums, extra, reason, found = self._update(part, sums)
                self._clear_cache()
                metrics |= extra
                if reason:
                    return metrics | self._skip(reason)
            if batch.old_logprobs is None and epoch + 1 < train.epochs:
                batch = self._with_old_logprobs(batch, found)
        self.bad_steps = 0
        sums = {name: shards.reduced(value, largest=name.endswith("_max")) for name, value in sums.items()}
        return metrics | summarise(sums, batch.authors, self.updates - before)

    @torch.no_grad()
    def learned(self, batch: Batch, groups: Sequence[TraceGroup]) -> list[tuple[Learned | None, ...]]:
        """What the next step will make of each token of ``groups``, by group and trace; ``batch`` was packed of these and later ones.

        As if the batch were one update. None for a trace that is not trained on, and for all of a batch that the step's first guards
        refuse.
        """
        if _fault(batch):
            return [tuple(None for _ in group.traces) for group in groups]
        count = sum(len(trace.threads) for group in groups for trace in group.traces if fault(trace) is None)
        chosen = batch.select(torch.arange(count))  # the first rows, as `pack` makes them
        logprobs = self._logprobs(chosen)
        self._clear_cache()  # here too: the step itself may have nothing to do
        rows = learned_rows(logprobs, chosen, self.config.loss, self.config.rollout.max_tokens)
        return [tuple(_learned(trace, rows) if fault(trace) is None else None for trace in group.traces) for group in groups]

    def _update(self, batch: Batch, sums: Sums) -> tuple[Sums, dict[str, float], str | None, Tensor]:
        """One optimizer step. Returns the sums so far, gradient norm and learning rate, why it was skipped, if it was, and this rank's
        log-probabilities before it, f32 [rows with a gradient, T].
        """
        loss, parts = self.config.loss, sums
        total = torch.zeros((), device=self.device)
        active = batch.select(batch.trainable(loss).any(1))
        found = torch.zeros(active.token_ids.shape, device=self.device)
        if not len(active):
            return sums, {}, None, found
        for rows, counts in self._share(active):
            micro = active.select(rows).to(self.device)
            logprobs, entropy = self._score(self.model, micro)
            reference = None if self.reference is None else self._reference_logprobs(self.reference, micro)
            value, part = aipo_loss(logprobs, entropy, micro, loss, budget=self.config.rollout.max_tokens, reference=reference)
            if counts:
                found[rows, : logprobs.shape[1]] = logprobs.detach()
            else:
                value, part = 0.0 * value, {name: torch.zeros_like(sums) for name, sums in part.items()}
            value.backward()
            parts, total = merge(parts, part), total + value.detach()
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = shards.whole(get_total_norm(gradients))
        reason = None if shards.reduced(total).isfinite() else "loss"
        reason = reason or (None if norm.isfinite() else "gradient")
        if reason:
            self.optimizer.zero_grad()
            return sums, {}, reason, found
        clip_grads_with_norm_(self.trained.values(), self.config.optimizer.grad_clip, norm)
        rate = learning_rate(self.config, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return parts, {"gradient_norm": float(norm), "lr": rate}, None, found

    @torch.no_grad()
    def _with_old_logprobs(self, batch: Batch, found: Tensor | None) -> Batch:
        """Those before the first of several updates. One that takes the whole batch has ``found`` them, which spares this pass."""
        active = batch.trainable(self.config.loss).any(1)
        old = torch.zeros_like(batch.behaviour_logprobs)
        found = self._logprobs(batch.select(active)) if found is None else shards.reduced(found).cpu()
        old[active, : found.shape[1]] = found
        return replace(batch, old_logprobs=old)

    def _logprobs(self, batch: Batch) -> Tensor:
        """f32 [B, T] on the CPU: log-probabilities of the tokens in the mask."""
        found = torch.zeros(batch.token_ids.shape, device=self.device)
        for rows, counts in self._share(batch):
            logprobs, _ = self._score(self.model, batch.select(rows).to(self.device))
            if counts:
                found[rows, : logprobs.shape[1]] = logprobs
        return shards.reduced(found).cpu()

    def _share(self, batch: Batch) -> Iterator[tuple[Tensor, bool]]:
        """Rows of this rank's micro-batches, which are dealt out as one process would run them, and whether they count.

        All ranks get as many, and each makes one forward: a rank that runs out repeats the last. Rows with an empty mask are left out.
        """
        rank, size = shards.world()
        far, active = far_rows(self.model, batch.mask), batch.mask.any(1)
        plan = batch.plan(self.config.train.micro_batch_tokens, packed=self.packed)
        if far is not None:
            plan = [part for rows in plan for part in (rows[far[rows]], rows[~far[rows]])]
        plan = [kept for rows in plan if len(kept := rows[active[rows]])]
        for start in range(0, len(plan), size):
            yield plan[min(start + rank, len(plan) - 1)], start + rank < len(plan)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.policy.dtype == "bfloat16")

    def _score(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return token_logprobs(model, batch.token_ids, batch.mask, self.config.rollout.temperature, packed=self.packed)

    @torch.no_grad()
    def _reference_logprobs(self, reference: PreTrainedModel, batch: Batch) -> Tensor:
        with nullcontext() if self.adapted is None else self.adapted.disable_adapter():
            return self._score(reference, batch)[0]

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """log p(token t | tokens < t) for t = 1, 2, … at temperature 1: what an engine that holds these weights must give, too."""
        ids = torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device)
        with self._autocast():
            values, _ = token_logprobs(self.model, ids, torch.ones_like(ids, dtype=torch.bool), packed=self.packed)
        return tuple(values[0, 1:].tolist())

    def _clear_cache(self) -> None:
        """For vLLM's own process, which wakes up in the memory that was used here."""
        if self.device.type == "cuda" and self.config.engine.kind == "vllm":
            torch.cuda.empty_cache()

    def _skip(self, reason: str) -> dict[str, float]:
        self.bad_steps += 1
        logger.warning("step %d skipped: %s not finite or out of range", self.version, reason)
        if self.bad_steps >= BAD_STEPS:
            raise TrainError(
                f"step {self.version}: {BAD_STEPS} bad steps in a row, the last for its {reason}; lower optimizer.lr or look at the data"
            )
        return {"skipped": 1.0, f"skipped/{reason}": 1.0}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight of the whole policy under its name in the plain model, tied ones once.

        Full training gives the float32 weights themselves: take them before the next step. LoRA gives merged ones in ``policy.dtype``,
        made one at a time, as each is asked for.
        """
        yield from lora.merged(self.model)
        yield from self._buffers().items()

    def _buffers(self) -> dict[str, Tensor]:
        kept = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the LoRA adapter under the names of peft's files. Raises ConfigError where all weights are trained."""
        if self.adapted is None:
            raise ConfigError("policy.lora_rank = 0: all weights are trained, there is no adapter; give the engine the weights")
        yield from lora.tensors(self.adapted).items()

    def _kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, itself, of which a rank has its part: the adapter alone for LoRA."""
        kept = self.trained if self.adapted is not None else dict(self.model.named_parameters()) | self._buffers()
        return {name: tensor.detach() for name, tensor in kept.items()}

    @property
    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the weights that it keeps, and two moments of each that is trained."""
        kept = sum(tensor.numel() * tensor.element_size() for tensor in self._kept().values())
        return kept + 2 * sum(tensor.numel() * tensor.element_size() for tensor in self.trained.values())

    def save(self, directory: str | Path, cursor: Mapping[str, Any]) -> str | None:
        """A checkpoint under ``directory``, with the caller's JSON ``cursor``. Returns one line to show if the disk is full."""
        states = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        optimizer = {f"{name}|{slot}": value for name, slots in states.items() for slot, value in slots.items()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        return checkpoint.save(
            Path(directory),
            self.version,
            {"model": self._kept(), "optimizer": optimizer, "rng": self._random_state()},
            {"counters": counters, "cursor": dict(cursor), "frozen": self.frozen},
            keep=KEPT,
        )

    def _random_state(self) -> dict[str, Tensor]:
        found = {"cpu": torch.get_rng_state()}
        return found | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def restore(self, directory: str | Path) -> dict[str, Any]:
        """Continue from the newest whole checkpoint, of this many ranks or another number: returns its cursor, {} where there is none.

        Raises ConfigError where no checkpoint is whole or the newest is of another model or LoRA adapter.
        """
        found = checkpoint.load(Path(directory))
        if found is None:
            return {}
        model, rng = self._kept(), self._random_state()
        saved = {name: shape for name, shape in found.shapes.items() if "|" not in name and name not in ("cpu", "cuda")}
        if {name: tensor.shape for name, tensor in model.items()} != saved or found.state.get("frozen") != self.frozen:
            raise ConfigError(
                f"checkpoint {found.path} is of another model than {str(self.model_path)!r} with policy.lora_rank = "
                f"{self.config.policy.lora_rank}; use another run.name"
            )
        optimizer: dict[str, Tensor] = {}
        for key, shape in found.shapes.items():
            name, _, slot = key.rpartition("|")
            if name:  # moments have their parameter's shape and its parts, AdamW's count of steps has none
                weight = self.trained[name]
                optimizer[key] = torch.zeros_like(weight) if shape == weight.shape else torch.zeros(shape, device=self.device)
                self.optimizer.state[weight][slot] = optimizer[key]
        found.read(model | optimizer | {name: value for name, value in rng.items() if name in found.shapes})
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        for name in COUNTERS:
            setattr(self, name, int(found.state["counters"][name]))
        return dict(found.state["cursor"])

    def export(self, directory: str | Path) -> None:
        """A plain Hugging Face model directory in ``policy.dtype`` with the starting policy's tokenizer; for LoRA the weights are merged,
        and ``directory/adapter`` holds the adapter alone. Raises ConfigError.
        """
        save_model(
            self.model,
            self.weights(),
            directory,
            dtype=self.config.policy.dtype,
            source=str(self.model_path),
            adapter=self.adapted,
        )


COUNTERS = ("version", "updates", "bad_steps", "idle_steps")


def _fault(batch: Batch) -> str | None:
    if not batch.advantages.isfinite().all():
        return "advantage"
    behaviour = batch.behaviour_logprobs[batch.mask & (batch.source == POLICY)]
    return None if (behaviour.isfinite() & (behaviour <= ROUNDING)).all() else "logprob"


def learning_rate(config: Config, update: int) -> float:
    """Linear warm-up over ``warmup_steps`` updates, then constant, or half a cosine down to 0 at the run's last update."""
    setting, train = config.optimizer, config.train
    if update < setting.warmup_steps:
        return setting.lr * (update + 1) / setting.warmup_steps
    if setting.schedule == "constant":
        return setting.lr
    whole = train.steps * train.epochs * train.minibatches
    progress = min(1.0, (update - setting.warmup_steps) / max(1, whole - setting.warmup_steps))
    return setting.lr * 0.5 * (1 + math.cos(math.pi * progress))
