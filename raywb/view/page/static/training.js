/** Training: every series that is logged, by namespace, each on its own step axis. */

import { chart, chartSpec } from "raywb/charts";
import { copyLink, el, empty } from "raywb/dom";
import { ago, count, counted, duration, perSecond, value } from "raywb/format";
import { currentRoute, hashOf, select } from "raywb/route";

/** Charts of one chunk of a grid: made together when it is near the window, taken down behind it. */
const CHUNK = 12;

/** Height of a chart with its frame, and the gap between two, in pixels; as in the style sheet. */
const CARD_PX = 224;
const GAP_PX = 12;

/** Groups are opened from the first on until so many charts are shown. */
const OPENED_CHARTS = 48;

/** Namespaces that have views of their own come last here, closed. */
const ELSEWHERE = /^(xenna|nodes|raywb)(\/|$)/;

/** What says how the ranks of a stage stand to each other, drawn after everything else. */
const RANK_KEYS = ["ranks", "slowest_rank", "rank_spread_s", "late_ranks"];

/** Which groups the reader opened or closed, by run and name; everything else opens by itself. */
const opened = new Map();

export function training(given) {
  const { series, seriesTrouble, route } = given;
  if (!series) return [el("h1", null, "Training"), empty(seriesTrouble || "Loading the list of series…")];
  const matches = matcher(route.filter);
  const groups = grouped(series);
  const shown = groups.map((group) => ({ ...group, cards: group.cards.filter((card) => card.keys.some(({ key }) => matches(key))) })).filter((group) => group.cards.length);
  const number = shown.reduce((sum, group) => sum + group.cards.length, 0);
  return [
    el("h1", null, "Training"),
    toolbar(given, number, series.length),
    seriesTrouble ? el("p.trouble.bad", null, el("b", null, "Problem"), " ", seriesTrouble) : null,
    focus(given, groups),
    shown.length ? null : nothing(given),
    ...groupsOf(given, shown),
  ].filter(Boolean);
}

function nothing({ series, route }) {
  if (route.filter) return empty(`No series matches “${route.filter}”. `, el("button.link", { type: "button", onclick: () => select({ filter: undefined }) }, "Show all"));
  if (series.length) return null;
  return empty("No number has been logged to this run yet. In a task, actor or driver: ", el("code", null, "raywb.attach(\"training/a\").log({\"loss\": 0.1}, step=1)"), ".");
}

/** Words that all must be in a key; in slashes: a regular expression. */
function matcher(filter) {
  if (!filter) return () => true;
  const pattern = /^\/(.+)\/$/.exec(filter);
  if (pattern) {
    try {
      const expression = new RegExp(pattern[1], "i");
      return (key) => expression.test(key);
    } catch {
      return () => false; // half typed
    }
  }
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  return (key) => words.every((word) => key.toLowerCase().includes(word));
}

function toolbar({ route, source }, shown, all) {
  const typed = (event) => select({ filter: event.target.value }, true);
  const slid = (event) => select({ smooth: event.target.value === "0" ? undefined : event.target.value }, true);
  const axes = [["axis", "step"], ["time", "time"], ["row", "row"]];
  const x = route.x ?? "axis";
  return el(
    "div.toolbar",
    { role: "group", "aria-label": "What the charts show", "data-id": "toolbar" },
    el("label.filter", null, el("span.unseen", null, "Filter the series"), el("input", { id: "filter", type: "search", value: route.filter ?? "", placeholder: "Filter: loss, or /regex/", autocomplete: "off", spellcheck: "false", oninput: typed, "aria-keyshortcuts": "/" })),
    el("span.counted", { role: "status" }, shown === all ? counted(all, "series").replace(/ss$/, "s") : `${count(shown)} charts`),
    source.isReport ? null : el("div.choice", { role: "group", "aria-label": "x axis" }, axes.map(([id, name]) => el("button", { type: "button", "aria-pressed": x === id, onclick: () => select({ x: id === "axis" ? undefined : id, from: undefined, to: undefined, axis: undefined }) }, name))),
    el("button.toggle", { type: "button", "aria-pressed": route.log === "1", title: "Logarithmic y axis (l)", onclick: () => select({ log: currentRoute().log ? undefined : "1" }) }, "log y"),
    el("label.slider", null, "smooth", el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: route.smooth ?? 0, oninput: slid, "aria-label": "Smoothing" }), el("output", null, Number(route.smooth ?? 0).toFixed(2))),
    route.from !== undefined ? el("button.toggle", { type: "button", title: "Whole range (r)", onclick: () => select({ from: undefined, to: undefined, axis: undefined }) }, "✕ zoom") : null,
  );
}

/** Series by namespace; those of the ranks of one key are one chart. */
export function grouped(series) {
  const groups = new Map();
  const families = new Map();
  const axes = new Set(series.map((one) => one.axis));
  for (const one of series) {
    const rank = /^(.+)\/rank_(\d+)$/.exec(one.key);
    const base = rank ? rank[1] : one.key;
    const namespace = rank ? base.slice(0, Math.max(0, base.lastIndexOf("/"))) : one.namespace;
    if (axes.has(one.key)) continue; // over itself it is a straight line
    if (!groups.has(namespace)) groups.set(namespace, { name: namespace, cards: [] });
    const name = namespace && base.startsWith(`${namespace}/`) ? base.slice(namespace.length + 1) : base;
    const line = { key: one.key, label: rank ? `rank ${rank[2]}` : name };
    if (rank && families.has(base)) {
      families.get(base).keys.push(line);
      continue;
    }
    const card = { title: rank ? `${name}, by rank` : name, axis: one.axis, keys: [line] };
    if (rank) families.set(base, card);
    groups.get(namespace).cards.push(card);
  }
  const place = (card) => RANK_KEYS.indexOf(card.title);
  const all = [...groups.values()];
  for (const group of all) group.cards.sort((a, b) => place(a) - place(b) || 0);
  const isElsewhere = (group) => Number(ELSEWHERE.test(group.name));
  return all.filter((group) => group.cards.length).sort((a, b) => isElsewhere(a) - isElsewhere(b));
}

function groupsOf(given, groups) {
  const { number, route, stages } = given;
  let drawn = 0;
  return groups.map((group) => {
    const id = `${number} ${group.name}`;
    const byItself = Boolean(route.filter) || route.stage === group.name || (drawn < OPENED_CHARTS && !ELSEWHERE.test(group.name));
    const isOpen = opened.get(id) ?? byItself;
    if (isOpen) drawn += group.cards.length;
    const live = stages.find((stage) => stage.stage === group.name);
    const specs = isOpen ? group.cards.map((card) => specOf(given, card)) : [];
    const toggle = () => {
      opened.set(id, !isOpen);
      dispatchEvent(new Event("hashchange"));
    };
    const name = group.name || "(no namespace)";
    return el(
      `section.group${route.stage === group.name ? ".selected" : ""}`,
      { "data-id": id, "data-stop": true, "data-reveal": route.stage === group.name && !route.key ? "start" : null, tabindex: -1, "aria-label": name },
      el(
        "header",
        null,
        el("h2", null, el("button.fold", { type: "button", "aria-expanded": isOpen, onclick: toggle }, name)),
        el("small", null, counted(group.cards.length, "chart")),
        copyLink(hashOf({ view: "training", run: number, stage: group.name }), `stage ${name}`),
        live ? liveLine(live, given.overview) : null,
      ),
      isOpen ? slowRanks(given, group.name) : null,
      isOpen ? el("raywb-grid", { spec: specs }) : null,
    );
  });
}

/** Ranks that lag or are silent, each with the reason. */
function slowRanks({ status, run, isPresent, stageRun }, name) {
  const stage = (isPresent || stageRun) && status.stages.find((one) => one.stage === name && one.run_id === run.id);
  if (!stage?.slow?.length) return null;
  const more = stage.slow_ranks - stage.slow.length;
  const said = stage.slow.map((one) => {
    const where = one.pid ? ` (${one.hostname}, pid ${one.pid})` : "";
    return el("li", null, el("b", null, `Rank ${one.rank}`), `${where}${one.step === null ? "" : ` at step ${count(one.step)}`}: ${one.reason}`);
  });
  return el("ul.slow", { "aria-label": `Slow ranks of ${name}` }, said, more > 0 ? el("li", null, `and ${count(more)} more`) : null);
}

function liveLine(live, { live: isLive, now_s: now }) {
  const parts = [
    live.step === null ? "" : `step ${count(live.step)}`,
    live.steps_per_s ? perSecond(live.steps_per_s, "steps") : "",
    live.main ? `${live.main} ${value(live.metrics[live.main])}` : "",
    live.ranks ? counted(live.ranks, "rank") : "",
    live.rank_spread_s ? `rank ${live.slowest_rank} last by ${duration(live.rank_spread_s)}` : "",
    isLive ? ago(now - live.time_s) : "",
  ];
  return el("span.live", null, parts.filter(Boolean).map((part) => el("span", null, part)));
}

function specOf(given, card) {
  return chartSpec(given, { title: card.title, axis: card.axis, lines: card.keys, opens: card.keys[0].key });
}

/** The one chart that the address names, large. */
function focus(given, groups) {
  const { route, number } = given;
  if (!route.key) return null;
  const close = el("a.close", { href: hashOf({ ...route, key: undefined }) }, "Close");
  const group = groups.find(({ cards }) => cards.some((card) => card.keys.some(({ key }) => key === route.key)));
  const card = group?.cards.find((one) => one.keys.some(({ key }) => key === route.key));
  const link = copyLink(hashOf(route), `series ${route.key}`);
  const heading = el("div.title-row", null, el("h2", null, route.key), link, close);
  if (!card) return el("section.panel.focus", { "data-id": "focus" }, heading, empty("This run has no such series."));
  const spec = { ...specOf(given, card), height: 340, large: true, opens: undefined };
  return el("section.panel.focus", { "data-id": `focus ${number} ${route.key}`, "data-stop": true, "data-reveal": "start", tabindex: -1, "aria-label": route.key }, heading, chart(spec));
}

/** `<raywb-grid>`: very many charts, of which only those near the window exist. */
class RaywbGrid extends HTMLElement {
  #specs = [];
  #chunks = [];
  #observer = null;

  get spec() {
    return this.#specs;
  }

  set spec(specs) {
    this.#specs = specs;
    if (this.isConnected) this.#fill();
  }

  connectedCallback() {
    const look = (entries) => entries.forEach(({ target, isIntersecting }) => this.#show(this.#chunks.indexOf(target), isIntersecting));
    this.#observer = new IntersectionObserver(look, { rootMargin: "800px 0px" });
    this.#fill();
  }

  disconnectedCallback() {
    this.#observer.disconnect();
    this.#chunks = [];
    this.replaceChildren();
  }

  #fill() {
    const wanted = Math.ceil(this.#specs.length / CHUNK);
    while (this.#chunks.length > wanted) {
      const chunk = this.#chunks.pop();
      this.#observer.unobserve(chunk);
      chunk.remove();
    }
    while (this.#chunks.length < wanted) {
      const chunk = el("div.charts.chunk");
      this.#chunks.push(chunk);
      this.append(chunk);
      this.#hold(this.#chunks.length - 1);
      this.#observer.observe(chunk);
    }
    this.#chunks.forEach((chunk, index) => {
      if (!chunk.dataset.shown) this.#hold(index);
      else this.#show(index, true);
    });
  }

  #of(index) {
    return this.#specs.slice(index * CHUNK, (index + 1) * CHUNK);
  }

  /** An empty chunk takes the room that its charts will take. */
  #hold(index) {
    const columns = this.clientWidth < 560 ? 1 : Math.max(1, Math.floor((this.clientWidth + GAP_PX) / (320 + GAP_PX)));
    const rows = Math.ceil(this.#of(index).length / columns);
    this.#chunks[index].style.minHeight = `${rows * (CARD_PX + GAP_PX) - GAP_PX}px`;
  }

  #show(index, isNear) {
    const chunk = this.#chunks[index];
    if (!chunk) return;
    if (!isNear) {
      if (chunk.dataset.shown) {
        chunk.style.minHeight = `${chunk.offsetHeight}px`;
        chunk.replaceChildren();
        delete chunk.dataset.shown;
      }
      return;
    }
    chunk.dataset.shown = "1";
    chunk.style.minHeight = "";
    const known = new Map([...chunk.children].map((one) => [one.dataset.id, one]));
    const fresh = this.#of(index).map((spec) => chart(spec));
    const kept = fresh.map((one) => {
      const old = known.get(one.dataset.id);
      if (old) old.spec = one.spec;
      return old ?? one;
    });
    if (kept.length !== chunk.children.length || kept.some((one, at) => chunk.children[at] !== one)) chunk.replaceChildren(...kept);
  }
}

customElements.define("raywb-grid", RaywbGrid);
