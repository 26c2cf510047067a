"""The trace viewer on two runs: seconds to write the file, its size, first paint, time of a filter, memory of the page.

Needs Chromium and the extra `dev`. The runs are synthetic and the same every time: lines that the trainer's own log writes, 2,000 traces
shaped like the quick start's (121 tokens in 16 segments on average), and 200 traces of 2,000 tokens of a byte-level BPE, with words and
log-probabilities drawn at random. `--run FOLDER` measures a run of your own instead.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.load import data, shipped
from aipo_graph.log import RunLog
from aipo_graph.types import Learned, Problem, Segment, Source, Trace, TraceGroup

REPEATS = 3
AGENTS = ("verify", "knowledge", "reasoning")
FILTERS = ("filter-reward", "filter-help", "filter-agent", "filter-status")
# From the change to the second frame after it: by then the list is painted.
CHANGE = """([name, value]) => new Promise((done) => {
  const select = document.querySelector(`[data-testid="${name}"]`);
  const started = performance.now();
  select.value = value;
  select.dispatchEvent(new Event("change", { bubbles: true }));
  requestAnimationFrame(() => requestAnimationFrame(() => {
    const measured = performance.getEntriesByName("filter").map((entry) => entry.duration);
    done([performance.now() - started, Math.max(...measured)]);
  }));
})"""


@dataclass
class Writer:
    """Makes segments and what was learned from them, from one seed."""

    tokenizer: Tokenizer
    draw: random.Random
    noise: float
    """Between sampler and learner, in nats."""

    def segment(self, source: Source, author: str, text: str) -> Segment:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        logprobs = tuple(-math.exp(self.draw.gauss(-4, 3)) for _ in ids) if source == "policy" else None
        return Segment(source, author, ids, self.tokenizer.decode(ids, skip_special_tokens=False), logprobs=logprobs, version=0)

    def learned(self, segments: tuple[Segment, ...], advantage: float) -> Learned:
        logprobs: list[float | None] = []
        ratios: list[float | None] = []
        for segment in segments:
            for index in range(len(segment.token_ids)):
                before = segment.logprobs[index] if segment.logprobs else 0.0
                after = -math.exp(self.draw.gauss(-1, 2)) if segment.source == "agent" else min(before + self.draw.gauss(0, self.noise), 0)
                logprobs.append(None if segment.source == "context" else float(f"{after:.4g}"))
                ratios.append(None if segment.source == "context" else float(f"{math.exp(after - before):.4g}"))
        weights = [None if ratio is None else min(max(ratio, 0.3), 2.0) for ratio in ratios]
        return Learned(tuple(logprobs), tuple(ratios), tuple(None if r is None else advantage for r in ratios), tuple(weights))

    def trace(self, problem: Problem, member: int, words: Callable[[int], str], consults: int, length: int) -> Trace:
        """``length``: of each of the policy's turns."""
        segments, path = [self.segment("context", "policy", problem.question)], ["policy"]
        for _ in range(consults):
            agent = self.draw.choice(AGENTS)
            segments += [
                self.segment("policy", "policy", f"<{agent}>{words(length)}</{agent}>"),
                self.segment("context", "feedback", "<feedback>"),
                self.segment("agent", agent, words(length)),
                self.segment("context", "feedback", "</feedback>"),
            ]
            path += [agent, "policy"]
        segments.append(self.segment("policy", "policy", words(length)))
        reward = float(self.draw.random() < 0.6)
        return Trace(problem.id, self.draw.getrandbits(63), bool(consults), tuple(segments), tuple(path), "done", {"reward": reward})


def quick(folder: Path) -> Path:
    """2,000 traces of 125 steps."""
    writer = Writer(Tokenizer.from_file(str(data("operators") / "tokenizer.json")), random.Random(0), noise=1e-6)

    def words(length: int) -> str:
        return "".join(writer.draw.choice("0123456789+-ABC") for _ in range(length))

    def trace(problem: Problem, member: int) -> Trace:
        helped = member < 4
        return writer.trace(problem, member, words, consults=7 if helped else 0, length=6 if helped else 110)

    return run(folder, "quick", writer, steps=125, trace=trace, model="operators")


def long(folder: Path) -> Path:
    """200 traces of some 2,000 tokens each."""
    corpus = [path.read_text() for path in sorted(shipped().glob("docs/*.md"))] or [__doc__ or ""]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False))
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    writer = Writer(tokenizer, random.Random(0), noise=0.01)  # bfloat16's
    known = " ".join(corpus).split()

    def words(length: int) -> str:
        return " ".join(writer.draw.choices(known, k=length)) + " 😀"

    def trace(problem: Problem, member: int) -> Trace:
        return writer.trace(problem, member, words, consults=3 if member < 4 else 0, length=160 if member < 4 else 1200)

    return run(folder, "long", writer, steps=13, trace=trace, model=str(folder / "model"))


def run(folder: Path, name: str, writer: Writer, steps: int, trace: Callable[[Problem, int], Trace], model: str) -> Path:
    """A run's folder by the trainer's own log: two groups of eight traces per step."""
    settings = {"run": {"dir": str(folder), "name": name, "trackers": []}, "policy": {"model": model}, "train": {"steps": steps}}
    with RunLog(Config.model_validate(settings), Console(quiet=True)) as log:
        for step in range(1, steps + 1):
            groups, learned = [], []
            for place in range(2):
                problem = Problem(f"train-{2 * step + place}", f"@{step:04}ABC?", str(step), "hard" if place else "easy")
                groups.append(TraceGroup(problem, tuple(trace(problem, member) for member in range(8))))
                learned.append(tuple(writer.learned(entry.segments, writer.draw.gauss(0, 1)) for entry in groups[-1].traces))
            log.step(step, {f"metric/{i}": writer.draw.random() for i in range(100)}, groups, learned)
    return folder / name


def measure(run: Path, out: Path, chromium: str) -> dict[str, float]:
    """Medians over the repeats, but for the filters: the slowest of all."""
    seconds, worked = [], []
    for _ in range(REPEATS):
        started, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-m", "aipo_graph.view", str(run), "--no-open", "--out", str(out)], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
        after = os.times()
        worked.append(after.children_user + after.children_system - before.children_user - before.children_system)
    lines = [json.loads(line)["group"]["traces"] for line in (run / "traces.jsonl").open()]
    tokens = [sum(len(segment["token_ids"]) for segment in trace["segments"]) for traces in lines for trace in traces]
    found = {"traces": len(tokens), "tokens_per_trace": statistics.mean(tokens), "seconds_to_write": statistics.median(seconds)}
    found["processor_seconds"] = statistics.median(worked)
    return found | {"megabytes": out.stat().st_size / 1e6} | shown(out, chromium)


def shown(out: Path, chromium: str) -> dict[str, float]:
    """What the page takes in Chromium, from file://."""
    paints, filters, frames, heaps = [], [], [], []
    with sync_playwright() as playwright:
        flags = ["--enable-precise-memory-info"]
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=os.geteuid() != 0, args=flags)
        for _ in range(REPEATS):
            page = browser.new_page()
            page.goto(out.resolve().as_uri())
            page.get_by_test_id("trace-row").first.wait_for()
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            for name, value in choices(page):
                frame, measured = page.evaluate(CHANGE, [name, value])
                filters.append(measured)
                frames.append(frame)
            heaps.append(page.evaluate("performance.memory.usedJSHeapSize") / 1e6)
            page.close()
        browser.close()
    return {
        "first_paint_ms": statistics.median(paints),
        "filter_ms": max(filters),
        "filter_painted_ms": max(frames),
        "heap_megabytes": statistics.median(heaps),
    }


def choices(page: Page) -> Iterator[tuple[str, str]]:
    """Every value of every filter, each back to all after it."""
    for name in FILTERS:
        values = page.get_by_test_id(name).locator("option").evaluate_all("options => options.map((option) => option.value)")
        for value in [*values[1:], values[0]]:
            yield name, value


ROWS = (
    ("traces", "traces", ",.0f"),
    ("tokens_per_trace", "tokens per trace", ",.0f"),
    ("seconds_to_write", "seconds to write the file, start of Python included", ".2f"),
    ("processor_seconds", "of them on a processor", ".2f"),
    ("megabytes", "size, MB", ".2f"),
    ("first_paint_ms", "first contentful paint, ms", ",.0f"),
    ("filter_ms", "a filter, ms (slowest)", ".1f"),
    ("filter_painted_ms", "a filter until the list is painted, ms (slowest)", ",.0f"),
    ("heap_megabytes", "heap of the page, MB", ".1f"),
)


def command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/view.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run's folder to measure instead")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    given = parser.parse_args(argv)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))), None)
    if chromium is None:
        raise ConfigError("no Chromium on this machine; install one (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [given.run] if given.run else [quick(folder), long(folder)]
        found = {run.name: measure(run, folder / "view.html", chromium) for run in runs}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    table = Table("", *found, title=f"python -m aipo_graph.view, {os.cpu_count()} cores, {platform.machine()}, medians of {REPEATS}")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label, form in ROWS:
        table.add_row(label, *(f"{values[key]:{form}}" for values in found.values()))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(cli.main(command))
