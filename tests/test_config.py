"""Settings: small, documented, and every mistake answered in one line that names it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic_settings import CliPositionalArg, CliVariadicArg
from rich.console import Console

from aipo_graph.cli import main, parse, write_yaml
from aipo_graph.config import PATHS, Config
from aipo_graph.errors import ConfigError


class Evaluation(Config):
    """A command with words of its own."""

    model: CliPositionalArg[str]
    """The model."""
    k: CliVariadicArg[tuple[int, ...]] = (1, 4)
    """Sizes of k."""


def settings(*argv: str, cls: type[Config] = Config) -> Config:
    return parse(argv, cls, prog="train")[0]


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(*argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def leaves(cls: type, prefix: str = "") -> dict[str, str | None]:
    found = {}
    for name, field in cls.model_fields.items():
        section = hasattr(field.annotation, "model_fields")
        found |= leaves(field.annotation, f"{prefix}{name}.") if section else {prefix + name: field.description}
    return found


def test_small_and_documented() -> None:
    fields = leaves(Config)
    assert 40 < len(fields) <= 91
    assert [key for key, text in fields.items() if not text or not text.strip()] == []
    assert [key for key in PATHS if key not in fields] == []


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {steps: 7, epochs: 2}\nloss:\n# nothing here\n")
    config, options = parse([str(file), "--train.steps", "9", "--dry-run"], Config, prog="train")
    assert (config.train.steps, config.train.epochs, config.train.minibatches) == (9, 2, 1)
    assert (options.file, options.dry_run) == (file, True)
    assert parse([], Config, prog="train")[1].dry_run is False


def test_default_file_is_found_among_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(tmp_path)
    _, options = parse([], Config, prog="train", default="configs/quickstart.yaml")
    assert options.file == root / "configs/quickstart.yaml"


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    settings(str(file))


def test_every_kind_of_value_from_the_command_line() -> None:
    config = settings(
        *["--run.trackers", "tensorboard,trackio", "--optimizer.betas", "0.8,0.9", "--task.data", "null"],
        *["--agents.use", "verify=my.py:build", "--train.gradient_checkpointing", "true", "--optimizer.lr=1e-3"],
    )
    assert config.run.trackers == ("tensorboard", "trackio")
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.lr == 1e-3
    assert config.task.data is None
    assert config.agents.use == {"verify": "my.py:build"}
    assert config.train.gradient_checkpointing is True


def test_command_with_words_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("evaluate: {samples: 16}\n")
    config = settings("some/model", "--k", "1", "4", "16", "--config", str(file), cls=Evaluation)
    assert isinstance(config, Evaluation)
    assert (config.model, config.k, config.evaluate.samples) == ("some/model", (1, 4, 16), 16)


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = settings(
        "--optimizer.lr", "1e-7", "--run.seed", "3", "--rollout.with_agents", "0.3333333333333333", "--task.data", "x: y.jsonl"
    )
    (tmp_path / "a.yaml").write_text(write_yaml(config))
    assert settings(str(tmp_path / "a.yaml")) == config
    assert yaml.safe_load(write_yaml(config))["run"]["seed"] == 3


def test_paths_beside_the_file_hold_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "g.py").touch()
    (tmp_path / "mine" / "operators").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text(
        "rollout: {graph: 'g.py:build', solo: 'graphs/solo.py:build'}\nagents: {use: {verify: 'g.py:v'}}\npolicy: {model: operators}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = settings("mine/a.yaml")
    assert config.rollout.graph == f"{tmp_path}/mine/g.py:build"
    assert config.agents.use == {"verify": f"{tmp_path}/mine/g.py:v"}
    assert (config.rollout.solo, config.policy.model) == ("graphs/solo.py:build", "operators")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 7}", "no setting 'train.stepz'; did you mean 'train.steps'? (FILE:1)"),
        ("trian: {}", "no setting 'trian'; did you mean 'train'? (FILE:1)"),
        ("train:\n  steps: 7\n  steps: 8", "FILE:3: train.steps is given twice"),
        ("a: &x [1]\nb: *x", "FILE:2: aliases (*name) are not supported; write the value out"),
        ("train:\n  steps: [7", "FILE:2: expected ',' or ']'"),
        ("train:\n\n  steps: -7", "train.steps = -7: must be greater than 0 (FILE:3)"),
        (
            "loss: {agent: foo}",
            "loss.agent = 'foo': must be aipo, credit, mask, ppo, luffy, gated, sft, echo or path/to/file.py:name (FILE:1)",
        ),
        ("loss:\n  agent: shortfall", "loss.agent = 'shortfall': is gone, the study gave no reason to keep it; use aipo (FILE:2)"),
        ("- 1", "FILE:1: a mapping of sections is wanted"),
        ("run: {name: no}", "run.name = False: must be a valid string; put quotes around it (FILE:1)"),
        ("[1]: 2", "FILE:1: a key must be a word"),
        ("!!python/object/apply:os.system [ls]", "FILE:1: could not determine a constructor"),
        ("[" * 100_000, "FILE: nested too deeply"),
        ("x" * 1_000_001, "FILE: larger than 1,000,000 bytes"),
        ("train: 3", "train = 3: must be a mapping of settings (FILE:1)"),
        ("agents:\n  models: {oracle: 'openai:x'}", "agents.models.oracle: agents.use has no 'oracle'; add it there"),
        ("agents: {use: {'Bad Name': x}}", "agents.use.Bad Name = 'Bad Name': must match"),
        (f"rollout: {{prompts: {'x' * 300}}}\ntrain: 3", "train = 3: must be a mapping of settings (FILE:2)"),
    ],
)
def test_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    said = refusal(str(file)).replace(str(file), "FILE")
    assert message in said
    assert "FILE" in said


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    assert "a.yaml: not UTF-8, but UTF-16" in refusal(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train.stepz 3", "no setting --train.stepz; did you mean '--train.steps'?"),
        ("--train.micro-batch-tokens 3", "did you mean '--train.micro_batch_tokens'?"),
        ("--steps 3", "did you mean '--train.steps'?"),
        ("--rollout.seed 3", "did you mean '--run.seed'?"),
        ("--train.steps", "--train.steps: expected one argument"),
        ("--train.steps x", "train.steps = 'x': must be a valid integer, unable to parse string as an integer (on the command line)"),
        ("configs/nope.yaml", "no file 'configs/nope.yaml'"),
        ("configs/quickstart.yaml more", "unrecognized arguments: more"),
        ("--optimizer.lr nan", "optimizer.lr = 'nan': must be a finite number"),
        ("--run.name ../x", "run.name = '../x': must match"),
        ("--run.device gpu", "run.device = 'gpu': must match"),
        ("--engine.kind server", "engine.kind = server: give engine.urls of running servers, or engine.launch: true"),
        ("--engine.launch true", "engine.launch: used by engine.kind = server alone, not local"),
        ("--engine.kind server --engine.urls localhost:8000", "engine.urls.0 = 'localhost:8000': must match pattern '^https?://'"),
        ("--engine.kind vllm --rollout.max_lag 1", "rollout.max_lag = 1: engine.kind = vllm sleeps while the learner learns"),
        ("--cluster.learners 2", "cluster.learners = 2: needs a Ray cluster; say cluster.address: local, or a running one's"),
        ("--cluster.address here", "cluster.address = 'here': must match"),
        (
            "--cluster.address auto --engine.kind server --engine.launch true",
            "engine.launch: in a cluster others do not reach this machine",
        ),
        ("--cluster.address local --run.device cuda:1", "run.device = cuda:1: in a cluster Ray chooses the GPU of each process; say cuda"),
        (
            '--cluster.address local --engine.kind vllm --agents.models {"verify":"policy"}',
            "agents.models: policy: in a cluster nothing keeps the starting weights; serve them and say vllm:URL",
        ),
        ("--engine.kind vllm --engine.gpus 2", "engine.gpus = 2: used by engine.kind = vllm in a cluster alone; leave it 1"),
        ("--rollout.traces 1", "rollout.traces = '1': must be greater than or equal to 2"),
        ("--rollout.traces 4 --rollout.with_agents 0.1", "rollout.with_agents = 0.1: that is 0 of rollout.traces = 4"),
        ("--loss.floor 3", "loss.floor = 3.0: above loss.ceiling = 2.0"),
        ("--loss.clip_low 1", "loss.clip_low = 1.0: with loss.algorithm = grpo the ratio's lower clip is 1 - clip_low; give less than 1"),
        (
            "--loss.clip_low 1 --loss.algorithm cispo --loss.agent ppo",
            "loss.clip_low = 1.0: with loss.agent = ppo the ratio's",
        ),
        (
            "--loss.advantage raft --rollout.redraws 2",
            "rollout.redraws = 2: loss.advantage = raft learns from equal rewards, too",
        ),
        ("--run.seed 99999999999999999999", "run.seed = '99999999999999999999': must be less than"),
        ("--loss.clip_low 1 --loss.algorithm gspo", "loss.clip_low = 1.0: with loss.algorithm = gspo"),
        ("--loss.clip_low -0.1 --loss.algorithm cispo", "loss.clip_low = '-0.1': must be greater than or equal to 0"),
        ("--loss.clip_high 0 --loss.algorithm cispo", "loss.clip_high = '0': must be greater than 0"),
        ("--loss.clip_dual 1", "loss.clip_dual = 1.0: give more than 1 (3 is usual), or 0 for none"),
        ("--loss.clip_dual 3 --loss.algorithm cispo", "loss.clip_dual = 3.0: cispo clips every ratio; leave it 0"),
        ("--optimizer.betas 0.9,1", "optimizer.betas.1 = 1: must be less than 1"),
        ("--train.minibatches 99", "train.minibatches = 99: more than rollout.problems = 32"),
        ("--loss.baseline counterfactual --rollout.with_agents 1", "loss.baseline = counterfactual: rollout.with_agents = 1"),
    ],
)
def test_bad_command_line_is_one_line(argv: str, message: str) -> None:
    assert message in refusal(*argv.split())


@pytest.mark.parametrize(
    ("algorithm", "low", "high"),
    [
        ("grpo", 0.2, 0.2),
        ("dapo", 0.2, 0.28),
        ("dr_grpo", 0.2, 0.2),
        ("gspo", 3e-4, 4e-4),
        ("cispo", 1, 5),
        ("cispo", 1e3, 4),
        ("rloo", 0.2, 0.2),
    ],
)
def test_the_clips_that_the_papers_use(algorithm: str, low: float, high: float) -> None:
    loss = settings("--loss.algorithm", algorithm, "--loss.clip_low", str(low), "--loss.clip_high", str(high)).loss
    assert (loss.clip_low, loss.clip_high) == (low, high)


def test_share_of_agents_in_whole_traces() -> None:
    assert settings("--rollout.traces", "8", "--rollout.with_agents", "0.3").rollout.traces_with_agents == 2
    assert settings("--rollout.with_agents", "0").rollout.traces_with_agents == 0


def test_help_shows_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for key, doc in leaves(Config).items():
        assert f"--{key}" in text
        assert " ".join((doc or "").split()).partition(" -> ")[0] in text
    assert "Training steps. (default: 100)" in text


RUN = "import sys; from aipo_graph.cli import main\ndef command(argv):\n    {}\nsys.exit(main(command))"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        (r"from aipo_graph.errors import TaskError; raise TaskError('bad\n\x1b[2Jline')", 2, "error: bad [2Jline"),
        ("import errno; raise OSError(errno.ENOSPC, 'No space', 'f.bin')", 2, "error: no space left on the disk while writing f.bin"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(body: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN.format(body)], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (1 if said else 0)
    assert "\x1b" not in done.stderr


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(lambda argv: print(1 / 0), [])
    with pytest.raises(FileNotFoundError):
        main(lambda argv: print(Path("/nowhere/x").read_text()), [])


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(stderr=True).no_color
    assert main(lambda argv: settings("--nope"), []) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_trace_must_fit_a_training_batch_where_there_is_training(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train.micro_batch_tokens", "9", "--dry-run"]
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens = 9: below rollout.max_tokens = 160"):
        importlib.import_module("aipo_graph.train").main(words)
    importlib.import_module("aipo_graph.evaluate").main(["operators", *words])
    assert "micro_batch_tokens: 9" in capsys.readouterr().out


def test_a_helper_that_the_evaluation_would_train_is_refused() -> None:
    words = ["--engine.kind", "server", "--engine.urls", "http://localhost:1", "--policy.lora_rank", "4"]
    words += ["--agents.models", '{"verify": "policy"}', "--dry-run"]
    with pytest.raises(ConfigError, match=r"agents.models: policy: the evaluation gives the servers the trained weights"):
        importlib.import_module("aipo_graph.train").main(words)
    importlib.import_module("aipo_graph.train").main([*words, "--evaluate.problems", "0"])
