/** Delivery: what came in, what W&B has, what waits, and what is missing and why. */

import { chart, chartSpec } from "raywb/charts";
import { chip, el, empty, section, stateChip, table } from "raywb/dom";
import { ago, bytes, count, counted, words } from "raywb/format";
import { sum } from "raywb/overview";

/** Sources, and runs of stages, that are listed one by one. */
const LISTED = 20;

/** States that this page has seen, thinned by half when there are more. */
const KEPT = 2000;

/** What this page saw while it was open, for the present run: rows by time. */
let noted = { run: null, x: [], received: [], delivered: [], waiting: [] };

/** Remember how the rows stand now. */
export function noteDelivery(overview) {
  const { live, now_s: now, status } = overview ?? {};
  if (!live || !status) return;
  if (noted.run !== status.run.id) noted = { run: status.run.id, x: [], received: [], delivered: [], waiting: [] };
  if (noted.x.length && now <= noted.x[noted.x.length - 1]) return;
  noted.x.push(now);
  noted.received.push(status.received_rows);
  noted.delivered.push(deliveredOf(status.run.mode, status.sink));
  noted.waiting.push(status.backlog_rows);
  if (noted.x.length <= KEPT) return;
  for (const name of ["x", "received", "delivered", "waiting"]) noted[name] = noted[name].filter((_, index) => index % 2 === 0);
}

function deliveredOf(mode, sink) {
  return mode === "online" ? sink.confirmed_rows : sink.applied_rows;
}

export function delivery(given) {
  const { status, isPresent, stageRun: own } = given;
  const title = el("h1", null, "Delivery");
  const parts = [title];
  if (!status) return [...parts, empty("How this run was delivered is not known here: its service wrote no status."), chartsOf(given)].filter(Boolean);
  if (isPresent || own) parts.push(numbers(given, isPresent ? status : own, isPresent));
  else parts.push(empty("How this run was delivered is not known here; what is below is of the present one."));
  return [...parts, undelivered(status), unconfirmed(status), chartsOf(given), losses(status), sinks(status), sources(status, given.overview.sources)].filter(Boolean);
}

function numbers({ run }, of, isPresent) {
  const cells = [
    ["Rows in", count(of.received_rows)],
    ...(isPresent ? [["Finished rows", count(of.outbox_rows)]] : []),
    ...(run.mode === "disabled" ? [] : [[run.mode === "online" ? "With W&B" : "In W&B's files", count(deliveredOf(run.mode, of.sink))], ["Waiting", count(of.backlog_rows)]]),
    ...(isPresent ? [["Lost", count(sum(of.lost)), sum(of.lost) > 0], ["Values refused", count(of.rejected), of.rejected > 0]] : []),
    ...(isPresent && of.after_finish_rows ? [["After finish()", count(of.after_finish_rows), true]] : []),
  ];
  const disabled = run.mode === "disabled" ? el("p.hint", null, "W&B is disabled: the rows stay in ", el("code", null, run.dir), ".") : null;
  const note = run.mode === "offline" ? el("p.hint", null, "Offline: the rows lie in ", el("code", null, run.dir), "; ", el("code", null, "raywb sync"), " takes them to W&B.") : null;
  return el("section.panel", { "aria-label": "Rows", "data-stop": true, tabindex: -1 }, el("div.numbers", null, cells.map(([name, text, isBad]) => el("div", null, el("span", null, name), el(`b${isBad ? ".bad" : ""}`, null, text)))), note, disabled);
}

function chartsOf(given) {
  const { series, status, overview: { live }, source } = given;
  const found = [];
  if (live && status && noted.x.length > 1) {
    const line = (name, label) => ({ key: `page:${name}`, label, read: async () => ({ axis: null, x: [...noted.x], min: noted[name], max: noted[name], mean: [...noted[name]], points: noted.x.length }) });
    found.push(chartSpec(given, { title: "Rows", sub: "since this page is open", axis: null, axisName: "time", x: "time", range: null, smooth: 0, lines: [line("received", "in"), line("delivered", "out")] }));
    found.push(chartSpec(given, { title: "Rows that wait", sub: "since this page is open", axis: null, axisName: "time", x: "time", range: null, smooth: 0, lines: [line("waiting", "waiting")] }));
  }
  const mine = (series ?? []).filter(({ key }) => key.startsWith("raywb/"));
  const named = (title, keys) => {
    const lines = mine.filter(({ key }) => keys(key)).map(({ key }) => ({ key, label: words(key.split("/").pop()) }));
    const route = { ...given.route, x: given.route.x ?? "time" };
    if (lines.length) found.push(chartSpec({ ...given, route, source }, { title, sub: "in the run", axis: null, lines, smooth: 0 }));
  };
  named("Backlog", (key) => key === "raywb/backlog_rows");
  named("Lost, by reason", (key) => key.startsWith("raywb/lost/"));
  named("Refused, late", (key) => ["raywb/rejected", "raywb/late_rows"].includes(key));
  if (!found.length) return null;
  return section("Over time", { "data-stop": true, tabindex: -1, "data-id": "charts" }, el("div.charts", { "data-id": "charts" }, found.map(chart)));
}

function losses({ lost, rejected }) {
  const rows = Object.entries(lost).sort((a, b) => b[1] - a[1]).map(([reason, number]) => [words(reason), count(number)]);
  if (rejected) rows.push(["values that log() refused", count(rejected)]);
  const body = rows.length ? table("Rows lost, by reason", [{ text: "Reason" }, { text: "Rows", number: true }], rows) : empty("Nothing is lost.");
  return section("Losses", { "data-stop": true, tabindex: -1 }, body);
}

function undelivered({ undelivered_updates: updates }) {
  if (!updates.length) return null;
  return section("Not with W&B", { "data-stop": true, tabindex: -1 }, el("ul.plain", null, updates.slice(0, LISTED).map((text) => el("li", null, text))), updates.length > LISTED ? el("p.hint", null, `and ${updates.length - LISTED} more`) : null);
}

function unconfirmed({ unconfirmed: all }) {
  if (!all.length) return null;
  const rows = all.slice(0, LISTED).map((one) => [
    `${one.hostname || one.node_id.slice(0, 8) || "unknown host"} · pid ${one.pid}`,
    one.quiet ? chip("quiet when last heard") : chip(one.unacknowledged_rows === null ? "unknown number missing" : `at least ${count(one.unacknowledged_rows)} missing`, "bad"),
    count(one.received_rows),
    one.reason,
  ]);
  const heads = [{ text: "Source" }, { text: "Rows" }, { text: "Received", number: true }, { text: "Why" }];
  return section("Unconfirmed", { "data-stop": true, tabindex: -1 }, el("p.sub", null, "Processes that fell silent, and whose journals cannot be had: their last rows may be missing."), table("Unconfirmed sources", heads, rows), all.length > LISTED ? el("p.hint", null, `and ${all.length - LISTED} more`) : null);
}

function sinks({ run, sink, stage_runs: stageRuns, backlog_rows: backlog }) {
  const row = (name, one, waiting) => [name, stateChip(one.state), count(one.applied_rows), count(one.confirmed_rows), count(waiting), count(one.restarts), one.last_error ?? "–"];
  const open = [...stageRuns].sort((a, b) => Number(b.state === "running") - Number(a.state === "running"));
  const rows = [row(run.name, sink, backlog), ...open.slice(0, LISTED).map((one) => row(one.run.name, one.sink, one.backlog_rows))];
  const heads = [{ text: "Run" }, { text: "State" }, { text: "Taken", number: true }, { text: "Shown", number: true }, { text: "Waiting", number: true }, { text: "Restarts", number: true }, { text: "Last error" }];
  return section("Sinks", { "data-stop": true, tabindex: -1 }, table("W&B's side of each run", heads, rows), open.length > LISTED ? el("p.hint", null, `and ${open.length - LISTED} more runs of stages`) : null);
}

function sources({ address, sources: all, silence_s: silence }, known) {
  if (!all.length && !address) return null; // what lies in a directory does not tell of processes
  if (!all.length) return section("Sources", { "data-stop": true, tabindex: -1 }, empty("No process has attached yet: ", el("code", null, "raywb.attach()"), " in a task, actor or driver."));
  const stateOf = (one) => (one.ended ? (one.killed ? "killed" : "ended") : one.heard_ago_s !== null && one.heard_ago_s <= silence ? "live" : "silent");
  // Of very many sources the page is told of some, and how many they all are.
  const states = known ?? {};
  if (!known) for (const one of all) states[stateOf(one)] = (states[stateOf(one)] ?? 0) + 1;
  const number = sum(states);
  const said = Object.entries(states).map(([state, number]) => `${count(number)} ${state}`).join(", ");
  const listed = [...all].sort((a, b) => Number(a.ended) - Number(b.ended) || (a.heard_ago_s ?? 1e9) - (b.heard_ago_s ?? 1e9)).slice(0, LISTED);
  const kinds = { live: "good", silent: "warn", killed: "bad", ended: "" };
  const rows = listed.map((one) => [one.hostname, one.pid, one.stages.join(", ") || "–", chip(stateOf(one), kinds[stateOf(one)]), count(one.received_rows), bytes(one.received_bytes), one.heard_ago_s === null ? "–" : ago(one.heard_ago_s)]);
  const heads = [{ text: "Host" }, { text: "Pid", number: true }, { text: "Stages" }, { text: "State" }, { text: "Rows", number: true }, { text: "Bytes", number: true }, { text: "Heard", number: true }];
  return section("Sources", { "data-stop": true, tabindex: -1 }, el("p.sub", null, `${counted(number, "source")}: ${said}`), table("Processes that log", heads, rows), number > LISTED ? el("p.hint", null, `and ${count(number - LISTED)} more`) : null);
}
