"use strict";

const { h, html, render, useState, useEffect, useMemo, useRef, useCallback } = htmPreact;

/** A number to `digits` significant digits, "–" where there is none. */
function fixed(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return minus(value.toExponential(Math.max(digits - 2, 0)));
  return minus(String(Number(value.toPrecision(digits))));
}

/** 0.123 -> "12%". */
function percent(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return `${minus((100 * value).toFixed(digits))}%`;
}

/** 12345 -> "12,345". */
function grouped(value) {
  return Number.isFinite(value) ? value.toLocaleString("en-US") : "–";
}

/** 1 -> "1 trace", 2 -> "2 traces". */
function plural(count, noun) {
  return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function minus(text) {
  return text.replaceAll("-", "−");
}

/** What the two sorts of traces are called: where no agent is, "alone" would say that there was one. */
function sortsOf(agents) {
  return agents.length ? { alone: "alone", with_agents: "with agents" } : { alone: "solo", with_agents: "in the graph" };
}

/** The names of classes that hold. */
function classes(...names) {
  return names.filter(Boolean).join(" ");
}

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u00a0\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u3164\uffa0]/gu;
const CLOSE_LOOK = 4000;

/** What stands for a character that cannot be seen: an arrow, or its code point as an escape. */
function symbol(character) {
  if (character === "\n") return "↵";
  if (character === "\t") return "⇥";
  const code = character.codePointAt(0).toString(16);
  if (code.length <= 2) return `\\x${code.padStart(2, "0")}`;
  return code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
}

/** Such text where only a string can stand, as in an option or an attribute: invisible characters as symbols. */
function spelt(text) {
  return text.replace(UNSEEN, (character) => symbol(character));
}

/** Text that a model wrote, as text nodes: invisible characters as symbols of their own style, newlines kept. */
function visible(text) {
  const whole = /^\p{M}/u.test(text) ? `◌${text}` : text;
  if (whole.search(UNSEEN) < 0) return whole;
  if (whole.length > CLOSE_LOOK) {
    return whole.replace(UNSEEN, (character) => (character === "\n" ? "↵\n" : symbol(character)));
  }
  const parts = [];
  let from = 0;
  for (const match of whole.matchAll(UNSEEN)) {
    if (match.index > from) parts.push(whole.slice(from, match.index));
    parts.push(html`<span class="unseen">${symbol(match[0])}</span>`);
    if (match[0] === "\n") parts.push("\n");
    from = match.index + match[0].length;
  }
  if (from < whole.length) parts.push(whole.slice(from));
  return parts;
}

const LONG = 600;

/** A long text, cut with a button that shows all of it. */
function Clipped({ text, limit = LONG, keep = 300 }) {
  const [all, setAll] = useState(false);
  if (text.length <= limit) return visible(text);
  return html`${visible(all ? text : cut(text, keep))}<button
      class="more" type="button" onClick=${(event) => { event.stopPropagation(); setAll(!all); }}
    >${all ? "show less" : `… show all ${grouped(text.length)} characters`}</button>`;
}

/** The first characters of a text, never half of a surrogate pair. */
function cut(text, length) {
  return text.slice(0, length).replace(/[\ud800-\udbff]$/, "");
}

/** A choice of one of `options`, [name, label, title] each; the arrow keys move along them. */
function Switch({ label, options, value, onChange, testid = null, kind = "" }) {
  return html`<div class=${classes("switch", kind)} role="radiogroup" aria-label=${label} data-testid=${testid}
    onKeyDown=${arrowAlong}>
    ${options.map(([name, text, title]) => html`<button key=${name} type="button" role="radio" data-choice=${name}
      title=${title} aria-checked=${String(name === value)} tabindex=${name === value ? 0 : -1}
      onClick=${() => onChange(name)}>${text}</button>`)}
  </div>`;
}

const ALONG = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

/** An arrow key chooses the next button of a group, round its end. */
function arrowAlong(event) {
  if (!Object.hasOwn(ALONG, event.key)) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const next = buttons.at((buttons.indexOf(event.target) + ALONG[event.key]) % buttons.length);
  event.preventDefault();
  next.focus();
  next.click();
}

const SYSTEM_DARK = matchMedia("(prefers-color-scheme: dark)");

/** "light" or "dark": what was chosen, else the system's. */
function themeNow() {
  return kept("theme") || (SYSTEM_DARK.matches ? "dark" : "light");
}

function applyTheme() {
  document.documentElement.dataset.theme = themeNow();
  document.dispatchEvent(new Event("themechange"));
}

/** [the theme in force, a function that chooses another]; who uses it is drawn again when the theme changes. */
function useTheme() {
  const [theme, setTheme] = useState(themeNow);
  useEffect(() => {
    const changed = () => setTheme(themeNow());
    document.addEventListener("themechange", changed);
    return () => document.removeEventListener("themechange", changed);
  }, []);
  return [theme, (name) => { keep("theme", name); applyTheme(); }];
}

function ThemeButton() {
  const [theme, setTheme] = useTheme();
  const other = theme === "dark" ? "light" : "dark";
  return html`<button class="button theme" type="button" data-testid="theme" aria-label=${`switch to ${other}`}
    onClick=${() => setTheme(other)}>${theme === "dark" ? "☀" : "☾"}</button>`;
}

const choices = {};

/** A choice of the reader, kept by the browser where it lets us, else until the page is closed. */
function keep(name, value) {
  choices[name] = value;
  try {
    localStorage.setItem(`aipo-graph/${name}`, value);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
  }
}

function kept(name) {
  if (name in choices) return choices[name];
  try {
    return localStorage.getItem(`aipo-graph/${name}`);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    return null;
  }
}

SYSTEM_DARK.addEventListener("change", applyTheme);
applyTheme();
