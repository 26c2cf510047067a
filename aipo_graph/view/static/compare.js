"use strict";

/** One trace in a column: what is said of it, and its tokens. */
function TraceCard({ trace, entry, colour, run = null, graph = null, onOpen = null }) {
  return html`<section class="card trace-card" data-testid="trace-card" data-key=${entry.key}
    aria-label=${`trace ${entry.member + 1}`}>
    <header>
      <div class="title"><${Mark} entry=${entry} />
        <h3>${onOpen ? html`<button type="button" class="link"
          onClick=${onOpen}>#${entry.member + 1}</button>` : `#${entry.member + 1}`}</h3>
        <${HelpTag} entry=${entry} />
        ${wasCut(entry) && html`<span class="tag bad">${entry.status}</span>`}
        ${run && html`<span class="tag">step ${entry.step}</span>`}
      </div>
      <dl class="card-facts number">
        <div><dt>reward</dt><dd>${fixed(entry.reward)}</dd></div>
        <div><dt>advantage</dt><dd
          class=${classes(entry.advantage > 0 && "good", entry.advantage < 0 && "bad")}
        >${signed(entry.advantage) || "–"}</dd></div>
        <div><dt>tokens</dt><dd>${grouped(entry.tokens)}</dd></div>
        ${Object.entries(entry.consults).map(([name, count]) => html`<div key=${name}><dt>${visible(name)}</dt><dd>${count}</dd></div>`)}
      </dl>
      ${entry.error !== null && html`<p class="reason"><${Clipped} text=${entry.error} limit=${200} keep=${160} /></p>`}
    </header>
    ${graph && html`<${GraphPicture} graph=${graph} path=${trace.path} ended=${!wasCut(entry)} />`}
    <${NoColours} trace=${trace} colour=${colour} />
    <${TraceTokens} trace=${trace} colour=${colour} />
  </section>`;
}

/** The G siblings of a problem side by side. */
function GroupView({ runs, source, entry, all, colour, go }) {
  const entries = useMemo(() => groupOf(all, entry), [all, entry.run, entry.group]);
  const { loaded, error } = useTraces(source, entries);
  if (!loaded) return html`<${Waiting} error=${error} />`;
  const sorts = [...new Set(entries.map((one) => one.sort))];
  const mean = (sort) => meanReward(entries.filter((one) => one.sort === sort && !unscored(one)));
  const { about } = loaded[0].trace;
  return html`<article class="group" data-testid="group">
    <div class="card head">
      <div class="about">
        <div class="title"><h2 title=${visible(entry.problem)}><bdi><${Clipped} text=${about.question} /></bdi></h2></div>
        <div class="chips">
          ${runs.length > 1 && html`<span class="tag"><bdi>${runs[entry.run].name}</bdi></span>`}
          <span class="tag">step ${entry.step}</span><span class="tag">${plural(entries.length, "sibling")}</span>
        </div>
        <dl class="facts">
          <dt>right answer</dt><dd class="quote"><${Clipped} text=${about.answer} /></dd>
          <dt>mean reward</dt><dd>${sorts.map((sort, i) => html`${i ? " · " : ""}<b>${fixed(mean(sort), 2)}</b> ${sort}`)}</dd>
        </dl>
      </div>
      <div class="graph-panel"><${GraphOfMany} graph=${runs[entry.run].graph} source=${source} entries=${entries} />
        </div>
    </div>
    <div class="siblings" tabindex="0" role="group" aria-label="siblings, scroll sideways">
      ${loaded.map(({ entry: one, trace }) => html`<${TraceCard} key=${one.key} trace=${trace} entry=${one}
        colour=${colour}
        onOpen=${() => go({ view: "trace", trace: one.key })} />`)}
    </div>
  </article>`;
}

function meanReward(entries) {
  return entries.length ? entries.reduce((sum, entry) => sum + entry.reward, 0) / entries.length : null;
}

function sceneOf(entry) {
  return `${entry.run}.${entry.step}`;
}

/** Problems that stand in more than one (run, step), with their entries. */
function sharedProblems(all) {
  const found = new Map();
  for (const entry of all.values()) {
    if (!found.has(entry.problem)) found.set(entry.problem, []);
    found.get(entry.problem).push(entry);
  }
  return [...found].filter(([, entries]) => new Set(entries.map(sceneOf)).size > 1);
}

/** What to compare a trace with: its like in another run, else at another step, else a sibling of the other sort; best one that ended otherwise. */
function partnerOf(entry, entries) {
  const score = (one) => 4 * (one.run !== entry.run) + 2 * (one.step !== entry.step)
    + ((one.withAgents === entry.withAgents) === (sceneOf(one) !== sceneOf(entry)))
    + (outcomeOf(one) !== outcomeOf(entry)) / 2;
  const others = entries.filter((one) => one.key !== entry.key);
  return others.reduce((best, one) => (!best || score(one) > score(best) ? one : best), null);
}

/** The last trace alone of the first run, else any, whose like in another run ended otherwise: what two runs are opened with. */
function tellingOf(all) {
  const pairs = sharedProblems(all).flatMap(([, entries]) => entries.filter(({ run }) => run === 0)
    .map((one) => [one, partnerOf(one, entries)]));
  const score = ([one, two]) => 2 * (one.run !== two.run && outcomeOf(one) !== outcomeOf(two)) + !one.withAgents;
  return pairs.reduce((best, pair) => (!best || score(pair) >= score(best) ? pair : best), null)?.[0];
}

/** Two traces of one problem side by side: at two steps, in two runs, or two siblings. */
function Compare({ runs, source, entry, all, colour, place, go }) {
  const shared = useMemo(() => sharedProblems(all), [all]);
  const telling = useMemo(() => (runs.length > 1 && !place.a ? tellingOf(all) : null), [all, place.a]);
  const a = all.get(place.a) || telling || entry;
  const same = useMemo(() => [...all.values()].filter((one) => one.problem === a.problem), [all, a.problem]);
  const b = same.find((one) => one.key === place.b) || partnerOf(a, same);
  const elsewhere = new Set(same.map(sceneOf)).size > 1;
  const both = useTraces(source, b ? [a, b] : [a]);
  const questions = new Set(both.loaded?.map(({ trace }) => trace.about.question));
  const chooseProblem = (name) => {
    const entries = shared.find(([problem]) => problem === name)[1];
    go({ a: entries[0].key, b: partnerOf(entries[0], entries).key });
  };
  return html`<article class="compare" data-testid="comparison">
    <div class="card compare-bar">
      ${shared.length ? html`<label class="choice wide">
        <span>${plural(shared.length, "problem")} seen in more than one run or step</span>
          <select data-testid="compare-problem" value=${elsewhere ? a.problem : ""}
            onChange=${(event) => event.target.value && chooseProblem(event.target.value)}>
            ${!elsewhere && html`<option value="" selected>choose one …</option>`}
            ${shared.map(([name]) => html`<option key=${name} value=${name}
              selected=${name === a.problem}>${spelt(name)}</option>`)}
          </select></label>`
        : html`<p class="muted"
          data-testid="nothing-shared">No problem stands here in two runs or at two steps: each is recorded once.
            Give the page a second run with the same seed to compare them; siblings can be compared as they are.</p>`}
      ${shared.length > 0 && !elsewhere && html`<p class="muted"><b><bdi>${visible(cut(a.problem, 120))}</bdi>
        </b> is recorded once only; below are two of its siblings.</p>`}
      ${questions.size > 1 && html`<p class="bad"
        data-testid="different-questions">The two have the same problem id but different questions:
        the runs drew their problems from different seeds or data.</p>`}
    </div>
    <div class="pair">
      ${both.error && html`<${Waiting} error=${both.error} />`}
      ${[["A", a, "a"], ["B", b, "b"]].map(([name, one, side], index) => html`<${Compared} key=${side} name=${name}
        entry=${one} entries=${same}
        runs=${runs} loaded=${both.loaded?.find((found) => found.entry.key === one?.key)} colour=${colour}
          onChoose=${(key) => go({ a: a.key, b: b?.key || "", [side]: key })} />`)}
    </div>
  </article>`;
}

function Compared({ name, entry, entries, runs, loaded, colour, onChoose }) {
  if (!entry) return html`<p class="muted">This problem has one trace only.</p>`;
  const scenes = [...new Set(entries.map(sceneOf))];
  return html`<div class="compared" data-testid=${`compare-${name.toLowerCase()}`}>
    <label class="choice wide"><span><b>${name}</b></span>
      <select value=${entry.key} aria-label=${`trace ${name}`} onChange=${(event) => onChoose(event.target.value)}>
        ${scenes.map((scene) => html`<optgroup key=${scene} label=${sceneName(scene, runs)}>
          ${entries.filter((one) => sceneOf(one) === scene).map((one) => html`<option key=${one.key} value=${one.key}
            selected=${one.key === entry.key}>${nameOf(one, scene, runs)}</option>`)}
        </optgroup>`)}
      </select></label>
    ${loaded && html`<${TraceCard} key=${entry.key} trace=${loaded.trace} entry=${entry} colour=${colour}
      run=${runs[entry.run]} graph=${runs[entry.run].graph} />`}
  </div>`;
}

function sceneName(scene, runs) {
  const [run, step] = scene.split(".").map(Number);
  return `${runs.length > 1 ? `${runs[run].name}, ` : ""}step ${step}`;
}

function nameOf(entry, scene, runs) {
  const outcome = wasCut(entry) ? entry.status : outcomeOf(entry) === "unsolved" ? "not solved" : outcomeOf(entry);
  return `${sceneName(scene, runs)} · #${entry.member + 1} ${entry.sort} · ${outcome}`;
}
