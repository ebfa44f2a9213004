/** `<raywb-chart>`: a chart that asks for its points when it is seen, and keeps them up to date. */

import { el, empty } from "raywb/dom";
import { counted, value } from "raywb/format";
import { axisKind, makePlot, xText } from "raywb/plot";
import { hashOf, currentRoute, select } from "raywb/route";

/** How near to the window a chart is made, in pixels. */
const NEAR_PX = 240;

/** Shortest time between two looks for new points of one chart, in milliseconds. */
const REFRESH_MS = 2000;

/** Longest pause after requests that failed, one after the other. */
const FAILED_MS = 30000;

/** Points of one line: more than a chart is wide is nothing that could be seen. */
const POINTS = 500;
const POINTS_LARGE = 1500;

/** Height of a drawing, and what of it the names of several lines take, in pixels. */
const HEIGHT_PX = 180;
const LEGEND_PX = 44;

const charts = new Set();
const themed = [];
let source = null;
let timer = 0;

/** Where all charts get their points; they follow it from then on. */
export function useSource(given) {
  source = given;
  source.addEventListener("change", refreshSoon);
  document.addEventListener("visibilitychange", refreshSoon);
}

export function sourceOf() {
  return source;
}

/** Everything that is drawn takes on the colours of the theme. */
export function themeChanged() {
  for (const chart of charts) chart.redraw();
  for (const listener of themed) listener();
}

/** Have something called that draws with the theme's colours when they change. */
export function onTheme(listener) {
  themed.push(listener);
}

function refreshSoon() {
  timer ||= setTimeout(() => {
    timer = 0;
    if (document.hidden) return;
    let isEarly = false;
    for (const chart of charts) isEarly = chart.refresh() || isEarly;
    if (isEarly) refreshSoon();
  }, 250);
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) target.setSeen(isIntersecting);
  },
  { rootMargin: `${NEAR_PX}px 0px` },
);
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) target.closest("raywb-chart")?.resized();
});

/** What the selected x-axis is called, and which range of it is shown.
 *
 * @param {string | null} axis key of the series' own axis; null is the row's number
 */
export function axisOf(route, axis, isReport = false) {
  const x = isReport ? "axis" : (route.x ?? "axis");
  const name = x === "axis" ? (axis ?? "row") : x;
  const isZoomed = route.axis === name && Number(route.to) > Number(route.from);
  return { x, name, range: isZoomed ? { from: Number(route.from), to: Number(route.to) } : null };
}

/** What all charts of a view have in common, from what is selected. */
export function chartSpec({ route, number, source: { isReport } }, wanted) {
  const { x, name, range } = axisOf(route, wanted.axis, isReport);
  return {
    run: number,
    height: wanted.lines.length > 1 ? HEIGHT_PX - LEGEND_PX : HEIGHT_PX,
    x,
    axisName: name,
    range,
    log: route.log === "1",
    smooth: Number(route.smooth) || 0,
    ...wanted,
  };
}

/** A chart.
 *
 * @param {object} spec `{title, run, axis, x, lines: [{key, label}], range, log, smooth, height,
 *     bounds, opens}`; `opens` is the key that a click on the title makes large; a line with
 *     `read`, a function, has its points from there and not from the source
 */
export function chart(spec) {
  return el("raywb-chart", { spec, "data-id": `${spec.run} ${spec.title} ${spec.lines[0]?.key}` });
}

class RaywbChart extends HTMLElement {
  #spec = null;
  #said = "";
  #isSeen = false;
  #lines = null;
  #plot = null;
  #abort = null;
  /** Of what is drawn; null where there is more to ask for. */
  #version = null;
  #next = 0;
  #pause = REFRESH_MS;
  #parts = null;

  get spec() {
    return this.#spec;
  }

  set spec(spec) {
    const said = JSON.stringify(spec);
    if (said === this.#said) return;
    const before = this.#spec;
    this.#spec = spec;
    this.#said = said;
    if (!this.isConnected) return;
    this.#frame();
    const asked = (one) => one && JSON.stringify([one.run, one.lines, one.x, one.range, one.axis]);
    if (asked(before) === asked(spec) && this.#lines) this.redraw();
    else this.#load();
  }

  connectedCallback() {
    charts.add(this);
    this.#frame();
    seen.observe(this);
  }

  disconnectedCallback() {
    charts.delete(this);
    seen.unobserve(this);
    this.#clear();
    this.#abort?.abort();
    this.#isSeen = false;
    this.#lines = null;
  }

  setSeen(isSeen) {
    this.#isSeen = isSeen;
    if (isSeen && this.#lines && this.#version === source.version(this.#spec.run)) {
      if (!this.#plot) this.#draw();
    } else if (isSeen) {
      this.#load();
    } else {
      this.#abort?.abort();
      this.#abort = null;
      this.#clear();
    }
  }

  /** Look for new points, where there may be any; true where it is too early for that. */
  refresh() {
    if (!this.#isSeen || this.#abort || this.#version === source.version(this.#spec.run)) return false;
    if (Date.now() < this.#next) return true;
    this.#load();
    return false;
  }

  redraw() {
    this.#clear();
    if (this.#isSeen && this.#lines) this.#draw();
  }

  resized() {
    this.#plot?.resize(this.#parts.host.clientWidth);
  }

  /** Title, values, and room for the drawing: there before any point is. */
  #frame() {
    const { title, sub, opens, height, lines } = this.#spec;
    this.#clear();
    const host = el("div.plot", { role: "img", "aria-label": title, style: { height: `${height}px` } });
    const readout = el("span.readout");
    const name = opens ? el("a.title", { href: hashOf({ ...currentRoute(), key: opens }), title: opens }, title) : el("span.title", { title: lines[0]?.key }, title);
    const legend = lines.length > 1 ? el("ul.legend", null, lines.map((line, index) => el("li", { title: line.key }, el("i", { style: { "--colour": `var(--series-${(index % 8) + 1})` } }), el("span", null, line.label), el("b", null)))) : null;
    this.#parts = { host, readout, legend };
    this.replaceChildren(el("figure", null, el("figcaption", null, name, sub ? el("small", null, sub) : null, readout), host, legend));
  }

  #clear() {
    if (!this.#plot) return;
    sized.unobserve(this.#parts.host);
    this.#plot.destroy();
    this.#plot = null;
  }

  async #load() {
    if (!this.#isSeen || !source.overview) return;
    this.#abort?.abort();
    const abort = new AbortController();
    this.#abort = abort;
    const { run, lines, x, range, large } = this.#spec;
    const version = source.version(run);
    const wanted = { x, ...range, points: large ? POINTS_LARGE : POINTS, signal: abort.signal };
    try {
      const found = await Promise.all(lines.map(({ key, read }) => (read ? read() : source.points(run, key, wanted))));
      if (abort.signal.aborted) return;
      this.#version = found.every((one) => one.isWhole ?? true) ? version : null;
      this.#pause = REFRESH_MS;
      this.#next = Date.now() + REFRESH_MS;
      const canUpdate = this.#plot && this.#lines?.length === found.length;
      this.#lines = found;
      if (canUpdate) this.#update();
      else this.redraw();
    } catch (error) {
      if (abort.signal.aborted || error.name === "AbortError") return;
      this.#version = null;
      this.#next = Date.now() + this.#pause;
      this.#pause = Math.min(2 * this.#pause, FAILED_MS);
      const trouble = `These points could not be had: ${error.message}`;
      if (this.#plot) this.#parts.readout.replaceChildren(el("small", { title: trouble }, "not up to date"));
      else this.#parts.host.replaceChildren(empty(trouble));
    } finally {
      if (this.#abort === abort) {
        this.#abort = null;
        refreshSoon();
      }
    }
  }

  #update() {
    this.#plot.update(this.#lines);
    this.#describe();
  }

  #draw() {
    const { height, x, axis, axisName, log, smooth, range, bounds } = this.#spec;
    const lines = this.#lines;
    const { host } = this.#parts;
    host.replaceChildren();
    this.#describe();
    const some = lines.some((line) => line.mean.some((one) => one !== null && (!log || one > 0)));
    if (!some) {
      const text = range ? "No point in this range." : lines.some((line) => line.x.length) && log ? "No positive value to draw on a logarithmic axis." : source.isReport ? "Not in this report." : "No number yet.";
      host.replaceChildren(empty(text));
      return;
    }
    const kind = axisKind(x, axis);
    this.#plot = makePlot(host, {
      lines,
      height,
      kind,
      log,
      smooth,
      range,
      bounds,
      sync: axisName,
      onZoom: (from, to) => select({ from: rounded(from, to - from), to: rounded(to, to - from), axis: axisName }),
      onReset: () => select({ from: undefined, to: undefined, axis: undefined }),
      onCursor: (at, values, xValue) => this.#read(at, values, xValue, kind),
    });
    sized.observe(host);
  }

  /** The last values in words: for who cannot see the drawing, and beside it. */
  #describe() {
    const { title, lines } = this.#spec;
    const lasts = this.#lines.map(lastOf);
    const words = this.#lines.map((line, index) => {
      const low = line.min.reduce((a, b) => (b !== null && b < a ? b : a), Infinity);
      const high = line.max.reduce((a, b) => (b !== null && b > a ? b : a), -Infinity);
      const extent = low <= high ? `, between ${value(low)} and ${value(high)}` : "";
      return `${lines[index].label ?? title}: last ${value(lasts[index])}${extent}, ${counted(line.points, "point")}`;
    });
    this.#parts.host.setAttribute("aria-label", `${title}. ${words.join(". ")}`);
    this.#parts.lasts = lasts;
    this.#read(null, [], null, "");
  }

  #read(at, values, x, kind) {
    const { lines, axisName } = this.#spec;
    const { readout, legend, lasts } = this.#parts;
    const name = axisName.split("/").pop();
    const place = at === null ? "" : xText(x, kind, name);
    const now = at === null ? lasts : values;
    if (legend) {
      [...legend.querySelectorAll("b")].forEach((one, index) => (one.textContent = value(now[index])));
      readout.textContent = place;
    } else {
      readout.replaceChildren(...(place ? [el("small", null, place)] : []), el("b", null, lines.length ? value(now[0]) : "–"));
    }
  }
}

/** The newest value of a line in its range; a bucket's mean only where nobody said it. */
export function lastOf({ last, mean }) {
  return last === undefined ? mean.findLast((one) => one !== null) : last;
}

/** As many digits as the range needs, so that the address stays short. */
function rounded(number, width) {
  const digits = Math.max(0, 4 - Math.floor(Math.log10(width)));
  return Number(number.toFixed(Math.min(12, digits)));
}

customElements.define("raywb-chart", RaywbChart);
