/** `<raywb-heat-map>`: how busy each node was, a line per node, time from left to right. */

import { lastOf, onTheme, sourceOf } from "raywb/charts";
import { el } from "raywb/dom";
import { value } from "raywb/format";
import { axisKind, xText } from "raywb/plot";
import { select } from "raywb/route";

/** Columns that are asked for at most; a cell is at least so wide, in pixels. */
const COLUMNS = 240;
const CELL_PX = 3;
const ROW_PX = 18;
const REFRESH_MS = 3000;

/** Longest pause after requests that failed, one after the other. */
const FAILED_MS = 30000;

/** Steps of the colour scale, from the style sheet: from nothing to full. */
const SHADES = 6;

const maps = new Set();

class RaywbHeatMap extends HTMLElement {
  #spec = null;
  #said = "";
  #found = null;
  /** Of what is drawn; null where there is more to ask for. */
  #version = null;
  #abort = null;
  #next = 0;
  #pause = REFRESH_MS;
  #parts = null;
  #grid = null;
  #sized = new ResizeObserver(() => this.#draw());

  get spec() {
    return this.#spec;
  }

  /** @param {object} spec `{run, title, axis, axisName, x, range, full, rows: [{key, label, mark}]}` */
  set spec(spec) {
    const said = JSON.stringify(spec);
    if (said === this.#said) return;
    this.#spec = spec;
    this.#said = said;
    if (!this.isConnected) return;
    this.#frame();
    this.#load();
  }

  connectedCallback() {
    maps.add(this);
    this.#frame();
    this.#load();
  }

  disconnectedCallback() {
    maps.delete(this);
    this.#abort?.abort();
    this.#sized.disconnect();
  }

  refresh() {
    if (this.#abort || this.#version === sourceOf().version(this.#spec.run) || Date.now() < this.#next) return;
    this.#load();
  }

  redraw() {
    this.#draw();
  }

  #frame() {
    const { rows, title } = this.#spec;
    const canvas = el("canvas", { role: "img", "aria-label": title });
    const readout = el("span.readout", { "aria-hidden": "true" });
    const ends = el("div.ends", { "aria-hidden": "true" }, el("span"), el("span"), el("span"));
    const labels = el("ul.labels", { "aria-hidden": "true" }, rows.map((row) => el(`li${row.mark ? ".stale" : ""}`, { title: row.label }, row.label, row.mark ? el("small", null, ` ${row.mark}`) : null)));
    const shades = Array.from({ length: SHADES }, (_, index) => el("i", { style: { "--shade": `var(--heat-${index})` } }));
    const scale = el("div.shades", { "aria-hidden": "true" }, el("span", null, "0"), shades, el("span.full"));
    const trouble = el("p.hint", { role: "status" });
    this.#parts = { canvas, readout, ends, scale, trouble };
    this.replaceChildren(el("figure", null, el("figcaption", null, el("span.title", null, title), readout, scale), trouble, el("div.map", null, labels, el("div.cells", null, canvas, ends))));
    canvas.onmousemove = (event) => this.#read(event);
    canvas.onmouseleave = () => readout.replaceChildren();
    canvas.onmousedown = (event) => this.#drag(event);
    canvas.ondblclick = () => select({ from: undefined, to: undefined, axis: undefined });
    this.#sized.disconnect();
    this.#sized.observe(canvas.parentElement);
  }

  async #load() {
    const source = sourceOf();
    if (!source?.overview) return;
    this.#abort?.abort();
    const abort = new AbortController();
    this.#abort = abort;
    const { run, rows, x, range } = this.#spec;
    const version = source.version(run);
    try {
      const found = await Promise.all(rows.map(({ key }) => source.points(run, key, { x, ...range, points: COLUMNS, signal: abort.signal })));
      if (abort.signal.aborted) return;
      this.#found = found;
      this.#version = found.every((one) => one.isWhole) ? version : null;
      this.#pause = REFRESH_MS;
      this.#next = Date.now() + REFRESH_MS;
      this.#parts.trouble.textContent = "";
      this.#draw();
    } catch (error) {
      if (abort.signal.aborted || error.name === "AbortError") return;
      this.#version = null;
      this.#next = Date.now() + this.#pause;
      this.#pause = Math.min(2 * this.#pause, FAILED_MS);
      this.#parts.trouble.textContent = `These points could not be had: ${error.message}`;
    } finally {
      if (this.#abort === abort) {
        this.#abort = null;
      }
    }
  }

  #draw() {
    const { canvas, ends, scale } = this.#parts;
    const width = canvas.parentElement.clientWidth;
    if (!this.#found || !width) return;
    const grid = binned(this.#found, Math.max(1, Math.min(COLUMNS, Math.floor(width / CELL_PX))));
    this.#grid = grid;
    const height = this.#spec.rows.length * ROW_PX;
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const style = getComputedStyle(document.documentElement);
    const shades = Array.from({ length: SHADES }, (_, index) => rgb(style.getPropertyValue(`--heat-${index}`).trim()));
    const full = this.#spec.full ?? (grid.highest || 1);
    const ink = canvas.getContext("2d");
    ink.scale(ratio, ratio);
    grid.rows.forEach((cells, row) => {
      cells.forEach((one, column) => {
        if (one === null) return;
        const left = Math.round((column / grid.columns) * width * ratio) / ratio;
        const right = Math.round(((column + 1) / grid.columns) * width * ratio) / ratio;
        ink.fillStyle = shade(shades, one / full);
        ink.fillRect(left, row * ROW_PX + 1, right - left, ROW_PX - 2);
      });
    });
    scale.querySelector(".full").textContent = value(full);
    const kind = axisKind(this.#spec.x, this.#spec.axis);
    const name = this.#spec.axisName.split("/").pop();
    [grid.from, (grid.from + grid.to) / 2, grid.to].forEach((x, index) => {
      ends.children[index].textContent = grid.columns && Number.isFinite(x) ? xText(x, kind, name) : "";
    });
    canvas.setAttribute("aria-label", `${this.#spec.title}. Newest values: ${this.#spec.rows.map((row, index) => `${row.label} ${value(lastOf(this.#found[index]))}`).join(", ")}`);
  }

  #place(event) {
    const box = this.#parts.canvas.getBoundingClientRect();
    const share = Math.max(0, Math.min(0.9999, (event.clientX - box.left) / box.width));
    return { share, row: Math.floor((event.clientY - box.top) / ROW_PX), x: this.#grid.from + share * (this.#grid.to - this.#grid.from) };
  }

  #read(event) {
    if (!this.#grid?.columns) return;
    const { share, row, x } = this.#place(event);
    const cell = this.#grid.rows[row]?.[Math.floor(share * this.#grid.columns)];
    const kind = axisKind(this.#spec.x, this.#spec.axis);
    const place = xText(x, kind, this.#spec.axisName.split("/").pop());
    this.#parts.readout.replaceChildren(el("small", null, `${this.#spec.rows[row]?.label ?? ""} · ${place}`), el("b", null, value(cell)));
  }

  #drag(down) {
    if (!this.#grid?.columns) return;
    const start = this.#place(down);
    const end = (up) => {
      removeEventListener("mouseup", end);
      const stop = this.#place(up);
      if (Math.abs(up.clientX - down.clientX) < 6) return;
      const [from, to] = [start.x, stop.x].sort((a, b) => a - b);
      select({ from: Number(from.toFixed(3)), to: Number(to.toFixed(3)), axis: this.#spec.axisName });
    };
    addEventListener("mouseup", end);
  }
}

/** All rows on one grid of equal columns: the mean of what falls into a cell; null where nothing. */
export function binned(found, most) {
  const all = found.flatMap((one) => (one.x.length ? [one.x[0], one.x[one.x.length - 1]] : []));
  const from = Math.min(...all);
  const to = Math.max(...all);
  const points = Math.max(0, ...found.map((one) => one.x.length));
  const columns = Math.min(most, points);
  if (!columns) return { from, to, columns: 0, rows: [], highest: 0 };
  const width = (to - from) / columns || 1;
  let highest = 0;
  const rows = found.map(({ x, mean }) => {
    const sums = new Float64Array(columns);
    const counts = new Uint32Array(columns);
    x.forEach((at, index) => {
      if (mean[index] === null) return;
      const column = Math.min(columns - 1, Math.floor((at - from) / width));
      sums[column] += mean[index];
      counts[column] += 1;
      highest = Math.max(highest, mean[index]);
    });
    const cells = Array.from(sums, (sum, column) => (counts[column] ? sum / counts[column] : null));
    // Points are not quite evenly spaced: one empty cell between two full ones is no gap.
    return cells.map((one, column) => (one === null && cells[column - 1] !== null && cells[column + 1] !== null ? (cells[column - 1] ?? cells[column + 1] ?? null) : one));
  });
  return { from, to, columns, rows, highest };
}

function rgb(hex) {
  return [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16));
}

function shade(shades, share) {
  const place = Math.max(0, Math.min(1, share)) * (shades.length - 1);
  const low = Math.min(shades.length - 2, Math.floor(place));
  const mix = shades[low].map((one, index) => Math.round(one + (shades[low + 1][index] - one) * (place - low)));
  return `rgb(${mix.join(" ")})`;
}

onTheme(() => maps.forEach((map) => map.redraw()));
setInterval(() => document.hidden || maps.forEach((map) => map.refresh()), 1000);
customElements.define("raywb-heat-map", RaywbHeatMap);
