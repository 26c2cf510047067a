"use strict";

const TABS = [["traces", "Traces"], ["dashboard", "Dashboard"], ["settings", "Settings"]];
const KEYS = [
  ["j k ↓ ↑", "next, previous trace"], ["g", "group: the siblings side by side"], ["p", "compare this trace"],
  ["c", "next colouring"], ["← →", "from token to token, once one has the focus"], ["/", "search for a problem"],
  ["d", "dark or light"], ["?", "this help"], ["Esc", "close"],
];

function Viewer({ source, first }) {
  const [runs, setRuns] = useState(first.runs);
  const [lost, setLost] = useState(null);
  const [follow, setFollow] = useState(false);
  const [help, setHelp] = useState(false);
  const [theme, setTheme] = useTheme();
  const [place, go] = usePlace();
  useEffect(() => source.follow((index) => setRuns(index.runs), setLost), [source]);
  useEffect(() => {
    const onKey = (event) => {
      if (event.key === "Escape") setHelp(false);
      if (event.ctrlKey || event.metaKey || event.altKey || isWriting(event.target)) return;
      if (event.key === "?") setHelp((shown) => !shown);
      if (event.key === "d") setTheme(theme === "dark" ? "light" : "dark");
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });
  const tab = TABS.some(([name]) => name === place.tab) ? place.tab : "traces";
  return html`
    <${Header} runs=${runs} tab=${tab} go=${go} onHelp=${() => setHelp(true)}
      live=${source.live} follow=${follow} setFollow=${setFollow} lost=${lost} />
    <${Notes} runs=${runs} />
    <div class="tab" id="panel" role="tabpanel" aria-labelledby=${`tab-${tab}`}>
      ${tab === "traces" && html`<${Traces} runs=${runs} source=${source} place=${place} go=${go}
        follow=${follow} setFollow=${setFollow} />`}
      ${tab === "dashboard" && html`<div class="dashboard-tab"><${Dashboard} runs=${runs} /></div>`}
      ${tab === "settings" && html`<${Settings} runs=${runs} version=${first.version} />`}
    </div>
    ${help && html`<${Help} onClose=${() => setHelp(false)} />`}`;
}

function Header({ runs, tab, go, onHelp, live, follow, setFollow, lost }) {
  return html`<header class="top">
    <h1>${runs.map((run, index) => html`<span key=${index} class="run-name">${index > 0 && html`<span
      class="muted"> and </span>`}<bdi
      title=${run.folder}>${run.name}</bdi> <${State} run=${run} lost=${lost} /></span>`)}</h1>
    <div class="tabs" role="tablist" aria-label="views" onKeyDown=${arrowAlong}>
      ${TABS.map(([name, label]) => html`<button key=${name} id=${`tab-${name}`} type="button" role="tab"
        aria-selected=${String(name === tab)} aria-controls="panel" tabindex=${name === tab ? 0 : -1}
        data-testid=${`tab-${name}`} onClick=${() => go({ tab: name })}>${label}</button>`)}
    </div>
    <div class="tools">
      ${live && html`<button type="button" class="button" aria-pressed=${String(follow)} data-testid="follow"
        onClick=${() => setFollow(!follow)}>follow</button>`}
      <${ThemeButton} />
      <button type="button" class="button" onClick=${onHelp} aria-label="keyboard help">?</button>
    </div>
  </header>`;
}

function State({ run, lost }) {
  const steps = run.metrics.step?.at(-1) || 0;
  const state = lost ? "connection lost" : run.state;
  return html`<span class=${`state ${lost ? "stopped" : run.state}`} title=${lost?.message}
    role=${lost && "alert"}>${state}
    <span class="number"> ${steps}${run.steps ? `/${run.steps}` : ""} steps</span></span>`;
}

/** What a reader has to know about the data: lines left out, traces that are not in the page. */
function Notes({ runs }) {
  const notes = runs.flatMap((run) => [
    ...run.notes,
    ...(run.shown < run.recorded
      ? [`${grouped(run.shown)} of ${grouped(run.recorded)} recorded traces are in this page`] : []),
  ].map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  if (!notes.length) return null;
  return html`<aside class="notes" data-testid="notes" role="note"><ul>${notes.map((note, index) => html`<li
    key=${index}>${visible(note)}</li>`)}</ul></aside>`;
}

/** The settings of the runs, section by section; those in which two runs differ are marked. */
function Settings({ runs, version }) {
  const [only, setOnly] = useState(false);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differs = (name) => runs.some((run) => run.settings[name] !== runs[0].settings[name]);
  const different = names.filter(differs);
  const sections = new Map();
  for (const name of only ? different : names) {
    const section = name.split(".")[0];
    sections.set(section, [...(sections.get(section) || []), name]);
  }
  return html`<div class="settings" data-testid="settings">
    <div class="filter-row">
      <p class="muted">${runs.map((run) => run.folder).join(" and ")} · page made by aipo_graph ${version}</p>
      ${runs.length > 1 && html`<button type="button" class="button" aria-pressed=${String(only)}
        onClick=${() => setOnly(!only)}>${
        different.length ? `only the ${different.length} that differ` : "no setting differs"}</button>`}
    </div>
    <div class="sections">${[...sections].map(([section, keys]) => html`<details key=${section} class="card" open>
      <summary>${section} <span class="muted">${keys.length}</span></summary>
      <table><thead class=${runs.length > 1 ? "" : "unseen-head"}><tr><th
        scope="col">setting</th>${runs.map((run) => html`<th scope="col"><bdi>${run.name}</bdi></th>`)}</tr></thead>
        <tbody>${keys.map((name) => html`<tr key=${name} class=${differs(name) ? "differs" : ""}><th
          scope="row">${name.slice(section.length + 1) || name}</th>
          ${runs.map((run) => html`<td><${Clipped} text=${run.settings[name] ?? "–"} /></td>`)}</tr>`)}</tbody></table>
    </details>`)}</div>
  </div>`;
}

function Help({ onClose }) {
  const box = useRef(null);
  useEffect(() => { box.current.showModal(); }, []);
  return html`<dialog class="keys-help" ref=${box} onClose=${onClose} aria-label="keyboard help"
      onClick=${(event) => event.target === box.current && box.current.close()}>
    <h2>Keyboard</h2>
    <dl>${KEYS.map(([keys, what]) => html`<dt
      key=${what}>${keys.split(" ").map((key) => html`<kbd>${key}</kbd> `)}</dt><dd>${what}</dd>`)}</dl>
    <button type="button" class="button" onClick=${() => box.current.close()}>close</button>
  </dialog>`;
}

function startViewer() {
  const root = document.getElementById("app");
  const source = openSource();
  source.index().then(
    (first) => render(html`<${Viewer} source=${source} first=${first} />`, root),
    (error) => render(html`<p class="empty">This page's data cannot be read: ${error.message}</p>`, root),
  );
}

startViewer();
