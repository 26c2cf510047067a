"""Every setting of a run: frozen sections, one docstring per field (its ``--help``), defaults that train."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from aipo_graph.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
FORMS = {
    "advantage": ("grpo", "dr_grpo", "rloo", "raft"),
    "algorithm": ("grpo", "dapo", "dr_grpo", "rloo", "cispo", "gspo"),
    "agent": ("aipo", "credit", "mask", "ppo", "luffy", "gated", "sft", "echo"),
}
"""Parts of the loss, and the names that each has; a file's function is one, too."""
RETIRED = {"clip": "aipo", "shortfall": "aipo"}
"""Coefficients of agent tokens that are gone, and what did better in their place in the study."""
Momentum = Annotated[float, Field(ge=0, lt=1)]
FolderName = Annotated[str, StringConstraints(pattern=r"^\w[\w.=+,-]*$", max_length=100)]
AgentName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]

PATHS = (
    "policy.model",
    "task.name",
    "task.data",
    "task.heldout",
    "task.reward",
    "rollout.graph",
    "rollout.solo",
    "rollout.prompts",
    "agents.use",
    *(f"loss.{part}" for part in FORMS),
)
"""Fields that may name a file. In a YAML file such a path may be relative to that file."""

MAY_CHANGE = {
    "run": "name dir threads device trackers checkpoint_every trace_groups tracing",
    "task": "max_prompt_tokens timeout",
    "rollout": "timeout max_failed",
    "agents": "max_tokens concurrency attempts timeout",
    "engine": "*",
    "cluster": "*",
    "train": "steps tokens micro_batch_tokens gradient_checkpointing patience",
    "evaluate": "*",
}
"""What a begun run may go on with otherwise: limits, places, and what does not change what is learned from a trace."""
CHANGES_LEARNING = {
    "run": "seed",
    "policy": "*",
    "task": "name data heldout columns reward weights options",
    "rollout": (
        "graph solo prompts inputs output helpers problems redraws traces with_agents max_tokens max_consults max_supersteps "
        "temperature max_lag"
    ),
    "agents": "use models temperature max_reply_tokens leak",
    "loss": "*",
    "optimizer": "*",
    "train": "epochs minibatches",
}
"""What it may go on with otherwise by --force alone. The two tables name every setting once; * is all of a section."""


def may_change(key: str, table: Mapping[str, str] = MAY_CHANGE) -> bool:
    """Whether a table has the setting of this dotted name."""
    section, _, name = key.partition(".")
    return table.get(section) == "*" or name in table.get(section, "").split()


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Section):
    name: FolderName = "quickstart"
    """Name of the run; everything it writes is under DIR/NAME."""
    dir: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of every random draw."""
    threads: PositiveInt = 1
    """Torch threads per process. On a shared CPU more than one is often far slower."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""
    trace_groups: NonNegativeInt = 2
    """Groups per step written to traces.jsonl."""
    tracing: bool = False
    """Let LangSmith and other tracers that LANGSMITH_* and LANGCHAIN_* variables turn on see every graph run, its tokens included."""


class Policy(Section):
    model: str = "operators"
    """A Hugging Face model directory or hub name; `operators` is the small base policy that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that sampling and the learner's forward compute in. With bfloat16 the trained weights stay float32 (master weights)."""
    thinking: bool = False
    """Ask chat templates that know it (Qwen3's `enable_thinking`) for a reasoning part before the answer."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters on every linear layer but the head; 0 trains all weights. Needs the extra `peft`."""
    lora_alpha: PositiveFloat = 32.0
    """LoRA's scale is lora_alpha / lora_rank."""


class TaskSection(Section):
    name: str = "operators"
    """operators, word_problems, gsm8k, math, dapo_math, openr1_math, dataset (give task.columns), reasoning_gym, to evaluate alone
    aime2024, aime2025, math500, gpqa_diamond and livecodebench, or a factory (my_task.py:build)."""
    data: str | None = None
    """Training problems: a local .parquet, .jsonl or .csv file, or a hub data set, NAME:SPLIT or NAME:CONFIG:SPLIT; default: the task's."""
    heldout: str | None = None
    """Held-out problems, named like task.data; default: the task's own, else a fixed twentieth of the data."""
    columns: dict[Literal["question", "answer", "id", "kind"], str] = {}
    """Columns of the data set, where they differ from the task's: question: problem."""
    max_prompt_tokens: NonNegativeInt = 0
    """Training problems whose question is longer, in the policy's tokens, are passed over; 0 keeps all."""
    reward: str | dict[FolderName, str] = ""
    """What a trace is worth: text, math, json:SCHEMA_FILE or a function (file.py:name), or several by name; default: the task's own."""
    weights: dict[FolderName, float] = {}
    """Weights of several rewards, by name; 1 where none is given."""
    timeout: PositiveFloat = 60.0
    """Seconds in which a reward function must have ended."""
    options: dict[str, JsonValue] = {}
    """Settings of the task's own, by name. operators: easy_share, the share of training problems that the base policy can already solve
    (0.25). gpqa_diamond and livecodebench: see docs/evaluate.md. reasoning_gym: {GENERATOR: {OPTION: value, weight: 1}}. A task of your
    own reads config.task.options."""


Options = TypeVar("Options", bound=Section)


def task_options(section: TaskSection, form: type[Options]) -> Options:
    """``task.options`` in the form that the task gives them. Raises ConfigError for one that it does not have, or of a wrong value."""
    try:
        return form.model_validate(section.options)
    except ValidationError as error:
        first, there = error.errors()[0], ", ".join(form.model_fields) or "none"
        name = ".".join(map(str, first["loc"]))
        what = "the task has no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(f"task.options.{name} = {first['input']!r}: {what}; options of {section.name}: {there}") from error


def refuse_problems(section: TaskSection) -> None:
    """For a task that makes its own problems. Raises ConfigError where the settings name others."""
    if section.data is not None or section.heldout or section.columns:
        raise ConfigError(
            f"task.name = {section.name}: it makes its own problems; leave out {section.data or section.heldout or section.columns!r}"
        )


class Rollout(Section):
    graph: str = "graphs/aipo.py:build"
    """The graph with agents: path.py:function, or package.module:function."""
    solo: str = "graphs/solo.py:build"
    """The graph without agents; it makes the alone share of every group and the alone evaluation."""
    prompts: str = "prompts/operators"
    """Folder of the prompt files that the graph's nodes name; `prompts` holds those for models that read English."""
    inputs: dict[str, str] = {}
    """What the graph is given of a problem: KEY of its state, context.NAME or configurable.NAME -> question, id, kind, answer or a
    column."""
    output: str = ""
    """Key of the graph's last state that is scored, of `messages` the last one's text; default: what the policy said last."""
    helpers: tuple[str, ...] = ()
    """Tools or nodes of a graph of messages whose words are a helper's, learned from as agent tokens. In traces alone the policy writes
    such a tool's results itself."""
    problems: PositiveInt = 32
    """Problems per step."""
    redraws: NonNegativeInt = 0
    """Dynamic sampling (DAPO, arXiv 2503.14476): times that a step's groups without signal (equal rewards) are replaced by new problems."""
    traces: Annotated[int, Field(ge=2)] = 8
    """Traces per problem (G, the group size): each is rewarded against the others."""
    with_agents: Fraction = 0.5
    """Share of each group that runs with agents, rounded to whole traces."""
    max_tokens: PositiveInt = 160
    """Budget of policy tokens per trace."""
    max_consults: NonNegativeInt = 16
    """Budget of consults per trace."""
    max_supersteps: PositiveInt = 64
    """LangGraph supersteps per trace before it ends for lack of budget."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature while training and in sampled evaluation. There is no top-p or top-k: the learner could not know the
    probability of what truncated sampling drew."""
    timeout: PositiveFloat = 300.0
    """Seconds for one trace."""
    max_failed: Fraction = 0.5
    """Share of failed traces in a step past which the run stops."""
    max_lag: NonNegativeInt = 0
    """Steps by which a token's weights may be behind when it is learned from: 0 is synchronous, 1 overlaps sampling and learning, more
    evens out long traces. With engine.kind = local, whole steps, and never across a checkpoint."""

    @property
    def traces_with_agents(self) -> int:
        """Traces of each group that run with agents; the others run alone."""
        return round(self.with_agents * self.traces)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.with_agents < 1 and self.traces_with_agents in (0, self.traces):
            raise ValueError(
                f"rollout.with_agents = {self.with_agents}: that is {self.traces_with_agents} of rollout.traces = {self.traces}; "
                "raise rollout.traces, or say 0 or 1"
            )
        return self


class Agents(Section):
    use: dict[AgentName, str] = {
        "verify": "graphs/operators_agents.py:verify",
        "knowledge": "graphs/operators_agents.py:knowledge",
        "reasoning": "graphs/operators_agents.py:reasoning",
    }
    """Agent name -> path of a function that builds the Agent. Empty for an agent that is a model alone: its prompt is NAME.md."""
    models: dict[AgentName, str] = {}
    """Agent name -> its language model: provider:model (LangChain's init_chat_model), vllm:URL (a vLLM server; its tokens and logprobs are
    recorded where its tokenizer is the policy's), or policy (a frozen copy of the starting weights). Default: its first tool answers."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature of agents' models."""
    max_tokens: PositiveInt = 1024
    """Tokens that a model may write per call, thinking included."""
    concurrency: PositiveInt = 64
    """Consults of one agent at once; the others wait."""
    max_reply_tokens: PositiveInt = 256
    """Longest reply that is spliced in; the rest is cut."""
    attempts: PositiveInt = 3
    """Tries per consult on a transient fault."""
    timeout: PositiveFloat = 90.0
    """Seconds for one consult, retries included."""
    leak: Literal["mask", "drop", "allow"] = "mask"
    """A reply that gives the answer away: keep it out of the loss, drop the trace, or do nothing. Counted in any case."""


class Engine(Section):
    kind: Literal["local", "server", "vllm"] = "local"
    """local: sampling in this process with torch. server: vLLM servers. vllm: vLLM beside the learner, asleep while it learns."""
    urls: tuple[Annotated[str, StringConstraints(pattern=r"^https?://")], ...] = ()
    """server: base URLs of running vLLM servers, such as http://localhost:8000. A dry run prints the command that starts one."""
    launch: bool = False
    """server: start one on this machine for the time of the run, and print its command."""
    memory: Fraction = 0.85
    """server (launched) and vllm: share of the GPU's memory for vLLM."""
    max_context: NonNegativeInt = 0
    """Longest prompt plus completion, in tokens; 0 is the model's own."""
    max_batch: PositiveInt = 256
    """Sequences decoded at once."""
    workers: PositiveInt = 1
    """local: processes that sample side by side, each with the policy and the agents. In training the learner has all their threads."""
    gpus: PositiveInt = 1
    """vllm in a cluster: GPUs over which an engine spreads one copy of the policy (tensor parallel). There is one engine per so many of
    the GPUs that the learner leaves."""
    deterministic: bool = True
    """local: form batches at fixed points only, so that a run repeats bit for bit. Turn off where agents are slow to answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "server" and bool(self.urls) == self.launch:
            raise ValueError("engine.kind = server: give engine.urls of running servers, or engine.launch: true to start one")
        if self.kind != "server" and (self.urls or self.launch):
            field = "urls" if self.urls else "launch"
            raise ValueError(
                f"engine.{field}: used by engine.kind = server alone, not {self.kind}; say engine.kind: server, or leave it out"
            )
        return self


class Cluster(Section):
    address: Annotated[str, StringConstraints(pattern=r"^(|local|auto|[\w.-]+:\d+)$")] = ""
    """Ray: local starts it on this machine, auto or HOST:PORT joins a running cluster; empty is without, in this process. Needs the extra
    `ray`."""
    learners: PositiveInt = 1
    """Processes over which the learner's tensors and batches are divided (FSDP2), one GPU each where there are any."""
    workers: NonNegativeInt = 0
    """Processes that run graphs, one CPU each; 0 is one per node. With engine.kind = local each has an engine of its own."""


class Loss(Section):
    advantage: str = "grpo"
    """Advantage estimator over a group's rewards: grpo, dr_grpo, rloo, raft (the reward itself), or your file.py:name."""
    baseline: Literal["split", "group", "counterfactual"] = "split"
    """split: alone traces are compared with alone ones only; group: all with all; counterfactual: each with the alone ones and itself."""
    algorithm: str = "grpo"
    """Surrogate of policy tokens: grpo, dapo, dr_grpo, rloo, cispo, gspo, or your file.py:name."""
    agent: str = "aipo"
    """Coefficient of agent tokens: aipo (our reconstruction), credit (aipo, and credit for single replies of failed traces), mask, ppo,
    luffy, gated, sft, echo, or your file.py:name."""
    agent_weight: NonNegativeFloat = 1.0
    """Lambda: weight of the agent-token loss beside the policy-token loss."""
    tags: bool = False
    """Learn the tags around a reply as its words, where the policy would not write them by itself."""
    floor: NonNegativeFloat = 0.3
    """Smallest coefficient of an agent token in a trace with positive advantage."""
    ceiling: PositiveFloat = 2.0
    """Largest coefficient of an agent token."""
    negative: NonNegativeFloat = 0.0
    """aipo: factor of an agent token's ratio in a trace with negative advantage: 0 blames no reply for a failure, 1 by the ratio."""
    behaviour: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability assumed for agent tokens whose helper recorded none (mu)."""
    clip_low: NonNegativeFloat = 0.2
    """Lower clip of the policy ratio, 1 - clip_low; cispo as published has none: 1 or more."""
    clip_high: PositiveFloat = 0.28
    """Upper clip of the policy ratio, 1 + clip_high."""
    clip_dual: NonNegativeFloat = 0.0
    """Where A < 0, no loss above clip_dual * abs(A), however large the ratio (3 is usual); 0 is no such bound."""
    mismatch_cap: PositiveFloat = 2.0
    """Largest weight exp(old - behaviour) that corrects a policy token for sampler-learner mismatch or lag."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the KL to the starting policy; 0 keeps no reference in memory."""

    @field_validator(*FORMS)
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        part = info.field_name or ""
        if part == "agent" and value in RETIRED:
            raise ValueError(f"loss.agent = {value!r}: is gone, the study gave no reason to keep it; use {RETIRED[value]}")
        if value not in FORMS[part] and ":" not in value:
            raise ValueError(f"loss.{part} = {value!r}: must be {', '.join(FORMS[part])} or path/to/file.py:name")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.floor > self.ceiling:
            raise ValueError(f"loss.floor = {self.floor}: above loss.ceiling = {self.ceiling}")
        if self.clip_low >= 1 and (self.algorithm != "cispo" or self.agent == "ppo"):
            which = "agent = ppo" if self.algorithm == "cispo" else f"algorithm = {self.algorithm}"
            raise ValueError(f"loss.clip_low = {self.clip_low}: with loss.{which} the ratio's lower clip is 1 - clip_low; give less than 1")
        if self.clip_dual and (self.clip_dual <= 1 or self.algorithm == "cispo"):
            reason = "cispo clips every ratio; leave it 0" if self.algorithm == "cispo" else "give more than 1 (3 is usual), or 0 for none"
            raise ValueError(f"loss.clip_dual = {self.clip_dual}: {reason}")
        return self


class Optimizer(Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate. The default is for all weights of a pretrained model; LoRA takes some 20 times as much, a tiny model more."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW betas."""
    warmup_steps: NonNegativeInt = 5
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


class Train(Section):
    steps: PositiveInt = 100
    """Training steps."""
    tokens: NonNegativeInt = 0
    """Stop before `steps` once this many policy tokens were sampled, for comparisons at equal cost; 0 is no limit."""
    epochs: PositiveInt = 1
    """Passes over each batch."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    micro_batch_tokens: PositiveInt = 16384
    """Padded tokens per forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    patience: PositiveInt = 5
    """Steps in a row with nothing to learn from before the run stops."""


class Evaluate(Section):
    problems: NonNegativeInt = 256
    """Held-out problems; 0 leaves out the evaluations before and after a training run."""
    problems_with_agents: PositiveInt = 64
    """Held-out problems in the evaluation with agents (the first ones of the same list, all of them at most)."""
    samples: PositiveInt = 64
    """Samples per problem; the largest k of pass@k."""


class Config(Section):
    """Settings of a training run. Everything not given keeps its default."""

    run: Run = Run()
    policy: Policy = Policy()
    task: TaskSection = TaskSection()
    rollout: Rollout = Rollout()
    agents: Agents = Agents()
    engine: Engine = Engine()
    cluster: Cluster = Cluster()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := sorted(set(self.agents.models) - set(self.agents.use)):
            raise ValueError(f"agents.models.{unknown[0]}: agents.use has no {unknown[0]!r}; add it there (empty for a model alone)")
        if self.cluster.address:
            if ":" in self.run.device:
                raise ValueError(f"run.device = {self.run.device}: in a cluster Ray chooses the GPU of each process; say cuda")
            if self.engine.launch and self.cluster.address != "local":
                raise ValueError("engine.launch: in a cluster others do not reach this machine's server; start one and give engine.urls")
            if self.engine.kind != "local" and any(spec.partition(":")[0] == "policy" for spec in self.agents.models.values()):
                raise ValueError("agents.models: policy: in a cluster nothing keeps the starting weights; serve them and say vllm:URL")
        elif self.cluster != Cluster():
            name, count = next((name, count) for name, count in self.cluster if count != getattr(Cluster(), name))
            raise ValueError(f"cluster.{name} = {count}: needs a Ray cluster; say cluster.address: local, or a running one's")
        elif self.engine.kind == "vllm" and self.rollout.max_lag:
            raise ValueError(
                f"rollout.max_lag = {self.rollout.max_lag}: engine.kind = vllm sleeps while the learner learns; use 0, or a server"
            )
        if self.engine.gpus > 1 and not (self.engine.kind == "vllm" and self.cluster.address):
            raise ValueError(f"engine.gpus = {self.engine.gpus}: used by engine.kind = vllm in a cluster alone; leave it 1")
        if self.loss.baseline == "counterfactual" and self.rollout.with_agents == 1:
            raise ValueError("loss.baseline = counterfactual: rollout.with_agents = 1 leaves no traces alone to compare with; use 0.5")
        if self.loss.advantage == "raft" and self.rollout.redraws:
            raise ValueError(f"rollout.redraws = {self.rollout.redraws}: loss.advantage = raft learns from equal rewards, too; leave it 0")
        if self.train.minibatches > self.rollout.problems:
            raise ValueError(f"train.minibatches = {self.train.minibatches}: more than rollout.problems = {self.rollout.problems}")
        return self
