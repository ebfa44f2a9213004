/** Nodes: how busy each one was and is, and which of them are stale or gone. */

import { axisOf, chart, chartSpec } from "raywb/charts";
import { bar, chip, el, empty, section, table } from "raywb/dom";
import { count, counted, duration, gb, moment, percent, words } from "raywb/format";
import { select } from "raywb/route";
import { sum } from "raywb/overview";
import "raywb/heat_map";

/** Nodes that are listed one by one; more are summed up by what they are. */
const LISTED = 64;
const LISTED_LEFT = 8;

/** Lines of the heat map, and for how long the same nodes stand in it, in milliseconds. */
const MAP_ROWS = 64;
const MAP_MS = 60000;

/** Which nodes the heat map shows, by run and metric: they must not change at every row. */
const extremes = new Map();

const SUMS = ["mean", "min", "max"];

/** What the metrics are called; those not named here are called by their keys. */
const NAMES = {
  cpu_percent: "CPU, %",
  memory_percent: "Memory, %",
  gpu_percent: "GPU, %",
  gpu_memory_percent: "GPU memory, %",
  disk_percent: "Disk, %",
  object_store_percent: "Object store, %",
  memory_used_gb: "Memory, GB",
  gpu_memory_used_gb: "GPU memory, GB",
  object_store_used_gb: "Object store, GB",
  network_sent_mb_per_s: "Network out, MB/s",
  network_received_mb_per_s: "Network in, MB/s",
  disk_read_mb_per_s: "Disk reads, MB/s",
  disk_write_mb_per_s: "Disk writes, MB/s",
  gpus_idle: "Idle GPUs",
};

export function nodes(given) {
  const { series, status } = given;
  const found = ofNodes(series ?? []);
  const title = el("h1", null, "Nodes");
  if (!found.metrics.length && !status?.nodes.length && !given.nodeUsage.length) {
    return [title, empty(series ? "No node of the cluster is known in this run. On a Ray cluster they appear by themselves, and again at every interval of " : (given.seriesTrouble || "Loading…"), series ? el("code", null, "node_metrics_interval_s") : null, series ? "." : null)];
  }
  return [title, summary(given), heatMap(given, found), listing(given), charts(given, found)].filter(Boolean);
}

/** The series of nodes: names, metrics in order of first sight, and the axis of each key. */
function ofNodes(series) {
  const names = new Set();
  const metrics = new Set();
  const axes = new Map();
  for (const { key, axis } of series) {
    const parts = /^nodes\/(.+)\/([^/]+)$/.exec(key);
    if (!parts) {
      if (key.startsWith("nodes/")) axes.set(key, axis);
      continue;
    }
    axes.set(key, axis);
    metrics.add(parts[2]);
    if (!SUMS.includes(parts[1])) names.add(parts[1]);
  }
  const order = Object.keys(NAMES);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  return { names: [...names].sort(naturally), metrics: [...metrics].sort((a, b) => place(a) - place(b)), axes };
}

function naturally(one, other) {
  return one.localeCompare(other, "en", { numeric: true });
}

function summary({ status, nodeUsage, allNodes }) {
  const all = status?.nodes ?? [];
  const alive = all.filter((node) => node.left_s === null);
  const stale = nodeUsage.filter((node) => node.stale).length;
  const total = (key) => alive.reduce((number, node) => number + node[key], 0);
  const gpus = alive.reduce((number, node) => number + sum(node.gpus), 0);
  const numbers = [
    ["Nodes", count(alive.length || nodeUsage.length)],
    ...(alive.length ? [["CPUs", count(total("cpu_count"))], ["Memory", gb(total("memory_gb"))]] : []),
    ...(gpus ? [["GPUs", count(gpus)]] : []),
    ...(allNodes.gpu_idle_share === undefined ? [] : [["GPUs idle", percent(allNodes.gpu_idle_share * 100)]]),
    ...(stale ? [["Stale", count(stale)]] : []),
    ...(all.length > alive.length ? [["Left", count(all.length - alive.length)]] : []),
  ];
  return el("section.panel", { "aria-label": "Sums", "data-stop": true, tabindex: -1 }, el("div.numbers", null, numbers.map(([name, text]) => el("div", null, el("span", null, name), el("b", null, text)))));
}

function heatMap(given, { names, metrics, axes }) {
  const { route, number, status, nodeUsage, source } = given;
  if (!names.length) return null;
  const preferred = metrics.includes("gpu_percent") ? "gpu_percent" : metrics[0];
  const metric = metrics.includes(route.metric) ? route.metric : preferred;
  const shown = extremeOf(given, names, metric);
  const rows = shown.map((name) => ({ key: `nodes/${name}/${metric}`, label: name, mark: markOf(name, status, nodeUsage) })).filter(({ key }) => axes.has(key));
  const axis = axes.get(rows[0]?.key) ?? null;
  const { x, name, range } = axisOf(route, axis, source.isReport);
  const options = metrics.map((one) => el("option", { value: one, selected: one === metric }, NAMES[one] ?? words(one)));
  const choice = el("select", { id: "metric", onchange: (event) => select({ metric: event.target.value }) }, options);
  choice.value = metric;
  const spec = { run: number, title: NAMES[metric] ?? words(metric), axis, axisName: name, x, range, full: metric.endsWith("_percent") ? 100 : null, rows };
  return section(
    "Utilisation",
    { "data-stop": true, tabindex: -1, "data-id": "heat" },
    el("div.toolbar", null, el("label", { for: "metric" }, "Metric"), choice, route.from !== undefined ? el("button.toggle", { type: "button", onclick: () => select({ from: undefined, to: undefined, axis: undefined }) }, "✕ zoom") : null),
    shown.length < names.length ? el("p.hint", null, `${count(shown.length)} of ${count(names.length)} nodes: those with the lowest and the highest newest values`) : null,
    el("raywb-heat-map", { spec, "data-id": "map" }),
  );
}

/** All nodes, or of very many those whose newest values are the lowest and the highest. */
function extremeOf({ series, number }, names, metric) {
  if (names.length <= MAP_ROWS) return names;
  const id = `${number} ${metric}`;
  const known = extremes.get(id);
  if (known && known.of === names.length && performance.now() - known.at < MAP_MS) return known.shown;
  const last = new Map(series.map((one) => [one.key, one.last]));
  const place = (name) => last.get(`nodes/${name}/${metric}`) ?? -Infinity;
  const sorted = names.filter((name) => last.has(`nodes/${name}/${metric}`)).sort((a, b) => place(a) - place(b));
  const chosen = new Set([...sorted.slice(0, MAP_ROWS / 2), ...sorted.slice(-MAP_ROWS / 2)]);
  const shown = sorted.filter((name) => chosen.has(name));
  extremes.clear();
  extremes.set(id, { of: names.length, at: performance.now(), shown });
  return shown;
}

function markOf(name, status, usage) {
  const node = status?.nodes.find((one) => one.name === name);
  if (node?.left_s) return "left";
  return usage.find((one) => one.name === name)?.stale ? "stale" : "";
}

function listing(given) {
  const { status, nodeUsage, overview: { now_s: now, live } } = given;
  const known = new Map((status?.nodes ?? []).map((node) => [node.name, node]));
  const usage = new Map(nodeUsage.map((one) => [one.name, one]));
  const names = [...new Set([...known.keys(), ...usage.keys()])].filter((name) => !known.get(name)?.left_s).sort(naturally);
  const left = [...known.values()].filter((node) => node.left_s !== null).sort((a, b) => b.left_s - a.left_s);
  const parts = names.length > LISTED ? [kinds(names.map((name) => known.get(name)).filter(Boolean))] : [each(names, known, usage, now, live)];
  if (left.length) {
    const named = left.slice(0, LISTED_LEFT).map((node) => `${node.name} at ${moment(node.left_s, now)}`);
    parts.push(el("p.hint", null, `${count(left.length)} left: ${named.join(", ")}${left.length > LISTED_LEFT ? ` and ${left.length - LISTED_LEFT} before` : ""}`));
  }
  return section("Each node", { "data-stop": true, tabindex: -1 }, parts);
}

function each(names, known, usage, now, live) {
  const meter = (values, key, label) => (values[key] === undefined ? "–" : el("div.meter", null, bar(values[key] / 100, label, key.includes("memory") && values[key] > 95 ? "hot" : ""), el("span", null, percent(values[key]))));
  const hasGpus = names.some((name) => sum(known.get(name)?.gpus) || usage.get(name)?.values.gpu_percent !== undefined);
  const isKnown = known.size > 0;
  const heads = [{ text: "Node" }, { text: "CPU" }, { text: "Memory" }, ...(hasGpus ? [{ text: "GPU" }, { text: "GPU memory" }] : []), ...(isKnown ? [{ text: "What it is" }] : [])];
  const rows = names.map((name) => {
    const node = known.get(name);
    const { values = {}, stale, time_s: time } = usage.get(name) ?? {};
    const age = stale && live && time ? ` ${duration(now - time)}` : "";
    const marks = [node?.is_head ? chip("head") : null, stale ? chip(`stale${age}`, "warn") : null, node?.error ? el("span", { title: node.error }, chip("probe failed", "warn")) : null];
    return [
      el("span.node-name", null, el("b", null, name), marks),
      meter(values, "cpu_percent", `${name}: CPU`),
      meter(values, "memory_percent", `${name}: memory`),
      ...(hasGpus ? [meter(values, "gpu_percent", `${name}: GPU`), meter(values, "gpu_memory_percent", `${name}: GPU memory`)] : []),
      ...(isKnown ? [node ? what(node) : "–"] : []),
    ];
  });
  return table("Nodes", heads, rows);
}

function what(node) {
  const cloud = node.facts.cloud ?? {};
  const kind = cloud.instance_type ?? cloud.node_type ?? cloud.provider ?? "";
  const gpus = Object.entries(node.gpus).map(([name, number]) => `${number} × ${name}`);
  return [String(kind), counted(node.cpu_count, "CPU"), gb(node.memory_gb), ...gpus].filter(Boolean).join(" · ");
}

function kinds(all) {
  const numbers = new Map();
  for (const node of all) numbers.set(what(node), (numbers.get(what(node)) ?? 0) + 1);
  const rows = [...numbers].sort((a, b) => b[1] - a[1]).slice(0, 20).map(([kind, number]) => [count(number), kind]);
  return table("Nodes by what they are", [{ text: "Nodes", number: true }, { text: "What they are" }], rows);
}

function charts(given, { metrics, axes }) {
  const specs = metrics.flatMap((metric) => {
    const lines = SUMS.map((name) => ({ key: `nodes/${name}/${metric}`, label: name })).filter(({ key }) => axes.has(key));
    if (!lines.length) return [];
    return [chartSpec(given, { title: NAMES[metric] ?? words(metric), axis: axes.get(lines[0].key), lines, bounds: metric.endsWith("_percent") ? [0, 100] : null })];
  });
  const answered = ["alive", "answered"].map((name) => ({ key: `nodes/${name}`, label: name })).filter(({ key }) => axes.has(key));
  if (answered.length) specs.push(chartSpec(given, { title: "Nodes", axis: axes.get(answered[0].key), lines: answered }));
  if (!specs.length) return null;
  return section("All nodes together", { "data-stop": true, tabindex: -1, "data-id": "charts" }, el("div.charts", { "data-id": "charts" }, specs.map(chart)));
}
