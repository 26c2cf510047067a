"use strict";

const NARROW = matchMedia("(max-width: 760px)");
const VIEWS = { trace: "Trace", group: "Group", compare: "Compare" };

/** The traces tab: the list with its filters, and one trace, its group, or two compared. */
function Traces({ runs, source, place, go, follow, setFollow }) {
  const run = runs[Number(place.run)] ? Number(place.run) : 0;
  const tables = useMemo(() => runs.map(entriesOf), [runs]);
  const entries = tables[run];
  const all = useMemo(() => new Map(tables.flat().map((entry) => [entry.key, entry])), [tables]);
  const left = useMemo(() => leftOf(entries, place), [entries, ...FILTERS.map((name) => place[name]), place.order]);
  const search = useRef(null);
  const stage = useRef(null);
  const first = useSettled(left[0] || null);
  const entry = all.get(place.trace) || first;
  const choose = useCallback((key) => {
    setFollow(false);
    go({ trace: key, ...(place.view === "compare" ? { view: "trace" } : {}) });
    if (NARROW.matches) stage.current.scrollIntoView();
  }, [place.view]);
  const move = (by) => {
    const at = left.findIndex((one) => one.key === entry?.key);
    const next = left[clamp(at + by, 0, left.length - 1)];
    if (next) choose(next.key);
  };
  useKeys({ left, entry, move, place, go, search });
  useEffect(() => { if (follow && left.length) go({ trace: newestOf(left).key }); }, [follow, runs]);
  if (runs.every((one) => !one.traces.step.length)) return html`<${NoTraces} runs=${runs} />`;
  return html`<div class="traces">
    <aside class="side" aria-label="traces">
      ${runs.length > 1 && html`<${Switch} label="run" kind="runs" testid="filter-run" value=${run}
        options=${runs.map((one, index) => [index, html`<bdi>${one.name}</bdi>`])}
        onChange=${(index) => go({ run: String(index), trace: "" })} />`}
      <${Filters} run=${runs[run]} entries=${entries} left=${left} place=${place} go=${go} search=${search} />
      <${TraceList} entries=${left} chosen=${entry?.key} onChoose=${choose} />
    </aside>
    <div class="stage" ref=${stage}>
      ${entry && html`<${Stage} runs=${runs} source=${source} entry=${entry} left=${left} all=${all} place=${place}
        go=${go} />`}
    </div>
  </div>`;
}

function newestOf(entries) {
  const newer = (one, two) => one.step > two.step || (one.step === two.step && one.group > two.group);
  return entries.reduce((best, entry) => (newer(entry, best) ? entry : best));
}

/** A value once it has stayed for a moment: what is costly to draw follows a filter when the typing is over. */
function useSettled(value) {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), SETTLED);
    return () => clearTimeout(timer);
  }, [value]);
  return settled;
}

/** In place of traces: what went wrong, or that they are being read. */
function Waiting({ error }) {
  return error ? html`<p class="problem-note bad" role="alert">${visible(error.message)}</p>`
    : html`<p class="muted loading">loading …</p>`;
}

function NoTraces({ runs }) {
  const running = runs.some((run) => run.state === "running");
  return html`<div class="empty" data-testid="empty">
    <h2>No traces yet</h2>
    <p>${running ? "The run has begun; its first traces appear after its first step."
      : "This run recorded no traces: run.trace_groups says how many groups a step records."}</p>
  </div>`;
}

function isWriting(element) {
  return element.matches("input:not([type=range]), select, textarea");
}

function useKeys(given) {
  const latest = useRef(given);
  latest.current = given;
  useEffect(() => {
    const onKey = (event) => {
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest("dialog")) return;
      const { left, entry, move, place, go, search } = latest.current;
      if (isWriting(event.target)) { if (event.key === "Escape") event.target.blur(); return; }
      const inList = event.target === document.body || event.target.closest(".list");
      const acts = {
        j: () => move(1), k: () => move(-1),
        g: () => go({ view: place.view === "group" ? "trace" : "group", trace: entry?.key || "" }),
        c: () => go({ colour: COLOUR_NAMES[(COLOUR_NAMES.indexOf(place.colour) + 1) % COLOUR_NAMES.length] }),
        p: () => entry && go({ view: "compare", a: entry.key, b: "" }),
        "/": () => search.current?.focus(),
        ...(inList && { ArrowDown: () => move(1), ArrowUp: () => move(-1) }),
        ...(inList && { Home: () => move(-left.length), End: () => move(left.length) }),
      };
      if (!Object.hasOwn(acts, event.key)) return;
      event.preventDefault();
      acts[event.key]();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
}

function Stage({ runs, source, entry, left, all, place, go }) {
  const view = oneOf(VIEWS, place.view);
  const colour = oneOf(COLOURS, place.colour);
  const changes = {
    trace: () => ({}),
    group: () => ({ trace: entry.key }),
    compare: () => (runs.length > 1 && !place.trace ? {} : { a: place.a || entry.key, b: place.a ? place.b : "" }),
  };
  const shared = { runs, source, entry, left, all, colour, place, go };
  return html`
    <div class="stage-bar">
      <${Switch} label="view" testid="view" value=${view} options=${Object.entries(VIEWS)}
        onChange=${(name) => go({ view: name, ...changes[name]() })} />
      <${ColourSwitch} colour=${colour} onChange=${(name) => go({ colour: name })} />
    </div>
    ${view === "trace" && html`<${TraceView} ...${shared} />`}
    ${view === "group" && html`<${GroupView} ...${shared} />`}
    ${view === "compare" && html`<${Compare} ...${shared} />`}`;
}

function HelpTag({ entry }) {
  return html`<span class=${`tag ${entry.withAgents ? "with" : "alone"}`}>${entry.sort}</span>`;
}

/** What is said of a trace in chips: step, with agents or alone, how it ended. */
function Chips({ entry, run }) {
  return html`<div class="chips">
    ${run && html`<span class="tag"><bdi>${run.name}</bdi></span>`}
    <span class="tag">step ${entry.step}</span>
    <${HelpTag} entry=${entry} />
    <span class=${classes("tag", wasCut(entry) && "bad")}>${entry.status}</span>
    ${entry.kind && html`<span class="tag"><bdi>${visible(entry.kind)}</bdi></span>`}
  </div>`;
}

function TraceView({ source, entry, ...shared }) {
  const { loaded, error } = useTraces(source, [entry]);
  return loaded ? html`<${OneTrace} source=${source} ...${loaded[0]} ...${shared} />`
    : html`<${Waiting} error=${error} />`;
}

function OneTrace({ runs, source, entry, trace, left, all, colour, place, go }) {
  const [node, setNode] = useState(null);
  const [visit, setVisit] = useState(null);
  const marked = useMemo(() => {
    if (node === null && visit === null) return null;
    const visits = visitOfSegments(trace);
    const lit = (segment, index) => (node === null ? visits[index] === visit : segment.author === node);
    const segments = new Set(trace.segments.filter(lit));
    return (segment) => segments.has(segment);
  }, [trace, node, visit]);
  return html`<article class="trace" data-testid="trace" data-key=${entry.key}>
    <div class="card head">
      <div class="about">
        <div class="title"><${Mark} entry=${entry} /><h2 title=${visible(entry.problem)}><bdi>${visible(cut(entry.question, 200))}</bdi></h2></div>
        <${Chips} entry=${entry} run=${runs.length > 1 && runs[entry.run]} />
        ${entry.error !== null && html`<p class="reason" data-testid="reason"><${Clipped} text=${entry.error} /></p>`}
        <${Facts} key=${entry.key} trace=${trace} entry=${entry} />
        <button type="button" class="button" data-testid="pin"
          onClick=${() => go({ view: "compare", a: entry.key, b: "" })}>compare …</button>
      </div>
      <${GraphPanel} runs=${runs} source=${source} entry=${entry} trace=${trace} left=${left} all=${all} place=${place}
        go=${go}
        onNode=${setNode} onStep=${setVisit} />
    </div>
    <div class="card">
      <${NoColours} trace=${trace} colour=${colour} />
      <${TraceTokens} key=${entry.key} trace=${trace} colour=${colour} marked=${marked} />
    </div>
  </article>`;
}

function Facts({ trace, entry }) {
  const scores = Object.entries(trace.scores).filter(([name]) => name !== "reward");
  return html`<dl class="facts">
    <dt>question</dt><dd class="quote"><${Clipped} text=${trace.about.question} /></dd>
    <dt>right answer</dt><dd class="quote"><${Clipped} text=${trace.about.answer} /></dd>
    <dt>reward</dt><dd><b>${fixed(entry.reward)}</b>${scores.map(([name, value]) => html` <span
      class="muted"> · <bdi>${visible(name)}</bdi> ${fixed(value)}</span>`)}</dd>
    <dt>advantage</dt><dd>${learnedOf(entry)}</dd>
    <dt>tokens</dt><dd>${grouped(entry.tokens)}</dd>
    <dt>seed</dt><dd class="muted">${trace.seed}</dd>
  </dl>`;
}

/** What an advantage meant for the trace's tokens. */
function learnedOf({ advantage }) {
  if (advantage === null) return "none recorded: not trained on, or an earlier version's run";
  if (advantage === 0) return "0: nothing was learned from it";
  return `${signed(advantage)}: made ${advantage > 0 ? "likelier" : "less likely"}`;
}

const SCOPES = { trace: "this trace", group: "its group", left: "all in the list" };

/** The graph with the visits of one trace, step by step, or of many. */
function GraphPanel({ runs, source, entry, trace, left, all, place, go, onNode, onStep }) {
  const scope = oneOf(SCOPES, place.graph);
  const graph = runs[entry.run].graph;
  useEffect(() => { onStep(null); onNode(null); }, [scope]);
  return html`<div class="graph-panel">
    <div class="graph-bar"><span class="muted">visits of</span>
      <${Switch} label="visits of" kind="small" value=${scope} options=${Object.entries(SCOPES)}
        onChange=${(name) => go({ graph: name })} />
    </div>
    ${scope === "trace" ? html`<${PathPlayer} key=${entry.key} graph=${graph} trace=${trace}
      onStep=${onStep} onNode=${onNode} />`
      : html`<${GraphOfMany} graph=${graph} source=${source} onNode=${onNode}
          entries=${scope === "group" ? groupOf(all, entry) : left} />`}
  </div>`;
}

function groupOf(all, entry) {
  return [...all.values()].filter((one) => one.run === entry.run && one.group === entry.group);
}

/** Visits summed over entries; pages not yet read are read first. */
function GraphOfMany({ graph, source, entries, onNode = null }) {
  const [counted, setCounted] = useState(null);
  const [done, setDone] = useState(0);
  const [error, setError] = useState(null);
  const names = useMemo(() => entries.map((entry) => entry.key).join(" "), [entries]);
  useEffect(() => {
    let wanted = true;
    setDone(0);
    setError(null);
    tracesOf(source, entries, (share) => wanted && setDone(share)).then(
      (traces) => wanted && setCounted({ counts: sumVisits(traces), traces: traces.length }),
      (fault) => wanted && setError(fault),
    );
    return () => { wanted = false; };
  }, [source, names]);
  if (error) return html`<${Waiting} error=${error} />`;
  return html`<div class="player">
    <${GraphPicture} graph=${graph} counts=${counted?.counts || noVisits()} onNode=${onNode} />
    <p class="muted player-bar">${done < 1 && entries.length ? `reading traces … ${percent(done)}`
      : `visits of ${plural(counted?.traces || 0, "trace")}`}</p>
  </div>`;
}
