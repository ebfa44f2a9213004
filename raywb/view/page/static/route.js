/** What is selected, in the address behind `#`: so it can be copied, and back and forward work.
 *
 * `#/training?run=2&key=training%2Fa%2Floss&x=time&from=10&to=200&axis=training%2Fa%2Fstep`
 */

export const VIEWS = ["overview", "pipelines", "training", "nodes", "delivery"];

/** What a view's address may carry; anything else in it is passed over. */
const NAMES = ["run", "stage", "key", "x", "axis", "from", "to", "filter", "metric", "log", "smooth"];

/** These stay when another view is opened. */
const LASTING = ["run", "x", "log", "smooth"];

/** @returns {{view: string} & Record<string, string>} */
export function currentRoute() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const route = { view: VIEWS.includes(path) ? path : "overview" };
  for (const [name, value] of new URLSearchParams(query ?? "")) {
    if (!NAMES.includes(name) || value === "") continue;
    if (name === "run" && !/^\d{1,15}$/.test(value)) continue; // of no run
    route[name] = value;
  }
  return route;
}

/** The address of a route, as a link carries it. */
export function hashOf(route) {
  const query = new URLSearchParams();
  for (const name of NAMES) {
    if (route[name] !== undefined && route[name] !== "") query.set(name, route[name]);
  }
  const text = query.toString();
  return `#/${route.view}${text ? `?${text}` : ""}`;
}

/** The address of a view, with what lasts across views, and `changes`. */
export function linkTo(view, changes = {}) {
  const route = { view };
  const now = currentRoute();
  for (const name of LASTING) route[name] = now[name];
  return hashOf({ ...route, ...changes });
}

/** Change what is selected in this view; `undefined` takes it out.
 *
 * @param {boolean} replace no new entry in the history: for sliders and typing
 */
export function select(changes, replace = false) {
  const hash = hashOf({ ...currentRoute(), ...changes });
  if (hash === location.hash) return;
  if (replace) {
    history.replaceState(null, "", hash);
    dispatchEvent(new HashChangeEvent("hashchange"));
  } else {
    location.hash = hash;
  }
}
