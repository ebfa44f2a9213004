/** The page's frame: header, views, keyboard, theme, and who is told what when. */

import { openSource } from "raywb/data";
import { bar, el, icon, morphChildren, say, table } from "raywb/dom";
import { count, counted, moment } from "raywb/format";
import { liveOf } from "raywb/live";
import { currentRoute, linkTo, select, VIEWS } from "raywb/route";
import { themeChanged, useSource } from "raywb/charts";
import { delivery, noteDelivery } from "raywb/delivery";
import { nodes } from "raywb/nodes";
import { overview } from "raywb/overview";
import { pipelines } from "raywb/pipelines";
import { training } from "raywb/training";

const RENDER = { overview, pipelines, training, nodes, delivery };
const TITLES = {
  overview: "Overview",
  pipelines: "Pipelines",
  training: "Training",
  nodes: "Nodes",
  delivery: "Delivery",
};
const THEME_KEY = "raywb-theme";

const CONNECTION = {
  connecting: "connecting…",
  live: "live",
  lost: "connection lost, trying again…",
  refused: "refused",
  ended: "not live",
  report: "report",
};

const source = openSource();
const main = document.getElementById("main");
const dialog = document.getElementById("dialog");
let series = { run: null, list: [], rows_read: 0, rows_total: 0 };
let shown = "";
let drawing = false;
let wantsFilter = false;

/** What every view gets: the overview, the selected run and its series, and what is selected. */
function context() {
  const { overview: latest } = source;
  const route = currentRoute();
  const number = Number(route.run ?? latest.run);
  const run = latest.runs.find((one) => one.number === number) ?? null;
  const mine = series.run === number;
  const isPresent = latest.status?.run.id === run?.id;
  return {
    source,
    overview: latest,
    status: latest.status,
    route,
    run,
    number,
    series: mine ? series.list : null,
    seriesTrouble: mine ? series.trouble : "",
    isPresent,
    ...liveOf(latest.status, number, isPresent, mine ? series.list : null),
  };
}

/** Draw at the next frame, once, however many reasons there are. */
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawNow();
  });
}

function drawNow() {
  const route = currentRoute();
  source.tick();
  if (!source.overview) {
    drawFrame(route, null);
    const wait = source.trouble || CONNECTION[source.connection];
    morphChildren(main, [el("p.empty", null, wait)]);
    return;
  }
  const given = context();
  drawFrame(route, given);
  if (route.view !== shown) {
    main.replaceChildren();
    if (shown) scrollTo(0, 0);
    shown = route.view;
  }
  main.dataset.view = route.view;
  morphChildren(main, given.run ? [RENDER[route.view](given)].flat() : [noRun(given)]);
  if (wantsFilter && document.getElementById("filter")) {
    wantsFilter = false;
    document.getElementById("filter").focus();
  }
  const name = given.run?.name;
  document.title = `${name ? `${name} · ` : ""}${TITLES[route.view]} · raywb`;
  askForSeries(given.number);
}

function noRun({ number, overview: { runs } }) {
  if (runs.length) return el("p.empty", null, `There is no run ${number} here. `, el("a", { href: linkTo("overview", { run: undefined }) }, "Show the present one."));
  return el("p.empty", null, "No run has begun yet. ", el("code", null, "raywb.start()"), " in a driver begins one; this page shows it as soon as it is there.");
}

async function askForSeries(run) {
  const { version } = source;
  if (series.run === run && series.version === version) return;
  const before = series.run === run ? series : { list: null };
  series = { ...before, run, version };
  const mine = series;
  try {
    const { series: list } = await source.series(run);
    if (series === mine) Object.assign(series, { list, trouble: "" });
  } catch (error) {
    if (series === mine) Object.assign(series, { list: series.list ?? [], trouble: error.message });
  }
  draw();
}

function drawFrame(route, given) {
  const header = document.getElementById("top");
  const links = VIEWS.map((view, index) =>
    el("a", { href: linkTo(view), "aria-current": route.view === view ? "page" : null, "aria-keyshortcuts": index + 1, title: `${TITLES[view]} (${index + 1})` }, TITLES[view], badgeOf(view, given)),
  );
  morphChildren(header, [
    el("a.brand", { href: linkTo("overview"), "aria-label": "raywb: overview" }, el("span.mark", { "aria-hidden": "true" }), "raywb"),
    el("nav", { "aria-label": "Views" }, links),
    el("div.tools", null, runChoice(given), connection(given), themeButton(), helpButton()),
    given ? reading(given.overview.reading) : null,
  ].filter(Boolean));
}

/** How many things are wrong, beside the view that shows them. */
function badgeOf(view, given) {
  if (view !== "overview" || !given?.status) return null;
  const { problems, warnings } = given.status;
  const number = problems.length + warnings.length;
  if (!number) return null;
  return el(`span.badge${problems.length ? ".bad" : ".warn"}`, { title: `${counted(problems.length, "problem")}, ${counted(warnings.length, "warning")}` }, number);
}

function runChoice(given) {
  const runs = given?.overview.runs ?? [];
  if (runs.length < 2) return null;
  const options = runs.map((run) => el("option", { value: run.number, selected: run.number === given.number }, `${run.name} · ${run.state}`));
  const change = (event) => select({ run: event.target.value, key: undefined, stage: undefined, from: undefined, to: undefined, axis: undefined });
  const choice = el("select", { "aria-label": "Run", onchange: change }, options);
  choice.value = String(given.number);
  return choice;
}

function connection(given) {
  let text = CONNECTION[source.connection];
  let state = source.connection;
  if (given?.run && state === "live" && given.run.state !== "running") {
    text = given.run.state;
    state = "ended";
  } else if (given?.run && state === "ended") {
    text = given.run.state === "running" ? "not live" : given.run.state;
  }
  if (source.trouble) text = source.trouble;
  return el("span.connection", { "data-state": state, role: "status", title: source.overview ? `newest state: ${moment(source.overview.now_s)}` : null }, text);
}

/** How much of the directory is read: charts fill up meanwhile. */
function reading({ rows_read: read, rows_total: total, rows_thinned: thinned }) {
  if (!total || read >= total) {
    return thinned ? el("div.reading", null, `The first ${count(thinned)} rows are kept as minima, maxima and means: all would not fit into memory`) : null;
  }
  return el("div.reading", null, bar(read / total, "Rows read"), `Reading ${count(read)} of ${count(total)} rows`);
}

// Theme

function systemTheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function keptTheme() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null; // a file of its own, or storage that is forbidden: the system's theme
  }
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme ?? systemTheme();
  themeChanged();
}

function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    say("This browser keeps no settings for this page");
  }
  useTheme(theme);
  say(`${theme} theme`);
  draw();
}

function themeButton() {
  const isDark = document.documentElement.dataset.theme === "dark";
  return el("button.icon", { type: "button", title: "Theme (t)", "aria-label": `Use the ${isDark ? "light" : "dark"} theme`, "aria-keyshortcuts": "t", onclick: toggleTheme }, icon(isDark ? "sun" : "moon"));
}

// Keyboard

const KEYS = [
  ["1 – 5", "overview, pipelines, training, nodes, delivery"],
  ["/", "filter the series"],
  ["j  k", "next, previous section"],
  ["[  ]", "previous, next run"],
  ["x", "x axis: step, time, row"],
  ["l", "logarithmic y axis"],
  ["r", "whole range again"],
  ["t", "light or dark"],
  ["?", "this list"],
  ["Esc", "close, leave the filter"],
];

function helpButton() {
  return el("button.icon", { type: "button", title: "Keyboard (?)", "aria-label": "Keyboard shortcuts", "aria-keyshortcuts": "?", onclick: openHelp }, "?");
}

function openHelp() {
  const close = () => dialog.close();
  dialog.replaceChildren(
    el("header", null, el("h2", { id: "dialog-title" }, "Keyboard"), el("button.icon", { type: "button", "aria-label": "Close", onclick: close }, icon("close"))),
    table("Keys", [{ text: "Key" }, { text: "What it does" }], KEYS.map(([key, text]) => [key.split("  ").map((one) => el("kbd", null, one)), text])),
    el("p.hint", null, "In a chart: drag over a range to zoom in; double click for the whole range. A click on its title makes it large."),
  );
  dialog.showModal();
}

function step(by) {
  const stops = [...main.querySelectorAll("[data-stop]")];
  const at = stops.findIndex((stop) => stop.contains(document.activeElement));
  const next = stops[at < 0 ? (by > 0 ? 0 : stops.length - 1) : Math.max(0, Math.min(stops.length - 1, at + by))];
  if (!next) return;
  next.tabIndex = next.tabIndex >= 0 ? next.tabIndex : -1;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function otherRun(by) {
  if (!source.overview) return;
  const { number, overview: { runs } } = context();
  const at = runs.findIndex((run) => run.number === number);
  const next = runs[at + by];
  if (next) select({ run: next.number, key: undefined, stage: undefined, from: undefined, to: undefined, axis: undefined });
}

const SHORTCUTS = {
  t: toggleTheme,
  "?": openHelp,
  j: () => step(1),
  k: () => step(-1),
  "[": () => otherRun(-1),
  "]": () => otherRun(1),
  r: () => select({ from: undefined, to: undefined, axis: undefined }),
  l: () => select({ log: currentRoute().log ? undefined : "1" }),
  x: nextAxis,
  "/": focusFilter,
};

function nextAxis() {
  if (source.isReport) return;
  const order = ["axis", "time", "row"];
  const next = order[(order.indexOf(currentRoute().x ?? "axis") + 1) % order.length];
  select({ x: next === "axis" ? undefined : next, from: undefined, to: undefined, axis: undefined });
  say(`x axis: ${next === "axis" ? "step" : next}`);
}

function focusFilter() {
  wantsFilter = true;
  if (!document.getElementById("filter")) location.hash = linkTo("training");
  else draw();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.matches?.("input:not([type=range], [type=checkbox]), textarea, select");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (dialog.open) return; // Escape closes it by itself
  const view = VIEWS[Number(event.key) - 1];
  const action = view ? () => (location.hash = linkTo(view)) : SHORTCUTS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

// Start

useSource(source);
useTheme(keptTheme());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (!keptTheme()) {
    useTheme(null);
    draw();
  }
});
dialog.addEventListener("close", () => dialog.replaceChildren());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
addEventListener("hashchange", draw);
source.addEventListener("change", () => {
  noteDelivery(source.overview);
  draw();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the route's
  main.focus();
});
setInterval(() => source.connection === "live" && !document.hidden && draw(), 5000); // ages grow
draw();
source.start();
