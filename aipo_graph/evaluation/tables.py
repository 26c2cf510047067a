"""The figures of evaluations, to read: a table, the line that says how they came about, and what a reader must know beside them."""

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from aipo_graph.evaluation.samples import Mode
from aipo_graph.evaluation.summary import Values

MODES: tuple[Mode, ...] = ("alone", "with_agents")
UNNAMED = "heldout"
"""The kind of problems that have none."""
Row = tuple[str, list[str]]


def table(values: Values) -> Table:
    """The figures of an evaluation, each over its interval."""
    shown = Table(title=f"{values['model']}: {_problems(values['kind'])}, 95 % intervals over problems")
    modes = [("", values), *values["kinds"].items()]
    columns = [(f"{kind} {mode}".strip().replace("_", " "), found[mode]) for kind, found in modes for mode in MODES if mode in found]
    if "difference" in values:
        columns.append(("difference,\npaired", values["difference"]))
    shown.add_column("", no_wrap=True)
    for title, _ in columns:
        shown.add_column(title, justify="right")
    found = [found for _, found in columns]
    for name in (*(f"pass@{k}" for k in values["k"]), *(f"maj@{k}" for k in values["k"]), "greedy"):
        if any(name in column for column in found):
            shown.add_row("pass@1 = avg@n" if name == "pass@1" else name, *(cell(column, name) for column in found))
    if 1 not in values["k"] and any("samples" in column for column in found):
        shown.add_row("avg@n", *(cell(column, f"avg@{column.get('samples')}") for column in found))
    shown.add_section()
    for name, cells in _details(found):
        shown.add_row(name, *cells)
    return shown


def _details(columns: Sequence[Values]) -> list[Row]:
    """The rows below the estimates; those in which no column has anything to say are left out."""

    def row(name: str, figure: Callable[[Values], str]) -> Row:
        return name, [figure(column) for column in columns]

    rows = [
        row("problems x samples", size),
        row("tokens per trace", lambda c: _number(c.get("tokens_per_trace"))),
        row("tokens, median / 95 %", lambda c: _pair(c.get("length"), ("all", "median"), ("all", "p95"))),
        row("tokens, solved / not", lambda c: _pair(c.get("length"), ("solved", "mean"), ("unsolved", "mean"))),
        row("cut at the budget", lambda c: _share(c.get("truncated"))),
    ]
    for agent in dict.fromkeys(agent for column in columns for agent in column.get("consults_per_trace", {})):
        consults = [column.get("consults_per_trace", {}).get(agent, {}) for column in columns]
        rows.append((f"{agent} calls", [_number(found.get("calls")) for found in consults]))
        rows.append((f"{agent} tokens", [_number(found.get("tokens")) for found in consults]))
        rows.append((f"{agent} helpfulness", [_helpfulness(column.get("helpfulness", {}).get(agent)) for column in columns]))
    rows.append(
        row("replies with the answer", lambda c: _share((c.get("leaks") or {}).get("replies")) if c.get("consults_per_trace") else "–")
    )
    rows.append(row("violations", lambda c: _share(c["violations"]) if c.get("violations") else "–"))
    return [(name, cells) for name, cells in rows if any(text != "–" for text in cells)]


def _problems(kind: str) -> str:
    return "held-out problems" if kind == UNNAMED else f"held-out {kind} problems"


def trained_table(base: Values, trained: Values) -> Table:
    """Base and trained policy, alone and with agents, and the other kinds alone: 80 columns hold it."""
    shown = Table(title=f"{_problems(base['kind'])}, 95 % intervals over problems")
    for title in ("", "base", "trained"):
        shown.add_column(title, justify="right" if title else "left", style="bold" if title == "trained" else "")
    for kind, before, after in [
        ("", base, trained),
        *((f"{kind} ", base["kinds"][kind], trained["kinds"][kind]) for kind in base["kinds"]),
    ]:
        for mode in (mode for mode in MODES if mode in before):
            shown.add_section()
            pair = before[mode], after[mode]
            for name in (*(f"pass@{k}" for k in base["k"]), "greedy"):
                if any(found.get(name) is not None for found in pair):
                    cells = (cell(found, name).replace("\n", " (", 1) + ")" for found in pair)
                    shown.add_row(f"{kind}{mode.replace('_', ' ')}, {name}", *cells)
            shown.add_row("problems x samples", *map(size, pair), style="dim")
    return shown


def verdict(parts: Mapping[str, Values], kind: str) -> list[str]:
    """What a run's evaluations come to, a sentence for each mode: the paired difference of base and trained policy."""
    lines = []
    for mode in (mode for mode in MODES if f"{kind}/{mode}" in parts):
        found = parts[f"{kind}/{mode}"]
        low, high = found["intervals"]["pass@1"]
        p = "p < 0.001" if found["p"]["pass@1"] < 0.001 else f"p = {found['p']['pass@1']:.2g}"
        how = "beats" if low > 0 else "falls behind" if high < 0 else "is not shown to differ from"
        lines.append(
            f"{mode.replace('_', ' ')}, the trained policy {how} the base: pass@1 {found['second']:.3f} against {found['first']:.3f}, a "
            f"difference of {found['pass@1']:+.3f} ({low:+.3f} … {high:+.3f}, {p})"
        )
    return lines


def caption(values: Values) -> str:
    """How an evaluation came about, in one line."""
    how = values["protocol"]
    model = how["model_revision"] or how["model_digest"]
    preset = f"preset {how['preset']}, " if how["preset"] else ""
    return (
        f"{preset}task {how['task']}, data {how['data']}; temperature {how['temperature']:g} without top-p, {how['max_tokens']} tokens, "
        f"seed {how['seed']}; weights {model[:12]}; aipo_graph {how['aipo_graph']}, {how['date']}"
    )


def remarks(values: Values) -> list[str]:
    """What a reader must know beside the table: traces that failed, problems without all their samples."""
    lines = []
    for kind, found in {values["kind"]: values, **values["kinds"]}.items():
        for mode in (mode for mode in MODES if mode in found):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in found[mode]["failed"].items())
            if reasons:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: without a score: {reasons}; the same command tries those that failed again"
                )
            if found[mode]["incomplete"]:
                lines.append(
                    f"{kind}, {mode.replace('_', ' ')}: {found[mode]['incomplete']} of {found[mode]['problems']} problems have fewer than "
                    f"{found[mode]['samples']} scored samples and are left out of each pass@k that needs more than they have"
                )
    if any(agent["difference"] is not None for agent in values.get("with_agents", {}).get("helpfulness", {}).values()):
        lines.append(
            "helpfulness: success of traces that consulted the agent minus that of others of the same problem (observed, not caused)"
        )
    return lines


def comparison(names: tuple[str, str], parts: dict[str, Values]) -> Table:
    """Part -> the paired difference of two evaluations' pass@1 there."""
    shown = Table(title=f"{names[1]}\nminus {names[0]}", caption="95 % intervals over problems; p: sign-flip permutation test")
    for title in ("", "first", "second", "difference", "problems"):
        shown.add_column(title, justify="right" if title else "left")
    for part, values in parts.items():
        shown.add_row(part, _number(values["first"], 3), _number(values["second"], 3), cell(values, "pass@1"), size(values))
    return shown


def cell(found: Values, name: str) -> str:
    if found.get(name) is None:
        return "–"
    low, high = found["intervals"][name]
    p = found.get("p", {}).get(name)
    return f"{found[name]:.3f}\n{low:.3f} … {high:.3f}" + ("" if p is None else f"\np = {p:.2g}" if p >= 0.001 else "\np < 0.001")


def size(found: Values) -> str:
    return str(max(found["problems"].values())) if isinstance(found["problems"], dict) else f"{found['problems']} x {found['samples']}"


def _helpfulness(found: Values | None) -> str:
    if not found or found["difference"] is None:
        return "–"
    low, high = found["interval"]
    return f"{found['difference']:+.3f}\n{low:+.3f} … {high:+.3f}\n{found['problems']} problems"


def _pair(found: Values | None, *keys: tuple[str, str]) -> str:
    if not found:
        return "–"
    return " / ".join(f"{part[figure]:.0f}" if (part := found[name]) else "–" for name, figure in keys)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
