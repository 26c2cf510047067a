"use strict";

/**
 * What the dashboard shows. A line is [label, metric, colour]; "*" in a metric stands for every name that fits, AGENT
 * for the agent of a panel made once per agent. `covers`: what the y axis shows at least. `form`: "lines", "stack"
 * (values added up) or "bands" (values that contain one another, the smallest first).
 */
const DASHBOARD_SECTIONS = [
  {
    title: "Reward",
    panels: [
      {
        title: "Reward", covers: [0, 1],
        lines: [
          ["alone", "reward/alone", "var(--policy)"], ["with agents", "reward/with_agents", "var(--agent)"],
        ],
        help: "Mean reward of a step's traces. With agents should rise above alone first; alone follows as the " +
          "policy learns what the agents know. With agents not above alone: the agents do not help, or the " +
          "policy does not ask.",
      },
      {
        title: "Reward alone, by kind", covers: [0, 1], lines: [["*", "reward/alone/*"]],
        help: "Mean reward of the traces without agents, by kind of problem. Kinds that the policy could not do by " +
          "itself show what it has taken over from the agents.",
      },
      {
        title: "Scores", lines: [["*", "score/*"]],
        help: "Mean of each further score of the reward functions. Several rewards by name are summed with their " +
          "weights: one that alone rises is what the policy found easiest to please.",
      },
      {
        title: "Problems solved", covers: [0, 1], share: true, lines: [["solved", "solved"]],
        help: "Share of problems with at least one rewarded trace. Between 20% and 90% there is much to learn from; " +
          "near 0% the data are too hard, near 100% too easy.",
      },
    ],
  },
  {
    title: "Consults",
    panels: [
      {
        title: "Consults per trace", covers: [0], lines: [["*", "consults/*"]],
        help: "Answered consults per trace with agents. 0: the prompt does not lead to asking. At the limit of " +
          "consults: say in the prompt when not to ask.",
      },
      {
        title: "Leaks and violations", covers: [0],
        lines: [["leaks", "leaks", "var(--bad)"], ["violations", "violations"]],
        help: "Per trace with agents. Leaks: replies that give the answer away; below 0.1 is well. Violations: the " +
          "policy writes feedback itself where an agent would answer; falls by itself, as such traces earn " +
          "nothing.",
      },
    ],
  },
  {
    title: "Coefficient",
    panels: [
      {
        title: "Mean ratio π/μ", covers: [0], lines: [["*", "agent_ratio_mean/*"]],
        help: "Mean of π/μ, the policy's probability over the agent's own, on the agent's tokens. Below 1 at first, " +
          "towards 1 as they are learned. Where it stays: a larger loss.agent_weight.",
      },
      {
        title: "Tokens at the floor", covers: [0], share: true, lines: [["*", "floor_hit/*"]],
        help: "Share of agent tokens with a positive advantage whose ratio lies below loss.floor: words the policy " +
          "would not have said. 10% to 70% at first, then falling.",
      },
      {
        title: "Tokens at the ceiling", covers: [0], share: true, lines: [["*", "ceiling_hit/*"]],
        help: "Share of agent tokens whose ratio lies above loss.ceiling. Below 10% is well; much more without " +
          "recorded μ: loss.behaviour is too low.",
      },
      {
        title: "Effective sample size", covers: [0, 1], share: true, lines: [["*", "agent_ess/*"]],
        help: "Of the raw ratios, as a share of the tokens: 100% where all weigh the same. Below 10% a few tokens " +
          "carry all: lower loss.ceiling.",
      },
      {
        title: "Log-probability of agents' words", lines: [["*", "agent_logprob/*"]],
        help: "Mean log-probability, in nats, that the policy gives to the agents' tokens. Rising to 0: it would say " +
          "them itself.",
      },
      {
        title: "Ratio of AGENT's tokens", per: "agent", form: "bands", covers: [0, 1], share: true,
        lines: [["0.001", 100], ["0.01", 78], ["0.1", 58], ["0.3", 38], ["1", 18]].map(([bound, strength]) => [
          `< ${bound}`, `agent_ratio_below/${bound}/AGENT`,
          `color-mix(in oklab, var(--agent) ${strength}%, var(--paper))`,
        ]),
        help: "Share of this agent's tokens whose ratio π/μ lies below each bound; what is left above the areas has " +
          "a ratio of 1 or more. The strongest colour are words that the policy would hardly have said: it " +
          "shrinks as they are learned.",
      },
    ],
  },
  {
    title: "Policy",
    panels: [
      {
        title: "Entropy", covers: [0], lines: [["entropy", "entropy", "var(--policy)"]],
        help: "Mean entropy of the policy's tokens, in nats. Falls slowly; near 0 within some steps: raise " +
          "loss.clip_high or lower optimizer.lr.",
      },
      {
        title: "Length", covers: [0],
        lines: [["alone", "length/alone", "var(--policy)"], ["with agents", "length/with_agents", "var(--agent)"]],
        help: "Policy tokens per trace. Alone falling to a few tokens: the reward is being gamed, read the traces. " +
          "Rising to the limit: lower optimizer.lr.",
      },
      {
        title: "Gradient norm", covers: [0], lines: [["norm", "gradient_norm"]],
        help: "Before clipping, of the step's last update. Stays within one order of magnitude; spikes: lower " +
          "optimizer.lr.",
      },
      { title: "Learning rate", covers: [0], lines: [["rate", "lr"]], help: "Of the step's last update." },
      {
        title: "Loss", lines: [
          ["total", "loss", "var(--series-3)"], ["policy tokens", "policy_loss", "var(--policy)"],
          ["agent tokens", "agent_loss", "var(--agent)"], ["KL", "kl", "var(--series-5)"],
        ],
        help: "The total and its parts, mean over the step's updates, before weighing. It is no measure of progress: " +
          "reward is. Watch for jumps.",
      },
      {
        title: "Clipped policy tokens", covers: [0], share: true, lines: [["clipped", "clip_fraction"]],
        help: "Share of policy tokens whose update is cut off by the clip range. Below 5% is well; more: lower " +
          "optimizer.lr or train.minibatches.",
      },
    ],
  },
  {
    title: "Speed & health",
    panels: [
      {
        title: "Sampled tokens per second", covers: [0], lines: [["tokens/s", "tokens_per_second"]],
        help: "Policy tokens of the step over the whole step's time, learning included.",
      },
      {
        title: "Seconds per step", form: "stack", covers: [0], lines: [["*", "seconds/*"]],
        help: "Time of a step, by phase, one on top of the other: sampling traces, learning from them, publishing " +
          "the new weights to the sampler.",
      },
      {
        title: "Tokens per step", covers: [0],
        lines: [
          ["policy", "tokens/policy", "var(--policy)"], ["agents", "tokens/agent", "var(--agent)"],
          ["trained on", "trainable_tokens"],
        ],
        help: "Tokens that the policy and the agents wrote in a step, and how many of them carry a gradient: groups " +
          "whose rewards are all equal carry none.",
      },
      {
        title: "How traces ended", covers: [0], share: true, lines: [["*", "ended/*"]],
        help: "Share of traces that ended otherwise than by an answer, by reason. length: out of tokens; budget: out " +
          "of consults; failed/…: an error, named.",
      },
      {
        title: "Failed and discarded", covers: [0], share: true,
        lines: [["failed", "failed", "var(--bad)"], ["discarded", "discarded"]],
        help: "Failed: share of traces that are not trained on, as something broke; below 2%. Discarded: share of " +
          "groups sampled again for lack of signal; below 50%.",
      },
      {
        title: "Mismatch KL", lines: [["KL", "mismatch_kl"]],
        help: "KL divergence between what the sampler computed and what the learner computes for the same tokens. " +
          "Below 0.01; more without lag: another dtype or model behind the server.",
      },
      {
        title: "Lag", covers: [0], lines: [["updates", "lag"]],
        help: "Updates by which the policy that sampled was behind the learner. Between 0 and rollout.max_lag.",
      },
    ],
  },
];

const HUES = 8;

function hue(i) {
  return `var(--series-${i % HUES})`;
}

/** A run's metrics with a column of steps; the reason of an end is logged only where there is one, so none is 0. */
function complete(metrics) {
  const ends = Object.entries(metrics).filter(([name]) => name.startsWith("ended/"));
  const filled = ends.map(([name, values]) => [name, values.map((value) => value ?? 0)]);
  return { step: [], ...metrics, ...Object.fromEntries(filled) };
}

/** A run's values of a metric, one per logged step, null where there is none. */
function column(run, metric) {
  return Object.hasOwn(run.metrics, metric) ? run.metrics[metric] : run.metrics.step.map(() => null);
}

/** Names of metrics with a value in any run, in order of appearance. */
function metricNames(runs) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.metrics)));
  return [...names].filter((name) => runs.some((run) => column(run, name).some((value) => value !== null)));
}

/** The panels of a section that have data, with their lines as {label, metric, colour}. */
function panelsOf(section, names, agents) {
  if (!agents.length && section.title === "Consults") return [];
  const each = (panel) => (panel.per ? agents.map((agent) => ({ ...panel, agent })) : [panel]);
  const sorts = sortsOf(agents);
  const word = (label, metric) => (label === "*" ? label : sorts[metric.split("/")[1]] ?? label);
  const helpOf = ({ help }) => (agents.length ? help : help.split(/(?<=[.:]) /).filter((said) => !/agent|consult/i.test(said)).join(" "));
  return section.panels.flatMap(each).map((panel) => {
    const fill = (text) => text.replace("AGENT", () => panel.agent);
    const lines = panel.lines.flatMap(([label, metric, colour]) => linesOf(word(label, metric), fill(metric), colour, names, agents));
    lines.forEach((line, i) => (line.colour ??= hue(i)));
    return { form: "lines", ...panel, title: fill(panel.title), lines, help: helpOf(panel) };
  }).filter((panel) => panel.lines.length);
}

function linesOf(label, metric, colour, names, agents) {
  const [before, after] = metric.split("*");
  if (after === undefined) return names.includes(metric) ? [{ label, metric, colour }] : [];
  const found = names.filter((name) => name.startsWith(before)).map((name) => name.slice(before.length));
  const others = found.filter((name) => !agents.includes(name));
  if (before === "reward/alone/") others.sort();
  const ordered = [...agents.filter((agent) => found.includes(agent)), ...others];
  const colourOf = (name) => (agents.includes(name) ? hue(agents.indexOf(name)) : undefined);
  return ordered.map((name) => ({ label: name, metric: before + name, colour: colourOf(name) }));
}

/** The x values of a run: its steps, or the policy tokens sampled so far. */
function along(run, axis) {
  if (axis === "step") return run.metrics.step;
  let sum = 0;
  return column(run, "tokens/policy").map((tokens) => (sum += tokens ?? 0));
}

/** Centred running mean over `span` values, over fewer at the ends; gaps stay gaps. */
function runningMean(values, span) {
  if (span === 1) return values;
  const half = (span - 1) / 2;
  const sums = [0];
  const counts = [0];
  values.forEach((value, i) => {
    sums.push(sums[i] + (value ?? 0));
    counts.push(counts[i] + (value === null ? 0 : 1));
  });
  return values.map((value, i) => {
    const from = Math.max(0, i - half);
    const to = Math.min(values.length, i + half + 1);
    return value === null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
  });
}

/** Columns of equal lengths, those before it added to each. */
function stacked(columns) {
  let below = null;
  return columns.map((values) => {
    below = values.map((value, i) => (value === null ? (below?.[i] ?? null) : value + (below?.[i] ?? 0)));
    return below;
  });
}

/** What is drawn, in that order: {run, colour, style, values}; style is "raw", "line", "stack" or "bands". */
function curvesOf(form, lines, runs, span) {
  return runs.flatMap((run, r) => {
    const raw = lines.map((line) => column(run, line.metric));
    const means = raw.map((values) => runningMean(values, span));
    const drawn = (style, columns) => lines.map(({ colour }, i) => ({ run: r, colour, style, values: columns[i] }));
    if (form === "lines") return [...drawn("raw", raw), ...drawn("line", means)];
    return drawn(r ? "line" : form, form === "stack" ? stacked(means) : means).reverse();
  });
}

/** uPlot's columns: the x of all runs, then each curve there; undefined where its run has no such x, null at a gap. */
function aligned(xs, curves) {
  return uPlot.join(xs.map((x, r) => [x, ...curves.filter((curve) => curve.run === r).map((curve) => curve.values)]));
}

/** The value of a column at `x`, null beyond the run's ends; the last one there is where x is null. */
function valueAt(xs, values, x) {
  if (x === null) return values.findLast((value) => value !== null) ?? null;
  if (!xs.length || x < xs[0] || x > xs.at(-1)) return null;
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return values[xs[high] - x < x - xs[low] ? high : low];
}

/** A value as text: shares in percent, large numbers in groups of three. */
function metricText(value, share = false) {
  if (value !== null && share) return percent(value, 1);
  return value !== null && Math.abs(value) >= 1000 ? grouped(Math.round(value)) : fixed(value, 4);
}
