/** Where the page's data come from: a server, or JSON that lies in the page itself (a report).
 *
 * Both sources have the same face; the shapes are those of the server's API, see README.md.
 */

import { getJson } from "raywb/fetch";
import { OverviewStream } from "raywb/stream";

/** Most keys in one request, and most characters of its address: proxies refuse long ones. */
const KEYS_PER_REQUEST = 24;
const ADDRESS_CHARS = 4000;

/** Requests for points at a time; a browser has six connections per server for all its tabs. */
const REQUESTS_AT_ONCE = 2;

/** Answers that are kept, so that scrolling back asks nothing. */
const KEPT_ANSWERS = 400;

/** Runs whose state of reading is kept. */
const KEPT_RUNS = 50;

/** Shortest time between two looks at a run of which no overview tells. */
const LOOK_MS = 10000;

const EMBEDDED_ID = "raywb-data";

/** The source that this page has: embedded JSON where there is some, else its server. */
export function openSource() {
  const embedded = document.getElementById(EMBEDDED_ID);
  return embedded ? new Report(JSON.parse(embedded.textContent)) : new Server();
}

/** What both sources have in common: the latest overview, and who wants to know of it. */
class Source extends EventTarget {
  /** `connecting`, `live`, `lost`, `refused`, `ended` or `report`. */
  connection = "connecting";
  /** What is wrong with the connection, in a sentence. */
  trouble = "";
  overview = null;
  _readings = new Map();

  /** Changes when a run may have new points; what its own answers lack they say themselves.
   *
   * @param {number} run its number
   */
  version(run) {
    const { runs = [], run: present, reading } = this.overview ?? {};
    const told = runs.find((one) => one.number === run);
    const read = run === present ? reading.rows_read : "";
    // Nobody tells of the rows of another directory: where it is worked in, look now and then.
    const isUntold = told?.rows === null && told.state === "running";
    return [told?.rows, told?.state, read, isUntold ? Math.floor(performance.now() / LOOK_MS) : ""].join("/");
  }

  /** How much of a run is read: as its newest answer says, or the overview of the present one. */
  reading(run) {
    const { run: present, reading } = this.overview;
    const answered = this._readings.get(run);
    if (run !== present) return answered ?? { rows_read: 0, rows_total: 0 };
    return answered?.rows_read > reading.rows_read ? answered : reading;
  }

  /** Bring the overview's present time up to now: it stands still while nothing changes. */
  tick() {
    if (this.overview?.live) this.overview.now_s = this._toldAt.now_s + (performance.now() - this._toldAt.at) / 1000;
  }

  _told(overview) {
    this.overview = overview;
    this._toldAt = { now_s: overview.now_s, at: performance.now() };
  }

  _changed(connection, trouble = "") {
    this.connection = connection;
    this.trouble = trouble;
    this.dispatchEvent(new Event("change"));
  }
}

/** A service, or `raywb ui` on a directory. */
export class Server extends Source {
  isReport = false;
  #waiting = [];
  #timer = 0;
  #running = 0;
  #kept = new Map();

  start() {
    const told = (overview) => {
      this._told(overview);
      this._changed(overview.live ? "live" : "ended");
    };
    new OverviewStream(told, (connection, trouble) => this._changed(connection, trouble)).start();
  }

  /** Every series of numbers of a run, in order of first sight. */
  async series(run) {
    return this.#noted(run, await getJson(`api/series?run=${run}`));
  }

  /** An answer, with `isWhole`: all rows that there were are in it. */
  #noted(run, answer) {
    const { rows_read: read, rows_total: total } = answer;
    this._readings.set(run, { rows_read: read, rows_total: total, rows_thinned: answer.rows_thinned });
    if (this._readings.size > KEPT_RUNS) this._readings.delete(this._readings.keys().next().value);
    return Object.assign(answer, { isWhole: !(read < total) });
  }

  /** Points of one series; many that are asked for at once travel in few requests.
   *
   * @param {{x?: string, from?: number, to?: number, points?: number, signal?: AbortSignal}} wanted
   * @returns {Promise<object>} one entry of `series` of the API's answer, with `isWhole`: false
   *     while rows of the run are still read, so that the same question has another answer soon
   */
  points(run, key, wanted = {}) {
    const query = new URLSearchParams({ run, points: wanted.points ?? 600 });
    if (wanted.x && wanted.x !== "axis") query.set("x", wanted.x);
    if (wanted.from !== undefined) query.set("from", wanted.from);
    if (wanted.to !== undefined) query.set("to", wanted.to);
    const group = query.toString();
    const name = `${this.version(run)} ${group} ${key}`;
    const kept = this.#kept.get(name);
    if (kept) return Promise.resolve(kept);
    return new Promise((resolve, reject) => {
      this.#waiting.push({ run, group, key, name, resolve, reject, signal: wanted.signal });
      this.#timer ||= setTimeout(() => this.#send(), 15);
    });
  }

  #send() {
    this.#timer = 0;
    this.#waiting = this.#waiting.filter((one) => {
      if (one.signal?.aborted) one.reject(new DOMException("not wanted any more", "AbortError"));
      return !one.signal?.aborted;
    });
    while (this.#waiting.length && this.#running < REQUESTS_AT_ONCE) {
      const { group } = this.#waiting[0];
      const taken = [];
      const rest = [];
      const keys = new Set();
      let chars = group.length;
      for (const one of this.#waiting) {
        const more = encodeURIComponent(one.key).length + 5;
        const fits = keys.size < KEYS_PER_REQUEST && (!keys.size || chars + more < ADDRESS_CHARS);
        if (one.group === group && (keys.has(one.key) || fits)) {
          if (!keys.has(one.key)) chars += more;
          keys.add(one.key);
          taken.push(one);
        } else {
          rest.push(one);
        }
      }
      this.#waiting = rest;
      this.#running += 1;
      this.#fetch(group, keys, taken).finally(() => {
        this.#running -= 1;
        this.#send();
      });
    }
  }

  async #fetch(group, keys, taken) {
    const named = [...keys].map((key) => `&key=${encodeURIComponent(key)}`).join("");
    try {
      const { series, isWhole } = this.#noted(taken[0].run, await getJson(`api/points?${group}${named}`));
      for (const one of taken) {
        const found = { ...(series[one.key] ?? nothing()), isWhole };
        if (isWhole) this.#kept.set(one.name, found);
        if (this.#kept.size > KEPT_ANSWERS) this.#kept.delete(this.#kept.keys().next().value);
        one.resolve(found);
      }
    } catch (error) {
      for (const one of taken) one.reject(error);
    }
  }
}

/** A report: everything is in the page, on the series' own axes only. */
export class Report extends Source {
  isReport = true;
  #data;

  constructor(data) {
    super();
    this.#data = data;
    this._told(data.overview);
  }

  start() {
    this._changed("report");
  }

  async series(run) {
    return { ...(this.#data.series[run] ?? { run, series: [] }), isWhole: true };
  }

  async points(run, key, { from = -Infinity, to = Infinity } = {}) {
    const all = this.#data.points[run]?.[key];
    if (!all) return { ...nothing(), isWhole: true };
    const inside = (_, index) => all.x[index] >= from && all.x[index] <= to;
    const [x, min, max, mean] = ["x", "min", "max", "mean"].map((name) => all[name].filter(inside));
    // Of a part that ends before the series does, its last bucket is all that is known.
    const last = x.at(-1) === all.x.at(-1) ? all.last : undefined;
    return { ...all, x, min, max, mean, last, isWhole: true };
  }
}

function nothing() {
  return { axis: null, x: [], min: [], max: [], mean: [], points: 0 };
}
