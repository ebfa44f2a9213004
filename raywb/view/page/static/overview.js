/** The first view: which run this is, what runs now, and what is wrong. */

import { bar, chip, el, empty, facts, outLink, section, sparkline, stateChip, table } from "raywb/dom";
import { ago, count, counted, duration, moment, percent, perSecond, value, words } from "raywb/format";
import { linkTo } from "raywb/route";

/** Most that is listed of each kind here; the views have all of them. */
const LISTED = 6;
const LISTED_RUNS = 50;

export function overview(given) {
  return [head(given), troubles(given), deliveryLine(given), nowRunning(given), nodesNow(given), runs(given)].filter(Boolean);
}

function head({ run, status, isPresent, overview: { now_s: now, ray_dashboard: dashboard, version } }) {
  const info = isPresent ? status.run : null;
  const end = run.ended_s ?? (run.state === "running" ? now : null);
  const links = [outLink(run.url, "W&B run"), outLink(dashboard, "Ray dashboard")].filter(Boolean);
  return el(
    "section.head",
    { "data-stop": true, tabindex: -1, "aria-label": "Run" },
    el("div.title-row", null, el("h1", null, run.name), stateChip(run.state), run.mode !== "online" ? chip(run.mode) : null, info?.provisional ? chip("provisional", "warn") : null, links.length ? el("span.links", null, links) : null),
    facts([
      ["Group", run.group && el("span", null, run.group, info?.group_source ? el("small", null, ` from ${info.group_source}`) : null)],
      ["Project", [run.entity, run.project].filter(Boolean).join(" / ")],
      ["Run id", el("code", null, run.id)],
      ["Mode", run.mode],
      ["Began", run.started_s && moment(run.started_s, now)],
      [run.ended_s ? "Took" : "For", run.started_s && end && duration(end - run.started_s)],
      ["Rows", count(run.rows)],
      ["raywb", version],
      ["Files", el("code", null, run.dir), "wide"],
    ]),
  );
}

function troubles({ status }) {
  const { problems = [], warnings = [] } = status ?? {};
  if (!problems.length && !warnings.length) return null;
  return el(
    "section.troubles",
    { "data-stop": true, tabindex: -1, "aria-label": "Problems and warnings" },
    problems.map((text) => el("p.trouble.bad", null, el("b", null, "Problem"), " ", text)),
    warnings.slice(0, LISTED).map(warning),
    warnings.length > LISTED ? el("details", null, el("summary", null, `${counted(warnings.length - LISTED, "further warning")}`), warnings.slice(LISTED).map(warning)) : null,
  );
}

function warning(text) {
  return el("p.trouble.warn", null, el("b", null, "Warning"), " ", text);
}

function deliveryLine({ run, status, isPresent, stageRun }) {
  const of = isPresent ? { ...status, lostRows: sum(status.lost) } : stageRun;
  if (!of) return null;
  const delivered = run.mode === "online" ? of.sink.confirmed_rows : of.sink.applied_rows;
  const parts = [
    [count(of.received_rows), "rows in"],
    ...(run.mode === "disabled" ? [["", "W&B is disabled"]] : [[count(delivered), run.mode === "online" ? "with W&B" : "in W&B's files"], [count(of.backlog_rows), "waiting"]]),
    ...(of.lostRows === undefined ? [] : [[count(of.lostRows), "lost", of.lostRows > 0]]),
    ...(status.unconfirmed.length ? [[count(status.unconfirmed.length), status.unconfirmed.length === 1 ? "source unconfirmed" : "sources unconfirmed", true]] : []),
  ];
  return el(
    "a.delivery-line",
    { href: linkTo("delivery"), "aria-label": `Delivery: ${parts.map(([number, text]) => `${number} ${text}`).join(", ")}` },
    parts.map(([number, text, isBad]) => el(`span${isBad ? ".bad" : ""}`, null, el("b", null, number), " ", text)),
    el("span.to", { "aria-hidden": "true" }, "Delivery →"),
  );
}

export function sum(numbers) {
  return Object.values(numbers ?? {}).reduce((a, b) => a + b, 0);
}

function nowRunning(given) {
  const { pipelines, stages, overview: { live, now_s: now } } = given;
  const cards = [...pipelines.slice(0, LISTED).map(pipelineCard), ...stages.slice(0, LISTED).map((one) => stageCard(one, now, live))];
  const untold = given.isPresent ? (given.status.live.more_pipelines ?? 0) + (given.status.live.more_stages ?? 0) : 0;
  const more = Math.max(0, pipelines.length - LISTED) + Math.max(0, stages.length - LISTED) + untold;
  const title = live && given.run.state === "running" ? "Now" : "Last state";
  if (!cards.length) {
    if (!given.series) return section(title, { "data-stop": true, tabindex: -1 }, empty(given.seriesTrouble || "Loading the list of series…"));
    if (given.series.length) return section(title, { "data-stop": true, tabindex: -1 }, empty(`${counted(given.series.length, "series").replace(/ss$/, "s")} without a stage, all in `, el("a", { href: linkTo("training") }, "Training"), "."));
    return section(title, { "data-stop": true, tabindex: -1 }, empty("Nothing has logged to this run yet. In a task, actor or driver: ", el("code", null, "raywb.attach(\"training/a\").log({\"loss\": 0.1}, step=1)"), "."));
  }
  return section(title, { "data-stop": true, tabindex: -1 }, el("div.cards", null, cards), more ? el("p.hint", null, `and ${more} more, in their views`) : null);
}

function pipelineCard(one) {
  const bottleneck = one.stages.find((stage) => stage.is_bottleneck);
  return el(
    "a.card",
    { href: linkTo("pipelines"), "data-id": `p ${one.name}` },
    el("header", null, el("b.name", null, one.name), el("span.kind", null, "pipeline"), stateChip(one.state)),
    el("div.big", null, percent(one.percent), el("small", null, one.state === "running" ? `${perSecond(one.outputs_per_s)} out` : `in ${duration(one.duration_s)}`)),
    bar(one.percent / 100, `${one.name}: progress`, one.state === "failed" ? "bad" : ""),
    el("footer", null, one.error ?? (one.state !== "done" && bottleneck ? `held up by ${words(bottleneck.name)}` : `${count(one.outputs)} out, ${count(one.inputs_left)} inputs left`)),
  );
}

function stageCard(one, now, live) {
  const main = one.main ? `${one.main} ${value(one.metrics[one.main])}` : "";
  const ranks = one.ranks ? counted(one.ranks, "rank") : "";
  const slow = one.slowest_rank !== null && one.rank_spread_s ? `rank ${one.slowest_rank} last by ${duration(one.rank_spread_s)}` : "";
  const age = live && now - one.time_s > 60 ? ago(now - one.time_s) : "";
  return el(
    "a.card",
    { href: linkTo("training", { stage: one.stage }), "data-id": `s ${one.stage}` },
    el("header", null, el("b.name", null, one.stage || "(no namespace)"), el("span.kind", null, age)),
    el("div.big", null, one.step === null ? value(one.metrics[one.main]) : el("span", null, el("small", null, "step "), count(one.step)), el("small", null, one.steps_per_s ? perSecond(one.steps_per_s, "steps") : "")),
    one.history.length > 1 ? sparkline(one.history, `${one.main ?? one.stage}, over the run`) : null,
    el("footer", null, [main, ranks, slow].filter(Boolean).join(" · ")),
  );
}

/** Each mean that the rows say, as a bar. */
const MEANS = [["cpu_percent", "CPU"], ["memory_percent", "Memory"], ["gpu_percent", "GPU"], ["gpu_memory_percent", "GPU memory"]];

function nodesNow({ status, allNodes, nodeUsage }) {
  const alive = (status?.nodes ?? []).filter((node) => node.left_s === null);
  const mean = (key) => allNodes[`mean/${key}`] ?? allNodes[`${key}/mean`];
  const bars = MEANS.filter(([key]) => mean(key) !== undefined).map(([key, name]) => el("div.meter-line", null, el("span", null, name), bar(mean(key) / 100, `${name}, mean of all nodes`), el("b", null, percent(mean(key)))));
  if (!alive.length && !bars.length) return null;
  const gpus = alive.reduce((total, node) => total + sum(node.gpus), 0);
  const stale = nodeUsage.filter((node) => node.stale).length;
  const said = [counted(alive.length || nodeUsage.length, "node"), gpus ? counted(gpus, "GPU") : "", stale ? `${stale} stale` : ""].filter(Boolean).join(", ");
  return section("Nodes", { "data-stop": true, tabindex: -1 }, el("p.sub", null, el("a", { href: linkTo("nodes") }, said)), el("div.meters", null, bars));
}

function runs({ overview: { runs: all, now_s: now, live }, number }) {
  if (all.length < 2) return null;
  const listed = [...all].reverse().slice(0, LISTED_RUNS);
  const heads = [{ text: "Run" }, { text: "State" }, { text: "Stage" }, { text: "Mode" }, { text: "Rows", number: true }, { text: "Began", number: true }, { text: "Took", number: true }];
  const rows = listed.map((run) => [
    el("a", { href: linkTo("overview", { run: run.number }), "aria-current": run.number === number ? "true" : null }, run.name),
    stateChip(run.state),
    run.stage ?? el("span.faint", null, "cluster"),
    run.mode,
    count(run.rows),
    moment(run.started_s, now),
    run.started_s && (run.ended_s || live) ? duration((run.ended_s ?? now) - run.started_s) : "–",
  ]);
  return section("Runs", { "data-stop": true, tabindex: -1 }, table("Runs of this directory", heads, rows), all.length > LISTED_RUNS ? el("p.hint", null, `and ${all.length - LISTED_RUNS} before`) : null);
}
