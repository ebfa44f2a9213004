/** One drawing: lines with their bands of minimum and maximum, by uPlot. */

import uPlot from "uplot";
import { compact, duration, value } from "raywb/format";

/** With no more points than this, each is marked: a line alone would hide how few they are. */
const MARKED_POINTS = 40;

/** Narrowest drag that is meant as a zoom, in pixels. */
const DRAG_PX = 6;

/** Distances of labels on an axis of seconds: whole minutes and hours, not 1,000 s. */
const DURATIONS = [0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000, 864000, 2592000];

/** How many colours the palette has; further lines begin it anew, dashed. */
export const COLOURS = 8;

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The colour of the n-th line, as the theme has it. */
export function lineColour(index) {
  return css(`--series-${(index % COLOURS) + 1}`);
}

/** Exponential smoothing that is not pulled to zero at its beginning.
 *
 * @param {number} weight of what came before, 0–1; 0 changes nothing
 */
export function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((one) => {
    if (one === null || one === undefined) return one;
    sum = sum * weight + one * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

/** How values of an x-axis are written: `time`, `duration` or `number`. */
export function axisKind(x, axis) {
  if (x === "time") return "time";
  return x !== "row" && axis?.endsWith("_s") ? "duration" : "number";
}

/** A value of the x-axis in words: `step 1,200`, `2 min 3 s`, `14:03:07`. */
export function xText(number, kind, name) {
  if (kind === "time") {
    const date = new Date(number * 1000);
    return date.toLocaleTimeString("en-GB");
  }
  if (kind === "duration") return duration(number);
  return `${name} ${value(Math.round(number * 1000) / 1000)}`;
}

/** Lines on one x-axis.
 *
 * @param {HTMLElement} host whose width it takes
 * @param {object} wanted
 * @param {Array<{x, min, max, mean}>} wanted.lines as the API gives them
 * @param {number} wanted.height in pixels
 * @param {"time"|"duration"|"number"} wanted.kind
 * @param {boolean} wanted.log
 * @param {number} wanted.smooth weight of smoothing, 0–1
 * @param {{from: number, to: number} | null} wanted.range what is shown of the x-axis
 * @param {[number, number] | null} wanted.bounds of the y-axis, at least
 * @param {string} wanted.sync cursors of drawings with the same one move together
 * @param {(from: number, to: number) => void} wanted.onZoom
 * @param {() => void} wanted.onReset
 * @param {(index: number | null, values: number[], x: number) => void} wanted.onCursor
 */
export function makePlot(host, wanted) {
  const { data, columns } = tableOf(wanted);
  const grid = css("--grid");
  const text = css("--text-3");
  const font = `11px ${css("--font")}`;
  const axis = { stroke: text, font, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
  const options = {
    width: Math.max(80, host.clientWidth),
    height: wanted.height,
    padding: [8, wanted.kind === "time" ? 24 : 14, 0, 0],
    legend: { show: false },
    scales: {
      x: { time: wanted.kind === "time", ...(wanted.range ? { range: () => [wanted.range.from, wanted.range.to] } : {}) },
      y: wanted.log ? { distr: 3, range: (plot, min, max) => (min === null ? [1, 10] : uPlot.rangeLog(min, max, 10, false)) } : { range: boundsOf(wanted.bounds) },
    },
    axes: [
      { ...axis, size: 26, gap: 4, space: 56, grid: { show: false }, values: xLabels(wanted.kind), ...(wanted.kind === "number" ? {} : { incrs: wanted.kind === "time" ? DURATIONS.filter((one) => one >= 1) : DURATIONS }) },
      { ...axis, size: ySize, gap: 6, space: 28, values: yLabels(wanted.log) },
    ],
    series: [{}, ...columns.map((column) => column.series)],
    bands: columns.flatMap((column, index) => (column.band ? [{ series: [index + 1, index + 2], fill: column.band }] : [])),
    cursor: {
      x: true,
      y: false,
      points: { size: 6, show: (plot, index) => (columns[index - 1].isValue ? undefined : false) },
      drag: { x: true, y: false, setScale: false },
      sync: { key: wanted.sync, setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      bind: { dblclick: () => () => wanted.onReset() },
      focus: { prox: -1 },
    },
    hooks: {
      setSelect: [(plot) => {
        const { left, width } = plot.select;
        if (width >= DRAG_PX) wanted.onZoom(plot.posToVal(left, "x"), plot.posToVal(left + width, "x"));
        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }],
      setCursor: [(plot) => {
        const { idx } = plot.cursor;
        const at = idx === null || idx === undefined ? null : idx;
        const values = columns.flatMap((column, index) => (column.isValue ? [at === null ? null : plot.data[index + 1][at]] : []));
        wanted.onCursor(at, values, at === null ? null : plot.data[0][at]);
      }],
    },
  };
  const plot = new uPlot(options, data, host);
  return {
    update: (lines) => plot.setData(tableOf({ ...wanted, lines }).data),
    resize: (width) => width > 0 && width !== plot.width && plot.setSize({ width, height: wanted.height }),
    destroy: () => plot.destroy(),
    plot,
  };
}

/** The columns that uPlot draws: for each line its band, its raw values where smoothed, itself. */
function tableOf({ lines, log, smooth }) {
  const columns = [];
  const xs = lines.map((line) => line.x);
  const isShared = xs.every((x) => x.length === xs[0].length && x.every((one, index) => one === xs[0][index]));
  const tables = (isShared ? lines : lines.map(merged)).map((line, index) => {
    const colour = lineColour(index);
    const mark = line.x.length <= MARKED_POINTS;
    const points = { show: mark, size: 4, fill: colour, stroke: colour };
    const dash = index >= COLOURS ? [4, 3] : undefined;
    const positive = (values) => (log ? values.map((one) => (one > 0 ? one : null)) : values);
    const mean = positive(line.mean);
    const quiet = { stroke: "transparent", width: 0, points: { show: false } };
    columns.push({ series: { ...quiet }, band: faint(colour, lines.length > 1 ? 0.1 : 0.22) }, { series: { ...quiet } });
    const found = [line.x, positive(line.max), positive(line.min)];
    if (smooth > 0) {
      columns.push({ series: { stroke: faint(colour, 0.35), width: 1, points: { show: false } } });
      found.push(mean);
    }
    columns.push({ isValue: true, series: { stroke: colour, width: 1.5, dash, points } });
    found.push(smooth > 0 ? smoothed(mean, smooth) : mean);
    return found;
  });
  if (!tables.length) return { data: [[]], columns };
  const [first] = tables;
  const data = isShared ? [first[0], ...tables.flatMap((one) => one.slice(1))] : uPlot.join(tables);
  return { data, columns };
}

/** A line with one point per x: lines of several can only meet so, and none of them is lost. */
export function merged(line) {
  const { x } = line;
  if (x.every((one, index) => !index || one !== x[index - 1])) return line;
  const found = { ...line, x: [], min: [], max: [], mean: [] };
  let counted = 0;
  x.forEach((one, index) => {
    const at = found.x.length - 1;
    if (at < 0 || found.x[at] !== one) {
      found.x.push(one);
      for (const name of ["min", "max", "mean"]) found[name].push(line[name][index]);
      counted = line.mean[index] === null ? 0 : 1;
      return;
    }
    if (line.mean[index] === null) return;
    counted += 1;
    found.min[at] = found.min[at] === null ? line.min[index] : Math.min(found.min[at], line.min[index]);
    found.max[at] = found.max[at] === null ? line.max[index] : Math.max(found.max[at], line.max[index]);
    found.mean[at] = found.mean[at] === null ? line.mean[index] : found.mean[at] + (line.mean[index] - found.mean[at]) / counted;
  });
  return found;
}

function faint(colour, alpha) {
  return `${colour}${Math.round(alpha * 255).toString(16).padStart(2, "0")}`;
}

function boundsOf(bounds) {
  if (!bounds) {
    return (plot, min, max) => (min === null ? [0, 1] : uPlot.rangeNum(min, max, 0.1, true));
  }
  return (plot, min, max) => [Math.min(bounds[0], min ?? bounds[0]), Math.max(bounds[1], max ?? bounds[1])];
}

function xLabels(kind) {
  if (kind === "time") return (plot, splits, axis, space, step) => splits.map((one) => clock(one, step));
  return (plot, splits) => splits.map(kind === "duration" ? shortDuration : compact);
}

/** A moment as short as the distance of the labels allows. */
function clock(seconds, step) {
  const date = new Date(seconds * 1000);
  if (step >= 86400) return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...(step < 60 ? { second: "2-digit" } : {}) });
}

function shortDuration(seconds) {
  if (Math.abs(seconds) < 120) return `${Number(seconds.toFixed(1))}s`;
  if (Math.abs(seconds) < 7200) return `${Number((seconds / 60).toFixed(1))}m`;
  if (Math.abs(seconds) < 172800) return `${Number((seconds / 3600).toFixed(1))}h`;
  return `${Number((seconds / 86400).toFixed(1))}d`;
}

function yLabels(log) {
  return (plot, splits) => {
    const isWide = log && splits.length > 1 && splits[splits.length - 1] / splits[0] >= 100;
    return splits.map((one) => (one === null || (isWide && !isPowerOfTen(one)) ? "" : label(one)));
  };
}

/** On a wide logarithmic axis only these are named. */
function isPowerOfTen(number) {
  const power = Math.log10(number);
  return Math.abs(power - Math.round(power)) < 1e-9;
}

function label(number) {
  if (number !== 0 && Math.abs(number) < 1e-3) return number.toExponential(0);
  return compact(Number(number.toPrecision(6)));
}

/** As wide as its widest label, so that charts use their room. */
function ySize(plot, labels) {
  const longest = Math.max(2, ...(labels ?? []).map((one) => one.length));
  return 14 + 6.4 * longest;
}
