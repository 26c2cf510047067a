"use strict";

/** What the page shows: kept in the address, so that a link or a reload brings it back. */
const PLACE = {
  tab: "traces", view: "trace", run: "0", trace: "", a: "", b: "", colour: "source", graph: "trace",
  from: "", to: "", reward: "", status: "", agent: "", help: "", failures: "", text: "", order: "oldest",
};
const FILTERS = ["from", "to", "reward", "status", "agent", "help", "failures", "text"];
const SETTLED = 200;
const ORDERS = {
  oldest: ["oldest first", null],
  newest: ["newest first", (one, two) => two.step - one.step || two.group - one.group || one.member - two.member],
  strongest: ["strongest advantage", (one, two) => Math.abs(two.advantage || 0) - Math.abs(one.advantage || 0)],
  longest: ["longest", (one, two) => two.tokens - one.tokens],
};

function readPlace() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(Object.entries(PLACE).map(([name, value]) => [name, given.get(name) ?? value]));
}

function writePlace(place) {
  const changed = Object.entries(place).filter(([name, value]) => value !== PLACE[name]);
  return `#${new URLSearchParams(changed)}`;
}

/** [place, go(changes)], with the address kept in step; a change of tab or view can be gone back from. */
function usePlace() {
  const [place, setPlace] = useState(readPlace);
  const written = useRef(place);
  const go = useCallback((changes) => setPlace((now) => ({ ...now, ...changes })), []);
  useEffect(() => {
    if (place === written.current) return undefined;
    const moved = place.tab !== written.current.tab || place.view !== written.current.view;
    const write = () => {
      if (writePlace(readPlace()) === writePlace(place)) return;
      history[moved ? "pushState" : "replaceState"](null, "", writePlace(place));
      written.current = place;
    };
    const timer = setTimeout(write, moved ? 0 : SETTLED);
    return () => clearTimeout(timer);
  }, [place]);
  useEffect(() => {
    const back = () => { written.current = readPlace(); setPlace(written.current); };
    addEventListener("hashchange", back);
    return () => removeEventListener("hashchange", back);
  }, []);
  return [place, go];
}

/** The entries that a place's filters leave, in its order. */
function leftOf(entries, place) {
  const start = performance.now();
  const from = stepOr(place.from, -Infinity);
  const to = stepOr(place.to, Infinity);
  const text = place.text.trim().toLowerCase();
  const left = entries.filter((entry) => entry.step >= from && entry.step <= to
    && (!place.reward || outcomeOf(entry) === place.reward)
    && (!place.status || entry.status === place.status)
    && (!place.agent || asked(entry, place.agent))
    && (!place.help || entry.withAgents === (place.help === "with"))
    && (!place.failures || wasCut(entry))
    && (!text || `${entry.question} ${entry.problem}`.toLowerCase().includes(text)));
  const order = ORDERS[oneOf(ORDERS, place.order)][1];
  if (order) left.sort(order);
  performance.clearMeasures("filter");
  performance.measure("filter", { start });
  return left;
}

function stepOr(text, otherwise) {
  return /^\d+$/.test(text) ? Number(text) : otherwise;
}

/** Whether a trace asked an agent ("=name"), or nobody ("none"). */
function asked(entry, agent) {
  return agent === "none" ? !consultsOf(entry) : Object.hasOwn(entry.consults, agent.slice(1));
}

function Choice({ label, value, options, onChange, testid }) {
  return html`<label class="choice"><span>${label}</span>
    <select value=${value} data-testid=${testid} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([name, text]) => html`<option key=${name} value=${name}
        selected=${name === value}>${text}</option>`)}
    </select>
  </label>`;
}

/** The filters over the list. `entries`: all of the run; `left`: those that the filters leave. */
function Filters({ run, entries, left, place, go, search }) {
  const statuses = useMemo(() => [...new Set(entries.map((entry) => entry.status))].sort(), [entries]);
  const cutShort = useMemo(() => entries.filter(wasCut).length, [entries]);
  const sorts = sortsOf(run.agents);
  const filtered = FILTERS.some((name) => place[name] !== "");
  const set = (name) => (value) => go({ [name]: value });
  const clear = (event) => {
    event.target.closest(".side").querySelector(".list").focus();
    go(Object.fromEntries(FILTERS.map((name) => [name, ""])));
  };
  return html`<div class="filters" role="search" aria-label="filter traces">
    <${Steps} entries=${entries} left=${left} place=${place} go=${go} sorts=${sorts} />
    <details class="choices-fold" open=${!NARROW.matches}><summary>filters</summary><div
      class="choices">
      <${Choice} label="reward" testid="filter-reward" value=${place.reward} onChange=${set("reward")}
        options=${[["", "all"], ["solved", "solved"], ["partly", "partly"], ["unsolved", "not solved"]]} />
      <${Choice} label="ran" testid="filter-help" value=${place.help} onChange=${set("help")}
        options=${[["", "all"], ["with", sorts.with_agents], ["alone", sorts.alone]]} />
      ${run.agents.length > 0 && html`<${Choice} label="consulted" testid="filter-agent" value=${place.agent} onChange=${set("agent")}
        options=${[["", "any or none"], ...run.agents.map((name) => [`=${name}`, spelt(name)]), ["none", "nobody"]]} />`}
      <${Choice} label="status" testid="filter-status" value=${place.status} onChange=${set("status")}
        options=${[["", "all"], ...statuses.map((name) => [name, spelt(name)])]} />
    </div></details>
    <div class="filter-row">
      <input type="search" ref=${search} placeholder="question or id" aria-label="search by question or problem id"
        data-testid="filter-text"
        value=${place.text} onInput=${(event) => go({ text: event.target.value })} />
      <button type="button" class="button chip" aria-pressed=${String(Boolean(place.failures))}
        data-testid="filter-failures"
        disabled=${!cutShort && !place.failures} onClick=${() => go({ failures: place.failures ? "" : "1" })}
      >failures <b>${grouped(cutShort)}</b></button>
    </div>
    <div class="filter-row count">
      <span role="status" data-testid="count">
        <b>${grouped(left.length)}</b> of ${plural(entries.length, "trace")}</span>
      <button type="button" class="link" disabled=${!filtered} data-testid="clear"
        onClick=${clear}>clear</button>
      <select class="order" aria-label="order" value=${place.order}
        onChange=${(event) => go({ order: event.target.value })}>
        ${Object.entries(ORDERS).map(([name, [label]]) => html`<option key=${name} value=${name}
          selected=${name === place.order}>${label}</option>`)}
      </select>
    </div>
  </div>`;
}

/** Mean reward by step of what the other filters leave, over a pair of sliders that choose the steps. */
function Steps({ entries, left, place, go, sorts }) {
  const [low, high] = useMemo(() => stepsOf(entries), [entries]);
  const from = clamp(stepOr(place.from, low), low, high);
  const to = clamp(stepOr(place.to, high), from, high);
  const choose = (start, end) => go({ from: start <= low ? "" : String(start), to: end >= high ? "" : String(end) });
  const stepAt = (event) => clamp(Number(event.target.value), low, high);
  const begin = (event) => choose(stepAt(event), Math.max(stepAt(event), to));
  const end = (event) => choose(Math.min(from, stepAt(event)), stepAt(event));
  const means = useMemo(() => meansByStep(left), [left]);
  const share = (step) => (high > low ? (step - low + 0.5) / (high - low + 1) : 0.5);
  const spot = ([step, mean]) => `${share(step)} ${0.95 - 0.9 * mean}`;
  const curve = (points) => (points.length ? `M${points.map(spot).join("L")}h0.001` : "");
  return html`<div class="steps" data-testid="filter-step">
    <div class="steps-label"><span>steps</span>
      <${StepField} label="first step" min=${low} max=${high} value=${from} testid="step-from" onChange=${begin} />
      <span>to</span>
      <${StepField} label="last step" min=${low} max=${high} value=${to} testid="step-to" onChange=${end} />
      <span class="steps-key"><i class="key alone"></i>${sorts.alone} <i class="key with"></i>${sorts.with_agents}</span>
    </div>
    <svg class="strip" viewBox="0 0 1 1" preserveAspectRatio="none" role="img"
      aria-label=${`mean reward by step, ${sorts.alone} and ${sorts.with_agents}`}>
      <rect class="chosen" x=${share(from) - 0.5 / (high - low + 1)} width=${(to - from + 1) / (high - low + 1)} y="0"
        height="1" />
      ${["with", "alone"].map((name) => html`<path key=${name} class=${name} d=${curve(means[name])} />`)}
    </svg>
    <div class="sliders">
      <input type="range" aria-label="first step" min=${low} max=${high} value=${from}
        onInput=${begin} />
      <input type="range" aria-label="last step" min=${low} max=${high} value=${to}
        onInput=${end} />
    </div>
  </div>`;
}

/** A field for a number, set only when the number changes: what is being typed survives a drawing in between. */
function StepField({ label, min, max, value, testid, onChange }) {
  const field = useRef(null);
  useEffect(() => { field.current.value = value; }, [value]);
  return html`<input type="number" ref=${field} aria-label=${label} min=${min} max=${max} data-testid=${testid}
    onChange=${onChange} />`;
}

function stepsOf(entries) {
  let low = Infinity;
  let high = -Infinity;
  for (const { step } of entries) { low = Math.min(low, step); high = Math.max(high, step); }
  return entries.length ? [low, high] : [1, 1];
}

/** {alone, with}: pairs (step, mean reward between 0 and 1). */
function meansByStep(entries) {
  const sums = { alone: new Map(), with: new Map() };
  for (const entry of entries) {
    if (unscored(entry)) continue;
    const of = sums[entry.withAgents ? "with" : "alone"];
    const [sum, count] = of.get(entry.step) || [0, 0];
    of.set(entry.step, [sum + entry.reward, count + 1]);
  }
  const line = (of) => [...of].sort(([one], [two]) => one - two)
    .map(([step, [sum, count]]) => [step, clamp(sum / count, 0, 1)]);
  return { alone: line(sums.alone), with: line(sums.with) };
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
