/** The newest overview: one stream of events for all windows of a browser.
 *
 * A browser has six connections per server for all its tabs, and a stream keeps one for good. So
 * only windows that are seen listen, and of these one holds the lock, has the stream and tells the
 * others. Who hears nothing for a while asks by itself: where the holder hangs, where a proxy lets
 * no stream through, and where there are no locks, which browsers have on loopback and HTTPS only.
 */

import { getJson } from "raywb/fetch";

/** Pause before a stream that was refused is tried again, in milliseconds: first and longest. */
const RETRY_MS = [1000, 15000];

/** How often the holder of the stream says that it is there. */
const BEAT_MS = 1000;

/** Silence after which a window asks by itself: beside a stream, and where it can have none. */
const PATIENCE_MS = 4000;
const POLL_MS = 2000;

/** Several pages may lie under one origin, behind a proxy. */
const NAME = `raywb ${new URL(".", location.href).pathname}`;

export class OverviewStream {
  #onOverview;
  #onTrouble;
  #here = null;
  #channel = null;
  #events = null;
  #timer = 0;
  #retry = 0;
  /** When an overview, or a sign of life, came; when this window asked; what came last. */
  #heardAt = -Infinity;
  #askedAt = -Infinity;
  #polledAt = -Infinity;
  #latest = null;
  #isTold = false;

  /**
   * @param {(overview: object) => void} onOverview
   * @param {(connection: "lost" | "refused", trouble: string) => void} onTrouble
   */
  constructor(onOverview, onTrouble) {
    this.#onOverview = (overview) => {
      this.#isTold = true;
      onOverview(overview);
    };
    this.#onTrouble = onTrouble;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#leave() : this.#join()));
    addEventListener("pagehide", () => this.#leave());
    addEventListener("pageshow", (event) => event.persisted && this.#join());
    addEventListener("online", () => this.#here && this.#join());
    if (document.hidden) this.#ask(null); // at least its title
    else this.#join();
  }

  #join() {
    this.#leave();
    const here = new AbortController();
    this.#here = here;
    this.#heardAt = performance.now();
    this.#timer = setInterval(() => this.#look(), BEAT_MS);
    if (!navigator.locks) {
      this.#ask(here);
      return;
    }
    this.#channel = new BroadcastChannel(NAME);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#channel.postMessage({ ask: true });
    const hold = () => here.signal.aborted || new Promise((release) => {
      here.signal.addEventListener("abort", release);
      this.#listen();
    });
    // Leaving takes the request back, which is no failure; without the lock it asks by itself.
    navigator.locks.request(NAME, { signal: here.signal }, hold).catch(() => {});
  }

  #leave() {
    this.#here?.abort();
    this.#here = null;
    this.#events?.close();
    this.#events = null;
    this.#channel?.close();
    this.#channel = null;
    clearInterval(this.#timer);
  }

  get #isOpen() {
    return this.#events?.readyState === EventSource.OPEN;
  }

  #look() {
    const now = performance.now();
    if (this.#isOpen) this.#channel?.postMessage({});
    else if (now - Math.max(this.#heardAt, this.#askedAt) >= (navigator.locks && this.#isTold ? PATIENCE_MS : POLL_MS)) this.#ask(this.#here);
  }

  #hear({ ask, overview, trouble }) {
    if (ask && this.#isOpen && this.#latest) {
      const age = (performance.now() - this.#latest.at) / 1000;
      this.#channel.postMessage({ overview: { ...this.#latest.overview, now_s: this.#latest.now_s + age } });
    }
    if (ask || this.#events) return;
    if (trouble) {
      this.#onTrouble(...trouble);
      return;
    }
    this.#heardAt = performance.now();
    if (overview) this.#onOverview(overview);
  }

  #listen() {
    this.#events?.close();
    const events = new EventSource("api/events");
    this.#events = events;
    events.addEventListener("overview", (event) => {
      const overview = JSON.parse(event.data);
      this.#retry = 0;
      this.#heardAt = performance.now();
      this.#latest = { overview, now_s: overview.now_s, at: this.#heardAt };
      this.#channel.postMessage({ overview });
      this.#onOverview(overview);
    });
    events.addEventListener("trouble", (event) => this.#fail("lost", JSON.parse(event.data).error));
    events.onerror = async () => {
      if (events !== this.#events) return;
      const trouble = await reason();
      if (events !== this.#events || events.readyState === EventSource.OPEN) return;
      // The browser itself tries again where the connection broke, and never after an error answer.
      if (events.readyState !== EventSource.CLOSED) {
        this.#fail("lost", trouble);
        return;
      }
      this.#fail(trouble ? "refused" : "lost", trouble);
      const pause = Math.min(RETRY_MS[0] * 2 ** this.#retry++, RETRY_MS[1]);
      setTimeout(() => events === this.#events && this.#listen(), pause);
    };
  }

  /** The stream fails; while asking works that is nothing to tell of. */
  #fail(connection, trouble) {
    if (performance.now() - this.#polledAt < 2 * PATIENCE_MS) return;
    this.#channel.postMessage({ trouble: [connection, trouble] });
    this.#onTrouble(connection, trouble);
  }

  async #ask(here) {
    this.#askedAt = performance.now();
    try {
      const overview = await getJson("api/overview");
      if (here !== this.#here || this.#isOpen) return;
      this.#polledAt = performance.now();
      this.#onOverview(overview);
    } catch (error) {
      if (here !== this.#here || this.#isOpen) return;
      this.#polledAt = -Infinity;
      this.#onTrouble(error.fromServer ? "refused" : "lost", error.fromServer ? error.message : "");
    }
  }
}

/** Why there are no events, as the server says; nothing where no server answers, or all is well. */
async function reason() {
  try {
    await getJson("api/overview");
  } catch (error) {
    return error.fromServer ? error.message : "";
  }
  return "";
}
