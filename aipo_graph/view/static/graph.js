"use strict";

const GRAPH_START = "__start__";
const GRAPH_END = "__end__";
const UNFINISHED = new Set(["failed", "timeout"]);

/** How often a path visits each node and takes each edge, from the start and, where it `ended`, to the end. */
function visitsOf(path, ended = true) {
  const stops = [GRAPH_START, ...path, ...(ended ? [GRAPH_END] : [])];
  const counts = noVisits();
  stops.forEach((name, index) => {
    counts.nodes[name] = (counts.nodes[name] || 0) + 1;
    if (index) addTo(counts.edges, edgeKey(stops[index - 1], name), 1);
  });
  return counts;
}

function noVisits() {
  return { nodes: Object.create(null), edges: Object.create(null) };
}

function edgeKey(source, target) {
  return JSON.stringify([source, target]);
}

function addTo(sums, key, value) {
  sums[key] = (sums[key] || 0) + value;
}

/** The visits of several traces, added up. */
function sumVisits(traces) {
  const sums = noVisits();
  for (const trace of traces) {
    const counts = visitsOf(trace.path, !UNFINISHED.has(trace.status));
    for (const kind of ["nodes", "edges"]) {
      for (const [key, value] of Object.entries(counts[kind])) addTo(sums[kind], key, value);
    }
  }
  return sums;
}

/**
 * A graph (graph.json) as SVG. `path`: the visited nodes in order, lit up and counted; or `counts`: of many traces.
 * `active`: the node to light. `onNode(name | null)` is told which node is pointed at.
 */
function GraphPicture({ graph, path = null, active = null, counts = null, ended = true, onNode = null }) {
  const visits = useMemo(() => counts || (path ? visitsOf(path, ended) : noVisits()), [counts, path, ended]);
  if (!graph || !graph.nodes.length) return html`<p class="muted">This run has no picture of its graph.</p>`;
  const unit = Math.min(...graph.nodes.map((node) => node.height)) / 2;
  const most = Math.max(1, ...Object.values(visits.edges));
  const edges = graph.edges.map((edge) => ({ edge, count: visits.edges[edgeKey(edge.source, edge.target)] || 0 }));
  edges.sort((one, two) => one.count - two.count);
  const told = graph.nodes.map((node) => `${labelOf(node)} ${visits.nodes[node.name] || 0}`).join(", ");
  return html`<svg class="graph" viewBox=${`0 0 ${graph.width} ${graph.height}`} data-testid="graph"
      role=${onNode ? "group" : "img"}
      aria-label=${`visits of the graph: ${told}`}>
    ${edges.map(({ edge, count }) => html`<${GraphEdge} key=${edgeKey(edge.source, edge.target)} edge=${edge}
      count=${count}
      unit=${unit} weight=${count / most} />`)}
    ${graph.nodes.map((node) => html`<${GraphNode} key=${node.name} node=${node} count=${visits.nodes[node.name] || 0}
      unit=${unit}
      active=${node.name === active} onNode=${onNode} />`)}
    ${edges.map(({ edge, count }) => count > 0 && html`<${EdgeCount} key=${edgeKey(edge.source, edge.target)}
      edge=${edge}
      count=${count} unit=${unit} />`)}
  </svg>`;
}

function labelOf(node) {
  return spelt(node.label || node.name.replaceAll("_", ""));
}

function GraphNode({ node, count, unit, active, onNode }) {
  const label = labelOf(node);
  const size = Math.min(0.72 * unit, (1.3 * node.width) / Math.max(label.length, 1));
  const badge = count > 0 && node.role !== "end";
  const told = `${label}: ${plural(count, "visit")}`;
  const here = () => onNode(node.name);
  const gone = () => onNode(null);
  const heard = onNode && node.role !== "end" && {
    tabindex: 0, role: "img", "aria-label": told, onMouseEnter: here, onFocus: here, onMouseLeave: gone, onBlur: gone,
  };
  return html`<g class=${classes("node", node.role, count > 0 && "taken", active && "active")} data-node=${node.name}
      ...${heard || {}}>
    <title>${told}</title>
    <rect x=${node.x - node.width / 2} y=${node.y - node.height / 2} width=${node.width} height=${node.height}
      rx=${0.45 * unit} />
    <text x=${node.x} y=${node.y} font-size=${size}>${label}</text>
    ${badge && html`<text class="visits" x=${node.x + node.width / 2} y=${node.y - node.height / 2}
      font-size=${0.62 * unit}
      stroke-width=${0.3 * unit}>${`×${SHORT.format(count)}`}</text>`}
  </g>`;
}

function GraphEdge({ edge, count, unit, weight }) {
  const [[x0, y0], [x1, y1], [x2, y2], [x3, y3]] = edge.points;
  const [fromX, fromY] = x2 === x3 && y2 === y3 ? [x0, y0] : [x2, y2];
  const turn = (Math.atan2(y3 - fromY, x3 - fromX) * 180) / Math.PI;
  const wide = unit * (count ? 0.09 + 0.12 * weight : 0.05);
  return html`<g class=${classes("edge", count > 0 && "taken", edge.conditional && "conditional")}
      data-source=${edge.source} data-target=${edge.target}>
    <path d=${`M${x0} ${y0}C${x1} ${y1} ${x2} ${y2} ${x3} ${y3}`} stroke-width=${wide}
      stroke-dasharray=${edge.conditional && !count ? `${0.2 * unit} ${0.16 * unit}` : null} />
    <polygon points="0,0 -10,-4.5 -10,4.5"
      transform=${`translate(${x3} ${y3}) rotate(${turn}) scale(${0.045 * unit})`} />
  </g>`;
}

const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** The count of an edge, a quarter on its way, so that those of a pair there and back stand apart. */
function EdgeCount({ edge, count, unit }) {
  const [p0, p1, p2, p3] = edge.points;
  const at = (axis) => (27 * p0[axis] + 27 * p1[axis] + 9 * p2[axis] + p3[axis]) / 64;
  return html`<text class="edge-count" x=${at(0)} y=${at(1)} font-size=${0.55 * unit}
    stroke-width=${0.28 * unit}>${SHORT.format(count)}</text>`;
}

/**
 * For each segment of a trace, the place in its path of the visit that appended it. A visit appends at most one
 * policy segment; what stands around a reply, by an author that is no node, came with the reply.
 */
function visitOfSegments(trace) {
  let visit = 0;
  let spoke = false;
  const visits = trace.segments.map(({ author, source }) => {
    const next = trace.path.indexOf(author, source === "policy" && spoke ? visit + 1 : visit);
    if (next > visit) { visit = next; spoke = false; }
    if (source === "policy") spoke = true;
    return next < 0 && spoke ? null : visit;
  });
  return visits.map((at, index) => at ?? visits.slice(index).find((later) => later !== null) ?? visit);
}

const BEAT = 700;

/** The taken path with a slider and a play button; tells `onStep(visit | null)` and `onNode(name | null)`. */
function PathPlayer({ graph, trace, onStep, onNode }) {
  const last = trace.path.length;
  const [at, setAt] = useState(last);
  const [playing, setPlaying] = useState(false);
  const ended = !UNFINISHED.has(trace.status);
  const whole = at >= last;
  useEffect(() => { setAt(last); setPlaying(false); }, [trace, last]);
  useEffect(() => onStep?.(whole ? null : at), [at, whole]);
  useEffect(() => {
    if (!playing) return undefined;
    if (whole) { setPlaying(false); return undefined; }
    const timer = setTimeout(() => setAt(at + 1), BEAT);
    return () => clearTimeout(timer);
  }, [playing, at, whole]);
  const play = () => { if (!playing && whole) setAt(0); setPlaying(!playing); };
  const path = useMemo(() => (whole ? trace.path : trace.path.slice(0, at + 1)), [trace, at, whole]);
  return html`<div class="player">
    <${GraphPicture} graph=${graph} path=${path} ended=${ended && whole} active=${whole ? null : trace.path[at]}
      onNode=${onNode} />
    ${last > 0 && html`<div class="player-bar">
      <button type="button" class="round" onClick=${play}
        aria-label=${playing ? "pause" : "play the path"}>${playing ? "❚❚" : "▶"}</button>
      <input type="range" min="0" max=${last} value=${at} aria-label="step of the path" data-testid="path-step"
        onInput=${(event) => { setPlaying(false); setAt(Number(event.target.value)); }} />
      <span class="player-place">
        ${whole ? plural(last, "visit") : html`${at + 1}/${last} <b>${visible(trace.path[at])}</b>`}
      </span>
    </div>`}
  </div>`;
}
