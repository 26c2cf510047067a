"use strict";

const BEAT_MS = 130;
const CALM = matchMedia("(prefers-reduced-motion: reduce)");
const TITLES = {};
const MOST_VOTES = 4;
const SHADES = ["source", "logprob"];
const GONE = "The server does not answer. Is it still running?";

/** What the server says against a request, and the field that it is about. */
class Refusal extends Error {
  constructor(text) {
    super(text);
    this.field = ["mode", "samples", "temperature", "seed"].find((name) => text.startsWith(`${name} = `)) ?? "question";
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(GONE);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  throw new Refusal(said.error);
}

async function getJson(path) {
  return (await request(path)).json();
}

function post(path, body = {}, signal = null) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** Asks, and calls `onEvent` with each event of the answer; returns when the server has ended it. */
async function stream(form, onEvent, signal) {
  const reader = (await post("/ask", form, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let last = null;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      last = JSON.parse(event.slice("data: ".length));
      onEvent(last);
    }
  }
  if (last?.event !== "end") throw new Refusal("The server broke off. What went wrong stands in its terminal.");
}

/** Hands on events: of each run, no node faster than people can see. */
class Pace {
  constructor(apply, onIdle) {
    this.apply = apply;
    this.onIdle = onIdle;
    this.runs = new Map();
    this.ended = false;
  }

  push(event) {
    if (event.run === undefined) {
      this.apply(event);
      return;
    }
    const waiting = this.runs.get(event.run) || { events: [], timer: null };
    this.runs.set(event.run, waiting);
    waiting.events.push(event);
    if (!waiting.timer) this.next(event.run, waiting);
  }

  next(run, waiting) {
    waiting.timer = null;
    while (waiting.events.length) {
      const event = waiting.events.shift();
      this.apply(event);
      if (event.event === "node" && !CALM.matches && !document.hidden) {
        waiting.timer = setTimeout(() => this.next(run, waiting), BEAT_MS);
        return;
      }
    }
    this.runs.delete(run);
    this.settle();
  }

  /** Nothing more will come: idle once all is shown. */
  end() {
    this.ended = true;
    this.settle();
  }

  settle() {
    if (this.ended && !this.runs.size) this.onIdle();
  }

  hurry() {
    for (const { events, timer } of this.runs.values()) {
      clearTimeout(timer);
      events.forEach(this.apply);
    }
    this.runs.clear();
    this.settle();
  }

  drop() {
    for (const { timer } of this.runs.values()) clearTimeout(timer);
    this.runs.clear();
    this.ended = false;
  }
}

/** What is shown of a question: its traces so far by their number. */
function openAsked({ thread, question, planned, traces = [] }) {
  const runs = planned.map((plan) => ({ ...plan, path: [], segments: [], active: null, status: null }));
  for (const trace of traces) runs[trace.number] = { ...trace, active: null };
  return { thread, question, runs };
}

/** The question as it stands after an event. */
function after(asked, event) {
  if (event.event === "asked") return openAsked(event);
  if (!asked || event.run === undefined) return asked;
  const runs = [...asked.runs];
  const run = runs[event.run];
  if (event.event === "node") runs[event.run] = { ...run, path: [...run.path, event.node], active: event.node };
  if (event.event === "segments") runs[event.run] = { ...run, segments: [...run.segments, ...event.segments] };
  if (event.event === "trace") runs[event.run] = { ...event.trace, active: null };
  return { ...asked, runs };
}

/** The answers of one side with their votes, most first; a right and a wrong one that are written alike stay two. */
function votesOf(runs) {
  const votes = new Map();
  for (const run of runs.filter((run) => run.vote)) {
    const key = JSON.stringify([run.vote, run.right]);
    const vote = votes.get(key) || { answer: run.answer, right: run.right, samples: [] };
    vote.samples.push(run.sample);
    votes.set(key, vote);
  }
  return [...votes.values()].sort((one, two) => two.samples.length - one.samples.length);
}

/** "right", "wrong", "answered", "silent", "failed", "stopped", "running" or, of one that its server left, "lost". */
function stateOf(run, running) {
  if (!run.status) return running ? "running" : "lost";
  if (run.status === "stopped") return "stopped";
  if (["failed", "timeout", "leaked"].includes(run.status)) return "failed";
  if (run.right !== null) return run.right ? "right" : "wrong";
  return run.answer === null ? "silent" : "answered";
}

const STATES = {
  right: ["✓", "right"], wrong: ["✗", "wrong"], answered: ["•", "answered"], silent: ["–", "no answer"],
  failed: ["!", "failed"], stopped: ["■", "stopped"], running: ["…", "running"], lost: ["?", "not finished"], tied: ["=", "tied"],
};

/** What came of one side: of one sample its state, of several that of their vote. */
function Badge({ runs, running }) {
  const states = runs.map((run) => stateOf(run, running));
  const [first, second] = votesOf(runs);
  const vote = first && (first.samples.length === second?.samples.length ? "tied" : isKnown(first.right) ? first.right ? "right" : "wrong" : "answered");
  const state = runs.length === 1 || !vote || states.includes("running") ? states.find((one) => one === "running") || states[0] : vote;
  return html`<span class=${`badge ${state}`} data-testid="badge">${runs.length > 1 && state === vote ? "vote: " : ""}${STATES[state].join(" ")}</span>`;
}

/** What came of one side, in words. */
function verdict(runs, running) {
  const ended = runs.filter((run) => run.status).length;
  if (ended < runs.length && running) return runs.length === 1 ? "running" : `${ended} of ${runs.length} done`;
  if (runs.length === 1) {
    const state = STATES[stateOf(runs[0], running)][1];
    return runs[0].answer ? `${runs[0].answer}, ${state}` : state;
  }
  const known = runs.some((run) => isKnown(run.right));
  const right = runs.filter((run) => run.right).length;
  return known ? `${right} of ${runs.length} right; ${majority(runs)}` : majority(runs);
}

function majority(runs) {
  const [first, second] = votesOf(runs);
  if (!first) return "no votes";
  if (second?.samples.length === first.samples.length) return "the vote is tied";
  const verdict = isKnown(first.right) ? `, ${first.right ? "right" : "wrong"}` : "";
  return `the vote goes to ${first.answer}${verdict}`;
}

function isKnown(value) {
  return value !== null && value !== undefined;
}

function Field({ name, label, error, children }) {
  return html`<label class=${classes("field", error?.field === name && "invalid")}>
    <span>${label}</span>${children}
  </label>`;
}

function AskForm({ about, form, setForm, error, running, onAsk, onStop, onSample }) {
  const [kind, setKind] = useState(about.kinds[0]);
  const box = useRef(null);
  useEffect(() => {
    box.current.style.height = "auto";
    box.current.style.height = `${Math.min(box.current.scrollHeight + 2, 260)}px`;
  }, [form.question]);
  const set = (name) => (event) => setForm({ ...form, [name]: event.target.value });
  const bad = (name) => (error?.field === name ? { "aria-invalid": "true", "aria-describedby": "error" } : {});
  const number = (name, step, min, max) => html`<input type="number" inputmode="decimal" min=${min} max=${max}
    step=${step} value=${form[name]} onInput=${set(name)} data-testid=${name} ...${bad(name)} />`;
  const onKeyDown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!event.repeat) onAsk();
  };
  return html`<form class="card ask" noValidate onSubmit=${(event) => { event.preventDefault(); onAsk(); }}>
    <label class="question-label" for="question">Question</label>
    <div class="question">
      <textarea id="question" ref=${box} rows="1" value=${form.question}
        placeholder=${about.example && `for example ${about.example}`}
        spellcheck="false" autocomplete="off" onInput=${set("question")} onKeyDown=${onKeyDown}
        data-testid="question" ...${bad("question")} />
      ${running
        ? html`<button class="button stop" type="button" onClick=${(event) => event.detail < 2 && onStop()}
            data-testid="stop">Stop<kbd>Esc</kbd></button>`
        : html`<button class="button primary" type="submit" data-testid="ask">Ask<kbd>↵</kbd></button>`}
    </div>
    ${about.notation && html`<p class="notation muted" data-testid="notation">${about.notation}</p>`}
    <p class="error" id="error" role="alert" data-testid="error">${error && visible(error.message)}</p>
    <div class="options">
      <div class="sampler">
        <button class="button" type="button" onClick=${() => onSample(kind)} data-testid="sample">
          Sample problem</button>
        ${about.kinds.length > 1 && html`<select aria-label="kind of problem" value=${kind} data-testid="kind"
          onChange=${(event) => setKind(event.target.value)}>
          ${about.kinds.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
        </select>`}
      </div>
      <${Switch} label="which graphs" options=${[["both", "Both"], ...Object.entries(TITLES)]} value=${form.mode} testid="mode"
        onChange=${(mode) => setForm({ ...form, mode })} />
      <${Field} name="samples" label="Samples" error=${error}>${number("samples", 1, 1, about.most_samples)}<//>
      <${Field} name="temperature" label="Temperature" error=${error}>${number("temperature", 0.1, 0)}<//>
      <${Field} name="seed" label="Seed" error=${error}>${number("seed", 1, 0)}<//>
    </div>
  </form>`;
}

function Earlier({ earlier, current, onOpen, onForget }) {
  if (!earlier.length) return html`<p class="muted empty">Questions that you ask are kept here as long as the server runs.</p>`;
  return html`<ul data-testid="history">${earlier.map(({ thread, title, traces, asked }) => html`<li key=${thread}
      class=${classes(thread === current && "current")}>
    <button class="open" type="button" aria-current=${thread === current ? "true" : null}
        onClick=${() => onOpen(thread)}>
      <bdi>${visible(cut(title, 120))}</bdi>
      <span class="muted"><time datetime=${asked}>${moment(asked)}</time> · ${plural(traces, "trace")}</span>
    </button>
    <button class="forget" type="button" aria-label="delete this question" title="Delete"
      onClick=${() => onForget(thread)}>×</button>
  </li>`)}</ul>`;
}

function moment(text) {
  const time = new Date(text);
  const today = time.toDateString() === new Date().toDateString();
  return time.toLocaleString([], { dateStyle: today ? undefined : "medium", timeStyle: "short" });
}

function Chips({ runs, running, sample, onSample }) {
  if (runs.length < 2) return null;
  return html`<div class="chips" role="radiogroup" aria-label="sample" onKeyDown=${arrowAlong}>${runs.map((run) => {
    const state = stateOf(run, running);
    const [sign, title] = STATES[state];
    return html`<button key=${run.sample} type="button" role="radio" class=${`chip ${state}`} title=${title}
      aria-checked=${String(run.sample === sample)} tabindex=${run.sample === sample ? 0 : -1}
      onClick=${() => onSample(run.sample)}>${run.sample + 1}<i>${sign}</i></button>`;
  })}</div>`;
}

function Votes({ runs, onSample }) {
  const [all, setAll] = useState(false);
  if (runs.length < 2) return null;
  const votes = votesOf(runs);
  const hidden = all ? 0 : Math.max(0, votes.length - MOST_VOTES);
  const silent = runs.filter((run) => run.status && !run.vote).length;
  return html`<div class="votes" data-testid="votes"><h4>Votes of ${runs.length}</h4>
    ${votes.slice(0, votes.length - hidden).map(({ answer, right, samples }) => html`<button
        key=${JSON.stringify([answer, right])} type="button" class=${classes("vote", right && "right")}
        title="show a trace with this answer" onClick=${() => onSample(samples[0])}>
      <bdi class="answer">${visible(cut(answer, 60))}</bdi>
      <span class="bar"><i style=${{ width: percent(samples.length / runs.length) }}></i></span>
      <span class="count">${samples.length}${right ? html` <b title="the right answer">✓</b>` : ""}</span>
    </button>`)}
    ${hidden > 0 && html`<button class="more" type="button" onClick=${() => setAll(true)}>
      … ${plural(hidden, "more answer")}</button>`}
    ${silent > 0 && html`<p class="muted">${plural(silent, "trace")} without an answer</p>`}
  </div>`;
}

/** One side: how the samples voted, the graph, what was written. */
function Side({ about, mode, runs, running, sample, shade, onSample }) {
  const graph = about.graphs[mode];
  const run = runs.find((made) => made.sample === sample) || runs[0];
  const [step, setStep] = useState(null);
  const [node, setNode] = useState(null);
  const visits = useMemo(() => visitOfSegments(run), [run]);
  const marks = useMemo(() => new Map(run.segments.map((segment, index) => [segment, visits[index]])), [run]);
  const lit = (segment) => (node === null ? step !== null && marks.get(segment) === step : segment.author === node);
  const state = stateOf(run, running);
  const box = useRef(null);
  useEffect(() => {
    if (state === "running") box.current.scrollTop = box.current.scrollHeight;
  }, [run.segments.length, state]);
  return html`<section class="card side" aria-label=${TITLES[mode]} data-testid=${`side-${mode}`} data-state=${state}>
    <header><h3>${TITLES[mode]}</h3><${Badge} runs=${runs} running=${running} /></header>
    <div class="tally"><${Chips} runs=${runs} running=${running} sample=${run.sample} onSample=${onSample} />
      <${Votes} runs=${runs} onSample=${onSample} /></div>
    <div class="picture" style=${{ maxWidth: `${graph.width}px` }}>${run.status
      ? html`<${PathPlayer} graph=${graph} trace=${run} onStep=${setStep} onNode=${setNode} />`
      : html`<${GraphPicture} graph=${graph} path=${run.path} active=${run.active} ended=${false} />`}</div>
    <div class="written">
      ${run.error && html`<p class="fault" data-testid="fault">${visible(run.error)}</p>`}
      <div class="transcript" tabindex="0" role="region" aria-label=${`what was written: ${TITLES[mode]}`} ref=${box}>
        <${TraceTokens} trace=${run} colour=${shade} marked=${lit} />
        ${state === "running" && html`<p class="writing muted"><i></i><bdi>${visible(run.active || "waits")}</bdi></p>`}
      </div>
      ${run.status && html`<${Facts} about=${about} run=${run} />`}
    </div>
  </section>`;
}

function Facts({ about, run }) {
  const tokens = {};
  for (const { source, tokens: written } of run.segments) tokens[source] = (tokens[source] || 0) + written.length;
  const consults = run.segments.filter((segment) => segment.source === "agent").length;
  const facts = [
    ["answer", run.answer === null ? "–" : html`<bdi>${visible(cut(run.answer, 80))}</bdi>`],
    ...(isKnown(run.reward) ? [["reward", fixed(run.reward)]] : []),
    ...(about.agents.length || consults ? [["consults", grouped(consults)]] : []),
    ["sampled tokens", grouped(tokens.policy || 0)],
    ...(run.status === "done" ? [] : [["ended", run.status]]),
    ...Object.entries(run.scores).filter(([name, value]) => value && ["violation", "leaks"].includes(name)),
  ];
  return html`<dl class="facts">
    ${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function Result({ about, asked, running }) {
  const [sample, setSample] = useState(0);
  const [shade, setShade] = useState("source");
  useEffect(() => setSample(0), [asked.thread]);
  const { question, runs } = asked;
  const sides = Object.keys(TITLES)
    .map((mode) => [mode, runs.filter((run) => run.with_agents === (mode === "with_agents"))])
    .filter(([, made]) => made.length);
  return html`<section class="result" aria-label="answer" data-testid="result" data-running=${String(running)}>
    <header class="asked"><h2><bdi><${Clipped} text=${question.question} limit=${500} keep=${400} /></bdi></h2>
      ${question.answer && html`<span class="known">right answer <b><bdi>${visible(question.answer)}</bdi></b></span>`}
      <span class="muted">temperature ${fixed(question.temperature)} · seed ${question.seed}</span></header>
    <p class="said" role="status" aria-live="polite" data-testid="said">
      ${sides.map(([mode, made]) => html`<span key=${mode}>
        <b>${TITLES[mode]}</b> ${visible(verdict(made, running))}</span>`)}
    </p>
    <div class="colouring">
      <${Switch} label="colour tokens by" options=${SHADES.map((name) => [name, COLOURS[name].label])} value=${shade}
        testid="colour" onChange=${setShade} />
      <${Legend} colour=${shade} />
    </div>
    <div class="sides">${sides.map(([mode, made]) => html`<${Side} key=${mode} about=${about} mode=${mode}
      runs=${made} running=${running} sample=${sample} shade=${shade} onSample=${setSample} />`)}</div>
  </section>`;
}

/** The question shown, whether it runs, what is wrong, the earlier ones, and what a person may do with them. */
function useConversation(form, setForm) {
  const [asked, setAsked] = useState(null);
  const [running, setRunning] = useState(false);
  const [error, setError] = useState(null);
  const [earlier, setEarlier] = useState([]);
  const current = useRef(null);
  const pace = useMemo(
    () => new Pace((event) => setAsked((before) => after(before, event)), () => setRunning(false)), [],
  );
  const guarded = async (work) => {
    setError(null);
    try {
      await work();
    } catch (failure) {
      if (failure.name !== "AbortError") setError(failure);
    }
  };
  const remember = async () => setEarlier(await getJson("/history"));
  const leave = () => { current.current?.abort.abort(); current.current = null; pace.drop(); setRunning(false); };
  const begin = (asking) => { leave(); current.current = asking; setRunning(true); showAddress(asking.thread); };
  const ask = (words = {}) => guarded(async () => {
    const asks = { ...form, ...words };
    setForm(asks);
    const asking = { abort: new AbortController(), thread: null };
    // What is refused leaves the question that runs alone.
    const onEvent = (event) => {
      if (event.event === "asked") { asking.thread = event.thread; begin(asking); }
      if (current.current !== asking) return;
      pace.push(event);
    };
    try {
      const { question, mode } = asks;
      const [samples, temperature, seed] = [asks.samples, asks.temperature, asks.seed].map(numberIn);
      await stream({ question, mode, samples, temperature, seed }, onEvent, asking.abort.signal);
    } finally {
      if (current.current === asking) { pace.end(); await remember(); }
    }
  });
  const stop = () => guarded(async () => { pace.hurry(); await post(`/stop?id=${current.current.thread}`); });
  const open = (thread) => guarded(async () => {
    const stored = await getJson(`/thread?id=${encodeURIComponent(thread)}`);
    leave();
    const { question, mode, samples, temperature, seed } = stored.question;
    setAsked(openAsked({ thread, ...stored }));
    setForm({ question, mode, samples, temperature, seed });
    showAddress(thread);
  });
  const forget = (thread) => guarded(async () => {
    if (asked?.thread === thread) { leave(); setAsked(null); showAddress(""); }
    await post(`/forget?id=${thread}`);
    await remember();
  });
  const sample = (kind) => guarded(async () => {
    const { question } = await getJson(`/sample?kind=${encodeURIComponent(kind)}`);
    setForm((before) => ({ ...before, question }));
  });
  const refresh = () => remember().catch(setError);
  return { asked, running, error, earlier, ask, stop, open, forget, sample, refresh };
}

function numberIn(text) {
  return String(text).trim() === "" ? null : Number(text);
}

/** The address names the question shown, so that a reload shows it again. */
function showAddress(thread) {
  history.replaceState(null, "", thread ? `#${thread}` : location.pathname);
}

function Demo({ about }) {
  const [form, setForm] = useState(about.asks);
  const talk = useConversation(form, setForm);
  useEffect(() => {
    talk.refresh();
    if (location.hash) talk.open(location.hash.slice(1));
    // Another tab may have asked meanwhile.
    window.addEventListener("focus", talk.refresh);
    return () => window.removeEventListener("focus", talk.refresh);
  }, []);
  useEffect(() => {
    const onKeyDown = (event) => { if (event.key === "Escape" && talk.running) talk.stop(); };
    document.addEventListener("keydown", onKeyDown);
    return () => document.removeEventListener("keydown", onKeyDown);
  }, [talk.running]);
  return html`<header class="top">
    <h1>aipo_graph <span class="muted">demo</span></h1>
    <span class="model" title=${about.model}><bdi>${visible(about.model)}</bdi></span>
    <${ThemeButton} />
  </header>
  <div class="page">
    <div class="main">
      <${AskForm} about=${about} form=${form} setForm=${setForm} error=${talk.error} running=${talk.running}
        onAsk=${talk.ask} onStop=${talk.stop} onSample=${talk.sample} />
      ${talk.asked
        ? html`<${Result} about=${about} asked=${talk.asked} running=${talk.running} />`
        : html`<${Welcome} about=${about} onAsk=${talk.ask} />`}
    </div>
    <aside class="card earlier" aria-label="earlier questions"><h2>Earlier questions</h2>
      <${Earlier} earlier=${talk.earlier} current=${talk.asked?.thread} onOpen=${talk.open}
        onForget=${talk.forget} /></aside>
  </div>`;
}

/** What stands there before the first question. */
function Welcome({ about, onAsk }) {
  const words = {
    alone: "The policy answers by itself.",
    with_agents: about.agents.length
      ? `The policy may ask ${about.agents.join(", ")}; what they reply stands among its own words.`
      : "The policy runs in its graph, with its tools.",
  };
  return html`<section class="welcome" aria-label="what this page shows">
    <p>Ask a question: the policy, which is the language model that is trained, answers it
      by itself and in its graph, while you watch.
      ${about.example && html` <button class="button" type="button" data-testid="example"
        onClick=${() => onAsk({ question: about.example })}>Try <bdi>${visible(cut(about.example, 60))}</bdi></button>`}
    </p>
    <div class="sides">${Object.keys(TITLES).map((mode) => html`<div class="card side" key=${mode}>
      <h3>${TITLES[mode]}</h3>
      <p class="muted">${words[mode]}</p>
      <div class="picture" style=${{ maxWidth: `${about.graphs[mode].width}px` }}>
        <${GraphPicture} graph=${about.graphs[mode]} /></div>
    </div>`)}</div>
  </section>`;
}

getJson("/about").then(
  (about) => {
    const sorts = Object.entries(sortsOf(about.agents));
    Object.assign(TITLES, Object.fromEntries(sorts.map(([mode, name]) => [mode, name[0].toUpperCase() + name.slice(1)])));
    render(html`<${Demo} about=${about} />`, document.getElementById("app"));
  },
  (failure) => render(html`<p class="fault">${failure.message}</p>`, document.getElementById("app")),
);
