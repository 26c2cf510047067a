"use strict";

const POLL = 2000;

/**
 * Where the page's data come from: `index()` and `page(run, n)` give promises; `live` says whether more may come,
 * and then `follow(onIndex, onLost)` calls back at each change or loss of the connection and returns what ends it.
 */
function openSource() {
  return document.body.dataset.source === "live" ? liveSource() : staticSource();
}

function staticSource() {
  const pages = new Map();
  return {
    live: false,
    index: () => unpack("index"),
    page: (run, n) => remembered(pages, `page-${run}-${n}`, unpack),
    follow: () => () => undefined,
  };
}

function liveSource() {
  const pages = new Map();
  let tag = "";
  const read = async (url) => jsonOf(await fetch(url, { cache: "no-store" }));
  const index = async () => {
    const response = await fetch("/index", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (response.status === 304) return null;
    const fresh = await jsonOf(response);
    tag = response.headers.get("ETag") || "";
    pages.clear();
    return fresh;
  };
  return {
    live: true,
    index,
    page: (run, n) => remembered(pages, `/page/${run}/${n}`, read),
    follow: (onIndex, onLost) => polling(index, onIndex, onLost),
  };
}

function polling(index, onIndex, onLost) {
  let timer = 0;
  let ended = false;
  const poll = async () => {
    try {
      const fresh = await index();
      if (!ended) { onLost(null); if (fresh) onIndex(fresh); }
    } catch (error) {
      if (!ended) onLost(error);
    }
    if (!ended) timer = setTimeout(poll, POLL);
  };
  timer = setTimeout(poll, POLL);
  return () => { ended = true; clearTimeout(timer); };
}

async function jsonOf(response) {
  if (!response.ok) throw new Error(`${response.url} answered ${response.status} ${response.statusText}`);
  return response.json();
}

/** The value of `make(key)`, made once; a failed one is made again when asked for again. */
function remembered(values, key, make) {
  if (!values.has(key)) {
    values.set(key, make(key).catch((error) => { values.delete(key); throw error; }));
  }
  return values.get(key);
}

/** A data entry of this page: base64 of gzip of JSON. */
async function unpack(name) {
  const element = document.getElementById(`data-${name}`);
  if (!element) throw new Error(`this page has no data entry "${name}"`);
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

/** One entry per trace of a run, from the index's columns. `key` names it in links: run.group.member. */
function entriesOf(run, place) {
  const columns = run.traces;
  const sorts = sortsOf(run.agents);
  const members = new Map();
  return columns.step.map((step, index) => {
    const group = columns.group[index];
    const member = members.get(group) || 0;
    members.set(group, member + 1);
    const problem = run.problems[columns.problem[index]];
    return {
      key: `${place}.${group}.${member}`, run: place, step, group, member, problem: problem.id, kind: problem.kind,
      question: problem.question || problem.id,
      reward: columns.reward[index], status: columns.status[index], withAgents: Boolean(columns.with_agents[index]),
      sort: sorts[columns.with_agents[index] ? "with_agents" : "alone"],
      tokens: columns.tokens[index], error: columns.error[index], consults: columns.consults[index],
      advantage: columns.advantage[index],
    };
  });
}

function wasCut(entry) {
  return entry.error !== null || UNFINISHED.has(entry.status);
}

/** Whether a trace has no reward that counts: it is learned from as little. */
function unscored(entry) {
  return entry.reward === null || ["failed", "timeout", "leaked"].includes(entry.status);
}

/** "solved", "partly" or "unsolved". */
function outcomeOf(entry) {
  if (entry.reward >= 1 - 5e-7) return "solved";
  return entry.reward > 0 ? "partly" : "unsolved";
}

/** The traces of entries, in their order, a page for each group; `said(done)` is told of each page. */
async function tracesOf(source, entries, said = null) {
  const wanted = [...new Set(entries.map((entry) => `${entry.run}.${entry.group}`))];
  const pages = new Map();
  for (const name of wanted) {
    const [run, page] = name.split(".").map(Number);
    pages.set(name, await source.page(run, page));
    said?.(pages.size / wanted.length);
  }
  return entries.map((entry) => {
    const page = pages.get(`${entry.run}.${entry.group}`);
    const trace = page.traces[entry.member];
    if (trace?.step !== entry.step || trace.problem !== entry.problem) {
      throw new Error(`group ${entry.group} is another one now: the run has changed, reload this page`);
    }
    return { ...trace, about: page.about };
  });
}

/**
 * {loaded, error} of entries: loaded is [{entry, trace}], of the entries before while those asked for are read and null
 * at first. What could not be read is tried again when the index changes.
 */
function useTraces(source, entries) {
  const [state, setState] = useState({ loaded: null, error: null });
  const names = entries.map((entry) => entry.key).join(" ");
  useEffect(() => {
    let wanted = true;
    tracesOf(source, entries).then(
      (traces) => wanted
        && setState({ loaded: entries.map((entry, index) => ({ entry, trace: traces[index] })), error: null }),
      (error) => wanted && setState({ loaded: null, error }),
    );
    return () => { wanted = false; };
  }, [source, names, state.error && entries[0]]);
  return state;
}
