"use strict";

const KEY_FIGURES = [
  ["Reward", "reward/alone"], ["Reward", "reward/with_agents"], ["Entropy", "entropy"],
  ["Tokens per second", "tokens_per_second"],
];
const SMOOTHING = [1, 3, 5, 9, 15, 25, 51, 101, 201];
const CHART_HEIGHT = 176;
const WHOLE = [...Array(12).keys()].flatMap((zeros) => [1, 2, 5].map((first) => first * 10 ** zeros));
const AMOUNT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** What the charts of the page share: zoom ([from, to] or null), cursor (an x or null) and the theme's colours. */
class ChartBoard {
  plots = new Set();
  watchers = new Set();
  colours = new Map();
  zoom = null;
  probe = null;

  /** A CSS colour as a canvas takes it, in the present theme. */
  colour(css) {
    if (!this.colours.has(css)) {
      this.probe.style.color = css;
      this.colours.set(css, getComputedStyle(this.probe).color);
    }
    return this.colours.get(css);
  }

  recolour() {
    this.colours.clear();
    for (const plot of this.plots) plot.redraw();
  }

  rescale(zoom) {
    this.zoom = zoom;
    for (const plot of this.plots) plot.setData(plot.data);
  }

  /** Moves the cursor of every chart to an x, as the pointer does; null takes it away. */
  point(x) {
    for (const plot of this.plots) {
      plot.setCursor(x === null ? { left: -10, top: -10 } : { left: plot.valToPos(x, "x"), top: 10 });
    }
  }

  /** A chart's cursor has moved. */
  moved({ cursor, data }) {
    const x = cursor.left < 0 ? null : (data[0][cursor.idx] ?? null);
    for (const watch of this.watchers) watch(x);
  }
}

/** The x that the cursor is at, or null. */
function useChartCursor(board) {
  const [x, setX] = useState(null);
  useEffect(() => {
    board.watchers.add(setX);
    return () => board.watchers.delete(setX);
  }, [board]);
  return x;
}

// --- a chart

function xRange(zoom, from, to) {
  if (zoom) return zoom;
  return from === to ? [from - 1, to + 1] : [from, to];
}

function yRange(covers, least, most) {
  if (least === null) return [0, 1];
  const [floor = least, ceiling = most] = covers ?? [];
  const [low, high] = [Math.min(floor, least), Math.max(ceiling, most)];
  const room = 0.06 * (high - low) || 1;
  return [low === covers?.[0] ? low : low - room, high === covers?.[1] ? high : high + room];
}

function tickTexts(share) {
  const shared = (value) => percent(value, value && Math.abs(value) < 0.01 ? 1 : 0);
  const plain = (value) => (Math.abs(value) >= 1000 ? AMOUNT.format(value) : fixed(value));
  return (_, ticks) => ticks.map(share ? shared : plain);
}

function labelWidth(_, labels) {
  return 14 + 6.5 * Math.max(4, ...(labels ?? []).map((label) => label.length));
}

function curveLook(board, { run, colour, style }) {
  const fills = { stack: `color-mix(in oklab, ${colour} 65%, var(--paper))`, bands: colour };
  const stroke = () => board.colour(style === "raw" ? `color-mix(in srgb, ${colour} 30%, transparent)` : colour);
  return {
    stroke,
    width: style === "line" ? 2 : 1,
    dash: run ? [6, 4] : [],
    fill: fills[style] ? () => board.colour(fills[style]) : null,
    points: { size: 5, fill: stroke, ...(style === "raw" && { show: false }) },
  };
}

function chartOptions(board, panel, curves, skipped) {
  const line = { stroke: () => board.colour("var(--line)"), width: 1 };
  const text = { stroke: () => board.colour("var(--muted)"), font: "11px system-ui", gap: 6 };
  const axis = { ...text, grid: line, ticks: { show: false } };
  return {
    width: 300,
    height: CHART_HEIGHT,
    legend: { show: false },
    padding: [8, 12, 0, 0],
    scales: {
      x: { time: false, range: (_, from, to) => xRange(board.zoom, from, to) },
      y: { range: (_, least, most) => yRange(panel.covers, least, most) },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 26, space: 56, incrs: WHOLE, values: tickTexts(false) },
      { ...axis, size: labelWidth, space: 34, values: tickTexts(panel.share) },
    ],
    series: [{}, ...curves.map((curve) => curveLook(board, curve))],
    cursor: {
      y: false,
      drag: { x: true, y: false, setScale: false, dist: 4 },
      sync: { key: "dashboard", setSeries: false, filters: { pub: (type) => type === "mousemove" } },
      points: { size: (_, i) => (curves[i - 1].style === "raw" ? 4 : 7) },
      bind: { dblclick: () => () => board.onZoom(null) },
    },
    hooks: {
      setCursor: [(plot) => board.moved(plot)],
      setSelect: [(plot) => zoomSelected(board, plot)],
      draw: [(plot) => skipped.current.forEach((xs, run) => markSkipped(board, plot, xs, run))],
    },
  };
}

function zoomSelected(board, plot) {
  const { left, width } = plot.select;
  if (width < 4) return;
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  board.onZoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
}

/** A vertical line at each skipped step. */
function markSkipped(board, plot, xs, run) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = board.colour("var(--bad)");
  ctx.lineWidth = Math.round(devicePixelRatio);
  ctx.setLineDash(run ? [6, 4] : []);
  ctx.beginPath();
  for (const x of xs) {
    const left = Math.floor(plot.valToPos(x, "x", true)) + ctx.lineWidth / 2;
    if (left < bbox.left || left > bbox.left + bbox.width) continue;
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
  }
  ctx.stroke();
  ctx.restore();
}

/** Arrow keys move the cursor of all charts, + and - zoom around it, Escape shows all again. */
function chartKey(event, board, plot) {
  const xs = plot.data[0];
  const { min, max } = plot.scales.x;
  const at = plot.cursor.left < 0 ? null : plot.cursor.idx;
  const far = event.shiftKey ? 10 : 1;
  const [first, last] = [xs.findIndex((x) => x >= min), xs.findLastIndex((x) => x <= max)];
  const targets = { ArrowRight: (at ?? first - 1) + far, ArrowLeft: (at ?? last + 1) - far, Home: first, End: last };
  const to = targets[event.key];
  if (to !== undefined) board.point(xs[Math.min(Math.max(to, first), last)]);
  else if (event.key === "+" || event.key === "-") zoomAround(board, plot, xs[at ?? last], event.key === "+" ? 0.5 : 2);
  else if (event.key === "Escape") board.onZoom(null);
  else return;
  event.preventDefault();
}

function zoomAround(board, plot, x, factor) {
  const xs = plot.data[0];
  const { min, max } = plot.scales.x;
  const from = Math.max(xs[0], x - (x - min) * factor);
  const to = Math.min(xs.at(-1), x + (max - x) * factor);
  if (from < to) board.onZoom(from === xs[0] && to === xs.at(-1) ? null : [from, to]);
}

function Chart({ board, panel, lines, runs, xs, span, skipped }) {
  const holder = useRef(null);
  const chart = useRef(null);
  const marks = useRef(skipped);
  marks.current = skipped;
  const curves = useMemo(() => curvesOf(panel.form, lines, runs, span), [lines, runs, span]);
  const data = useMemo(() => aligned(xs, curves), [xs, curves]);
  const look = JSON.stringify(curves.map(({ run, colour, style }) => [run, colour, style]));
  useEffect(() => {
    const plot = new uPlot(chartOptions(board, panel, curves, marks), data, holder.current);
    const sizes = new ResizeObserver(([{ contentRect: { width } }]) => plot.setSize({ width, height: CHART_HEIGHT }));
    sizes.observe(holder.current);
    board.plots.add(plot);
    chart.current = plot;
    return () => {
      sizes.disconnect();
      board.plots.delete(plot);
      plot.destroy();
    };
  }, [look]);
  useEffect(() => {
    if (chart.current.data !== data) chart.current.setData(data);
  }, [data]);
  return html`<div class="chart" ref=${holder} tabindex="0" role="group"
    aria-label=${`Chart: ${panel.title}. Arrow keys read its values, plus and minus zoom, Escape shows all.`}
    onKeyDown=${(event) => chartKey(event, board, chart.current)} onBlur=${() => board.point(null)}></div>`;
}

/** The lines of a chart, each a button that hides it, with the raw values at the cursor, or the latest. */
function ChartLegend({ board, panel, runs, xs, hidden, onToggle }) {
  const x = useChartCursor(board);
  return html`<ul class="chart-legend">${panel.lines.map((line) => html`<li key=${line.metric}>
    <button type="button" aria-pressed=${String(!hidden.has(line.metric))} onClick=${() => onToggle(line.metric)}>
      <span class="chart-swatch" style=${{ background: line.colour }}></span>${visible(line.label)}
    </button>
    ${runs.map((run, r) => html`<span class=${r ? "value other" : "value"} title=${run.name}
      data-metric=${line.metric} data-run=${r}>
      ${metricText(valueAt(xs[r], column(run, line.metric), x), panel.share)}
    </span>`)}
  </li>`)}</ul>`;
}

function ChartPanel({ board, panel, runs, xs, span, skipped }) {
  const [open, setOpen] = useState(false);
  const [hidden, setHidden] = useState(new Set());
  const lines = useMemo(() => panel.lines.filter((line) => !hidden.has(line.metric)), [panel, hidden]);
  const toggle = (metric) => setHidden((before) => before.symmetricDifference(new Set([metric])));
  return html`<section class="chart-panel" data-testid="panel" aria-label=${panel.title}>
    <header>
      <h3>${visible(panel.title)}</h3>
      <button type="button" class="help" aria-expanded=${String(open)} aria-label=${`How to read: ${panel.title}`}
        onClick=${() => setOpen(!open)} onKeyDown=${(event) => event.key === "Escape" && setOpen(false)}>?</button>
    </header>
    ${open && html`<p class="help-text">${panel.help}</p>`}
    <${Chart} ...${{ board, panel, lines, runs, xs, span, skipped }} />
    <${ChartLegend} ...${{ board, panel, runs, xs, hidden }} onToggle=${toggle} />
  </section>`;
}

// --- above and below the charts

function Sparkline({ columns }) {
  const longest = Math.max(...columns.map((values) => values.length));
  const stride = Math.ceil(longest / 120);
  const every = columns.map((values) => values.filter((_, i) => i % stride === 0));
  const known = every.flat().filter((value) => value !== null);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const left = (i) => (100 * stride * i) / Math.max(1, longest - 1);
  const top = (value) => 22 - (20 * (value - least)) / (most - least || 1);
  const move = (values, i) => (i && values[i - 1] !== null ? "L" : "M");
  const path = (values) =>
    values.map((value, i) => (value === null ? "" : `${move(values, i)}${left(i)} ${top(value)}`)).join("");
  return html`<svg class="sparkline" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
    ${every.map((values, r) => html`<path class=${r ? "other" : ""} d=${path(values)} />`)}
  </svg>`;
}

/** The latest of a metric's running means, as its curve shows them. */
function KeyFigure({ label, metric, runs, span }) {
  const columns = runs.map((run) => runningMean(column(run, metric), span));
  const first = (values) => values.find((value) => value !== null) ?? null;
  return html`<div class="key-figure">
    <dt>${label}</dt>
    ${columns.map((values, r) => html`<dd class=${r ? "other" : ""}>
      <strong>${metricText(valueAt([], values, null))}</strong> from ${metricText(first(values))}
    </dd>`)}
    <dd class="drawing"><${Sparkline} columns=${columns} /></dd>
  </div>`;
}

/** The base policy against the trained one on held-out problems, once a run is finished. */
function Evaluated({ run }) {
  const { base, trained } = run.summary ?? {};
  const modes = Object.entries(sortsOf(run.agents)).filter(([mode]) => base?.[mode] && trained?.[mode]);
  if (!modes.length) return null;
  const heads = Object.keys(trained[modes[0][0]]).filter((name) => /^(pass@\d+|greedy)$/.test(name));
  return html`<table class="evaluated" data-testid="evaluated">
    <caption>${visible(run.name)}, held-out problems</caption>
    <thead><tr><th scope="col"></th>${heads.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
    <tbody>${modes.map(([mode, label]) => html`<tr key=${mode}>
      <th scope="row">${label}</th>
      ${heads.map((name) => html`<td>${fixed(base[mode][name], 3)} → <strong>${fixed(trained[mode][name], 3)}</strong></td>`)}
    </tr>`)}</tbody>
  </table>`;
}

function Position({ board, axis }) {
  const x = useChartCursor(board);
  const where = axis === "step" ? `step ${grouped(x)}` : `${AMOUNT.format(x)} tokens`;
  return html`<output class="position" data-testid="position">
    ${x === null ? "Latest values" : `Values at ${where}`}
  </output>`;
}

/** Every metric of the runs, as a table. */
function LatestTable({ runs, names }) {
  return html`<details class="latest">
    <summary>Latest value of every metric (${names.length})</summary>
    <table>
      <thead><tr>
        <th scope="col">Metric</th>${runs.map((run) => html`<th scope="col">${visible(run.name)}</th>`)}
      </tr></thead>
      <tbody>${names.map((name) => html`<tr key=${name}>
        <th scope="row">${visible(name)}</th>
        ${runs.map((run) => html`<td>${metricText(valueAt([], column(run, name), null))}</td>`)}
      </tr>`)}</tbody>
    </table>
  </details>`;
}

function ChartControls({ board, runs, axis, onAxis, span, onSpan, zoomed, skipped }) {
  const mean = span === 1 ? "none" : `mean of ${span} steps`;
  return html`<div class="chart-controls">
    ${runs.length > 1 && html`<ul class="run-names">
      ${runs.map((run, r) => html`<li class=${r ? "other" : ""}>${visible(run.name)}</li>`)}
    </ul>`}
    <label>Smoothing
      <input type="range" min="0" max=${SMOOTHING.length - 1} value=${SMOOTHING.indexOf(span)} aria-valuetext=${mean}
        data-testid="smoothing" onInput=${(event) => onSpan(SMOOTHING[event.target.value])} />
      <output>${mean}</output>
    </label>
    <label>Along <select data-testid="axis" value=${axis} onChange=${(event) => onAxis(event.target.value)}>
      <option value="step">steps</option>
      <option value="tokens">sampled tokens</option>
    </select></label>
    ${zoomed && html`<button type="button" class="button" data-testid="unzoom"
      onClick=${() => board.onZoom(null)}>Show all</button>`}
    ${skipped > 0 && html`<span class="skipped">${plural(skipped, "skipped step")}</span>`}
    <${Position} board=${board} axis=${axis} />
  </div>`;
}

function Dashboard({ runs: given }) {
  const board = useMemo(() => new ChartBoard(), []);
  const runs = useMemo(() => given.map((run) => ({ ...run, metrics: complete(run.metrics) })), [given]);
  const longest = Math.max(...runs.map((run) => run.metrics.step.length));
  const [axis, setAxis] = useState("step");
  const [span, setSpan] = useState(SMOOTHING.findLast((steps) => steps <= longest / 8) ?? 1);
  const [zoom, setZoom] = useState(null);
  board.onZoom = (range) => {
    board.rescale(range);
    setZoom(range);
  };
  useEffect(() => {
    const recolour = () => board.recolour();
    document.addEventListener("themechange", recolour);
    return () => document.removeEventListener("themechange", recolour);
  }, [board]);
  const xs = useMemo(() => runs.map((run) => along(run, axis)), [runs, axis]);
  const names = useMemo(() => metricNames(runs), [runs]);
  const agents = useMemo(() => [...new Set(runs.flatMap((run) => run.agents))], [runs]);
  const sorts = sortsOf(agents);
  const sections = useMemo(() => {
    return DASHBOARD_SECTIONS.map((section) => ({ title: section.title, panels: panelsOf(section, names, agents) }));
  }, [runs, names]);
  const skipped = useMemo(() => runs.map((run, r) => {
    const values = column(run, "skipped");
    return xs[r].filter((_, i) => values[i] > 0);
  }), [runs, xs]);
  if (!longest) return html`<p class="dashboard-empty">No step is logged yet.</p>`;
  const shared = { board, runs, xs, span, skipped };
  const chooseAxis = (name) => {
    board.onZoom(null);
    setAxis(name);
  };
  return html`<div class="dashboard" data-testid="dashboard">
    <span hidden ref=${(element) => (board.probe = element ?? board.probe)}></span>
    ${runs.map((run, r) => html`<${Evaluated} key=${r} run=${run} />`)}
    <dl class="key-figures">
      ${KEY_FIGURES.filter(([, metric]) => names.includes(metric)).map(([label, metric]) => html`
        <${KeyFigure} key=${metric} label=${`${label} ${sorts[metric.split("/")[1]] ?? ""}`} metric=${metric} runs=${runs} span=${span} />`)}
    </dl>
    <${ChartControls} ...${shared} axis=${axis} onAxis=${chooseAxis} onSpan=${setSpan} zoomed=${zoom !== null}
      skipped=${skipped.flat().length} />
    ${sections.map(({ title, panels }) => panels.length > 0 && html`<section key=${title} class="charts">
      <h2>${title}</h2>
      <div class="panels">
        ${panels.map((panel) => html`<${ChartPanel} key=${panel.title} panel=${panel} ...${shared} />`)}
      </div>
    </section>`)}
    <${LatestTable} runs=${runs} names=${names.filter((name) => name !== "step")} />
  </div>`;
}
