/** The page's frame: header, views, keyboard, theme, and who is told what when. */

import { openSource } from "raywb/data";
import { bar, el, icon, morphChildren, say, table } from "raywb/dom";
import { count, counted, moment } from "raywb/format";
import { liveOf, stageRunOf } from "raywb/live";
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
/** Shortest and longest time between two looks at the list of series of a run, in milliseconds. */
const LIST_MS = [3000, 30000];

/** Lists that are kept, by number of their run, those asked for last at the end. */
const LISTS = 8;
const lists = new Map();
let shown = "";
let drawing = false;
let wantsFilter = false;
let revealed = "";

/** What every view gets: the overview, the selected run and its series, and what is selected. */
function context() {
  const { overview: latest } = source;
  const route = currentRoute();
  const number = Number(route.run ?? latest.run);
  const run = latest.runs.find((one) => one.number === number) ?? null;
  const mine = lists.get(number);
  const isPresent = Boolean(latest.status) && number === latest.run;
  return {
    source,
    overview: latest,
    status: latest.status,
    route,
    run,
    number,
    series: mine?.list ?? null,
    seriesTrouble: mine?.trouble ?? "",
    isPresent,
    stageRun: stageRunOf(latest, run),
    ...liveOf(latest.status, number, isPresent, mine?.list ?? null),
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
  reveal(route);
  if (wantsFilter && document.getElementById("filter")) {
    wantsFilter = false;
    document.getElementById("filter").focus();
  }
  const name = given.run?.name;
  document.title = `${name ? `${name} · ` : ""}${TITLES[route.view]} · raywb`;
  askForSeries(given.number);
}

/** Bring what the address names into view, once, as soon as it is there. */
function reveal({ view, run, stage, key }) {
  const wanted = [view, run, stage, key].join(" ");
  if (wanted === revealed) return;
  const found = main.querySelector("[data-reveal]");
  if (!found && (stage || key)) return; // its series are not known yet
  revealed = wanted;
  found?.scrollIntoView({ block: found.dataset.reveal });
}

function noRun({ number, overview: { runs } }) {
  if (runs.length) return el("p.empty", null, `There is no run ${number} here. `, el("a", { href: linkTo("overview", { run: undefined }) }, "Show the present one."));
  return el("p.empty", null, "No run has begun yet. ", el("code", null, "raywb.start()"), " in a driver begins one; this page shows it as soon as it is there.");
}

/** Have the list of a run's series, and look again when there may be more of them.
 *
 * One request of a run at a time, however long it takes: its answer is shown whatever has come in
 * by then, and a little later the list is asked for again.
 */
async function askForSeries(run) {
  const mine = lists.get(run) ?? { list: null, trouble: "", version: null, isAsked: false, next: 0, pause: LIST_MS[0], timer: 0 };
  lists.delete(run);
  lists.set(run, mine);
  if (lists.size > LISTS) lists.delete(lists.keys().next().value);
  const version = source.version(run);
  if (mine.isAsked || mine.version === version) return;
  if (Date.now() < mine.next) {
    mine.timer ||= setTimeout(() => {
      mine.timer = 0;
      draw();
    }, mine.next - Date.now());
    return;
  }
  mine.isAsked = true;
  try {
    const { series: list, isWhole } = await source.series(run);
    Object.assign(mine, { list, trouble: "", version: isWhole ? version : null, pause: LIST_MS[0] });
  } catch (error) {
    Object.assign(mine, { trouble: error.message, version: null, pause: Math.min(2 * mine.pause, LIST_MS[1]) });
  }
  mine.isAsked = false;
  mine.next = Date.now() + mine.pause;
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
    given ? reading(source.reading(given.number)) : null,
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
setInterval(() => !document.hidden && draw(), 5000); // ages grow, and untold runs
draw();
source.start();
