"use strict";

/** How a colour switch reads a token: its value, the edges between its bins (classes prefix-0 …), the legend. */
const COLOURS = {
  source: { label: "source", title: "who wrote it" },
  logprob: {
    label: "log p", prefix: "seq", edges: [-0.01, -0.1, -0.3, -0.7, -1.5, -3, -5, -8], descending: true,
    title: "log-probability before the step's updates: strong is a surprise",
    value: (token) => token.learner ?? token.behaviour,
  },
  ratio: {
    label: "ratio", prefix: "div", edges: [0.1, 0.5, 0.8, 0.98, 1.02, 1.25, 2, 10], middle: "1",
    title: "the learner's probability over the sampler's: 1 is on-policy",
    value: (token) => token.ratio,
  },
  coefficient: {
    label: "coefficient", prefix: "seq", edges: [0, 0.2, 0.4, 0.7, 0.95, 1.05, 1.4, 1.9],
    title: "how strongly it is learned from, per unit of advantage: hatched is not at all",
    value: (token) => token.coefficient,
  },
  advantage: {
    label: "advantage", prefix: "div", edges: [-1.5, -0.75, -0.25, -0.001, 0.001, 0.25, 0.75, 1.5], middle: "0",
    title: "above 0 it is made likelier, below 0 less likely",
    value: (token) => token.advantage,
  },
};
const COLOUR_NAMES = Object.keys(COLOURS);
const SHOWN_TOKENS = 3000;

/** The numbers of token `index` of a segment. */
function tokenOf(segment, index) {
  const learned = segment.learned;
  const at = (values) => values?.[index] ?? null;
  return {
    piece: segment.tokens[index],
    behaviour: at(segment.logprobs),
    learner: at(learned?.logprobs),
    ratio: at(learned?.ratios),
    coefficient: at(learned?.coefficients),
    advantage: at(learned?.advantages),
  };
}

/** The class that colours a value; "" where the switch does not apply to it. */
function binOf(scale, value) {
  if (value === null || value === undefined) return "";
  const past = scale.edges.filter((edge) => (scale.descending ? value < edge : value > edge)).length;
  return `${scale.prefix}-${past}`;
}

/** A choice among the keys of a table, the first of them where it is none. */
function oneOf(table, name) {
  return Object.hasOwn(table, name) ? name : Object.keys(table)[0];
}

function tokenClass(segment, index, colour) {
  const scale = COLOURS[colour];
  return scale.value ? binOf(scale, scale.value(tokenOf(segment, index))) : "";
}

/** The switch between the colourings, with the legend of the one in use. */
function ColourSwitch({ colour, onChange }) {
  return html`<div class="colouring">
    <${Switch} label="colour tokens by" testid="colour" value=${colour} onChange=${onChange}
      options=${COLOUR_NAMES.map((name) => [name, COLOURS[name].label, COLOURS[name].title])} />
    <${Legend} colour=${colour} />
  </div>`;
}

function Legend({ colour }) {
  const scale = COLOURS[colour];
  if (!scale.value) {
    return html`<div class="legend" data-testid="legend">
      <span class="swatch policy">policy</span><span class="swatch agent">agent</span><span
        class="swatch tool">tool</span><span class="swatch context">context</span><span class="muted">${scale.title}; struck out is masked</span>
    </div>`;
  }
  const place = scale.edges.length / 2;
  const hidden = (index) => scale.middle && (index === place - 1 || index === place);
  const edgeLabel = (edge, index) => (hidden(index) ? "" : minus(String(edge).replace("0.", ".")));
  return html`<div class="legend" data-testid="legend">
    <div class=${`scale by-${colour}`}>${[...scale.edges, null].map((edge, index) => html`<span key=${index}
      class=${`bin ${scale.prefix}-${index}`}>
      ${index === place && scale.middle && html`<i class="middle">${scale.middle}</i>`}
      ${edge !== null && html`<i>${edgeLabel(edge, index)}</i>`}</span>`)}</div>
    <span class="muted">${scale.title}; plain is outside the loss</span>
  </div>`;
}

/** Why no token of a trace has a colour, where that is so. */
function NoColours({ trace, colour }) {
  const { label, value } = COLOURS[colour];
  const some = (found) => trace.segments.some((part) => part.tokens.some((_, index) => found(tokenOf(part, index))));
  if (!value || some((token) => value(token) !== null)) return null;
  return html`<p class="muted" data-testid="no-colours">${some((token) => token.advantage === 0)
    ? "The advantage of this trace is 0: nothing was learned from it."
    : `No ${label} is recorded for this trace: it was not trained on, or its run is of an earlier version.`}</p>`;
}

/** Where the policy's own feedback begins and ends, and the marks with which chat templates begin a message. */
const FEEDBACK = /<feedback>|(?<=<\/feedback>)/g;
const MESSAGE = new RegExp(
  String.raw`<(?:[|｜](?:im_start|start_header_id|start_of_role|start|turn)[|｜]?|start_of_turn)>\s*(\w+)`
  + String.raw`|<[|｜](system|user|assistant|tool|observation)[|｜]>|\[(INST|SYSTEM_PROMPT|TOOL_RESULTS)\]|<(tool)_response>`, "gi",
);
const MARKUP = /<[|｜][^<>]*[|｜]>|<(start|end)_of_turn>|\[\/?[A-Z_]+\]/g;
const ROLES = { inst: "user", system_prompt: "system", tool_results: "tool", observation: "tool", ipython: "tool" };

/** Parts [from, to) of a segment's tokens that stand apart: a policy's by its feedback tags, a prompt's by message, with its `role`. */
function partsOf(segment, next) {
  const text = segment.source === "agent" ? "" : segment.tokens.join("");
  const policy = segment.source === "policy";
  const found = [...text.matchAll(policy ? FEEDBACK : MESSAGE)];
  const empty = (from, to) => !text.slice(from, to).replace(MARKUP, "").trim();
  const marks = found.map((mark) => ({ at: mark.index, role: policy ? null : mark.slice(1).find(Boolean).toLowerCase() }))
    .filter((_, i) => policy || (i + 1 === found.length && next?.source === "agent")
      || !empty(found[i].index + found[i][0].length, found[i + 1]?.index));
  if (marks.length && !policy && empty(0, found[0].index)) marks[0].at = 0;
  const parts = [{ segment, from: 0, to: segment.tokens.length }];
  let place = 0;
  segment.tokens.forEach((piece, index) => {
    place += piece.length;
    while (marks.length && marks[0].at < place) {
      const { role } = marks.shift();
      if (index > parts.at(-1).from) {
        parts.at(-1).to = index;
        parts.push({ segment, from: index, to: segment.tokens.length });
      }
      parts.at(-1).role = role && (ROLES[role] || role);
    }
  });
  return parts;
}

/** The segments of one thread as turns: the policy writes, or something is spliced in; a message of a chat is a turn of its own. */
function turnsOf(segments) {
  const turns = [];
  for (const part of segments.flatMap((segment, index) => partsOf(segment, segments[index + 1]))) {
    const spliced = part.segment.source !== "policy";
    if (spliced && turns.at(-1)?.spliced && !part.role) turns.at(-1).parts.push(part);
    else turns.push({ spliced, parts: [part] });
  }
  const writers = new Set(segments.filter(({ source }) => source === "policy").map(({ author }) => author));
  return turns.map(({ spliced, parts }) => {
    const agents = [...new Set(parts.map(({ segment }) => segment).filter(({ source }) => source === "agent").map(({ author }) => author))];
    const [{ segment: { author }, role }] = parts;
    const prompt = parts[0].segment === segments[0];
    const tool = role === "tool" || !(prompt || writers.has(author));
    const kind = !spliced ? "policy" : agents.length ? "agent" : tool ? "tool" : "context";
    const name = agents.join(", ") || (tool && !writers.has(author) && !prompt ? author : role || (prompt && spliced ? "prompt" : author));
    return { kind, parts, name };
  });
}

/**
 * The tokens of a trace, coloured by one switch, thread by thread.
 * `marked(segment)` lights the segments of a node or a visit; hover, focus or a tap shows a token's numbers.
 */
function TraceTokens({ trace, colour = "source", marked = null }) {
  const [shown, setShown] = useState(null);
  const box = useRef(null);
  const threads = useMemo(() => {
    const place = new Map(trace.segments.map((segment, index) => [segment, index]));
    const names = [...new Set(trace.segments.map((segment) => segment.thread))];
    return names.map((name) => html`<${Thread} key=${name} name=${names.length > 1 ? name : ""} place=${place}
      turns=${turnsOf(trace.segments.filter((part) => part.thread === name))} colour=${colour} marked=${marked} />`);
  }, [trace, colour, marked]);
  useEffect(() => setShown(null), [trace]);
  const show = (event) => {
    const element = event.target.closest?.(".token");
    if (element) setShown({ segment: Number(element.dataset.segment), index: Number(element.dataset.index), element });
    else if (event.type === "click") setShown(null);
  };
  const onKeyDown = (event) => {
    if (event.key === "Escape") setShown(null);
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const tokens = [...box.current.querySelectorAll(".token")];
    const next = tokens[tokens.indexOf(event.target) + (event.key === "ArrowRight" ? 1 : -1)];
    if (!next) return;
    event.preventDefault();
    next.focus();
  };
  const segment = shown && trace.segments[shown.segment];
  return html`<div class=${`tokens by-${colour}`} ref=${box} data-testid="tokens" tabindex="0" role="group"
      aria-label="tokens, read one by one with the arrow keys"
      onMouseOver=${show} onfocusin=${show} onClick=${show} onKeyDown=${onKeyDown}
      onMouseLeave=${() => setShown(null)} onfocusout=${() => setShown(null)}>
    ${threads}
    ${segment && segment.tokens[shown.index] !== undefined
      && html`<${Tooltip} segment=${segment} index=${shown.index} element=${shown.element} />`}
  </div>`;
}

function Thread({ name, turns, place, colour, marked }) {
  const lit = (turn) => marked !== null && turn.parts.some(({ segment }) => marked(segment));
  return html`<section class="thread" aria-label=${name ? `thread ${spelt(name)}` : "transcript"}>
    ${name && html`<h4 class="thread-name">thread <b>${visible(name)}</b></h4>`}
    ${turns.map((turn, index) => html`<div key=${index} class=${classes("turn", turn.kind, lit(turn) && "lit")}>
      <div class="turn-name"><bdi>${visible(turn.name)}</bdi></div>
      <div class="turn-text">${turn.parts.map((part) => html`<${SegmentTokens} key=${`${place.get(part.segment)}.${part.from}`}
        ...${part} place=${place.get(part.segment)} colour=${colour} named=${part.segment.author !== turn.name} />`)}</div>
    </div>`)}
  </section>`;
}

/** Tokens [from, to) of a segment. */
function SegmentTokens({ segment, from, to, place, colour, named }) {
  const [all, setAll] = useState(false);
  const tokens = segment.tokens.slice(from, all ? to : Math.min(to, from + SHOWN_TOKENS));
  const hidden = to - from - tokens.length;
  const spaced = segment.tokens.some((piece) => /\s/.test(piece));
  return html`<span class=${classes("segment", segment.source, segment.masked && "masked")}
    data-author=${segment.author}>${
      segment.source === "agent" && (named || segment.masked)
        && html`<span
          class="author">${named && html`<bdi>${visible(segment.author)}</bdi> `}${segment.masked && "masked"}</span>`
    }${tokens.map((piece, index) => html`<span
      key=${index} class=${`token ${tokenClass(segment, from + index, colour)}`} data-segment=${place}
      data-index=${from + index} tabindex="-1">${pieceOf(piece)}</span>${!spaced && html`<wbr />`}`)}${
      hidden > 0 && html`<button class="more" type="button"
        onClick=${() => setAll(true)}>… show ${plural(hidden, "more token")}</button>`
    }</span>`;
}

function pieceOf(piece) {
  if (!piece) return html`<span class="unseen">·</span>`;
  return piece.length > LONG ? html`<${Clipped} text=${piece} />` : visible(piece);
}

function Tooltip({ segment, index, element }) {
  const box = useRef(null);
  useEffect(() => {
    const at = element.getClientRects()[0] || element.getBoundingClientRect();
    const { width, height } = box.current.getBoundingClientRect();
    const below = at.bottom + 6 + height < window.innerHeight;
    box.current.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
    box.current.style.top = `${Math.max(8, below ? at.bottom + 6 : at.top - height - 6)}px`;
    box.current.style.visibility = "visible";
    element.setAttribute("aria-describedby", "token-numbers");
    return () => element.removeAttribute("aria-describedby");
  }, [segment, index, element]);
  const token = tokenOf(segment, index);
  const rows = [
    ["log p, sampler", fixed(token.behaviour, 4)],
    ["log p, learner", fixed(token.learner, 4)],
    ["ratio", fixed(token.ratio, 4)],
    ["coefficient", fixed(token.coefficient, 4)],
    ["advantage", fixed(token.advantage, 4)],
    ["version", segment.version < 0 ? "–" : String(segment.version)],
    segment.masked && ["masked", "yes, not trained on"],
  ].filter(Boolean);
  return html`<div class="tooltip" role="tooltip" id="token-numbers" ref=${box} data-testid="tooltip">
    <div class="piece"><bdi>${visible(cut(token.piece, 80))}${token.piece.length > 80 && "…"}</bdi></div>
    <div class=${`by ${segment.source}`}>${segment.source} · <bdi>${visible(segment.author)}</bdi></div>
    <dl>${rows.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
  </div>`;
}
