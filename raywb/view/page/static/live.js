/** What runs: as the status says, and for runs that it does not tell of, as the series end. */

/** What the status tells of a run that a stage has of its own; nothing where it tells of others.
 *
 * Ids alone do not say which run is meant: those of other directories may be equal.
 */
export function stageRunOf({ status, runs }, run) {
  const numberOf = ({ id, dir, job_type: stage }) => runs.findLast((one) => one.stage !== null && one.stage === stage && one.id === id && one.dir === dir)?.number;
  return run && status?.stage_runs.find((one) => numberOf(one.run) === run.number);
}

/** Pipelines, stages and nodes of one run.
 *
 * @param {object | null} status of the service
 * @param {number} run its number
 * @param {boolean} isPresent the status is this run's
 * @param {Array | null} series of the run; null while they are not known
 */
export function liveOf(status, run, isPresent, series) {
  const live = status?.live;
  const mine = (one) => one.run === run;
  const pipelines = (live?.pipelines ?? []).filter(mine);
  const stages = (live?.stages ?? []).filter(mine);
  const told = new Set([...pipelines.map((one) => one.name), ...stages.map((one) => one.stage)]);
  const isNew = (name) => !told.has(name);
  const last = new Map((series ?? []).map((one) => [one.key, one]));
  const usage = isPresent ? (live?.nodes ?? []) : [];
  const allNodes = isPresent ? (live?.all_nodes ?? {}) : {};
  return {
    pipelines: [...pipelines, ...pipelinesIn(last).filter(({ name }) => isNew(name)).map((one) => ({ ...one, run }))],
    stages: [...stages, ...stagesIn(last).filter(({ stage }) => isNew(stage)).map((one) => ({ ...one, run }))],
    nodeUsage: usage.length ? usage : nodesIn(last),
    allNodes: Object.keys(allNodes).length ? allNodes : allNodesIn(last),
  };
}

function pipelinesIn(last) {
  const found = new Map();
  for (const key of last.keys()) {
    const parts = /^(.+)\/stage\/([^/]+)\/tasks_completed$/.exec(key);
    if (!parts) continue;
    if (!found.has(parts[1])) found.set(parts[1], []);
    found.get(parts[1]).push(parts[2]);
  }
  return [...found].map(([name, stages]) => {
    const of = (key) => last.get(`${name}/${key}`)?.last ?? null;
    const bottleneck = of("bottleneck_stage_index");
    const percent = of("progress") ?? 0;
    return {
      name,
      state: percent >= 100 ? "done" : "unfinished",
      percent,
      duration_s: of("pipeline_duration_s"),
      inputs_left: of("num_input_remaining"),
      outputs: of("num_outputs"),
      inputs_per_s: of("inputs_processed_per_s"),
      outputs_per_s: of("outputs_per_s"),
      error: null,
      stages: stages.map((stage, index) => stageIn((key) => of(`stage/${stage}/${key}`), stage, index === bottleneck)),
    };
  });
}

function stageIn(of, name, isBottleneck) {
  return {
    name,
    tasks_completed: of("tasks_completed") ?? 0,
    tasks_known: null,
    queue_in: of("queue_in") ?? 0,
    queue_out: of("queue_out") ?? 0,
    slots_used: of("slots_used") ?? 0,
    slots_empty: of("slots_empty") ?? 0,
    actors_ready: of("actors_ready") ?? 0,
    actors_pending: of("actors_pending") ?? 0,
    speed_tasks_per_s: of("speed_tasks_per_s"),
    cpu_percent: of("resource/cpu_util_pct"),
    memory_gb: of("resource/mem_gb"),
    is_bottleneck: isBottleneck,
  };
}

/** Namespaces with a step of their own. */
function stagesIn(last) {
  const found = [];
  for (const [key, { last: step, time_s: time }] of last) {
    if (!key.endsWith("/step")) continue;
    const stage = key.slice(0, -"/step".length);
    const metrics = {};
    for (const one of last.values()) {
      if (one.namespace === stage && one.key !== key) metrics[one.key.slice(stage.length + 1)] = one.last;
    }
    const names = Object.keys(metrics);
    const main = names.find((name) => /loss/i.test(name)) ?? names[0] ?? null;
    found.push({ stage, step, steps_per_s: null, metrics, main, history: [], time_s: time, ranks: metrics.ranks ?? null, slowest_rank: metrics.slowest_rank ?? null, rank_spread_s: metrics.rank_spread_s ?? null });
  }
  return found;
}

function nodesIn(last) {
  const found = new Map();
  for (const [key, one] of last) {
    const parts = /^nodes\/(.+)\/([^/]+)$/.exec(key);
    if (!parts || ["mean", "min", "max"].includes(parts[1])) continue;
    const node = found.get(parts[1]) ?? { name: parts[1], values: {}, time_s: 0, stale: false };
    node.values[parts[2]] = one.last;
    node.time_s = Math.max(node.time_s, one.time_s ?? 0);
    found.set(parts[1], node);
  }
  const newest = Math.max(0, ...[...found.values()].map((node) => node.time_s));
  return [...found.values()].map((node) => ({ ...node, stale: node.time_s < newest }));
}

function allNodesIn(last) {
  const found = {};
  for (const [key, one] of last) {
    if (/^nodes\/(mean\/|[^/]+$)/.test(key)) found[key.slice("nodes/".length)] = one.last;
  }
  return found;
}
