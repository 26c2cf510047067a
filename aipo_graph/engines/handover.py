"""Weights on their way to vLLM: a Hugging Face model or LoRA adapter directory that is there whole or not at all."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from aipo_graph.config import Config
from aipo_graph.engines.facts import Facts
from aipo_graph.errors import EngineError
from aipo_graph.forward import first_line

PREFIX = "weights-"


def sweep(folder: Path) -> None:
    """Deletes what killed processes left in a run's folder, which no other process may be training in."""
    for left in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


class Handover:
    """A folder of versions, in the run's folder where there is one: servers on other machines must see it under the same path.

    ``write`` makes NAME; ``keep`` deletes all but the named ones; ``close`` deletes the folder.
    """

    def __init__(self, config: Config, facts: Facts) -> None:
        self._facts, self._policy = facts, config.policy
        run = Path(config.run.dir).absolute() / config.run.name
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=run if run.is_dir() else None))
        self.folder.chmod(0o755)  # the server may run as another user

    def write(self, name: str, weights: Iterable[tuple[str, Any]]) -> Path:
        """Writes all weights, or an adapter where the policy is trained with LoRA. Raises EngineError if the disk refuses."""
        final, temporary = self.folder / name, self.folder / f".{name}"
        rank = self._policy.lora_rank
        dtype = torch.float32 if rank else getattr(torch, self._policy.dtype)
        tensors = {n: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous() for n, t in weights}
        if not tensors:
            raise EngineError(f"weights {name} are empty; send every tensor")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if rank:
                (temporary / "adapter_config.json").write_text(json.dumps(self._adapter_config(tensors)), encoding="utf-8")
                save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            else:
                self._shell.save_pretrained(temporary, state_dict=tensors)  # undoes what loading renamed and fused
                self._facts.config.save_pretrained(temporary)
                self._facts.tokenizer.save_pretrained(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights {name} cannot be written to {self.folder} ({first_line(error)}); free space there") from error
        return final

    @cached_property
    def _shell(self) -> PreTrainedModel:
        """The model without its weights: knows under which names the hub keeps them."""
        with torch.device("meta"):
            shell: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(self._facts.config))
        shell.generation_config = GenerationConfig()
        return shell

    @property
    def renames(self) -> bool:
        """Whether files name or cut weights otherwise than the model in memory does, as for fused experts: then they go by disk."""
        state = self._shell.state_dict()
        return revert_weight_conversion(self._shell, dict(state)).keys() != state.keys()

    def _adapter_config(self, tensors: Iterable[str]) -> dict[str, Any]:
        modules = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._facts.path,
            "r": self._policy.lora_rank,
            "lora_alpha": self._policy.lora_alpha,
            "target_modules": sorted(modules),
            "bias": "none",
        }

    def keep(self, *names: str) -> None:
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
