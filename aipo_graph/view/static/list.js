"use strict";

const ROW = 52;
const AROUND = 8;
const MARKS = { solved: "✓", partly: "◐", unsolved: "✕" };

/** The marks of an entry that stand wherever it is named. */
function Mark({ entry }) {
  const outcome = outcomeOf(entry);
  if (wasCut(entry)) return html`<span class="mark cut" title=${entry.status}>!</span>`;
  return html`<span class=${`mark ${outcome}`}
    title=${outcome === "unsolved" ? "not solved" : outcome}>${MARKS[outcome]}</span>`;
}

function signed(value) {
  return value === null || value === undefined ? "" : `${value > 0 ? "+" : ""}${fixed(value, 2)}`;
}

function consultsOf(entry) {
  return Object.values(entry.consults).reduce((sum, count) => sum + count, 0);
}

/** A list that draws only the rows in sight. */
function TraceList({ entries, chosen, onChoose }) {
  const box = useRef(null);
  const [view, setView] = useState({ top: 0, height: 800 });
  const place = entries.findIndex((entry) => entry.key === chosen);
  const look = () => setView({ top: box.current.scrollTop, height: box.current.clientHeight });
  useEffect(() => {
    const observer = new ResizeObserver(look);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    if (place < 0) return;
    const { scrollTop, clientHeight } = box.current;
    if (place * ROW < scrollTop) box.current.scrollTop = place * ROW;
    if ((place + 1) * ROW > scrollTop + clientHeight) box.current.scrollTop = (place + 1) * ROW - clientHeight;
  }, [place, chosen]);
  const top = clamp(view.top, 0, entries.length * ROW - view.height);
  const first = Math.max(0, Math.floor(top / ROW) - AROUND);
  const last = Math.min(entries.length, Math.ceil((top + view.height) / ROW) + AROUND);
  return html`<div class="list" ref=${box} onScroll=${look} role="listbox" tabindex="0" aria-label="traces"
      aria-activedescendant=${place >= first && place < last ? `row-${chosen}` : null}>
    <div class="list-all" style=${{ height: `${entries.length * ROW}px` }}>
      ${entries.slice(first, last).map((entry, index) => html`<${TraceRow} key=${entry.key} entry=${entry}
        top=${(first + index) * ROW}
        chosen=${entry.key === chosen} place=${first + index + 1} count=${entries.length} onChoose=${onChoose} />`)}
    </div>
    ${!entries.length && html`<p class="list-empty muted">No trace is left. Clear a filter to see more.</p>`}
  </div>`;
}

function TraceRow({ entry, top, chosen, place, count, onChoose }) {
  return html`<div class=${classes("row", chosen && "chosen")} style=${{ transform: `translateY(${top}px)` }}
    role="option"
      id=${`row-${entry.key}`} aria-selected=${String(chosen)} aria-posinset=${place} aria-setsize=${count}
      data-testid="trace-row" data-key=${entry.key} onClick=${() => onChoose(entry.key)}>
    <${Mark} entry=${entry} />
    <div class="row-main">
      <div class="row-name" title=${visible(entry.problem)}><bdi>${visible(cut(entry.question, 120))}</bdi></div>
      <div class="row-more">step ${entry.step} · <span
        class=${entry.withAgents ? "with" : "alone"}>${entry.sort}</span>
        ${wasCut(entry) ? html` · <span class="bad"><bdi>${visible(cut(entry.error || entry.status, 200))}</bdi></span>`
          : consultsOf(entry) > 0 && ` · ${plural(consultsOf(entry), "consult")}`}</div>
    </div>
    <div class="row-numbers number">
      <div title="reward">${unscored(entry) ? "–" : fixed(entry.reward, 2)}</div>
      <div class=${classes("row-advantage", entry.advantage > 0 && "good", entry.advantage < 0 && "bad")}
        title="advantage">${signed(entry.advantage)}</div>
    </div>
  </div>`;
}
