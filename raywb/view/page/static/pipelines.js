/** Pipelines: how work flows through their stages, which one holds it up, and how that went. */

import { chart, chartSpec } from "raywb/charts";
import { bar, chip, copyLink, el, empty, section, stateChip } from "raywb/dom";
import { count, duration, gb, percent, perSecond, value, words } from "raywb/format";
import { hashOf, linkTo } from "raywb/route";

/** Charts over all stages of a pipeline: the last part of the stages' keys, and what it means. */
const STAGE_CHARTS = [
  ["speed_tasks_per_s", "Speed of one actor", "tasks/s"],
  ["tasks_completed", "Tasks completed", ""],
  ["queue_in", "Waiting in front", "tasks"],
  ["queue_out", "Waiting behind", "results"],
  ["actors_running", "Actors at work", ""],
  ["resource/cpu_util_pct", "CPU", "%"],
  ["resource/mem_gb", "Memory", "GB"],
];

/** Most lines of one chart; a pipeline of more stages is drawn in several. */
const LINES = 8;

export function pipelines(given) {
  const { pipelines: all } = given;
  if (!all.length) {
    return [
      el("h1", null, "Pipelines"),
      empty("No xenna pipeline has logged to this run. Put one inside ", el("code", null, "with XennaWandbStatsHook():"), ", or run ", el("code", null, "python -m recipes.pretrain tiny"), "."),
    ];
  }
  return [el("h1", null, "Pipelines"), ...all.map((one) => pipeline(given, one))];
}

function pipeline(given, one) {
  const left = one.state === "running" && one.percent > 2 && one.percent < 100 ? (one.duration_s * (100 - one.percent)) / one.percent : null;
  const numbers = [
    ["Progress", percent(one.percent)],
    ["Inputs left", count(one.inputs_left)],
    ["Outputs", count(one.outputs)],
    ["In", perSecond(one.inputs_per_s)],
    ["Out", perSecond(one.outputs_per_s)],
    [one.state === "running" ? "For" : "Took", duration(one.duration_s)],
    ...(left === null ? [] : [["Left, about", duration(left)]]),
  ];
  return el(
    "section.panel.pipeline",
    { "data-id": one.name, "aria-label": `Pipeline ${one.name}`, "data-stop": true, tabindex: -1 },
    el("div.title-row", null, el("h2", null, one.name), stateChip(one.state)),
    one.error ? el("p.trouble.bad", null, el("b", null, "Failed"), " ", one.error) : null,
    el("div.numbers", null, numbers.map(([name, text]) => el("div", null, el("span", null, name), el("b", null, text)))),
    bar(one.percent / 100, `${one.name}: progress`, one.state === "failed" ? "bad" : ""),
    el("ol.flow", { "aria-label": "Stages, in their order" }, one.stages.map((stage, index) => stageBox(given, one, stage, index))),
    selectedStage(given, one),
    charts(given, one),
  );
}

function stageBox({ route, number }, pipeline, stage, index) {
  const id = `${pipeline.name}/${stage.name}`;
  const isSelected = route.stage === id;
  const hash = hashOf({ view: "pipelines", run: number, stage: id });
  const slots = stage.slots_used + stage.slots_empty;
  const isHeldUp = stage.is_bottleneck && pipeline.state !== "done";
  const done = stage.tasks_known ? stage.tasks_completed / stage.tasks_known : 0;
  const lines = [
    ["queue", `${count(stage.queue_in)} in · ${count(stage.queue_out)} out`],
    ["slots", slots ? `${count(stage.slots_used)} of ${count(slots)}` : "–"],
    ["actors", `${count(stage.actors_ready)}${stage.actors_pending ? ` + ${count(stage.actors_pending)} pending` : ""}`],
    ["speed", stage.speed_tasks_per_s === null ? "–" : `${value(stage.speed_tasks_per_s)} tasks/s`],
    ...(stage.cpu_percent === null ? [] : [["CPU", percent(stage.cpu_percent)]]),
    ...(stage.memory_gb === null ? [] : [["memory", gb(stage.memory_gb)]]),
  ];
  return el(
    `li.stage${isHeldUp ? ".bottleneck" : ""}${isSelected ? ".selected" : ""}`,
    { "data-id": id, "aria-current": isSelected ? "true" : null, "data-reveal": isSelected ? "nearest" : null },
    el("header", null, el("span.index", null, index + 1), el("a.name", { href: isSelected ? linkTo("pipelines") : hash, title: stage.name }, words(stage.name).replace(/ stage$/, "")), copyLink(hash, `stage ${stage.name}`)),
    isHeldUp ? chip("bottleneck", "accent") : null,
    el("div.count", null, el("b", null, count(stage.tasks_completed)), el("span", null, stage.tasks_known === null ? " tasks" : ` of ${count(stage.tasks_known)} tasks`)),
    stage.tasks_known === null ? null : bar(done, `${stage.name}: tasks done`),
    el("div.slots", { role: "img", "aria-label": `${stage.slots_used} of ${slots} slots in use` }, slotMarks(stage.slots_used, slots)),
    el("dl", null, lines.map(([name, text]) => el("div", null, el("dt", null, name), el("dd", null, text)))),
  );
}

/** A mark per slot; of more than there is room for, each mark stands for several. */
function slotMarks(used, all) {
  const marks = Math.min(all, 16);
  const filled = all ? Math.round((used / all) * marks) : 0;
  return Array.from({ length: marks }, (_, index) => el(`i${index < filled ? ".used" : ""}`));
}

function selectedStage(given, pipeline) {
  const { route, series } = given;
  if (!route.stage?.startsWith(`${pipeline.name}/`)) return null;
  const name = route.stage.slice(pipeline.name.length + 1);
  const prefix = `${pipeline.name}/stage/${name}/`;
  const mine = (series ?? []).filter((one) => one.key.startsWith(prefix));
  const heading = el("div.title-row", null, el("h3", null, `Stage ${words(name)}`), el("a.close", { href: linkTo("pipelines") }, "Close"));
  if (!mine.length) return el("div.focus", { "data-id": "focus" }, heading, empty(series ? "This stage has logged no number in this run." : "Loading…"));
  const specs = mine.map((one) => chartSpec(given, { title: one.key.slice(prefix.length), axis: one.axis, opens: one.key, height: 132, lines: [{ key: one.key, label: one.key.slice(prefix.length) }] }));
  return el("div.focus", { "data-id": "focus" }, heading, el("div.charts", null, specs.map(chart)));
}

function charts(given, one) {
  const { series } = given;
  if (!series) return null;
  const axes = new Map(series.map((found) => [found.key, found.axis]));
  const axis = axes.get(`${one.name}/progress`) ?? `${one.name}/pipeline_duration_s`;
  const over = (title, lines, more = {}) => {
    const known = lines.filter((line) => axes.has(line.key));
    return known.length ? [chart(chartSpec(given, { title, axis, lines: known, opens: known.length === 1 ? known[0].key : undefined, ...more }))] : [];
  };
  const own = (name, label) => ({ key: `${one.name}/${name}`, label });
  const ofStages = ([key, title, sub]) => {
    const lines = one.stages.map((stage) => ({ key: `${one.name}/stage/${stage.name}/${key}`, label: words(stage.name).replace(/ stage$/, "") }));
    const parts = Math.ceil(lines.length / LINES);
    return Array.from({ length: parts }, (_, part) => over(parts > 1 ? `${title} (${part + 1})` : title, lines.slice(part * LINES, (part + 1) * LINES), { sub })).flat();
  };
  const found = [
    ...over("Throughput", [own("inputs_processed_per_s", "inputs in"), own("outputs_per_s", "outputs")], { sub: "per second" }),
    ...over("Progress", [own("progress", "progress")], { sub: "%", bounds: [0, 100] }),
    ...STAGE_CHARTS.flatMap(ofStages),
    ...over("Inputs and outputs", [own("num_input_remaining", "inputs left"), own("num_outputs", "outputs")]),
    ...over("CPUs available", [own("cluster/total_cpus", "total"), own("cluster/avail_cpus", "available")]),
    ...over("GPUs available", [own("cluster/total_gpus", "total"), own("cluster/avail_gpus", "available")]),
  ];
  return el("div.charts", { "data-id": "charts" }, found);
}
